"""The dry run: the time and memory that a run would take, estimated from a step or two."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quill.config.settings import RunConfig, TrainConfig
from quill.data import prepare
from quill.model.gpt import GPT
from quill.registry.store import Registry
from quill.training import autotune, memory, teachers
from quill.training.device import find_device
from quill.training.inputs import parent_of, settle
from quill.training.trainer import Trainer


@dataclass(frozen=True)
class Plan:
    """What a run would do, and the time and memory it would take.

    Attributes:
        config: The settled config.
        parameters: Number of parameters.
        tokens_per_step: Tokens in one optimizer step.
        memory_bytes: Weights, their average, teachers, gradients, optimizer state and activations.
        memory_present: Memory of the device.
        seconds_per_step: Seconds of one step.
        seconds_total: Seconds of all steps and evaluations.
        measured_on: What was timed, "2 steps" or "1/32 of a step".
        device: The device.
        dtype: Precision of the arithmetic.
        compiled: Whether torch.compile is used.
        micro_batch_size: Most sequences of a batch that are computed at once.
        gradient_checkpointing: Whether activations are computed again for the backward pass.
        dataset: Name of the dataset.
        train_tokens: Tokens to train on.
        val_tokens: Tokens to evaluate on.
        epochs: How many times a training token is seen on average.
    """

    config: dict[str, Any]
    parameters: int
    tokens_per_step: int
    memory_bytes: int
    memory_present: int
    seconds_per_step: float
    seconds_total: float
    measured_on: str
    device: str
    dtype: str
    compiled: bool
    micro_batch_size: int
    gradient_checkpointing: bool
    dataset: str
    train_tokens: int
    val_tokens: int
    epochs: float


def plan(
    config: RunConfig, registry: Registry, data_root: Path, on_data: prepare.Observer | None = None
) -> Plan:
    """Estimate a run by taking a step or two of it; nothing is kept.

    Args:
        config: The run.
        registry: Where `init_from` is looked up.
        data_root: Where prepared datasets are.
        on_data: Receives the progress of preparing the data.

    Raises:
        InputError: The settings do not fit the data, the parent or the device.
    """
    parent, found = parent_of(config, registry), teachers.find(config, registry)
    inputs = settle(config, data_root, parent, on_data)
    config, dataset, tokens = inputs.config, inputs.dataset, inputs.tokens
    c = config.train
    device = find_device(c.device)
    teachers.check(found, config, dataset)
    taught_by = teachers.shapes(found)
    memory.check(config, device, taught_by)
    model = GPT(config.model.shape(), c.seed).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    part = autotune.share_of(model, c)
    share = part.batch_size
    chosen = autotune.choose(model, config, dataset, device, teachers=taught_by)
    trainer = Trainer(model, part, tokens.train, chosen, teachers.load(found, device))
    forward, update = _time_step(trainer)
    passes = c.batch_size / share * c.gradient_accumulation_steps
    seconds = forward * passes + update
    evaluated = (
        tokens.val_tokens if c.eval_iters is None else c.eval_iters * c.batch_size * config.model.block_size
    )
    per_pass = forward / forward_passes(c)
    evaluation = (2 if c.ema_decay else 1) * per_pass * evaluated / (share * config.model.block_size)
    total = seconds * c.max_iters + evaluation * (c.max_iters // c.eval_interval)
    return Plan(
        config=config.to_dict(),
        parameters=parameters,
        tokens_per_step=tokens_per_step(config),
        memory_bytes=memory.need(config, chosen, taught_by).of(chosen.micro_batch_size or c.batch_size),
        memory_present=memory.of_device(device),
        seconds_per_step=seconds,
        seconds_total=total,
        measured_on="2 steps" if passes == 1 else f"1/{passes:.0f} of a step",
        device=chosen.name,
        dtype=chosen.dtype,
        compiled=chosen.compiled,
        micro_batch_size=chosen.micro_batch_size or c.batch_size,
        gradient_checkpointing=chosen.checkpointing,
        dataset=dataset.name,
        train_tokens=tokens.train_tokens,
        val_tokens=tokens.val_tokens,
        epochs=c.max_iters * tokens_per_step(config) / max(tokens.train_tokens, 1),
    )


def _time_step(trainer: Trainer) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimizer's update: the faster of two each."""
    times: list[tuple[float, float]] = []
    for _ in range(3):
        start = time.perf_counter()
        trainer.gradients()
        trainer.device.synchronize()
        middle = time.perf_counter()
        for optimizer in trainer.optimizer.at(0.0):
            optimizer.step()
        trainer.model.zero_grad(set_to_none=True)
        trainer.device.synchronize()
        times.append((middle - start, time.perf_counter() - middle))
        if middle - start > 1 and len(times) > 1:
            break
    # The first step allocates what the others reuse.
    later = times[1:] or times
    return min(t[0] for t in later), min(t[1] for t in later)


def forward_passes(config: TrainConfig) -> int:
    """The forward passes that take as long as all work on a batch; a backward pass takes as long as two."""
    return 3 * (2 if config.masked_loss_weight else 1) + len(config.teacher)


def tokens_per_step(config: RunConfig) -> int:
    """Tokens in one optimizer step."""
    t = config.train
    return t.batch_size * t.gradient_accumulation_steps * config.model.block_size
