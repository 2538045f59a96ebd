"""Training and evaluating with datasets, through the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quill.cli.app import main

SHAPE = "--n-layer 1 --n-head 1 --n-embd 4 --block-size 16 --batch-size 2 --device cpu --compile off"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run a command in an empty folder: `run("prepare", "sea.txt")` gives code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.setenv("QUILL_DATA", str(tmp_path / "data"))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        return (code, *capsys.readouterr())

    return run


def train(run: Run, *arguments: str, steps: int = 2) -> tuple[int, str, str]:
    steps_flags = ["--max-iters", str(steps), "--eval-interval", "2"]
    return run("train", *arguments, *SHAPE.split(), *steps_flags)


@pytest.mark.parametrize("flags", [[], ["--val-fraction", "0"]])
def test_w5_a_dataset_without_a_validation_split_trains(run: Run, write: Any, flags: list[str]) -> None:
    write("sea.txt")
    assert run("prepare", "sea.txt", "--val-fraction", "0")[0] == 0
    code, out, err = train(run, "--data", "sea", "--name", "m", *flags)
    assert (code, out) == (0, "m:v1\n"), err
    code, _, err = run("eval", "m")
    assert code == 2
    assert "has no validation split" in err
    assert "quill eval m --split train" in err
    assert run("eval", "m", "--split", "train")[0] == 0


def test_w5_a_validation_split_that_is_too_short_is_still_refused(run: Run, write: Any) -> None:
    write("sea.txt")
    assert run("prepare", "sea.txt", "--val-fraction", "0.001")[0] == 0
    code, _, err = train(run, "--data", "sea", "--name", "m")
    assert code == 2
    assert "validation split of 'sea' has 7 tokens" in err


def test_w14_files_with_brackets_are_trained_on_by_name(run: Run, write: Any, text: str) -> None:
    write("notes[1].txt", text)
    write("notes1.txt", "Another text altogether. " * 40)
    assert run("prepare", "notes[1].txt", "-q")[1] == "notes-1\n"
    assert train(run, "--data", "notes[1].txt", "--name", "m")[0] == 0
    source = json.loads(Path("weights/m/v1/manifest.json").read_text())["data"]
    assert source["name"] == "notes-1"
    [row] = json.loads(run("eval", "m", "--data", "notes[1].txt", "--json")[1])["models"]
    assert row["tokens"] == len(text) - 1


@pytest.mark.parametrize("name", ["prompt.txt", "-"])
def test_w15_a_prompt_counts_the_byte_order_mark(run: Run, write: Any, name: str, monkeypatch: Any) -> None:
    import io
    import sys

    write("sea.txt")
    assert train(run, "--data", "sea.txt", "--name", "m")[0] == 0
    raw = b"\xef\xbb\xbfthe \xff ship"
    write("prompt.txt", raw)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    code, _, err = run("sample", "m", *(["-"] if name == "-" else ["--prompt-file", name]))
    assert code == 2
    assert "byte 7 is 0xff" in err


def test_w15_a_config_counts_the_byte_order_mark(run: Run, write: Any) -> None:
    write("m.json", b'\xef\xbb\xbf{"name": "caf\xe9"}')
    code, _, err = run("config", "check", "m.json")
    assert code == 2
    assert "byte 16 is 0xe9" in err


@pytest.mark.parametrize("damage", ["flip", "zero", "large id"])
def test_f3_damaged_tokens_neither_train_nor_evaluate(run: Run, write: Any, damage: str) -> None:
    write("sea.txt")
    assert train(run, "--data", "sea.txt", "--name", "m")[0] == 0
    for split in ("train", "val"):
        file = Path(f"data/sea/{split}.bin")
        ids = np.fromfile(file, "<u2")
        if damage == "zero":
            ids[:] = 0
        else:
            ids[3] ^= 1 if damage == "flip" else 0x8000
        ids.tofile(file)
    for arguments in (
        ["train", "--data", "sea", "--name", "n", *SHAPE.split()],
        ["eval", "m", "--data", "sea"],
    ):
        code, _, err = run(*arguments)
        assert code == 5, err
        assert "dataset 'sea'" in err
        assert "quill prepare sea.txt --name sea --force" in err
    assert run("prepare", "sea.txt", "--name", "sea", "--force")[0] == 0
    assert run("eval", "m", "--data", "sea")[0] == 0


def test_a_file_that_shrinks_while_training_ends_the_run(run: Run, write: Any, monkeypatch: Any) -> None:
    from quill.data.shards import Shard

    write("sea.txt")
    assert run("prepare", "sea.txt")[0] == 0
    rows, calls = Shard.rows, [0]

    def shrinking(self: Shard, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 20:
            os.truncate("data/sea/train.bin", 10)
        return rows(self, *arguments)

    monkeypatch.setattr(Shard, "rows", shrinking)
    code, _, err = train(run, "--data", "sea", "--name", "m", steps=200)
    assert code == 5
    assert "became shorter while it was in use" in err
