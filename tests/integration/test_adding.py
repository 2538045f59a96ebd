"""Adding a tokenizer, a format, a logger, a command or a setting touches one file.

Each test copies the package, adds or changes one file in the copy, and uses the new member through the
command line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TOKENIZER = '''
"""One id per byte of UTF-8."""

from quill.tokenizers import base


class ByteTokenizer(base.Tokenizer):
    vocab_size = 256

    @classmethod
    def train(cls, texts, *, vocab_size=None, vocabulary=None):
        return cls()

    def encode(self, text, *, unknown="error"):
        return list(text.encode())

    def token_bytes(self, token):
        return bytes([token])

    def to_dict(self):
        return {"schema": 1, "kind": self.kind}

    @classmethod
    def from_dict(cls, data):
        return cls()
'''

FORMAT = '''
"""The number of values of each tensor, as JSON."""

import json

from quill.formats import base


class CountsFormat(base.Format):
    suffix = "-counts.json"
    dtypes = ("float32",)

    def refuses(self, checkpoint):
        return None

    def write(self, checkpoint, path, dtype):
        counts = {name: tensor.numel() for name, tensor in checkpoint.model.state_dict().items()}
        path.write_text(json.dumps(counts))
        return ()
'''

COMMAND = '''
"""Print the folder of the registry."""

from quill.cli import options
from quill.cli.options import Session


@options.command(examples="quill tally")
def command(session: Session) -> None:
    """Print the folder of the registry."""
    session.output.write(f"{session.registry().root.name}\\n")
'''

LOGGER = '''
"""A line for each number, in one file."""

from quill.loggers import base


class LinesLogger(base.Logger):
    package = "json"

    def __init__(self, run):
        self.file = open("lines.txt", "a")

    @property
    def where(self):
        return "lines.txt"

    def numbers(self, step, values):
        for name, value in values.items():
            self.file.write(f"{step} {name} {value}\\n")

    def text(self, step, name, text):
        pass

    def close(self):
        self.file.close()
'''

SHAPE = ["--n-layer=1", "--n-head=1", "--n-embd=16", "--block-size=16"]
TINY = [*SHAPE, "--batch-size=4", "--max-iters=4", "--eval-interval=4", "--warmup-iters=0", "--eval-iters=1"]


@pytest.fixture
def package(root: Path, tmp_path: Path) -> Path:
    """A copy of the package to add to."""
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(root / "quill", tmp_path / "copy" / "quill", ignore=ignored))


@pytest.fixture
def quill(package: Path, tmp_path: Path) -> Callable[..., str]:
    """Run a command of the copy; returns what it prints."""
    text = tmp_path / "tide.txt"
    text.write_text("The tide came in at seven, and went out at one.\n" * 60, encoding="utf-8")

    environment = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "QUILL_REGISTRY": str(tmp_path / "weights"),
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "quill", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_tokenizer_is_one_file(package: Path, quill: Callable[..., str]) -> None:
    (package / "tokenizers" / "utf8.py").write_text(TOKENIZER.lstrip())
    quill("prepare", "tide.txt", "--name", "tide", "--tokenizer", "utf8")
    assert quill("train", "--data", "tide", "--name", "m", *TINY) == "m:v1\n"
    assert quill("sample", "m", "--prompt", "The tide", "--max-new-tokens", "5").startswith("The tide")


def test_a_format_is_one_file(package: Path, quill: Callable[..., str], tmp_path: Path) -> None:
    (package / "formats" / "counts.py").write_text(FORMAT.lstrip())
    quill("train", "--data", "tide.txt", "--name", "m", *TINY)
    assert quill("export", "m", "--format", "counts").strip() == "m-counts.json"
    assert json.loads((tmp_path / "m-counts.json").read_text())["wte.weight"] > 0


def test_a_logger_is_one_file(package: Path, quill: Callable[..., str], tmp_path: Path) -> None:
    (package / "loggers" / "lines.py").write_text(LOGGER.lstrip())
    assert "lines" in quill("train", "--help-all")
    quill("train", "--data", "tide.txt", "--name", "m", *TINY, "--log-interval=2", "--log-to", "lines")
    logged = [line.split()[:2] for line in (tmp_path / "lines.txt").read_text().splitlines()]
    assert [step for step, name in logged if name == "train/loss"] == ["2", "4"]
    assert ["4", "val/loss"] in logged


def test_a_command_is_one_file(package: Path, quill: Callable[..., str]) -> None:
    (package / "cli" / "tally.py").write_text(COMMAND.lstrip())
    assert quill("tally") == "weights\n"
    assert "tally" in quill("--help")
    assert "Print the folder" in quill("tally", "--help")


def test_a_setting_is_one_declaration(package: Path, quill: Callable[..., str], tmp_path: Path) -> None:
    settings = package / "config" / "settings.py"
    declared = '    label_smoothing: _Fraction = setting(0.0, "Share of the uniform distribution.")\n'
    lines = settings.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("    grad_clip"))
    settings.write_text("".join([*lines[:at], declared, *lines[at:]]), encoding="utf-8")
    assert "label_smoothing" in quill("config", "schema")
    assert "train.label_smoothing" in quill("config", "table")
    (tmp_path / "c.json").write_text(json.dumps({"name": "m", "train": {"label_smoothing": 0.1}}))
    quill("config", "check", "c.json")
    ran = quill("train", "--data", "tide.txt", "--name", "m", *TINY, "--label-smoothing", "0.2", "--json")
    assert json.loads(ran.splitlines()[-1])["reference"] == "m:v1"
    assert json.loads(quill("show", "m", "--config", "--json"))["train"]["label_smoothing"] == 0.2
