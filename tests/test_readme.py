"""The README is what a newcomer follows: its commands run, its table is true, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quill
from quill.config import schema

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Training in full is what the README shows and what a test cannot wait for.
_SHORT = "--max-iters 2 --eval-interval 2 --warmup-iters 0 --batch-size 2 --eval-iters 1"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    """Every line of the README's shell blocks that calls quill, continuation lines joined."""
    # A whole script has a test of its own, among those of cron.
    blocks = [block for block in _blocks("sh") if not block.startswith("#!")]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if "quill " in line and "pip " not in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a newcomer has after cloning, as far as the README touches it."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "weights" / "shakespeare", tmp_path / "weights" / "shakespeare")
    shutil.copy(ROOT / "weights" / ".quill.json", tmp_path / "weights")
    corpus = Path("quill") / "data" / "harpoon.txt"
    (tmp_path / corpus).parent.mkdir(parents=True)
    shutil.copy(ROOT / corpus, tmp_path / corpus)
    return tmp_path


def test_every_quill_command_of_the_readme_runs(checkout: Path, tmp_path: Path) -> None:
    """One after another, as a newcomer would, without a network."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    entry = binaries / "quill"
    entry.write_text(f"#!{sys.executable}\nfrom quill.cli.app import run\nrun()\n")
    entry.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "http_proxy": "http://127.0.0.1:9",
    }
    commands = _commands()
    assert len(commands) > 10
    for command in commands:
        if "quill train" in command and "--dry-run" not in command:
            command = re.sub(r"(quill train[^|;&>]*)", rf"\1 {_SHORT} ", command)
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=env, capture_output=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr.decode()}"


@pytest.mark.parametrize("block", _blocks("python"), ids=lambda b: b.splitlines()[0])
def test_every_python_block_of_the_readme_runs(block: str, checkout: Path) -> None:
    for name in ("hf", "onnx"):
        if f"shakespeare-{name}" in block:
            pytest.importorskip({"hf": "transformers", "onnx": "onnxruntime"}[name])
            registry = checkout / "weights"
            quill.export("shakespeare", name, checkout / f"shakespeare-{name}", registry=registry)
    script = block.replace('"configs/quickstart.json"', "QUICK")
    quick = {
        "name": "quick",
        "model": {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 16},
        "train": {"max_iters": 2, "batch_size": 2, "eval_interval": 2, "eval_iters": 1, "warmup_iters": 0},
    }
    done = subprocess.run(
        [sys.executable, "-c", f"QUICK = {quick!r}\n{script}"],
        cwd=checkout,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_table_of_settings_is_the_settings_own() -> None:
    assert schema.table() in README


def test_links_and_pictures_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_configs_that_are_named_exist_and_all_are_named() -> None:
    named = set(re.findall(r"configs/([a-z0-9-]+)\.json", README))
    shipped = {p.stem for p in (ROOT / "configs").glob("*.json")}
    assert named == shipped


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    [command] = re.findall(r"^python -m pytest.*$", README, re.MULTILINE)
    assert command in (ROOT / ".ci/run").read_text()
    assert shlex.split(command)[:3] == ["python", "-m", "pytest"]
