"""Device, precision and compilation: what is chosen, and what is refused."""

from __future__ import annotations

import time

import pytest
import torch

from quill.checkpoint.card import card
from quill.config.settings import TrainConfig
from quill.errors import InputError, ResourceError
from quill.training import machine


def test_auto_is_the_fastest_kind_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert machine.find_device("auto") == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(ResourceError, match="no device 'cuda:3'") as caught:
        machine.find_device("cuda:3")
    assert "cpu" in caught.value.why


def test_float16_does_not_train_on_a_cpu() -> None:
    with pytest.raises(InputError, match="float16"):
        machine.candidates("cpu", TrainConfig(dtype="float16"))


def test_a_precision_that_is_asked_for_is_not_measured() -> None:
    assert machine.candidates("cpu", TrainConfig(dtype="bfloat16")) == ["bfloat16"]
    assert machine.candidates("cpu", TrainConfig())[0] == "float32"


def test_the_fastest_choice_wins_and_a_tie_goes_to_the_first() -> None:
    seconds = {"slow": 0.03, "quick": 0.005, "same": 0.005}
    choice, best = machine.fastest(["slow", "quick", "same"], lambda c: time.sleep(seconds[c]))
    assert choice == "quick"
    assert 0.004 < best < 0.03


def test_float32_needs_no_autocast_and_bfloat16_has_it() -> None:
    a = torch.ones(2, 2)
    with machine.Machine("cpu", "float32", False).autocast():
        assert (a @ a).dtype == torch.float32
    with machine.Machine("cpu", "bfloat16", False).autocast():
        assert (a @ a).dtype == torch.bfloat16


def test_a_model_cannot_close_the_fence_of_its_own_card() -> None:
    from quill.config.settings import RunConfig

    facts = {
        "parameters": 3,
        "data": {"tokenizer": "char", "name": "x", "tokens": 5, "sha256": "0" * 64},
        "best_val_loss": None,
        "steps": 1,
        "seconds": 2.0,
        "device": "cpu",
    }
    config = RunConfig.model_validate({"model": {"vocab_size": 5}})
    text = card("x:v1", config, facts, "a ```` b\n```\n# not a heading")
    assert text.count("`````") == 2
    assert "not measured" in text
