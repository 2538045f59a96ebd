"""Training and evaluating with datasets, through the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
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
def test_a_dataset_without_a_validation_split_trains(run: Run, write: Any, flags: list[str]) -> None:
    write("sea.txt")
    assert run("prepare", "sea.txt", "--val-fraction", "0")[0] == 0
    code, out, err = train(run, "--data", "sea", "--name", "m", *flags)
    assert (code, out) == (0, "m:v1\n"), err
    code, _, err = run("eval", "m")
    assert code == 2
    assert "has no validation split" in err
    assert "quill eval m --split train" in err
    assert run("eval", "m", "--split", "train")[0] == 0


def test_a_validation_split_that_is_too_short_is_still_refused(run: Run, write: Any) -> None:
    write("sea.txt")
    assert run("prepare", "sea.txt", "--val-fraction", "0.001")[0] == 0
    code, _, err = train(run, "--data", "sea", "--name", "m")
    assert code == 2
    assert "validation split of 'sea' has 7 tokens" in err


def test_files_with_brackets_are_trained_on_by_name(run: Run, write: Any, text: str) -> None:
    write("notes[1].txt", text)
    write("notes1.txt", "Another text altogether. " * 40)
    assert run("prepare", "notes[1].txt", "-q")[1] == "notes-1\n"
    assert train(run, "--data", "notes[1].txt", "--name", "m")[0] == 0
    source = json.loads(Path("weights/m/v1/manifest.json").read_text())["data"]
    assert source["name"] == "notes-1"
    [row] = json.loads(run("eval", "m", "--data", "notes[1].txt", "--json")[1])["models"]
    assert row["tokens"] == len(text) - 1


@pytest.mark.parametrize("name", ["prompt.txt", "-"])
def test_a_prompt_counts_the_byte_order_mark(run: Run, write: Any, name: str, monkeypatch: Any) -> None:
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


def test_a_config_counts_the_byte_order_mark(run: Run, write: Any) -> None:
    write("m.json", b'\xef\xbb\xbf{"name": "caf\xe9"}')
    code, _, err = run("config", "check", "m.json")
    assert code == 2
    assert "byte 16 is 0xe9" in err


@pytest.mark.parametrize("damage", ["flip", "zero", "large id"])
def test_f3_f51_damaged_tokens_neither_train_nor_evaluate(run: Run, write: Any, damage: str) -> None:
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "manifest.json"])
def test_f17_a_fifo_or_device_in_a_dataset_is_refused_at_once(
    run: Run, write: Any, name: str, kind: str
) -> None:
    write("sea.txt")
    assert run("prepare", "sea.txt")[0] == 0
    file = Path("data/sea", name)
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    for arguments in (
        ["train", "--data", "sea", "--name", "n", *SHAPE.split()],
        ["show", "data:sea"],
        ["verify"],
    ):
        assert run(*arguments)[0] == 5
    assert run("list", "--data", "-q")[:2] == (0, "data:sea\n")


def test_f51_any_flipped_bit_ends_training_and_evaluation(run: Run, write: Any, injections: Any) -> None:
    write("sea.txt")
    assert train(run, "--data", "sea.txt", "--name", "m")[0] == 0
    random, evaluate = Random(1), ["eval", "m", "--data", "sea"]
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        file = Path("data/sea", name)
        whole = file.read_bytes()
        for _ in range(10):
            raw = bytearray(whole)
            raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
            file.write_bytes(raw)
            for command in (["train", "--data", "sea", "--name", "n", *SHAPE.split()], evaluate):
                # An evaluation reads only one split.
                if command[0] == "train" or name != "train.bin":
                    code, out, err = run(*command)
                    assert (code, out) == (5, ""), err
                    assert "bug" not in err
        file.write_bytes(whole)
        injections.add("a dataset", "bit flipped", 10)
    assert run(*evaluate)[0] == 0
    assert not Path("weights/n").exists()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_f52_a_file_that_shrinks_while_it_is_read_ends_the_run(
    run: Run, write: Any, command: str, monkeypatch: Any
) -> None:
    from quill.data.shards import Shard

    write("sea.txt")
    assert train(run, "--data", "sea.txt", "--name", "m")[0] == 0
    rows, calls = Shard.rows, [0]

    def shrinking(self: Shard, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 20 or command == "eval":
            os.truncate("data/sea/train.bin", 10)
        return rows(self, *arguments)

    monkeypatch.setattr(Shard, "rows", shrinking)
    if command == "train":
        code, _, err = train(run, "--data", "sea", "--name", "n", steps=200)
    else:
        code, _, err = run("eval", "m", "--split", "train")
    assert code == 5
    assert "became shorter while it was in use" in err


def _states(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of each file; inode and time of the folder itself."""
    own = folder.stat()
    found = {".": (own.st_ino, own.st_mtime_ns, b"")}
    for path in folder.rglob("*"):
        file = path.stat()
        found[str(path)] = (file.st_ino, file.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    return found


@pytest.mark.parametrize("what", ["sea", ".verified", ".downloads", ".trash"])
def test_f57_nothing_is_written_through_a_link_in_the_data_root(
    run: Run, write: Any, settled: None, what: str, tmp_path: Path
) -> None:
    write("sea.txt")
    assert run("prepare", "sea.txt")[0] == 0
    outside, link = tmp_path / "outside", tmp_path / "data" / what
    if link.exists():
        link.rename(outside)
    else:
        outside.mkdir()
    (outside / "precious").write_bytes(b"x")
    before = _states(outside)
    link.symlink_to(outside)
    assert run("prepare", "sea.txt")[0] == 0
    os.utime("sea.txt")
    run("prepare", "sea.txt")
    run("train", "--data", "sea", "--name", "m", *SHAPE.split(), "--max-iters", "2")
    write("sea.txt", "Another text altogether.\n" * 90)
    run("prepare", "sea.txt")
    run("prepare", "sea.txt", "--name", "sea", "--force")
    run("prepare", "sea.txt", "--name", "other")
    run("gc", "--older-than", "0")
    run("rm", "data:other", "data:sea", "-y")
    assert _states(outside) == before


# Listing, showing, verifying and removing


@pytest.fixture
def two(run: Run, write: Any, text: str) -> Run:
    """Two datasets: `sea` by characters and `land` by words."""
    write("sea.txt", text)
    write("land.txt", "No water here, none at all.\n" * 30)
    assert run("prepare", "sea.txt")[0] == 0
    assert run("prepare", "land.txt", "--tokenizer", "word")[0] == 0
    return run


def test_list_shows_datasets(two: Run, text: str, tmp_path: Path) -> None:
    code, out, err = two("list", "--data")
    assert code == 0
    header, land, sea = out.splitlines()
    assert header.split() == ["DATASET", "TOKENIZER", "VOCABULARY", "TRAIN", "VAL", "SIZE", "WHEN", "STATE"]
    assert land.split()[0] == "data:land"
    assert " word " in land
    assert sea.split()[0] == "data:sea"
    assert " char " in sea
    assert str(tmp_path / "data") in err
    document = json.loads(two("list", "--data", "--json")[1])
    assert document["schema"] == "quill.datasets/1"
    assert [d["reference"] for d in document["datasets"]] == ["data:land", "data:sea"]
    found = document["datasets"][1]
    assert found["train_tokens"] + found["val_tokens"] == len(text)
    assert found["bytes"] == sum(f.stat().st_size for f in Path("data/sea").iterdir()) - (
        Path("data/sea/manifest.json").stat().st_size
    )
    assert two("list", "--data", "-q")[1] == "data:land\ndata:sea\n"
    assert two("list", "--data", "s*", "-q")[1] == two("list", "--data", "data:s*", "-q")[1] == "data:sea\n"
    assert two("list", "--data", "--sort", "size", "-q")[1].splitlines()[0] == "data:sea"
    assert two("list", "--data", "--sort", "loss")[0] == 2
    assert two("list", "--data", "--all-versions")[0] == 2
    assert two("list", "-q")[1] == ""


def test_list_shows_damaged_datasets(two: Run) -> None:
    Path("data/land/train.bin").write_bytes(b"")
    code, out, _ = two("list", "--data")
    assert code == 0
    assert "damaged: train.bin has 0 bytes" in out
    [land, sea] = json.loads(two("list", "--data", "--json")[1])["datasets"]
    assert (land["state"], sea["state"]) == ("damaged", "ok")
    assert "data:land" in two("doctor")[1]


def test_list_without_datasets_says_so(run: Run) -> None:
    code, out, err = run("list", "--data")
    assert (code, out) == (0, "")
    assert "quill prepare" in err
    assert json.loads(run("list", "--data", "--json")[1])["datasets"] == []


def test_show_describes_a_dataset(two: Run, text: str, tmp_path: Path) -> None:
    import hashlib

    code, out, _ = two("show", "data:sea")
    assert code == 0
    for expected in ("data:sea", "char, vocabulary of", "sea.txt", hashlib.sha256(text.encode()).hexdigest()):
        assert expected in out
    assert all(line in out for line in text.splitlines()[:5])
    document = json.loads(two("show", "data:sea", "--json")[1])
    assert document["alphabet"] == "".join(sorted(set(text)))
    assert document["starts"] == text.splitlines()[:5]
    assert json.loads(two("show", "data:land", "--json")[1])["alphabet"] is None
    assert two("show", "data:sea", "-q")[1] == "data:sea\n"
    assert two("show", "data:sea", "--path")[1] == f"{tmp_path / 'data' / 'sea'}\n"
    assert two("show", "data:sea", "--config")[0] == 2
    code, _, err = two("show", "data:see")
    assert code == 3
    assert "quill show data:sea" in err
    assert two("show", "data:../sea")[0] == 2


def test_show_cuts_a_long_list_of_sources(two: Run) -> None:
    file = Path("data/sea/manifest.json")
    manifest = json.loads(file.read_text())
    manifest["source"]["given"] = [f"{i}.txt" for i in range(1000)]
    file.write_text(json.dumps(manifest))
    assert "7.txt and 992 more\n" in two("show", "data:sea")[1]


def test_verify_covers_datasets(two: Run) -> None:
    code, out, _ = two("verify")
    assert code == 0
    assert "data:land" in out
    assert "data:sea" in out
    assert [r["kind"] for r in json.loads(two("verify", "--json")[1])["verified"]] == ["dataset"] * 2
    file = Path("data/sea/val.bin")
    file.write_bytes(bytes(file.stat().st_size))
    code, out, err = two("verify")
    assert code == 5
    assert "val.bin does not match its sha256" in out
    assert "quill prepare sea.txt --name sea --force" in err
    assert two("verify", "data:land")[0] == 0
    assert two("verify", "data:sea", "-q")[:2] == (5, "data:sea\n")
    assert two("verify", "data:see")[0] == 3
    Path("data/land/manifest.json").write_text("{")
    assert two("verify", "data:land")[0] == 5


def test_rm_removes_datasets_after_a_confirmation(two: Run) -> None:
    code, _, err = two("rm", "data:sea")
    assert code == 2
    assert "quill rm data:sea --yes" in err
    assert two("rm", "data:sea", "--dry-run")[:2] == (0, "data:sea\n")
    assert Path("data/sea").exists()
    assert two("rm", "data:sea", "data:nonesuch", "-y")[0] == 3
    assert Path("data/sea").exists()
    assert two("rm", "data:sea", "data:nonesuch", "-y", "--missing-ok")[:2] == (0, "data:sea\n")
    assert two("list", "--data", "-q")[1] == "data:land\n"


def test_rm_removes_models_and_datasets_together(two: Run) -> None:
    assert train(two, "--data", "sea", "--name", "m")[0] == 0
    assert two("rm", "m", "data:land", "-y")[1].split() == ["m:v1", "data:land"]
    assert not Path("weights/m/v1").exists()


def test_rm_refuses_a_dataset_in_use(two: Run) -> None:
    from quill.data.dataset import Dataset

    opened = Dataset.open(Path("data/sea"))
    assert len(opened.train)
    code, _, err = two("rm", "data:land", "data:sea", "-y")
    assert code == 75
    assert "dataset 'sea' is in use" in err
    assert two("list", "--data", "-q")[1] == "data:land\ndata:sea\n"


# Named texts without a network


@pytest.fixture
def offline(monkeypatch: Any) -> None:
    """No network: connections are refused."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.fixture
def named(monkeypatch: Any, text: str, offline: None) -> str:
    """A short text that is known as `shakespeare`."""
    import hashlib

    from quill.data.named_sources import NAMED, Named

    raw = text.encode()
    entry = Named("a text", url="https://localhost/x", size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    monkeypatch.setitem(NAMED, "shakespeare", entry)
    return text


def test_f50_a_missing_named_text_names_one_command(run: Run, offline: None, tmp_path: Path) -> None:
    for arguments in (["prepare", "shakespeare"], ["train", "--data", "shakespeare", *SHAPE.split()]):
        code, _, err = run(*arguments)
        assert code == 7
        assert "tiny Shakespeare" in err
        [hint] = [line for line in err.splitlines() if line.startswith("  try: ")]
        assert hint.startswith(
            f"  try: curl --create-dirs -o {tmp_path}/data/.downloads/shakespeare.txt https://"
        )


def test_f50_a_text_placed_by_hand_serves_a_named_text(run: Run, write: Any, named: str) -> None:
    write("data/.downloads/shakespeare.txt", named)
    assert train(run, "--data", "shakespeare", "--name", "m")[0] == 0


def test_f50_a_dataset_of_the_same_text_serves_a_named_text(run: Run, write: Any, named: str) -> None:
    write("input.txt", named.replace("\n", "\r\n"))
    assert run("prepare", "input.txt", "--name", "whatever")[1] == "whatever\n"
    assert train(run, "--data", "shakespeare", "--name", "shakespeare")[0] == 0
    assert json.loads(Path("weights/shakespeare/v1/manifest.json").read_text())["data"]["name"] == "whatever"
    assert run("list", "--data", "-q")[1] == "data:whatever\n"
    [row] = json.loads(run("eval", "shakespeare", "--json")[1])["models"]
    assert row["data"] == "whatever/val"


@pytest.mark.parametrize("flags", [["--tokenizer", "char", "--val-fraction", "0.3"], ["--tokenizer", "word"]])
def test_f50_a_dataset_with_other_settings_gives_back_the_text(
    run: Run, write: Any, named: str, flags: list[str]
) -> None:
    write("input.txt", named)
    assert run("prepare", "input.txt", "--name", "whatever", *flags)[0] == 0
    Path("input.txt").unlink()
    assert train(run, "--data", "shakespeare", "--name", "m")[0] == 0
    assert json.loads(Path("weights/m/v1/manifest.json").read_text())["data"]["name"] == "shakespeare"
    assert Path("data/.downloads/shakespeare.txt").read_text() == named


def test_f50_other_or_damaged_datasets_do_not_serve_a_named_text(run: Run, write: Any, named: str) -> None:
    write("input.txt", named + "more")
    assert run("prepare", "input.txt", "--name", "other")[0] == 0
    write("same.txt", named)
    assert run("prepare", "same.txt", "--name", "same", "--tokenizer", "word")[0] == 0
    file = Path("data/same/train.bin")
    file.write_bytes(bytes(file.stat().st_size))
    assert train(run, "--data", "shakespeare", "--name", "m")[0] == 7
    assert not Path("data/.downloads/shakespeare.txt").exists()
