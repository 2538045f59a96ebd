"""A checkout of nanoGPT on the user's disk, run next to quill in processes of its own.

Training is its train.py, which prints the time of each step; decoding and evaluation are functions of its
model.py, called by `nanogpt_probe`. Nothing of it is part of quill, and nothing is written into the checkout.
Source: https://github.com/karpathy/nanoGPT, train.py, model.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quill import strictjson
from quill.benchmark import nanogpt_probe
from quill.benchmark.subject import Subject
from quill.benchmark.work import DECODING, EVALUATION, TRAINING, Work, generated, needs
from quill.config import reading
from quill.config.settings import ModelConfig
from quill.errors import InputError, NotFoundError
from quill.evaluation import measure
from quill.formats import nanogpt
from quill.model.gpt import n_params

# What nanoGPT's model takes.
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
_FILES = ("train.py", "model.py", "configurator.py")
_STEP = re.compile(r"^iter \d+: loss \S+, time ([0-9.]+)ms", re.MULTILINE)
# The first step includes an evaluation, and the second may still allocate.
_FIRST_STEPS = 2
_FEWEST_STEPS, _MOST_STEPS = 3, 200
_NEVER = 1_000_000_000
_BITS_OF_TOKEN = 16


class Checkout:
    """A checkout of nanoGPT.

    Args:
        path: Its folder.

    Attributes:
        name: Of its folder.

    Raises:
        NotFoundError: A file that is run is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self.name = self._path.name
        for file in _FILES:
            if not (path / file).is_file():
                raise NotFoundError(
                    f"'{path}' is not a checkout of nanoGPT",
                    why=f"it has no {file}",
                    hint="git clone https://github.com/karpathy/nanoGPT",
                )

    def take(self, subject: Subject, folder: Path) -> None:
        """Prepare to run a model of the subject's sizes on its tokens.

        Args:
            subject: What quill is measured on.
            folder: Where the tokens go; it does not exist yet.

        Raises:
            InputError: nanoGPT has no such model.
        """
        shape = subject.model.shape
        if shape.n_embd % shape.n_head:
            raise InputError(
                f"nanoGPT has no model of {shape.n_head} heads and width {shape.n_embd}",
                why="its width is a multiple of its heads",
                hint="measure this config alone",
            )
        if shape.vocab_size > 1 << _BITS_OF_TOKEN:
            raise InputError(
                f"nanoGPT has no vocabulary of {shape.vocab_size:,} tokens",
                why=f"its tokens have {_BITS_OF_TOKEN} bits",
                hint="measure this config alone",
            )
        self._subject, self._folder = subject, folder
        self._shape = reading.check(
            ModelConfig,
            {
                **{name: getattr(shape, name) for name in _SIZES},
                "block": "gpt2",
                "activation": "gelu",
                "tie_embeddings": True,
            },
            origin="the config",
        ).shape()
        folder.mkdir()
        for split, tokens in (("train", subject.dataset.train), ("val", subject.dataset.val)):
            np.asarray(tokens, dtype=np.uint16).tofile(folder / f"{split}.bin")
        nanogpt.write_size(folder / nanogpt.META, shape.vocab_size)

    def like(self, work: Work) -> Work:
        """A kind of work as nanoGPT does it: on a CPU in float32, and with the needs of its own model."""
        dtype = "float32" if self._subject.device.kind == "cpu" else work.dtype
        flops, bytes = needs(work.name, self._shape)
        return replace(work, dtype=dtype, flops=flops, bytes=bytes)

    def facts(self) -> dict[str, Any]:
        """What was run."""
        return {
            "program": self.name,
            "path": str(self._path),
            "commit": self._commit(),
            "parameters": n_params(self._shape),
            "optimizer": "adamw",
        }

    def speeds(self, seconds: float, pace: float) -> dict[str, float]:
        """Tokens per second of each kind of work.

        Args:
            seconds: The time for one kind of work.
            pace: Tokens per second at which quill trains, from which the number of steps is chosen.

        Raises:
            InputError: It fails.
        """
        return {TRAINING: self._train(seconds, pace), **self._probe(seconds)}

    def _train(self, seconds: float, pace: float) -> float:
        """Run train.py for some steps."""
        subject, c = self._subject, self._subject.step
        tokens = c.batch_size * self._shape.block_size
        steps = min(max(_FEWEST_STEPS, round(seconds * pace / tokens)), _MOST_STEPS)
        settings = {
            **{name: getattr(self._shape, name) for name in _SIZES if name != "vocab_size"},
            "dataset": str(self._folder),
            "out_dir": str(self._folder / "out"),
            "batch_size": c.batch_size,
            "gradient_accumulation_steps": 1,
            "max_iters": _FIRST_STEPS + steps - 1,
            "eval_interval": _NEVER,
            "eval_iters": 1,
            "log_interval": 1,
            "always_save_checkpoint": False,
            "device": subject.device.name,
            "dtype": subject.device.dtype,
            "compile": subject.device.compiled,
        }
        printed = self._run("train.py", [f"--{name}={value}" for name, value in settings.items()])
        times = [float(ms) / 1000 for ms in _STEP.findall(printed)][_FIRST_STEPS:]
        if not times or not sum(times):
            raise InputError(
                f"'{self._path / 'train.py'}' printed no times of steps",
                why="they are read from its lines 'iter N: loss X, time Yms'",
                hint="use an unchanged checkout of nanoGPT",
            )
        return tokens * len(times) / sum(times)

    def _probe(self, seconds: float) -> dict[str, float]:
        """Call the functions of model.py."""
        subject, answer = self._subject, self._folder / "answer.json"
        size = self._shape.block_size
        request = {
            "checkout": str(self._path),
            "model": {name: getattr(self._shape, name) for name in _SIZES},
            "device": subject.device.name,
            "dtype": subject.device.dtype,
            "tokens": str(self._folder / "val.bin"),
            "rows": list(DECODING),
            "new_tokens": generated(size),
            "windows": max(1, measure.tokens_at_once(subject.device.kind) // size),
            "seconds": seconds,
            "answer": str(answer),
        }
        self._run(nanogpt_probe.__file__, [json.dumps(request)])
        found = strictjson.read(answer)
        names = {**{str(rows): name for rows, name in DECODING.items()}, "evaluation": EVALUATION}
        return {name: float(found[key]) for key, name in names.items()}

    def _run(self, script: str, arguments: Sequence[str]) -> str:
        """Run a script with the checkout as the working directory; returns what it prints."""
        done = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=self._path,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise InputError(
                f"'{self.name}' failed in {Path(script).name}",
                why=last,
                hint="use an unchanged checkout of nanoGPT that runs with this Python",
            )
        return done.stdout

    def _commit(self) -> str | None:
        with suppress(OSError, subprocess.SubprocessError):
            git = ("git", "--no-optional-locks", "-C", str(self._path), "rev-parse", "HEAD")
            done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
            return done.stdout.strip()
        return None
