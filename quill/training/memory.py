"""What a run needs in memory: refused by arithmetic before anything is allocated, then measured.

Legend: B batch, T context length, C n_embd, V vocabulary.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quill.config.settings import RunConfig, TrainConfig
from quill.config.shape import Shape
from quill.errors import InputError, is_out_of_memory
from quill.evaluation import measure
from quill.model.gpt import loss, n_params, outline
from quill.training.device import Device
from quill.training.optimizer import is_hidden
from quill.training.processes import Group
from quill.units import size

# A weight, its gradient, its momentum; all are float32.
_BYTES_OF_WEIGHT = 4
# Random numbers, positions and ids of a window while a batch is drawn.
_BYTES_PER_WINDOW = 24
# An input and a target.
_BYTES_PER_TOKEN = 16
# Code and buffers of the libraries that the first step loads; and on a CPU, where Python and torch count too,
# of the whole process: 240 MB of them before the first step, with torch's build for CPUs.
_LIBRARIES, _PROCESS = 125_000_000, 330_000_000
# The share of a device's memory that a run takes unasked; the rest is for other programs.
_COMFORTABLE = 0.8
# Beyond this depth, building the modules takes longer than any use of them is worth.
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Sharing:
    """How the processes of a run share memory.

    Attributes:
        processes: Number of processes.
        beside: How many of them are on one computer, and share its memory if they compute on its CPU.
        divided: Whether each has a share of weights, gradients and optimizer state, not all of them.
    """

    processes: int = 1
    beside: int = 1
    divided: bool = False

    @property
    def shares(self) -> int:
        """The number of shares of the weights; 1 if each process has all of them."""
        return self.processes if self.divided else 1

    def present(self, device: str, shape: Shape) -> int:
        """Bytes that one process may use of its device."""
        if device != "cpu":
            return of_device(device)
        # The first process gathers all weights to start from them and to write them.
        whole = _BYTES_OF_WEIGHT * n_params(shape) if self.divided else 0
        return max(of_device(device) - whole, 0) // self.beside


ALONE = Sharing()


def sharing_of(group: Group | None, *, divided: bool) -> Sharing:
    """How the processes of a run share memory if they divide its weights, or do not."""
    return ALONE if group is None else Sharing(group.size, group.local_size, divided)


def must_divide(config: RunConfig, device: Device, teachers: Sequence[Shape], group: Group | None) -> bool:
    """Whether the processes divide the weights: because it is set, or because a step does not fit otherwise.

    Args:
        config: The settled run.
        device: Where one of them computes.
        teachers: The models that teach the run.
        group: The processes.

    Raises:
        InputError: They would have to, and cannot in this precision.
    """
    if group is None or config.train.sharding == "off":
        return False
    if config.train.sharding == "auto":
        with suppress(InputError):
            fit(config, device, teachers, sharing_of(group, divided=False))
            return False
    if device.dtype == "float16":
        raise InputError(
            "'train.dtype' = 'float16' does not train a model that is divided among processes",
            why="a step whose gradients overflow would have to be repeated by all of them",
            hint="set train.dtype=bfloat16",
        )
    return True


def check(config: RunConfig, device: str, teachers: Sequence[Shape] = (), group: Group | None = None) -> int:
    """Refuse a model, or a batch of it, that cannot fit, in milliseconds and without allocating either.

    Args:
        config: The run; an unset vocab_size counts as two tokens.
        device: Where it would run.
        teachers: The models that teach it.
        group: Its processes, if there are several, which may divide the weights.

    Returns:
        Bytes of weights, their average, gradients and optimizer, and of the teachers, in one process.

    Raises:
        InputError: With the memory it would need and what there is.
    """
    setting = "off" if group is None else config.train.sharding
    if setting == "auto":
        with suppress(InputError):
            return _check(config, device, teachers, sharing_of(group, divided=False))
    return _check(config, device, teachers, sharing_of(group, divided=setting != "off"))


def _check(config: RunConfig, device: str, teachers: Sequence[Shape], sharing: Sharing) -> int:
    c, model = config.train, config.model.shape(config.model.vocab_size or 2)
    needed, present = _of_parameters(model, c) // sharing.shares, sharing.present(device, model)
    needed += _gathered(model, sharing) + _BYTES_OF_WEIGHT * sum(n_params(t) for t in teachers)
    if needed > present:
        raise _model_too_large(model, needed, present, device, teachers, sharing)
    if sharing.divided and (whole := _BYTES_OF_WEIGHT * n_params(model)) > of_device("cpu"):
        raise InputError(
            f"the model of {n_params(model):,} parameters does not fit in memory",
            why=f"its weights take {size(whole)}, and the computer of the first process, which gathers them, "
            f"has {size(of_device('cpu'))}",
            hint="lower model.n_layer, model.n_embd or model.vocab_size",
        )
    if model.n_layer > _MOST_LAYERS:
        raise InputError(
            f"'model.n_layer' = {model.n_layer:,} is too deep",
            why=f"quill trains models of up to {_MOST_LAYERS:,} blocks",
            hint="lower model.n_layer",
        )
    # A lower bound: the input of each block, and the logits; with teachers, their probabilities as well.
    logits = (3 if teachers else 1) * 4 * model.vocab_size
    per_sequence = model.block_size * (4 * model.n_layer * model.n_embd + logits)
    rows = min(c.micro_batch_size or 1, c.batch_size)
    step = needed + _of_batch(config)
    if step > present:
        passes = c.gradient_accumulation_steps
        many = "" if passes == 1 else f"{passes:,} times "
        larger = "gradient_accumulation_steps" if passes > c.batch_size else "batch_size"
        raise InputError(
            f"a step of {many}{c.batch_size:,} sequences of {model.block_size:,} tokens does not fit "
            "in memory",
            why=f"training needs at least {size(step)}; {device} has {size(present)}",
            hint=f"lower train.{larger}",
        )
    if step + rows * per_sequence > present:
        raise _sequences_too_large(rows, step + rows * per_sequence, present, config, device, "at least")
    return needed


def _model_too_large(
    model: Shape, needed: int, present: int, device: str, teachers: Sequence[Shape], sharing: Sharing
) -> InputError:
    """The error for a model whose weights do not fit, without any activation."""
    many = sharing.processes > 1
    in_each = f" in each of {sharing.processes} processes" if many else ""
    hint = "lower model.n_layer, model.n_embd or model.vocab_size"
    if many:
        hint = f"start more processes, or {hint}" if sharing.divided else "set train.sharding=auto"
    return InputError(
        f"the model of {n_params(model):,} parameters does not fit in memory",
        why=f"training it{' with its teachers' if teachers else ''} needs {size(needed)}{in_each} before any "
        f"activation; {device} has {size(present)}{' for it' if many else ''}",
        hint=hint,
    )


@dataclass(frozen=True)
class Need:
    """What the steps of a run take in memory at their peak.

    Attributes:
        fixed: Bytes of the process, weights, their average, optimizer, teachers and the step's token ids.
        gradients: Bytes of the gradients of all parameters.
        added: Bytes of the largest gradient, which exists twice while it is added to that of an earlier pass.
        first: Bytes that a pass over one sequence takes, with what it takes for any number of them.
        each: Bytes that each further sequence takes.
        closes_gaps: Whether activations take the place of an earlier step's gradients, and gradients theirs.
        batch_size: Sequences of a batch.
        accumulates: Whether gradients of several passes add up even if no batch is cut.
    """

    fixed: int
    gradients: int
    added: int
    first: int
    each: int
    closes_gaps: bool
    batch_size: int
    accumulates: bool

    def of(self, rows: int) -> int:
        """Bytes if so many sequences are computed at once."""
        activations = self.first + self.each * (rows - 1)
        if self.accumulates or rows < self.batch_size:
            return self.fixed + self.gradients + self.added + activations
        if not self.closes_gaps:
            # glibc cuts an aligned block of memory out of a larger one, and gives the edges to small objects.
            # When it is freed, its place is a few bytes too small for the next one of its size.
            return self.fixed + self.gradients + activations
        # Activations are freed while gradients take their place.
        return self.fixed + max(self.gradients, activations)

    def largest(self, limit: int) -> int | None:
        """The most sequences at once that stay below a limit; None if not even one does."""
        if self.of(self.batch_size) <= limit:
            return self.batch_size
        room = limit - self.of(1)
        return None if room < 0 else min(self.batch_size - 1, 1 + room // max(self.each, 1))


def need(config: RunConfig, device: Device, teachers: Sequence[Shape] = (), sharing: Sharing = ALONE) -> Need:
    """Measure what the steps of a run take, on forward passes of few sequences through few blocks.

    Args:
        config: The settled run.
        device: Where it runs, in which precision, with checkpointing or not.
        teachers: The models that teach it.
        sharing: How its processes share memory.
    """
    c, shape = config.train, config.model.shape()
    gradients = _BYTES_OF_WEIGHT * n_params(shape) // sharing.shares
    process = _LIBRARIES if device.kind == "cuda" else _PROCESS
    fixed = process + _of_parameters(shape, c) // sharing.shares - gradients + _of_batch(config)
    fixed += _gathered(shape, sharing) + _BYTES_OF_WEIGHT * sum(n_params(t) for t in teachers)
    one, two = (_activations(shape, device, rows) for rows in (1, 2))
    if teachers:
        # The mean of the teachers' probabilities and the student's, kept, and the gradient of the latter.
        logits = 3 * 4 * shape.block_size * shape.vocab_size
        one, two = one + logits, two + 2 * logits
    accumulates = c.gradient_accumulation_steps > 1 or c.masked_loss_weight > 0
    one_block = outline(replace(shape, n_layer=min(shape.n_layer, 1)))
    added = _BYTES_OF_WEIGHT * max(p.numel() for p in one_block.parameters()) // sharing.shares
    closes_gaps = device.kind != "cpu"
    return Need(fixed, gradients, added, one, two - one, closes_gaps, c.batch_size, accumulates)


def _activations(shape: Shape, device: Device, rows: int) -> int:
    """Bytes that a forward pass stores, and those that the backward pass takes in addition."""
    tokens, depth = rows * shape.block_size, shape.n_layer
    # The logarithms of the probabilities, their gradient, and that of the logits, all in float32.
    logits = tokens * shape.vocab_size
    head, on_cpu, is_short = 3 * 4 * logits, device.kind == "cpu", device.dtype != "float32"
    if is_short:
        # The weights that make the logits, once more in 16 bits.
        head += 2 * shape.n_embd * shape.vocab_size
    shallow = _stored(replace(shape, n_layer=min(depth, 1)), device, rows)
    if depth < 2:
        return shallow + head
    block = _stored(replace(shape, n_layer=2), device, rows) - shallow
    # The gradients inside of a block take about as much as what it has stored.
    if not device.checkpointing:
        # Conversions leave gaps.
        gaps = block + 2 * logits if on_cpu and is_short else 0
        return shallow + depth * block + gaps + head
    # What a block's first pass frees lies between the inputs that are kept, in gaps that are too small. On a
    # CPU half of it stays unused, in 16 bits a quarter, and so does the place of the logits.
    gaps = 4 * logits + (depth - 1) * block // (4 if is_short else 2) if on_cpu else block
    return shallow + block + gaps + (depth - 1) * 4 * tokens * shape.n_embd + head


def _stored(shape: Shape, device: Device, rows: int) -> int:
    """Bytes that a model stores in a forward pass for its backward pass, weights and logits aside."""
    # The logits of a large vocabulary may take more memory than there is, and need no measurement.
    few = replace(shape, vocab_size=1)
    model = outline(few).to_empty(device=device.name)
    idx = torch.zeros(rows, shape.block_size, dtype=torch.int64, device=device.name)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        # An output that is stored as it is would keep the step that made it, and itself, for good.
        return t.detach()

    # Nothing stored may be freed before the end, or its address would be counted once for two tensors.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), device.seeded(0):
        with device.autocast():
            logits = model(idx)
        stored = loss(logits.float(), idx)
    del stored
    return sum(seen.values())


def _of_parameters(shape: Shape, config: TrainConfig) -> int:
    """Bytes of weights, gradients, optimizer and average."""

    def takes(name: str, p: Tensor) -> int:
        # Muon keeps one momentum, AdamW two.
        momenta = 1 if config.optimizer == "muon" and is_hidden(name, p) else 2
        return _BYTES_OF_WEIGHT * (2 + momenta + (1 if config.ema_decay else 0)) * p.numel()

    def count(n_layer: int) -> int:
        return sum(takes(n, p) for n, p in outline(replace(shape, n_layer=n_layer)).named_parameters())

    if shape.n_layer <= 1:
        return count(shape.n_layer)
    one, two = count(1), count(2)
    return one + (shape.n_layer - 1) * (two - one)


def _gathered(shape: Shape, sharing: Sharing) -> int:
    """Bytes of divided weights that a process has whole for a while, and of their gradients."""
    if not sharing.divided:
        return 0
    outside = n_params(replace(shape, n_layer=min(shape.n_layer, 1)))
    if not shape.n_layer:
        return 2 * _BYTES_OF_WEIGHT * outside
    block = n_params(replace(shape, n_layer=2)) - outside
    outside -= block
    # What is outside of the blocks, the block that is computed, and the next one, which is fetched before.
    return _BYTES_OF_WEIGHT * (outside + 2 * block + max(outside, block))


def _of_batch(config: RunConfig) -> int:
    """Bytes of the windows that a step draws and of one batch's ids."""
    c = config.train
    windows = c.batch_size * c.gradient_accumulation_steps * _BYTES_PER_WINDOW
    return windows + c.batch_size * config.model.block_size * _BYTES_PER_TOKEN


def fit(
    config: RunConfig, device: Device, teachers: Sequence[Shape] = (), sharing: Sharing = ALONE
) -> Device:
    """Choose how many sequences of a batch are computed at once, and whether with checkpointing.

    A whole batch that fits is not cut, and activations are stored if one sequence fits with them. The choice
    depends on the settings and the device's memory alone.

    Args:
        config: The settled run.
        device: Where it runs; a number of sequences that it comes with is kept if it fits.
        teachers: The models that teach it.
        sharing: How its processes share memory.

    Raises:
        InputError: Not even one sequence fits, or not as many as are set.
    """
    c, present = config.train, sharing.present(device.name, config.model.shape())
    ways = [replace(device, checkpointing=on) for on in _checkpointing(config, device)]
    ways = [replace(way, compiled=way.compiled and not way.checkpointing) for way in ways]
    try:
        needs = [(way, need(config, way, teachers, sharing)) for way in ways]
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        raise InputError(
            f"one sequence of {config.model.block_size:,} tokens does not fit in memory",
            why=f"two of them in two blocks take more than {device.name} has left of {size(present)}",
            hint="lower model.block_size",
        ) from None
    given = c.micro_batch_size or device.micro_batch_size
    if given is not None:
        rows = min(given, c.batch_size)
        for way, needed in needs:
            if needed.of(rows) <= present:
                return replace(way, micro_batch_size=rows)
    if c.micro_batch_size is None:
        for limit in (int(_COMFORTABLE * present), present):
            for way, needed in needs:
                if most := needed.largest(limit):
                    return replace(way, micro_batch_size=most)
    rows = min(c.micro_batch_size or 1, c.batch_size)
    raise _sequences_too_large(rows, needs[-1][1].of(rows), present, config, device.name, "about")


def _checkpointing(config: RunConfig, device: Device) -> list[bool]:
    """Whether to compute activations again, the preferred way first."""
    c = config.train
    if c.gradient_checkpointing == "on":
        return [True]
    if c.gradient_checkpointing == "off" or c.compile == "on" or not config.model.n_layer:
        return [False]
    return [True] if device.checkpointing else [False, True]


def _sequences_too_large(
    rows: int, needed: int, present: int, config: RunConfig, device: str, bound: str
) -> InputError:
    """The error for sequences that do not fit, computed at once."""
    tokens = f"{config.model.block_size:,} tokens"
    what = f"one sequence of {tokens} does" if rows == 1 else f"{rows:,} sequences of {tokens} do"
    return InputError(
        f"{what} not fit in memory",
        why=f"training needs {bound} {size(needed)}; {device} has {size(present)}",
        hint="lower model.block_size" if rows == 1 else "leave train.micro_batch_size unset",
    )


def check_evaluation(config: RunConfig, val_tokens: int) -> None:
    """Refuse an evaluation that would read the validation split over and over.

    Args:
        config: The run.
        val_tokens: Tokens of the validation split.
    """
    n = config.train.eval_iters
    if n is not None and val_tokens:
        measure.check_iters(n, config.model.block_size, val_tokens, setting="train.eval_iters")


def of_device(device: str) -> int:
    """Bytes of a device's memory; for the CPU and what shares its memory, what the process may use of it."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    if sys.platform == "win32":
        import ctypes

        class Status(ctypes.Structure):
            _fields_ = (
                ("length", ctypes.c_ulong),
                ("load", ctypes.c_ulong),
                *((f"field{i}", ctypes.c_ulonglong) for i in range(7)),
            )

        status = Status(length=ctypes.sizeof(Status))
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.field0)
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits() -> list[int]:
    """The limits of this process in bytes: on its address space (ulimit -v), and of its control groups."""
    import resource

    limits = []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        mapped = resident = 0
        with suppress(OSError, ValueError):
            mapped, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
        # Libraries and the stacks of threads are mapped and hardly touched.
        limits.append(max(soft - (mapped - resident) * resource.getpagesize(), 0))
    root, groups = Path("/sys/fs/cgroup"), [Path()]
    with suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].partition("\n")[0]
        groups += [Path(own), *Path(own).parents]
    files = [*(root / group / "memory.max" for group in groups), root / "memory" / "memory.limit_in_bytes"]
    for file in files:
        with suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(file.read_text()))
    return limits
