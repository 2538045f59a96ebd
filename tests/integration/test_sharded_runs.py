"""A run whose model is divided among processes: the same model as in one, and nothing lost if one ends."""

from __future__ import annotations

import resource
import signal

import pytest
import torch
import trainings
from together import SECONDS, assert_alike
from trainings import events, finish, start_together, until

from quill.registry.store import Registry

DIVIDED = "--sharding=full"
MUON = (
    "--optimizer=muon", "--muon-coefficients=polar_express", "--ema-decay=0.9", "--token-dropout=0.1",
    "--grad-clip=0",
)  # fmt: skip
PAUSE = ("--no-publish", "--max-minutes=1e-9")


@pytest.mark.parametrize(
    ("size", "more"),
    [(2, MUON), pytest.param(4, ("--no-tie-embeddings",), marks=pytest.mark.slow)],
    ids=["two", "four"],
)
def test_losses_and_published_weights_are_those_of_one_process(here, size, more):
    """The norm over shares is rounded otherwise, which Muon would magnify if gradients were clipped by it."""
    here.run_alone("one", *more)
    here.run("many", size, DIVIDED, "--sample-every=25", *more)
    assert f"among {size} processes" in here.said(here.folder / f"many-{size}")
    assert_alike(here.curve("many"), here.curve("one"))
    assert len(here.curve("one")) == 52
    told = [e["event"] for e in events(here.folder / f"many-{size}")]
    assert told.count("sampled") == 2
    one, many = here.tensors("one"), here.tensors("many")
    assert many.keys() == one.keys()
    assert ("lm_head.weight" in many) is bool("--no-tie-embeddings" in more)
    for name, tensor in many.items():
        assert torch.allclose(tensor, one[name], atol=2e-4), name


@pytest.mark.slow
def test_a_run_resumes_divided_among_others_or_not_at_all(here):
    more = ("--ema-decay=0.9",)
    here.run_alone("one", *more)
    here.run("changing", 2, DIVIDED, *more, *PAUSE)
    here.run("changing", 4, DIVIDED, *more, *PAUSE)
    here.run_alone("changing", *more, *PAUSE)
    here.run("changing", 4, "--sharding=off", *more, *PAUSE)
    here.run("changing", 2, DIVIDED, *more)
    [started] = [e for e in events(here.folder / "changing-2") if e["event"] == "started"]
    assert started["step"] == 4
    assert_alike(here.curve("changing"), here.curve("one"))
    one, changing = here.tensors("one"), here.tensors("changing")
    assert all(torch.allclose(changing[name], one[name], atol=2e-4) for name in one)


@pytest.mark.slow
def test_f28_a_killed_process_ends_the_others_within_seconds(here):
    """The others have lost its share, so the last saved state is what there is."""
    said, long = here.folder / "said", (DIVIDED, "--max-iters=100000", "--eval-interval=10")
    processes = start_together(2, here.arguments("m", *long), here.folder, said)
    until(said, "saved")
    trainings.send(processes[1], signal.SIGKILL)
    assert finish(processes[1], SECONDS) == -signal.SIGKILL
    assert finish(processes[0], SECONDS) == 7, here.said(said, 2)
    assert "another process of the run has ended" in here.said(said, 2)
    saved = [e["step"] for e in events(said) if e["event"] == "saved"]
    here.run("m", 2, *long, *PAUSE)
    [started] = [e for e in events(here.folder / "m-2") if e["event"] == "started"]
    assert started["step"] == max(saved)


@pytest.mark.slow
def test_a_signal_during_an_evaluation_saves_and_ends_them(here):
    said = here.folder / "said"
    long = (DIVIDED, "--max-iters=100000", "--eval-interval=2")
    processes = start_together(2, here.arguments("m", *long), here.folder, said)
    until(said, "evaluated")
    for process in reversed(processes):
        trainings.send(process, signal.SIGTERM)
    assert [finish(p, SECONDS) for p in processes] == [128 + signal.SIGTERM, 0]
    stepped = max(e["step"] for e in events(said) if e["event"] == "stepped")
    assert Registry(here.weights).find("m", in_progress=True).status()["step"] == stepped


def _join_with_little_disk(rank: int, size: int, port: int) -> None:
    """Let all processes but the leader write files of at most a thousand bytes."""
    trainings.join(rank, size, port)
    if rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


@pytest.mark.slow
def test_f26_a_disk_that_is_full_for_one_process_ends_all_of_them(here):
    """None of them waits for the share that cannot be written, and the earlier state is kept."""
    here.run("m", 2, DIVIDED, *PAUSE)
    said = here.folder / "said"
    processes = start_together(2, here.arguments("m", DIVIDED), here.folder, said, _join_with_little_disk)
    assert [finish(p, SECONDS) for p in processes] == [7, 0], here.said(said, 2)
    assert Registry(here.weights).find("m", in_progress=True).status()["step"] == 1
