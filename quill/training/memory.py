"""What a run needs in memory: refused by arithmetic before anything is allocated, then measured.

Legend: B batch, T context length, C n_embd, V vocabulary.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from quill.config.settings import RunConfig, TrainConfig
from quill.config.shape import Shape
from quill.errors import InputError
from quill.evaluation import measure
from quill.model.gpt import GPT, n_params
from quill.training.device import Device
from quill.units import size

if TYPE_CHECKING:
    from quill.data.batches import Tokens
    from quill.training.trainer import Trainer

# Weights, gradients and AdamW's two momenta, float32 each.
_BYTES_PER_PARAMETER = 16
# A weight of the moving average, or of a teacher.
_BYTES_OF_WEIGHT = 4
# Random numbers, positions and ids of a window while a batch is drawn.
_BYTES_PER_WINDOW = 24
# Beyond this depth, building the modules takes longer than any use of them is worth.
_MOST_LAYERS = 10_000


def check(config: RunConfig, device: str, teachers: Sequence[Shape] = ()) -> int:
    """Refuse a model, or a batch of it, that cannot fit, in milliseconds and without allocating either.

    Args:
        config: The run; an unset vocab_size counts as two tokens.
        device: Where it would run.
        teachers: The models that teach it.

    Returns:
        Bytes of weights, their average, gradients and optimizer, and of the teachers.

    Raises:
        InputError: With the memory it would need and what there is.
    """
    c, model = config.train, config.model.shape(config.model.vocab_size or 2)
    parameters = n_params(model)
    needed, present = parameters * bytes_per_parameter(c), of_device(device)
    needed += _BYTES_OF_WEIGHT * sum(n_params(t) for t in teachers)
    if needed > present:
        raise InputError(
            f"the model of {parameters:,} parameters does not fit in memory",
            why=f"training it{' with its teachers' if teachers else ''} needs {size(needed)} before any "
            f"activation; {device} has {size(present)}",
            hint="lower model.n_layer, model.n_embd or model.vocab_size",
        )
    if model.n_layer > _MOST_LAYERS:
        raise InputError(
            f"'model.n_layer' = {model.n_layer:,} is too deep",
            why=f"quill trains models of up to {_MOST_LAYERS:,} blocks",
            hint="lower model.n_layer",
        )
    # A lower bound: the inputs of a block's projections and norms, its hidden layer, and the logits.
    width = 2 if c.dtype != "float32" else 4
    # With teachers, the probabilities of both sides are kept as well.
    logits = (3 if teachers else 1) * 4 * model.vocab_size
    per_token = 16 + model.n_layer * (3 * model.n_embd + model.mlp_size) * width + logits
    batch = c.batch_size * model.block_size * per_token
    windows = c.batch_size * c.gradient_accumulation_steps * _BYTES_PER_WINDOW
    require(needed + batch + windows, config, device, "at least ")
    return needed


def bytes_per_parameter(config: TrainConfig) -> int:
    """Bytes that a parameter takes while it is trained."""
    return _BYTES_PER_PARAMETER + (_BYTES_OF_WEIGHT if config.ema_decay else 0)


def require(needed: int, config: RunConfig, device: str, bound: str = "about ") -> None:
    """Refuse a batch that does not fit.

    Args:
        needed: Bytes of the model and of a step.
        config: The run.
        device: Where it would run.
        bound: What is said before the figure.
    """
    present = of_device(device)
    if needed <= present:
        return
    c = config.train
    passes = c.gradient_accumulation_steps
    many = "" if passes == 1 else f"{passes:,} times "
    larger = "gradient_accumulation_steps" if passes > c.batch_size else "batch_size"
    raise InputError(
        f"a step of {many}{c.batch_size:,} sequences of {config.model.block_size:,} tokens does not fit "
        "in memory",
        why=f"training needs {bound}{size(needed)}; {device} has {size(present)}",
        hint="lower model.block_size" if c.batch_size == passes == 1 else f"lower train.{larger}",
    )


def check_batch(
    model: GPT, config: RunConfig, train: Tokens, device: Device, teachers: Sequence[GPT] = ()
) -> None:
    """Refuse a batch that does not fit, after measuring what one sequence and two need.

    Args:
        model: On the device.
        config: The run.
        train: Ids of the training split, (n,).
        device: Where it runs, in which precision.
        teachers: The models that teach it, on the device.
    """
    from quill.training.trainer import Trainer

    def measured(sequences: int) -> int:
        settings = config.train.model_copy(
            update={"batch_size": sequences, "gradient_accumulation_steps": 1, "optimizer": "adamw"}
        )
        plain = Device(device.name, device.dtype, False)
        return activations(Trainer(model, settings, train, plain, teachers))

    one = measured(1)
    each = measured(2) - one if config.train.batch_size > 1 else 0
    fixed = bytes_per_parameter(config.train) * sum(p.numel() for p in model.parameters())
    fixed += _BYTES_OF_WEIGHT * sum(p.numel() for t in teachers for p in t.parameters())
    require(fixed + one + each * (config.train.batch_size - 1), config, device.name)


def check_evaluation(config: RunConfig, val_tokens: int) -> None:
    """Refuse an evaluation that would read the validation split over and over.

    Args:
        config: The run.
        val_tokens: Tokens of the validation split.
    """
    n = config.train.eval_iters
    if n is not None and val_tokens:
        measure.check_iters(n, config.model.block_size, val_tokens, setting="train.eval_iters")


def activations(trainer: Trainer) -> int:
    """Bytes that the largest forward pass of the trainer's batch keeps for its backward pass, measured."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    seen: dict[int, int] = {}
    passes: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    def passed() -> None:
        passes.append(sum(seen.values()))
        seen.clear()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        trainer.gradients(poll=passed)
    passed()
    trainer.model.zero_grad(set_to_none=True)
    return max(passes)


def of_device(device: str) -> int:
    """Bytes of a device's memory; for the CPU and what shares its memory, the computer's."""
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
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
