"""Precision and compilation: what is measured, and what is chosen."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from quill.checkpoint.load import load_checkpoint
from quill.config.settings import ModelConfig, RunConfig, TrainConfig
from quill.data.dataset import Dataset
from quill.errors import InputError
from quill.model.gpt import GPT
from quill.registry.store import Registry
from quill.training import autotune
from quill.training.device import Device


def test_float16_does_not_train_on_a_cpu() -> None:
    with pytest.raises(InputError, match="float16"):
        autotune.candidates("cpu", TrainConfig(dtype="float16"))


def test_an_explicit_precision_is_not_measured() -> None:
    assert autotune.candidates("cpu", TrainConfig(dtype="bfloat16")) == ["bfloat16"]
    assert autotune.candidates("cpu", TrainConfig())[0] == "float32"


def test_the_fastest_choice_wins_and_a_tie_goes_to_the_first() -> None:
    seconds = {"slow": 0.03, "quick": 0.005, "same": 0.005}
    choice, best = autotune.fastest(["slow", "quick", "same"], lambda c: time.sleep(seconds[c]))
    assert choice == "quick"
    assert 0.004 < best < 0.03


def test_a_trial_ends_once_one_choice_is_far_ahead() -> None:
    for seconds, timed in (({"a": 0.05, "b": 0.005}, 1), ({"a": 0.02, "b": 0.02}, 3)):
        steps: list[str] = []

        def step(choice: str, steps: list[str] = steps, seconds: dict[str, float] = seconds) -> None:
            steps.append(choice)
            time.sleep(seconds[choice])

        autotune.fastest(["a", "b"], step)
        # Each is warmed up, then they take turns.
        assert steps == ["a", "b"] * (1 + timed)


@pytest.fixture
def setting(tiny_registry: Registry) -> tuple[GPT, RunConfig, Dataset]:
    """A model, a run with everything on auto, and its data."""
    config = load_checkpoint(tiny_registry.resolve("tiny")).config
    train = TrainConfig(batch_size=64, max_iters=10, device="cpu")
    config = config.model_copy(update={"train": train})
    data = Dataset.open(tiny_registry.root.parent / "data" / "tiny")
    return GPT(config.model.shape()), config, data


def test_a_choice_is_measured_once_and_remembered(
    setting: tuple[GPT, RunConfig, Dataset], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(autotune, "cache_file", lambda: tmp_path / "cache" / "autotune.json")
    model, config, data = setting
    stages: list[str] = []
    first = autotune.choose(model, config, data, "cpu", stage=stages.append)
    assert stages == ["measuring float32 and bfloat16"]
    monkeypatch.setattr(autotune, "fastest", lambda *_: pytest.fail("it was measured again"))
    assert autotune.choose(model, config, data, "cpu", stage=stages.append) == first
    assert len(stages) == 1
    explicit = config.train.model_copy(update={"dtype": "bfloat16", "compile": "off"})
    chosen = autotune.choose(model, config.model_copy(update={"train": explicit}), data, "cpu")
    assert chosen == Device("cpu", "bfloat16", False, 64), "an explicit setting wins over the cache"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}'])
def test_a_damaged_or_unwritable_cache_is_ignored(
    content: str,
    setting: tuple[GPT, RunConfig, Dataset],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "autotune.json"
    file.write_text(content)
    monkeypatch.setattr(autotune, "cache_file", lambda: file)
    model, config, data = setting
    first = autotune.choose(model, config, data, "cpu")
    assert autotune.choose(model, config, data, "cpu") == first
    monkeypatch.setattr(autotune, "cache_file", lambda: file / "no" / "folder")
    assert autotune.choose(model, config, data, "cpu").dtype in ("float32", "bfloat16")


def test_a_trial_is_a_share_of_a_large_batch() -> None:
    shape = ModelConfig(n_layer=2, n_embd=256, vocab_size=1000, block_size=256).shape()
    model = GPT(shape)
    share = autotune.share_of(model, TrainConfig(batch_size=4096, gradient_accumulation_steps=8))
    assert 1 <= share.batch_size < 100
    assert share.gradient_accumulation_steps == 1
    assert autotune.share_of(model, TrainConfig(batch_size=2)).batch_size == 2
