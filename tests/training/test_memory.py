"""The estimate of memory, next to what a process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quill.config import reading
from quill.training import memory
from quill.training.device import Device

# Takes the steps of a run and prints the bytes by which they raised the peak of the process.
_STEPS = """
import json, re, sys
from pathlib import Path
from quill.cli import _environment
_environment.prepare()
import numpy as np
from quill.config import reading
from quill.model.gpt import GPT
from quill.training.device import Device
from quill.training.run import Trainer

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

settings, device = map(json.loads, sys.argv[1:])
config = reading.parse(settings, origin="the test")
tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 100_000).astype(np.uint16)
before = kilobytes("VmRSS")
trainer = Trainer(GPT(config.model.shape()), config.train, tokens, Device(*device))
for _ in range(2):
    trainer.advance()
print((kilobytes("VmHWM") - before) * 1024)
"""
_MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 128, "vocab_size": 1000, "dropout": 0.1}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({"block": "gpt2"}, {"optimizer": "adamw", "batch_size": 24}),
        ({"block": "modern"}, {"batch_size": 24}),
    ],
    ids=["adamw", "muon"],
)
def test_the_estimate_is_near_the_peak(model: dict[str, Any], train: dict[str, Any]) -> None:
    settings = {"model": _MODEL | model, "train": train}
    device = Device("cpu", "float32", False)
    estimate = memory.need(reading.parse(settings, origin="the test"), device).of(24)
    arguments = [json.dumps(settings), json.dumps(["cpu", "float32", False])]
    done = subprocess.run([sys.executable, "-c", _STEPS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert estimate == pytest.approx(int(done.stdout), rel=0.2)
