"""The estimate of memory, next to what a process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import mean
from typing import Any

import pytest

# Each function runs in a fork of a process that has loaded what every run needs; prints what they return.
_FORKS = """
import json, os, re, resource, sys
from pathlib import Path
from quill.cli import _environment
_environment.prepare()
import numpy as np
from quill.cli import train
from quill.config import reading
from quill.model.gpt import GPT
from quill.training import memory, run
from quill.training.device import Device

def forked(function, *arguments):
    there, here = os.pipe()
    if not os.fork():
        os.write(here, json.dumps(function(*arguments)).encode())
        os._exit(0)
    os.close(here)
    os.wait()
    return json.loads(os.read(there, 1000))

def proc(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def steps(config, device, count):
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 100_000).astype(np.uint16)
    trainer = run.Trainer(GPT(config.model.shape()), config.train, tokens, device)
    return [trainer.advance()[0].loss for _ in range(count)]

def estimate(config, device):
    return memory.need(config, device).of(device.micro_batch_size)

def peak(config, device):
    # The peak of the fork alone.
    Path("/proc/self/clear_refs").write_text("5")
    steps(config, device, 2)
    return proc("VmHWM")

def limited(config, device, room):
    # As `ulimit -v` does, to what is in use, the libraries of the first step, and some room for the run.
    libraries = 90_000_000
    memory._PROCESS = proc("VmRSS") + libraries
    resource.setrlimit(resource.RLIMIT_AS, (proc("VmSize") + libraries + room,) * 2)
    fitting = memory.fit(config, device)
    return fitting.micro_batch_size, fitting.checkpointing, steps(config, fitting, 3)

"""
_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "vocab_size": 1000, "dropout": 0.1}
_GPT2 = {"model": _SHAPE | {"block": "gpt2"}, "train": {"optimizer": "adamw", "batch_size": 24}}
_MODERN = {"model": _SHAPE | {"block": "modern"}, "train": {"batch_size": 24}}
# The vocabulary of GPT-2, whose logits take more than all blocks.
_WORDS = {
    "model": _SHAPE | {"block": "gpt2", "vocab_size": 50304, "block_size": 512},
    "train": {"optimizer": "adamw", "batch_size": 2},
}
# One sequence that does not fit below the limit unless activations are computed again.
_LONG = {
    "model": _SHAPE | {"block": "modern", "n_layer": 12, "block_size": 1024, "n_embd": 128},
    "train": {"batch_size": 2},
}
# Precision, compiled, sequences at once, checkpointing.
_RUNS: list[tuple[dict[str, Any], list[Any]]] = [
    (_GPT2, ["float32", False, 24, False]),
    (_GPT2, ["float32", False, 6, False]),
    (_GPT2, ["bfloat16", False, 24, True]),
    (_MODERN, ["float32", False, 24, False]),
    (_MODERN, ["bfloat16", False, 8, False]),
    (_MODERN, ["float32", False, 1, True]),
    (_WORDS, ["float32", False, 2, True]),
]


def _forks(code: str, *arguments: Any) -> Any:
    """Run code below `_FORKS`; returns the JSON that it prints. Threads would take address space."""
    done = subprocess.run(
        [sys.executable, "-c", _FORKS + code, json.dumps(arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak to set back here")
def test_the_estimate_is_near_the_peak_of_whole_and_cut_and_checkpointed_batches() -> None:
    code = """
import torch._dynamo  # what the first optimizer would load in each fork
function, runs = json.loads(sys.argv[1])
work = [(reading.parse(settings, origin="the test"), Device("cpu", *way)) for settings, way in runs]
print(json.dumps([forked(globals()[function], *one) for one in work]))
"""
    # Addresses at the start of a process decide which gaps of its heap a block fits into: peaks of one run
    # differ by up to 15% from their mean, and only between processes.
    peaks = zip(*(_forks(code, "peak", _RUNS) for _ in range(4)), strict=True)
    for estimate, found, (_, way) in zip(_forks(code, "estimate", _RUNS), peaks, _RUNS, strict=True):
        assert estimate == pytest.approx(mean(found), rel=0.15), (way, found)


@pytest.mark.skipif(sys.platform != "linux", reason="limits on address space are Linux's")
@pytest.mark.parametrize(
    ("settings", "room", "checkpoints"), [(_GPT2, 310_000_000, False), (_LONG, 270_000_000, True)]
)
def test_a_batch_under_a_limit_has_the_losses_of_the_whole_batch(
    settings: dict[str, Any], room: int, checkpoints: bool
) -> None:
    code = """
settings, room = json.loads(sys.argv[1])
config, device = reading.parse(settings, origin="the test"), Device("cpu", "float32", False)
print(json.dumps([forked(limited, config, device, room), forked(steps, config, device, 3)]))
"""
    (rows, checkpointing, cut), whole = _forks(code, settings, room)
    assert checkpointing == checkpoints
    assert checkpointing or rows < settings["train"]["batch_size"]
    assert cut == pytest.approx(whole, abs=1e-4)
