"""The estimate of memory, next to what a process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Takes the steps of runs, each in a fork of a process that has loaded what every run needs; prints, for each,
# the estimate and the peak of the process.
_STEPS = """
import json, os, re, sys
from pathlib import Path
from quill.cli import _environment
_environment.prepare()
import numpy as np
from quill.cli import train
from quill.config import reading
from quill.model.gpt import GPT
from quill.training import memory, run
from quill.training.device import Device

def forked(measure):
    there, here = os.pipe()
    if not os.fork():
        os.write(here, str(measure()).encode())
        os._exit(0)
    os.close(here)
    os.wait()
    return int(os.read(there, 100))

for settings, device in json.loads(sys.argv[1]):
    config, device = reading.parse(settings, origin="the test"), Device("cpu", *device)

    def peak():
        # The peak of the fork alone.
        Path("/proc/self/clear_refs").write_text("5")
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 100_000).astype(np.uint16)
        trainer = run.Trainer(GPT(config.model.shape()), config.train, tokens, device)
        for _ in range(2):
            trainer.advance()
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    def estimate():
        return memory.need(config, device).of(device.micro_batch_size)

    print(forked(estimate), forked(peak), flush=True)
"""
_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "vocab_size": 1000, "dropout": 0.1}
_GPT2 = {"model": _SHAPE | {"block": "gpt2"}, "train": {"optimizer": "adamw", "batch_size": 24}}
_MODERN = {"model": _SHAPE | {"block": "modern"}, "train": {"batch_size": 24}}
# Precision, compiled, sequences at once, checkpointing.
_RUNS: list[tuple[dict[str, Any], list[Any]]] = [
    (_GPT2, ["float32", False, 24, False]),
    (_GPT2, ["float32", False, 6, False]),
    (_GPT2, ["bfloat16", False, 24, True]),
    (_MODERN, ["float32", False, 24, False]),
    (_MODERN, ["bfloat16", False, 8, False]),
    (_MODERN, ["float32", False, 1, True]),
]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak to set back here")
def test_the_estimate_is_near_the_peak_of_whole_and_cut_and_checkpointed_batches() -> None:
    done = subprocess.run([sys.executable, "-c", _STEPS, json.dumps(_RUNS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == len(_RUNS)
    for (estimate, peak), (_, way) in zip(found, _RUNS, strict=True):
        assert estimate == pytest.approx(peak, rel=0.15), way
