"""Learning from other models: the objective, and which versions taught a run."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quill.checkpoint.load import load_checkpoint
from quill.config import reading
from quill.config.settings import ModelConfig, RunConfig, TrainConfig
from quill.data.batches import batch
from quill.errors import InputError, InterruptedRun, NotFoundError, RefusedError
from quill.evaluation.curves import stream
from quill.model.gpt import GPT, loss, n_params
from quill.registry import lineage
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.training import memory, teachers
from quill.training.device import Device
from quill.training.events import Event, Stepped
from quill.training.plan import forward_passes, plan
from quill.training.run import train
from quill.training.trainer import Trainer

TOKENS = np.random.default_rng(0).integers(0, 17, 2000).astype(np.uint16)
CPU = Device("cpu", "float32", False)


def model(seed: int, n_layer: int = 1, vocab_size: int = 17) -> GPT:
    config = ModelConfig(n_layer=n_layer, n_head=2, n_embd=16, block_size=8, vocab_size=vocab_size)
    made = GPT(config.shape(), seed)
    with torch.no_grad():
        made.wte.weight.mul_(20)  # far from uniform, as a trained model is
    return made


def student(taught_by: tuple[GPT, ...], **train: Any) -> Trainer:
    settings = {"batch_size": 8, "warmup_iters": 2, "max_iters": 20, **train}
    return Trainer(model(1), TrainConfig(**settings), TOKENS, CPU, taught_by)


@pytest.mark.parametrize("n", [1, 2])
def test_the_gradient_is_that_of_the_mixed_objective(n: int) -> None:
    taught_by = tuple(model(seed, n_layer=2).eval() for seed in range(2, 2 + n))
    trainer = student(taught_by, teacher_weight=0.3, teacher_temperature=2.0)
    x, y = batch(TOKENS, seed=1337, step=0, batch_size=8, block_size=8)
    logits = trainer.model(x)
    mean = sum(F.softmax(t(x) / 2.0, dim=-1) for t in taught_by) / n
    assert isinstance(mean, torch.Tensor)
    apart = (mean.detach() * (mean.detach().log() - F.log_softmax(logits / 2.0, dim=-1))).sum(-1).mean()
    objective = 0.7 * loss(logits, y) + 0.3 * 4.0 * apart
    objective.backward()
    expected = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    losses = trainer.gradients()
    assert losses.loss == pytest.approx(loss(logits, y).item())
    assert losses.objective == pytest.approx(objective.item())
    assert losses.objective != pytest.approx(losses.loss)
    for p, grad in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for t in taught_by for p in t.parameters())


def test_accumulated_batches_are_taught_as_one() -> None:
    taught_by = (model(2),)
    large = student(taught_by, masked_loss_weight=0.0)
    small = student(taught_by, batch_size=2, gradient_accumulation_steps=4)
    assert small.gradients() == pytest.approx(large.gradients(), abs=1e-6)
    for p, q in zip(large.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_every_part_of_the_objective_is_scaled_in_float16() -> None:
    grads = []
    for scale in (2.0**4, 2.0**12):
        trainer = student((model(2),), masked_loss_weight=0.4, grad_clip=0.0)
        trainer.device, trainer._scale = Device("cpu", "float16", False), scale
        trainer.gradients()
        trainer._clip()
        grads.append([p.grad for p in trainer.model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-2)


def test_a_model_does_not_differ_from_itself() -> None:
    same = model(1).eval()
    idx = torch.arange(8)[None]
    assert teachers.divergence(same(idx), idx, [same], 1.5, nullcontext).item() == pytest.approx(0, abs=1e-6)
    other = teachers.divergence(same(idx), idx, [model(3).eval()], 1.5, nullcontext).item()
    assert other > 0.01


def test_padding_of_a_vocabulary_is_not_taught() -> None:
    wide = model(2, vocab_size=24).eval()
    idx = torch.arange(8)[None]
    logits = model(1)(idx)
    assert teachers.divergence(logits, idx, [wide], 1.0, nullcontext).isfinite()
    assert teachers.divergence(wide(idx), idx, [model(1).eval(), wide], 1.0, nullcontext).isfinite()


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    path = tmp_path / "tide.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


def make(text: Path, name: str, **overrides: Any) -> RunConfig:
    settings = {
        "data.source": str(text), "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16,
        "model.block_size": 16, "model.dropout": 0.1, "train.batch_size": 4, "train.max_iters": 8,
        "train.eval_interval": 4, "train.log_interval": 1, "train.warmup_iters": 2, "train.device": "cpu",
        "train.dtype": "float32", "train.compile": "off",
    }  # fmt: skip
    return reading.parse({"name": name}, settings | {k.replace("__", "."): v for k, v in overrides.items()})


def run(config: RunConfig, registry: Registry, stop_after: int | None = None, **options: Any) -> Version:
    steps = [0]

    def observe(event: Event) -> None:
        steps[0] = event.step if isinstance(event, Stepped) else steps[0]

    def poll() -> None:
        if stop_after is not None and steps[0] >= stop_after:
            raise InterruptedRun("interrupted", signum=15)

    outcome = train(config, registry, registry.root.parent / "data", observer=observe, poll=poll, **options)
    assert outcome.version is not None
    return outcome.version


@pytest.fixture
def taught(text: Path, registry: Registry) -> RunConfig:
    """A run with two teachers in the registry."""
    for seed, name in enumerate(("ann", "bea")):
        run(make(text, name, train__seed=seed, model__n_layer=2), registry)
    return make(text, "kid", train__teacher=["ann", "bea:v1"])


def test_the_versions_that_taught_are_recorded(taught: RunConfig, text: Path, registry: Registry) -> None:
    version = run(taught, registry)
    ann, bea = registry.resolve("ann"), registry.resolve("bea")
    recorded = [{"reference": v.reference, "digest": v.digest} for v in (ann, bea)]
    assert version.facts["teachers"] == recorded
    assert lineage.trace(registry, version)[0]["teachers"] == recorded
    card = (version.path / "README.md").read_text(encoding="utf-8")
    assert f"| Taught by | ann:v1, sha256 {ann.digest} |" in card
    lines = [x for x in stream(version.metrics()) if "loss" in x]
    assert all(x["objective"] != x["loss"] for x in lines)
    assert "learns from ann:v1, bea:v1" in (version.path / "run.log").read_text(encoding="utf-8")
    alone = run(make(text, "alone"), registry)
    assert alone.facts["teachers"] is None
    assert alone.digest != version.digest


@pytest.mark.parametrize("stop", [0, 2, 4])
@pytest.mark.parametrize("more", [{}, {"masked_loss_weight": 0.4, "ema_decay": 0.9, "token_dropout": 0.1}])
def test_a_resumed_run_learns_from_the_versions_that_it_started_with(
    stop: int, more: dict[str, Any], taught: RunConfig, text: Path, registry: Registry
) -> None:
    taught = taught.model_copy(update={"train": taught.train.model_copy(update=more)})
    whole = run(taught.model_copy(update={"name": "whole"}), registry)
    with pytest.raises(InterruptedRun):
        run(taught, registry, stop_after=stop)
    run(make(text, "ann", train__seed=9), registry, new_version=True)
    shutil.move(registry.root / "bea", registry.root / "zoe")
    assert registry.resolve("ann").reference == "ann:v2"
    resumed = run(taught, registry, resume="must")
    assert resumed.digest == whole.digest
    assert resumed.facts["teachers"] == whole.facts["teachers"]


def test_a_run_whose_teacher_is_gone_does_not_resume(
    taught: RunConfig, text: Path, registry: Registry
) -> None:
    with pytest.raises(InterruptedRun):
        run(taught, registry, stop_after=4)
    shutil.rmtree(registry.root / "ann")
    run(make(text, "ann", train__seed=9), registry)
    with pytest.raises(NotFoundError, match="ann:v1") as caught:
        run(taught, registry)
    assert 'resume="never"' in caught.value.hint
    assert registry.unfinished("kid") is not None
    over = run(taught, registry, resume="never").facts["teachers"]
    assert over is not None
    assert over[0]["digest"] == registry.resolve("ann").digest


def test_a_finished_run_is_another_with_a_newer_teacher(
    taught: RunConfig, text: Path, registry: Registry
) -> None:
    first = run(taught, registry)
    assert run(taught, registry).reference == first.reference
    run(make(text, "ann", train__seed=9), registry, new_version=True)
    with pytest.raises(RefusedError) as caught:
        run(taught, registry)
    assert "ann:v1 -> ann:v2" in caught.value.why
    assert run(taught, registry, new_version=True).reference == "kid:v2"


def test_a_model_can_teach_the_next_version_of_its_name(text: Path, registry: Registry) -> None:
    first = run(make(text, "kid"), registry)
    again = make(text, "kid", train__teacher=["kid"])
    with pytest.raises(InterruptedRun):
        run(again, registry, stop_after=4, new_version=True)
    second = run(again, registry)
    assert second.reference == "kid:v2"
    assert second.facts["teachers"] == [{"reference": "kid:v1", "digest": first.digest}]
    assert run(again, registry).reference == "kid:v2", "it is finished, and not taught by itself"
    longer = make(text, "kid", train__teacher=["kid"], train__max_iters=12)
    third = run(longer, registry)
    assert third.reference == "kid:v3"
    assert third.facts["teachers"] == second.facts["teachers"]
    fourth = run(again, registry, new_version=True)
    assert fourth.facts["teachers"] == [{"reference": "kid:v3", "digest": third.digest}]


def test_a_run_is_not_lengthened_without_its_teacher(text: Path, registry: Registry) -> None:
    run(make(text, "kid"), registry)
    again = make(text, "kid", train__teacher=["kid"])
    run(again, registry, new_version=True)
    shutil.rmtree(registry.root / "kid" / "v1")
    assert run(again, registry).reference == "kid:v2"
    with pytest.raises(RefusedError) as caught:
        run(make(text, "kid", train__teacher=["kid"], train__max_iters=12), registry)
    assert "learns from: kid:v1 -> kid:v2" in caught.value.why


def test_a_teacher_must_read_what_the_student_reads(text: Path, tmp_path: Path, registry: Registry) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8") + "Zounds!\n", encoding="utf-8")
    run(make(other, "odd"), registry)
    run(make(text, "short", model__block_size=8), registry)
    with pytest.raises(InputError, match="odd:v1 cannot teach") as caught:
        run(make(text, "kid", train__teacher=["odd"]), registry)
    assert "tokenizer" in caught.value.why
    with pytest.raises(InputError, match="short:v1 cannot teach") as caught:
        run(make(text, "kid", train__teacher=["short"]), registry)
    assert caught.value.why == "its context length is 8, and the run's is 16"
    with pytest.raises(NotFoundError, match="nobody"):
        run(make(text, "kid", train__teacher=["nobody"]), registry)
    assert registry.unfinished("kid") is None


def test_teachers_are_counted_in_memory_and_time(taught: RunConfig, text: Path, registry: Registry) -> None:
    found = teachers.find(taught, registry)
    shapes = teachers.shapes(found)
    alone = make(text, "kid")
    more = memory.check(taught, "cpu", shapes) - memory.check(alone, "cpu")
    assert more == 4 * sum(n_params(s) for s in shapes)
    assert forward_passes(taught.train) == forward_passes(alone.train) + 2
    made = plan(taught, registry, registry.root.parent / "data")
    assert made.memory_bytes > plan(alone, registry, registry.root.parent / "data").memory_bytes


def test_a_student_keeps_its_own_weights(taught: RunConfig, registry: Registry) -> None:
    version = run(taught, registry)
    assert load_checkpoint(version).config.train.teacher == ["ann", "bea:v1"]
    assert load_checkpoint(version).model.shape.n_layer == 1
