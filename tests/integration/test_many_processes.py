"""A run shared by several processes on the CPU: the same model as in one, and nothing lost if one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import trainings
from together import SECONDS, assert_alike
from trainings import events, finish, start_together, until

from quill.registry.store import Registry

MUON = ("--optimizer=muon", "--muon-coefficients=polar_express", "--ema-decay=0.9", "--token-dropout=0.1")


@pytest.mark.parametrize(
    ("size", "more"), [(2, MUON), pytest.param(4, (), marks=pytest.mark.slow)], ids=["two", "four"]
)
def test_the_losses_are_those_of_one_process(here, size, more):
    """Two processes take one forward pass of the step each; four take half of one.

    What is rounded otherwise in halves, Muon magnifies until steps differ.
    """
    here.run_alone("one", *more)
    here.run("many", size, *more)
    assert len(here.curve("one")) == 52
    assert_alike(here.curve("many"), here.curve("one"))
    losses = [Registry(here.weights).resolve(name).facts["best_val_loss"] for name in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_dropout_and_masked_losses_are_those_of_one_process_too(here):
    """A process draws the masks of its own forward passes, by their numbers in the whole step."""
    more = ("--dropout=0.2", "--masked-loss-weight=0.5")
    here.run_alone("one", *more)
    here.run("two", 2, *more)
    assert_alike(here.curve("two"), here.curve("one"))


@pytest.mark.slow
def test_the_same_command_gives_the_same_weights_bit_for_bit(here):
    here.run("first", 2)
    here.run("again", 2)
    first, again = here.tensors("first"), here.tensors("again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
def test_a_run_resumes_in_another_number_of_processes(here):
    here.run_alone("one")
    pause = ("--no-publish", "--max-minutes=1e-9")
    here.run("changing", 2, *pause)
    here.run("changing", 4, *pause)
    here.run_alone("changing", *pause)
    here.run("changing", 2)
    steps = [e["step"] for e in events(here.folder / "changing-2") if e["event"] == "started"]
    assert steps == [3]
    assert_alike(here.curve("changing"), here.curve("one"))


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_f28_killed_processes_end_the_others_within_seconds(here, lost):
    """If the leader is left, it saves the step that was reached; if not, the last saved state is there."""
    here.run_alone("one")
    said = here.folder / "said"
    processes = start_together(
        2, here.arguments("m", "--max-iters=100000", "--eval-interval=20"), here.folder, said
    )
    until(said, "saved")
    trainings.send(processes[lost], signal.SIGKILL)
    assert finish(processes[lost], SECONDS) == -signal.SIGKILL
    assert finish(processes[1 - lost], SECONDS) == 7, here.said(said, 2)
    assert "another process of the run has ended" in here.said(said, 2)
    status = Registry(here.weights).find("m", in_progress=True).status()
    stepped = max(e["step"] for e in events(said) if e["event"] == "stepped")
    assert status["step"] == stepped if lost else status["step"] % 20 == 0
    here.run("m", 2, "--max-iters=100000", "--eval-interval=20", "--no-publish", "--max-minutes=1e-9")
    [started] = [e for e in events(here.folder / "m-2") if e["event"] == "started"]
    assert started["step"] == status["step"]


@pytest.mark.slow
def test_a_signal_to_the_processes_saves_and_ends_them(here):
    said = here.folder / "said"
    processes = start_together(2, here.arguments("m", "--max-iters=100000"), here.folder, said)
    until(said, "stepped")
    for process in reversed(processes):
        trainings.send(process, signal.SIGTERM)
    assert [finish(p, SECONDS) for p in processes] == [128 + signal.SIGTERM, 0]
    stepped = max(e["step"] for e in events(said) if e["event"] == "stepped")
    assert Registry(here.weights).find("m", in_progress=True).status()["step"] == stepped


def test_a_batch_that_cannot_be_divided_is_refused(here):
    said = here.folder / "said"
    processes = start_together(3, here.arguments("m"), here.folder, said)
    assert [finish(p, SECONDS) for p in processes] == [2, 0, 0]
    assert "8 sequences cannot be divided among 3 processes" in said.with_name("said.err").read_text()
    assert "--batch-size 6" in said.with_name("said.err").read_text()


def test_one_process_does_without_torch_distributed(here):
    """torch imports some of it on its own."""
    code = (
        "import sys, torch\n"
        "before = {m for m in sys.modules if m.startswith('torch.distributed')}\n"
        "import quill.training.run\n"
        "assert {m for m in sys.modules if m.startswith('torch.distributed')} == before\n"
        "from quill.cli.app import main\n"
        f"assert main({here.arguments('one', '--max-iters=2')!r}) == 0\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def launched(here):
    """Start `quill train --nproc 2` as a shell does; the processes it starts are found by their parent."""
    running: list[subprocess.Popen[Any]] = []

    def launch(*more: str) -> subprocess.Popen[Any]:
        command = [sys.executable, "-m", "quill", *here.arguments("m", "--nproc=2", *more)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        with (here.folder / "said").open("wb") as out, (here.folder / "said.err").open("wb") as err:
            running.append(subprocess.Popen(command, cwd=here.folder, env=env, stdout=out, stderr=err))
        return running[-1]

    yield launch
    for process in running:
        process.kill()


def ranks(launcher: subprocess.Popen[Any]) -> list[int]:
    """The processes that a launcher has started, the leader first."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(e[5:]): pid for e in env if e.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_f28_the_launcher_reports_a_process_that_was_killed(here, launched):
    launcher = launched("--max-iters=100000", "--eval-interval=20")
    until(here.folder / "said", "saved")
    os.kill(ranks(launcher)[1], signal.SIGKILL)
    began = time.monotonic()
    assert launcher.wait(SECONDS) == 7
    assert time.monotonic() - began < SECONDS
    assert "process 1 of the run was killed by signal 9" in (here.folder / "said.err").read_text()
    stepped = max(e["step"] for e in events(here.folder / "said") if e["event"] == "stepped")
    assert Registry(here.weights).find("m", in_progress=True).status()["step"] == stepped


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves(here, launched, number):
    launcher = launched("--max-iters=100000")
    until(here.folder / "said", "stepped")
    launcher.send_signal(number)
    assert launcher.wait(SECONDS) == 128 + number
    said = (here.folder / "said.err").read_text()
    assert said.count("m:v1 was interrupted at step") == 1
    assert "Traceback" not in said
    stepped = max(e["step"] for e in events(here.folder / "said") if e["event"] == "stepped")
    assert Registry(here.weights).find("m", in_progress=True).status()["step"] == stepped


@pytest.mark.slow
def test_the_launcher_prints_once_and_publishes(here, launched):
    launcher = launched("--max-iters=2")
    assert launcher.wait(120) == 0
    assert [e["event"] for e in events(here.folder / "said")].count("result") == 1
    said = (here.folder / "said.err").read_text().splitlines()
    assert [line.partition(":")[0] for line in said] == ["m", "step 2", "m"]
    assert Registry(here.weights).resolve("m").facts["steps"] == 2


@pytest.mark.slow
def test_the_launcher_ends_with_the_code_of_the_process_that_failed(here, launched):
    launcher = launched("--gradient-accumulation-steps=1", "--batch-size=3")
    assert launcher.wait(120) == 2
