"""Training on a device that computes while the CPU goes on: nothing in a step waits for it or leaves it.

No GPU is needed. Tensors without data on the meta device stand for one: they refuse to be read, and to be
combined with tensors on the CPU. Whole runs are on the CPU, with steps queued as on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)

from quill import discovery
from quill.config import reading
from quill.config.settings import ModelConfig, RunConfig, TrainConfig
from quill.errors import DivergedError, InterruptedRun
from quill.evaluation import measure
from quill.model.gpt import GPT
from quill.registry.store import Registry
from quill.training.device import Device
from quill.training.events import Event, Stepped
from quill.training.run import train
from quill.training.trainer import Trainer

TOKENS = np.random.default_rng(0).integers(0, 17, 2000).astype(np.uint16)
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "muon, polar_express": {"muon_coefficients": "polar_express"},
    "average": {"ema_decay": 0.9},
    "cautious": {"cautious_weight_decay": True, "optimizer": "adamw"},
    "masked": {"token_dropout": 0.2, "masked_loss_weight": 0.5, "gradient_accumulation_steps": 2},
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # It refuses the fused step on meta.
    adam = import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *arguments: None)
    with FakeTensorMode():
        yield


def make(block: str = "modern", dropout: float = 0.1, **train: Any) -> Trainer:
    config = ModelConfig(
        block=block, n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=17, dropout=dropout
    )
    settings = TrainConfig(**{"batch_size": 4, "warmup_iters": 2, "max_iters": 20, **train})
    device = Device("meta", "float32", False)
    with torch.device("meta"):
        model = GPT(config.shape())
        average = GPT(config.shape()) if settings.ema_decay else None
    trainer = Trainer(model, settings, TOKENS, device)
    # As on CUDA.
    for group in trainer.optimizer.optimizers[-1].param_groups:
        group["fused"] = True
    trainer.averaged = average and average.requires_grad_(False).eval()
    return trainer


@pytest.mark.parametrize("block", discovery.names("model.blocks"))
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.usefixtures("fake")
def test_steps_are_queued_and_read_together(block: str, settings: str) -> None:
    trainer = make(block, **SETTINGS[settings])
    for _ in range(3):
        trainer.enqueue()
    assert trainer.step == 3
    assert all(p.device.type == "meta" for p in trainer.model.parameters())
    with pytest.raises(DataDependentOutputException):
        trainer.read()


@pytest.mark.usefixtures("fake")
def test_a_wait_or_a_cpu_tensor_in_a_step_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GPT.head
    monkeypatch.setattr(GPT, "head", lambda self, x, near: whole(self, x, near) * x.mean().item())
    with pytest.raises(DataDependentOutputException):
        make().enqueue()
    monkeypatch.setattr(GPT, "head", lambda self, x, near: whole(self, x + torch.zeros(16), near))
    with pytest.raises(FakeTensorDeviceMismatchError):
        make().enqueue()


@pytest.mark.usefixtures("fake")
def test_states_evaluations_and_decoding_stay_on_the_device() -> None:
    trainer = make()
    trainer.enqueue()
    with pytest.raises(DataDependentOutputException):
        trainer.state()  # It reads the queued step first.
    trainer._queued.clear()
    tensors, facts = trainer.state()
    # As read from a file. The weights are copied by torch, which warns that copies to meta do nothing.
    on_disk = {
        name: torch.zeros(tuple(t.shape), dtype=t.dtype)
        for name, t in tensors.items()
        if not name.startswith("model/")
    }
    weights = {name: t for name, t in tensors.items() if name.startswith("model/")}
    resumed = make()
    resumed.load_state(weights | on_disk, facts)
    resumed.enqueue()
    assert resumed.step == 2
    with pytest.raises(DataDependentOutputException):
        # The sum of the losses is what it waits for.
        measure.evaluate(trainer.model, TOKENS, n_bytes=2000)
    cache = trainer.model.new_cache()
    with torch.no_grad():
        for length in (3, 1):
            logits = trainer.model(torch.zeros(1, length, dtype=torch.int64, device="meta"), cache)
            assert logits.device.type == "meta"


def small(text: Path, **train_: Any) -> RunConfig:
    settings = {
        "data.source": str(text), "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16,
        "model.block_size": 16, "train.batch_size": 4, "train.max_iters": 12, "train.eval_interval": 4,
        "train.log_interval": 3, "train.sample_every": 5, "train.warmup_iters": 0, "train.device": "cpu",
        "train.dtype": "float32", "train.compile": "off", **{f"train.{k}": v for k, v in train_.items()},
    }  # fmt: skip
    return reading.parse({"name": "tide"}, settings)


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    path = tmp_path / "tide.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


def metrics(registry: Registry) -> list[dict[str, Any]]:
    raw = registry.resolve("tide").path.joinpath("metrics.jsonl").read_text(encoding="utf-8")
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in raw.splitlines()
    ]


def test_a_run_with_queued_steps_is_the_same_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    train(small(text), one, tmp_path / "data")
    monkeypatch.setattr(Device, "runs_ahead", property(lambda self: True))
    monkeypatch.setattr("quill.training.run._LONGEST_SILENCE", 1e9)
    read: list[int] = []
    whole = Trainer.read
    monkeypatch.setattr(Trainer, "read", lambda self: read.append(len(self._queued)) or whole(self))
    events: list[Event] = []

    def poll() -> None:
        if len([e for e in events if isinstance(e, Stepped)]) == 6:
            raise InterruptedRun("interrupted", signum=15)

    with pytest.raises(InterruptedRun):
        train(small(text), two, tmp_path / "data", observer=events.append, poll=poll)
    events.clear()
    train(small(text), two, tmp_path / "data", observer=events.append)
    assert one.resolve("tide").digest == two.resolve("tide").digest
    assert metrics(one) == metrics(two)
    # Read every third step, and before an evaluation, a sample or a state; not after every step.
    assert sum(read) == 12
    assert len([n for n in read if n]) < 10


def test_a_run_that_diverges_while_steps_are_queued_leaves_its_last_good_state(
    text: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "runs_ahead", property(lambda self: True))
    monkeypatch.setattr("quill.training.run._LONGEST_SILENCE", 1e9)
    whole = Trainer._loss

    def diverging(self: Trainer, *batch: Any) -> torch.Tensor:
        return whole(self, *batch) * (float("nan") if self.step >= 5 else 1.0)

    monkeypatch.setattr(Trainer, "_loss", diverging)
    config = small(text, log_interval=100, sample_every=None)
    with pytest.raises(DivergedError) as caught:
        train(config, registry, tmp_path / "data")
    assert caught.value.what == "the loss is not finite at step 6"
    draft = registry.unfinished("tide")
    assert draft is not None
    assert [state.step for state in draft.states()] == [4]
    assert draft.facts["best_step"] == 4
    monkeypatch.setattr(Trainer, "_loss", whole)
    assert train(config, registry, tmp_path / "data").reason == "trained"


def test_a_diverged_trainer_gives_no_state() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=17)
    ahead = type("Ahead", (Device,), {"runs_ahead": True})("cpu", "float32", False)
    trainer = Trainer(GPT(config.shape()), TrainConfig(batch_size=2), TOKENS, ahead)
    with torch.no_grad():
        trainer.model.wte.weight[:] = float("nan")
    trainer.enqueue()
    for _ in range(2):
        with pytest.raises(DivergedError):
            trainer.state()
        with pytest.raises(DivergedError):
            trainer.evaluate(TOKENS, 2000)


def test_passes_that_are_recorded_add_to_gradients_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recorded pass returns is written over by the next one."""
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=17)
    recorded = type("Recorded", (Device,), {"records": True})("cpu", "float32", False)
    found: list[list[bool]] = []
    whole = Trainer._backward

    def backward(self: Trainer, part: torch.Tensor) -> None:
        found.append([p.grad is not None for p in self.model.parameters()])
        whole(self, part)

    monkeypatch.setattr(Trainer, "_backward", backward)
    for settings in ({"gradient_accumulation_steps": 2}, {"masked_loss_weight": 0.5}, {}):
        found.clear()
        Trainer(GPT(config.shape()), TrainConfig(batch_size=2, **settings), TOKENS, recorded).advance()
        assert all(found[0]) == bool(settings)


def test_deterministic_is_asked_for_around_the_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=17)
    entered: list[bool] = []

    @contextmanager
    def repeatable(self: Device) -> Iterator[None]:
        entered.append(True)
        yield

    monkeypatch.setattr(Device, "repeatable", repeatable)
    for wanted in (True, False):
        settings = TrainConfig(batch_size=2, deterministic=wanted)
        Trainer(GPT(config.shape()), settings, TOKENS, Device("cpu", "float32", False)).advance()
    assert entered == [True]
