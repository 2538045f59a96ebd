"""The dry run: the time and memory that a run would take, estimated from a step or two."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quill.config.settings import RunConfig, TrainConfig
from quill.data import prepare
from quill.model.gpt import GPT, n_params, outline
from quill.registry.folder import Folder
from quill.registry.store import Registry
from quill.training import autotune, memory, processes, teachers
from quill.training.device import Device, find_device
from quill.training.inputs import parent_of, settle
from quill.training.processes import Group
from quill.training.splits import Splits
from quill.training.trainer import Trainer


@dataclass(frozen=True)
class Plan:
    """What a run would do, and the time and memory it would take.

    Attributes:
        config: The settled config.
        parameters: Number of parameters.
        tokens_per_step: Tokens in one optimizer step.
        memory_bytes: Weights, their average, teachers, gradients, optimizer state and activations, in one
            process.
        memory_present: Memory of the device; of a CPU, the share of one process.
        processes: Number of processes.
        divided: Whether they divide the model among them.
        seconds_per_step: Seconds of one step, without communication; None for a divided model.
        seconds_total: Seconds of all steps and evaluations; None for a divided model.
        measured_on: What was timed, "2 steps" or "1/32 of a step"; None for a divided model.
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
    processes: int
    divided: bool
    seconds_per_step: float | None
    seconds_total: float | None
    measured_on: str | None
    device: str
    dtype: str
    compiled: bool
    micro_batch_size: int
    gradient_checkpointing: bool
    dataset: str
    train_tokens: int
    val_tokens: int
    epochs: float


class _Times(NamedTuple):
    """Seconds of a step and of a run, and what they were measured on."""

    step: float | None = None
    total: float | None = None
    measured_on: str | None = None


def plan(
    config: RunConfig,
    registry: Registry,
    data_root: Path,
    on_data: prepare.Observer | None = None,
    n_processes: int = 1,
) -> Plan:
    """Estimate a run by taking a step or two of it; nothing is kept.

    Args:
        config: The run.
        registry: Where `init_from` is looked up.
        data_root: Where prepared datasets are.
        on_data: Receives the progress of preparing the data.
        n_processes: Number of processes on this computer that share the run.

    Raises:
        InputError: The settings do not fit the data, the parent, the device or the number of processes.
    """
    parent, found = parent_of(config, registry), teachers.find(config, registry)
    inputs = settle(config, data_root, parent, on_data)
    config, dataset, tokens = inputs.config, inputs.dataset, inputs.tokens
    group = Group(0, n_processes, 0, n_processes) if n_processes > 1 else None
    part, shape = processes.part(config, group), config.model.shape()
    device = find_device(part.train.device)
    teachers.check(found, config, dataset)
    taught_by = teachers.shapes(found)
    memory.check(part, device, taught_by, group)
    first = Device(device, autotune.candidates(device, part.train)[0], False)
    divided = memory.must_divide(part, first, taught_by, group)
    sharing = memory.sharing_of(group, divided=divided)
    # Without n-gram counts, which are made of the text when training begins, and take little time to train.
    model = outline(shape) if divided else GPT(shape, part.train.seed).network().to(device)
    chosen = autotune.choose(model, part, dataset, device, teachers=taught_by, sharing=sharing)
    times = _Times() if divided else _time_run(model, part, tokens, chosen, found)
    rows = chosen.micro_batch_size or part.train.batch_size
    return Plan(
        config=config.to_dict(),
        parameters=n_params(shape),
        tokens_per_step=tokens_per_step(config),
        memory_bytes=memory.need(part, chosen, taught_by, sharing).of(rows),
        memory_present=sharing.present(device, shape),
        processes=n_processes,
        divided=divided,
        seconds_per_step=times.step,
        seconds_total=times.total,
        measured_on=times.measured_on,
        device=chosen.name,
        dtype=chosen.dtype,
        compiled=chosen.compiled,
        micro_batch_size=rows if rows < part.train.batch_size else config.train.batch_size,
        gradient_checkpointing=chosen.checkpointing,
        dataset=dataset.name,
        train_tokens=tokens.train_tokens,
        val_tokens=tokens.val_tokens,
        epochs=config.train.max_iters * tokens_per_step(config) / max(tokens.train_tokens, 1),
    )


def _time_run(
    model: GPT, config: RunConfig, tokens: Splits, device: Device, taught_by: Sequence[Folder]
) -> _Times:
    """Time a share of a step, and estimate the run from it."""
    c = config.train
    share = autotune.share_of(model, c)
    trainer = Trainer(model, share, tokens.train, device, teachers.load(taught_by, device.name))
    forward, update = _time_step(trainer)
    passes = c.batch_size / share.batch_size * c.gradient_accumulation_steps
    seconds = forward * passes + update
    evaluated = (
        tokens.val_tokens if c.eval_iters is None else c.eval_iters * c.batch_size * config.model.block_size
    )
    per_pass = forward / forward_passes(c)
    tokens_timed = share.batch_size * config.model.block_size
    evaluation = (2 if c.ema_decay else 1) * per_pass * evaluated / tokens_timed
    total = seconds * c.max_iters + evaluation * (c.max_iters // c.eval_interval)
    return _Times(seconds, total, "2 steps" if passes == 1 else f"1/{passes:.0f} of a step")


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
