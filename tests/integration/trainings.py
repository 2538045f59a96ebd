"""Trainings in processes of their own, started in no time: forks of one that has imported everything.

A child runs the command line itself, `quill.cli.app.main`, with its standard streams in files, so that what
it had said by the moment it died can be read.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Imported once, in the process that the others are forks of.
PRELOADED = (
    "pytest",
    "torch",
    "torch._dynamo",  # What the first optimizer imports takes longer than a training.
    "safetensors.torch",
    "quill.training.run",
    "quill.cli.app",
    "quill.cli.train",
    "quill.cli._training_display",
    "quill.training.sharding",
)

# Small, and with best weights that are not the last: the rate is far too high to end well.
SETTINGS = (
    "--n-layer=2", "--n-head=2", "--n-embd=16", "--block-size=16", "--dropout=0.1", "--batch-size=4",
    "--optimizer=adamw", "--learning-rate=0.3", "--min-lr=0.3", "--warmup-iters=0", "--max-iters=24",
    "--eval-interval=3", "--log-interval=1", "--device=cpu", "--dtype=float32", "--compile=off",
)  # fmt: skip


def start(arguments: Sequence[str], folder: Path, said: Path, fault: Any = None) -> BaseProcess:
    """Run quill in a process of its own.

    Args:
        arguments: As after the program's name.
        folder: Where it runs.
        said: The file of its standard output; its stderr goes to the same name with `.err`.
        fault: Called in the child before it begins; it can be pickled.

    Returns:
        The process, running.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    process = context.Process(target=_child, args=(list(arguments), str(folder), str(said), fault))
    process.start()
    return process


def _child(arguments: list[str], folder: str, said: str, fault: Any) -> None:
    import torch

    from quill.cli.app import main

    # The pool of threads does not survive a fork, and one is enough.
    torch.set_num_threads(1)
    # What is killed loses nothing that it wrote, synced or not.
    os.fsync = lambda fd: None
    os.chdir(folder)
    for fd, path in ((1, said), (2, said + ".err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
    if fault is not None:
        fault()
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def fault_at(k: int | None, way: str, told: str) -> None:
    """Have the k-th write operation of this process struck, or all from there on.

    Args:
        k: Which, from 0; None for none at all.
        way: "exit" ends the process there; "enospc" and "eio" refuse the operation, with "lasting" all
            from there on; "short" lets every write take but half of its bytes.
        told: A file that gets the name of every operation up to there, a line each.
    """
    import pytest
    from crashing import NEEDS_NO_ROOM, intercept

    number, count = errno.EIO if way.startswith("eio") else errno.ENOSPC, -1

    def strike(name: str) -> str | None:
        nonlocal count
        count += 1
        if k is None or count <= k:
            with open(told, "a") as file:
                file.write(name + "\n")
        if way == "short":
            return "half"
        if k is None or count < k or (count > k and not way.endswith("lasting")):
            return None
        if way == "exit":
            os._exit(9)
        if number == errno.ENOSPC and name in NEEDS_NO_ROOM:
            return None
        raise OSError(number, os.strerror(number))

    intercept(pytest.MonkeyPatch(), strike)


def no_flock() -> None:
    """Have flock say yes to everybody, as on some network filesystems."""
    fcntl.flock = lambda fd, how: None


def join(rank: int, size: int, port: int) -> None:
    """Make this process one of several that share a run, as torch's launcher does."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start_together(
    size: int, arguments: Sequence[str], folder: Path, said: Path, joining: Callable[..., None] = join
) -> list[BaseProcess]:
    """Run quill in processes that share a run, the leader first; only its output goes to `said`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [said, *(said.with_name(f"{said.name}-{rank}") for rank in range(1, size))]
    return [
        start(arguments, folder, output, functools.partial(joining, rank, size, port))
        for rank, output in enumerate(outputs)
    ]


def until(said: Path, event: str, times: int = 1) -> None:
    """Wait until a training has told of an event so often."""
    deadline = time.monotonic() + 60
    while sum(e["event"] == event for e in events(said)) < times:
        assert time.monotonic() < deadline, said.with_name(said.name + ".err").read_text()
        time.sleep(0.002)


def send(process: BaseProcess, number: int) -> None:
    """Send a process a signal; that it is gone already is fine."""
    with suppress(ProcessLookupError):
        os.kill(process.pid or 0, number)


def finish(process: BaseProcess, seconds: float = 60.0) -> int:
    """Wait for a process; its exit code, negative where a signal ended it."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"it was not done after {seconds:g} s")
    return process.exitcode


def events(said: Path) -> list[dict[str, Any]]:
    """What a training told with --json before it ended; a last line that was cut off is left out."""
    lines = said.read_text(encoding="utf-8").split("\n") if said.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def reached(said: Path) -> str:
    """How far a training had come, as a word: "starting", "stepping", "evaluating" and so on."""
    told = events(said)
    if not told:
        return "starting"
    last = told[-1]
    kind = last["event"]
    if kind == "stepped":
        due = last["step"] % 3 == 0
        return "evaluating" if due else "stepping"
    if kind == "saved" and last["step"] == 24:
        return "publishing"
    words = {"stage": "starting", "evaluated": "saving", "finished": "ending", "result": "ending"}
    return words.get(kind, "stepping")


def result(folder: Path) -> dict[str, Any]:
    """What must be the same however often a training was interrupted."""
    manifest = json.loads((folder / "manifest.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    names = ("model.safetensors", "tokenizer.json")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        **{n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names},
        **{k: manifest[k] for k in ("steps", "best_step", "best_val_loss", "data", "seeds", "parameters")},
        "config": {k: v for k, v in config.items() if k != "name"},
        "metrics": [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in metrics],
    }
