"""Whole commands where the machine around them is not as one would wish.

A clock that jumps, a registry that cannot be written or is not there, a disk without room, no network.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from quill.cli.app import main
from quill.registry import aliases, gc
from quill.registry.store import Registry

TINY = (
    "--data=tiny", "--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=16", "--batch-size=4",
    "--warmup-iters=0", "--max-iters=4", "--eval-interval=2",
    "--device=cpu", "--dtype=float32", "--compile=off",
)  # fmt: skip
NOBODY = 65534


@pytest.fixture
def here(tiny_registry, tmp_path, monkeypatch) -> Path:
    """A folder with the model `tiny` and its data, where commands run."""
    shutil.copytree(tiny_registry.root, tmp_path / "weights")
    shutil.copytree(tiny_registry.root.parent / "data", tmp_path / "data")
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def told(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def clock(monkeypatch) -> Callable[[Iterator[float]], None]:
    """Set the wall clock: each look at it gives the next of some times, in seconds since the epoch."""
    gmtime, localtime = time.gmtime, time.localtime

    def set_to(times: Iterator[float]) -> None:
        monkeypatch.setattr(time, "time", lambda: next(times))
        monkeypatch.setattr(time, "time_ns", lambda: int(next(times) * 1e9))
        monkeypatch.setattr(time, "gmtime", lambda s=None: gmtime(next(times) if s is None else s))
        monkeypatch.setattr(time, "localtime", lambda s=None: localtime(next(times) if s is None else s))

    return set_to


def jumping(start: float) -> Iterator[float]:
    """A clock that goes back a year, forward a century, and through the hour that DST repeats."""
    while True:
        for jump in (0.0, -86400.0 * 365, 3600.0, 86400.0 * 36500, -3600.0, 0.5):
            yield start + jump


def test_f38_durations_are_no_matter_of_the_wall_clock(here, clock, capsys):
    began = time.monotonic()
    clock(jumping(1.79e9))
    assert main(["train", *TINY, "--name=m", "--json"]) == 0
    passed = time.monotonic() - began
    events = told(capsys)
    stepped = [e for e in events if e["event"] == "stepped"]
    seconds = [e["seconds"] for e in stepped]
    assert seconds == sorted(seconds)
    assert all(0 <= s <= passed for s in seconds)
    assert all(e["tokens_per_second"] > 0 for e in stepped)
    assert all(0 <= e["seconds"] <= passed for e in events if e["event"] == "evaluated")
    manifest = events[-1]["manifest"]
    assert 0 <= manifest["seconds"] <= passed + 0.1
    assert main(["train", *TINY, "--name=limited", "--max-minutes=10", "-q"]) == 0
    assert capsys.readouterr().out == "limited:v1\n", "ten minutes were not over, whatever the clock said"
    for command in (["list"], ["show", "m"], ["doctor"], ["gc", "--dry-run"], ["verify"], ["logs", "m"]):
        assert main(command) == 0, capsys.readouterr().err


def test_f38_the_newest_version_is_the_highest_and_not_the_last_by_the_clock(here, clock, capsys):
    created = []
    for year, rate in ((2040, "1e-3"), (1999, "2e-3"), (2020, "3e-3")):
        clock(iter(lambda y=year: (y - 1970) * 31556952.0 + 86400 * 30, None))
        assert main(["train", *TINY, "--name=m", f"--learning-rate={rate}", "--new-version", "--json"]) == 0
        created.append(told(capsys)[-1]["manifest"]["created"][:4])
    assert created == ["2040", "1999", "2020"]
    registry = Registry(here / "weights")
    assert registry.resolve("m").number == registry.resolve("m:latest").number == 3
    assert [v.number for v in registry.entries("m", all_versions=True)] == [1, 2, 3]
    assert [v.number for v in gc.prune(registry, "m", 1)] == [1, 2], "keep means the newest by number"
    assert main(["list", "m", "-q"]) == 0
    assert capsys.readouterr().out == "m:v3\n"


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kathmandu", "Europe/Berlin"])
def test_f38_times_are_utc_also_in_the_hour_that_dst_repeats(here, clock, monkeypatch, zone, capsys):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        clock(iter(lambda: 1792891800.0, None))  # 2026-10-25T01:30Z; in Berlin 2:30, for the second time
        assert main(["train", *TINY, "--name=m", "--json"]) == 0
        assert told(capsys)[-1]["manifest"]["created"] == "2026-10-25T01:30:00Z"
        clock(iter(lambda: 1792891800.0 + 3600, None))
        assert main(["list", "m"]) == 0
        assert "1 hour ago" in capsys.readouterr().out
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


@pytest.fixture
def sealed(tiny_registry) -> Iterator[Path]:
    """A folder that whoever runs `as_a_reader` can read and cannot write, with `tiny` and its data."""
    folder = Path(tempfile.mkdtemp(prefix="quill-sealed-"))
    shutil.copytree(tiny_registry.root, folder / "weights")
    shutil.copytree(tiny_registry.root.parent / "data", folder / "data")
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in paths:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def as_a_reader(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run a command as somebody without rights (modes do not keep root out); its exit code and stderr."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.chdir(folder)
            os.environ["QUILL_REGISTRY"] = str(folder / "weights")
            os.environ["HOME"] = "/nonexistent"
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(write, 2)
            import sys

            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
            code = main([*arguments, "--debug"])
            sys.stderr.flush()
            os._exit(code)
        finally:
            os._exit(99)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        text = said.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


READS = (
    ("list", "--all-versions"),
    ("show", "tiny"),
    ("show", "tiny", "--lineage"),
    ("show", "tiny", "--metrics"),
    ("config", "show", "tiny"),
    ("sample", "tiny", "--max-new-tokens=5"),
    ("eval", "tiny"),
    ("verify",),
    ("logs", "tiny"),
    ("compare", "tiny", "tiny:v1"),
    ("alias", "list"),
    ("gc", "--dry-run"),
    ("train", *TINY, "--name=new", "--dry-run"),
)
WRITES = (
    ("train", *TINY, "--name=new"),
    ("train", *TINY, "--name=tiny", "--new-version", "--seed=5"),
    ("cp", "tiny", "other"),
    ("mv", "tiny", "other"),
    ("rm", "tiny", "-y"),
    ("alias", "set", "tiny:v1", "best"),
    ("prepare", "data/tiny/manifest.json", "--name=other"),
    ("export", "tiny", "-f", "hf"),
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_f41_a_registry_that_cannot_be_written_is_read_and_every_write_exits_7(sealed):
    import torch

    torch.set_num_threads(1)
    before = snapshot(sealed)
    for arguments in READS:
        code, said = as_a_reader(sealed, *arguments)
        assert code == 0, (arguments, said)
    for arguments in WRITES:
        code, said = as_a_reader(sealed, *arguments)
        assert code == 7, (arguments, said)
        assert "permission" in said.lower(), said
        assert "Traceback" not in said
    code, said = as_a_reader(sealed, "doctor", "-q")
    assert code == 7, "doctor says what would be in the way"
    assert snapshot(sealed) == before


def test_f41_a_registry_that_is_not_there_is_empty_and_no_reader_makes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "not" / "yet"))
    monkeypatch.chdir(tmp_path)
    for command, code in (
        (["list"], 0),
        (["verify"], 0),
        (["gc"], 0),
        (["doctor"], 0),
        (["alias", "list"], 0),
        (["show", "m"], 3),
        (["sample", "m"], 3),
        (["eval", "m"], 3),
        (["logs", "m"], 3),
        (["rm", "m", "-y"], 3),
        (["cp", "m", "n"], 3),
        (["mv", "m", "n"], 3),
    ):
        assert main(command) == code, capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [], command


def test_f26_a_disk_without_room_is_refused_before_the_first_step(here, monkeypatch, capsys):
    usage = SimpleNamespace(total=10**9, used=10**9 - 5000, free=5000)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage)
        assert main(["train", *TINY, "--name=m", "--json"]) == 7
    out, err = capsys.readouterr()
    assert {json.loads(line)["event"] for line in out.splitlines()} <= {"stage"}
    assert "not enough disk" in err
    assert "df -h" in err
    assert Registry(here / "weights").newest("m") is None
    assert main(["train", *TINY, "--name=m", "-q"]) == 0
    assert capsys.readouterr().out == "m:v1\n"


@pytest.fixture
def unreachable(monkeypatch) -> list[object]:
    """Every attempt to reach anybody; each fails as without a network."""
    tried: list[object] = []

    def fail(*arguments: object, **more: object) -> None:
        tried.append(arguments[1:] or arguments)
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket.socket, "connect_ex", fail)
    monkeypatch.setattr(socket, "create_connection", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    return tried


def test_f50_every_command_works_without_a_network_and_asks_for_none(here, unreachable, capsys):
    (here / "text.txt").write_text("".join(f"line {n} of {n * n}.\n" for n in range(300)))
    for command in (
        ["prepare", "text.txt", "--name=text"],
        ["train", *TINY, "--name=m"],
        ["train", *TINY, "--name=m", "--seed=2", "--new-version", "--from=tiny"],
        ["sample", "m", "--max-new-tokens=20"],
        ["eval", "m", "tiny"],
        ["list"],
        ["show", "m"],
        ["show", "m", "--lineage"],
        ["show", "m", "--metrics"],
        ["compare", "m:v1", "m:v2"],
        ["logs", "m"],
        ["config", "show", "m"],
        ["config", "schema"],
        ["cp", "m:v1", "n"],
        ["alias", "set", "n:v1", "best"],
        ["alias", "list"],
        ["mv", "n", "o"],
        ["alias", "rm", "o:best"],
        ["rm", "o:v1", "-y"],
        ["verify"],
        ["gc"],
        ["doctor"],
        ["export", "m", "-f", "hf", "-o", "exported"],
        ["import", "exported", "--name=again"],
        ["completion", "bash"],
    ):
        assert main(command) == 0, (command, capsys.readouterr().err)
    assert unreachable == []
    assert aliases.read(here / "weights" / "o")["next_version"] == 2


def test_f50_what_needs_a_network_says_so_and_what_to_do_instead(here, unreachable, monkeypatch, capsys):
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.setenv(name, str(here / "no-cache"))
    for command in (["prepare", "shakespeare"], ["prepare", "data/tiny/manifest.json", "--tokenizer=gpt2"]):
        assert main(command) == 7, capsys.readouterr().err
        said = capsys.readouterr().err
        assert "https://" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_f49_the_home_of_nobody_is_a_folder_like_any_other(here, monkeypatch, capsys, home):
    if home is None:
        monkeypatch.delenv("HOME", raising=False)
    else:
        monkeypatch.setenv("HOME", home)
    nobody = "~nosuchuser/x"
    for command, code in (
        (["list", f"--registry={nobody}"], 0),
        (["show", nobody], 3),
        (["sample", f"./{nobody}"], 3),
        (["import", nobody, "--name=a"], 3),
        (["prepare", nobody, "--name=a"], 3),
        (["export", "tiny", "-f", "gguf", "-o", nobody], 0),
    ):
        assert main(command) == code, (command, capsys.readouterr().err)
    monkeypatch.setenv("QUILL_DATA", nobody)
    assert main(["doctor"]) in (0, 7)
    assert "bug of its own" not in capsys.readouterr().err
