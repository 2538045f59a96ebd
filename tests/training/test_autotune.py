"""Precision and compilation: what is measured, and what is chosen."""

from __future__ import annotations

import time

import pytest

from quill.config.settings import TrainConfig
from quill.errors import InputError
from quill.training import autotune


def test_float16_does_not_train_on_a_cpu() -> None:
    with pytest.raises(InputError, match="float16"):
        autotune.candidates("cpu", TrainConfig(dtype="float16"))


def test_a_precision_that_is_asked_for_is_not_measured() -> None:
    assert autotune.candidates("cpu", TrainConfig(dtype="bfloat16")) == ["bfloat16"]
    assert autotune.candidates("cpu", TrainConfig())[0] == "float32"


def test_the_fastest_choice_wins_and_a_tie_goes_to_the_first() -> None:
    seconds = {"slow": 0.03, "quick": 0.005, "same": 0.005}
    choice, best = autotune.fastest(["slow", "quick", "same"], lambda c: time.sleep(seconds[c]))
    assert choice == "quick"
    assert 0.004 < best < 0.03
