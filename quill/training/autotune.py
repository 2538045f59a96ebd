"""Choosing a run's precision and compilation by measurement, once per computer and configuration."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quill import fsio, strictjson
from quill.config.settings import RunConfig, TrainConfig
from quill.config.shape import Shape
from quill.errors import InputError, QuillError
from quill.model.gpt import GPT
from quill.training import memory
from quill.training.device import Device
from quill.training.trainer import Trainer

if TYPE_CHECKING:
    from quill.data.dataset import Dataset

# Compiling takes about a minute on a CPU, a quarter of it on a GPU, where it also gains the most: a run must
# be long enough to win it back.
_COMPILE_PAYS_AFTER_SECONDS = {"cpu": 600.0, "cuda": 45.0}
# A pass over a whole batch may take minutes and gigabytes, so a share of its sequences is timed: as many as
# take most of a second on a slow device of the kind, and no fewer than keep a fast one busy.
_TRIAL_FLOPS = {"cpu": 1e11, "mps": 1e12, "cuda": 1e13}
# One choice is timed for no longer than this.
_TRIAL_SECONDS = 1.0
# How many times as fast a choice must be to win after one timed step: noise is smaller.
_FAR_AHEAD = 1.5
_FILE = "autotune.json"


def choose(
    model: GPT,
    config: RunConfig,
    dataset: Dataset,
    device: str,
    earlier: dict[str, Any] | None = None,
    stage: Callable[[str], None] = lambda name: None,
    teachers: Sequence[Shape] = (),
    sharing: memory.Sharing = memory.ALONE,
) -> Device:
    """Choose precision and compilation by timing a share of the run's first step; then make a step fit.

    What was timed is remembered in the user's cache directory, so that the same command on the same
    computer computes the same numbers.

    Args:
        model: On the device; its weights do not change.
        config: The run.
        dataset: Its data.
        device: Where it runs.
        earlier: The choice of the interrupted run, kept so that it resumes bit for bit.
        stage: Receives the name of each measurement before it starts.
        teachers: The models that teach it, which take memory.
        sharing: How its processes share memory; nothing is timed if they divide the weights.

    Raises:
        InputError: A step does not fit in memory.
    """
    c = config.train

    def fitted(chosen: Device) -> Device:
        return memory.fit(config, chosen, teachers, sharing)

    if earlier is not None and earlier["device"].partition(":")[0] == device.partition(":")[0]:
        rows, checkpointing = earlier["micro_batch_size"] or c.batch_size, earlier["gradient_checkpointing"]
        kept = Device(device, earlier["dtype"], earlier["compiled"], rows, checkpointing)
        return fitted(kept)
    dtypes = candidates(device, c)
    if sharing.divided:
        return fitted(Device(device, dtypes[0], c.compile == "on"))
    may_compile = c.compile == "on" or (c.compile == "auto" and can_compile(device))
    if len(dtypes) == 1 and not may_compile:
        return fitted(Device(device, dtypes[0], False))
    key = _key(config, device)
    with suppress(KeyError, TypeError):
        known = _remembered()[key]
        return fitted(Device(device, known["dtype"], known["compiled"]))
    chosen = _measured(model, config, dataset, device, dtypes, may_compile, stage, fitted)
    _remember(key, chosen)
    return chosen


def share_of(model: GPT, config: TrainConfig) -> TrainConfig:
    """The settings of a step over as few of a batch's sequences as can be timed."""
    parameters = sum(p.numel() for p in model.parameters())
    per_sequence = 6 * parameters * model.shape.block_size
    flops = _TRIAL_FLOPS.get(model.wte.weight.device.type, _TRIAL_FLOPS["cpu"])
    rows = min(config.batch_size, max(1, int(flops / max(per_sequence, 1))))
    return config.model_copy(update={"batch_size": rows, "gradient_accumulation_steps": 1})


def candidates(device: str, config: TrainConfig) -> list[str]:
    """Precisions worth timing on a device, float32 first.

    Raises:
        InputError: The device cannot train in the precision that is set.
    """
    kind = device.partition(":")[0]
    if config.dtype == "float16" and kind == "cpu":
        raise InputError(
            "'train.dtype' = 'float16' does not train on a CPU",
            why="its gradients underflow without loss scaling, which needs CUDA",
            hint="set train.dtype=auto",
        )
    if config.dtype != "auto":
        return [config.dtype]
    if kind == "cuda":
        return ["bfloat16"] if torch.cuda.is_bf16_supported() else ["float32"]
    if kind == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ["float32", "bfloat16"]
    return ["float32"]


def fastest(choices: list[str], step: Callable[[str], None], repeats: int = 3) -> tuple[str, float]:
    """The fastest choice and the seconds of its step.

    Args:
        choices: What to compare, the preferred one first; a later one must win by a tenth, which is noise.
        step: Runs one step of a choice.
        repeats: Timed steps per choice after a warm-up step, taken in turns; the fastest counts, as noise
            only adds. There are fewer if one choice is far ahead or the time is up.
    """
    seconds = dict.fromkeys(choices, float("inf"))
    for choice in choices:
        step(choice)
    begun = time.perf_counter()
    for _ in range(repeats):
        for choice in choices:
            start = time.perf_counter()
            step(choice)
            seconds[choice] = min(seconds[choice], time.perf_counter() - start)
        first, *others = sorted(seconds.values())
        if others and others[0] > _FAR_AHEAD * first:
            break
        if time.perf_counter() - begun > _TRIAL_SECONDS * len(choices):
            break
    best = choices[0]
    for choice in choices[1:]:
        if seconds[choice] < 0.9 * seconds[best]:
            best = choice
    return best, seconds[best]


def can_compile(device: str) -> bool:
    """Whether torch.compile can run here: it needs a C++ compiler for the CPU, Triton for CUDA."""
    if sys.platform == "win32" or sys.platform == "darwin":
        return False
    if device.startswith("cuda"):
        from importlib.util import find_spec

        return find_spec("triton") is not None
    return device == "cpu" and any(shutil.which(c) for c in ("g++", "clang++"))


def cache_file() -> Path:
    """Where the choices are remembered."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("quill", appauthor=False)) / _FILE


def _measured(
    model: GPT,
    config: RunConfig,
    dataset: Dataset,
    device: str,
    dtypes: list[str],
    may_compile: bool,
    stage: Callable[[str], None],
    fitted: Callable[[Device], Device],
) -> Device:
    c = config.train
    share = share_of(model, c)

    def trial(settings: TrainConfig, like: Device) -> Callable[[str], None]:
        trainers: dict[str, Trainer] = {}

        def step(dtype: str) -> None:
            using = replace(like, dtype=dtype)
            trainer = trainers.setdefault(dtype, Trainer(model, settings, dataset.train, using))
            model.train()
            trainer.gradients()
            model.zero_grad(set_to_none=True)
            using.synchronize()

        return step

    stage(f"measuring {' and '.join(dtypes)}")
    dtype, seconds = fastest(dtypes, trial(share, Device(device, dtypes[0], False)))
    plain = fitted(Device(device, dtype, False))
    passes = c.batch_size / share.batch_size * c.gradient_accumulation_steps
    pays_after = _COMPILE_PAYS_AFTER_SECONDS.get(plain.kind, _COMPILE_PAYS_AFTER_SECONDS["cpu"])
    if (
        not may_compile
        or plain.checkpointing
        or (c.compile == "auto" and seconds * passes * c.max_iters < pays_after)
    ):
        return plain
    stage("compiling, which takes up to a minute")
    # Compiled code is made for one shape, which has to be the run's own.
    compiled = replace(plain, compiled=True)
    whole = c.model_copy(update={"gradient_accumulation_steps": 1})
    try:
        _, compiled_seconds = fastest([dtype], trial(whole, compiled))
    except Exception as e:  # torch's compiler fails in as many ways as there are toolchains
        if c.compile == "on":
            raise InputError(
                "torch.compile does not work here",
                why=str(e).splitlines()[0][:200],
                hint="set train.compile=off",
            ) from e
        torch.compiler.reset()
        return plain
    gains = compiled_seconds < 0.9 * seconds * c.batch_size / share.batch_size
    return compiled if c.compile == "on" or gains else plain


def _key(config: RunConfig, device: str) -> str:
    """A hash of everything that the choice depends on."""
    c = config.train
    settings = (
        "batch_size",
        "gradient_accumulation_steps",
        "max_iters",
        "dtype",
        "compile",
    )
    facts = {
        "model": config.model.model_dump(),
        "train": {name: getattr(c, name) for name in settings},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "computer": [platform.node(), platform.machine(), os.cpu_count(), torch.get_num_threads()],
        "torch": torch.__version__,
    }
    return hashlib.sha256(strictjson.canonical(facts)).hexdigest()


def _remembered() -> dict[str, Any]:
    """All choices by key; none if the cache is missing or damaged."""
    with suppress(OSError, QuillError):
        found = strictjson.read(cache_file())
        return found if isinstance(found, dict) else {}
    return {}


def _remember(key: str, choice: Device) -> None:
    """Write a choice down; if that fails, the next run measures again."""
    with suppress(OSError, QuillError):
        path, value = cache_file(), {"dtype": choice.dtype, "compiled": choice.compiled}
        fsio.make_dir(path.parent)
        fsio.write_json(path, {**_remembered(), key: value})
