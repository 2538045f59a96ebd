"""Weights and resume states on disks that are really full, at size limits, and under kill -9.

The safetensors library writes past Python, so no fault can be injected into it; the faults here are real.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from crashing import collected, invariants, leftovers, library_save, versions

from quill import fsio
from quill.checkpoint.resume_state import load_state, save_state
from quill.checkpoint.weights import save_tensors
from quill.errors import ResourceError
from quill.registry.draft import Draft
from quill.registry.store import Registry
from quill.registry.version import Version

pytestmark = pytest.mark.slow

TENSORS = {"w": torch.arange(6000.0), "b": torch.ones(7, dtype=torch.bfloat16)}
BYTES = 25_000

Fill = Callable[..., None]


def save(draft: Draft, step: int) -> Path:
    return save_state(draft, step, TENSORS, {"step": step})


def publish(registry: Registry, fill: Fill) -> Version:
    draft = registry.unfinished("a") or registry.begin("a")
    fill(draft)
    draft.write_file("more.safetensors", lambda path: save_tensors(path, TENSORS))
    return draft.publish(parameters=64)


def begin(root: Path, fill: Fill) -> Registry:
    """A registry with a:v1, and a:v2 in progress with a state of step 100."""
    registry = Registry(root)
    publish(registry, fill)
    draft = registry.begin("a")
    fill(draft)
    save(draft, 100)
    return registry


ACTIONS = {
    "resume save": lambda registry, fill: save(registry.unfinished("a"), 200),
    "publish": publish,
}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let writes run into the disk's end, instead of being refused beforehand."""
    monkeypatch.setattr(fsio, "require_space", lambda *_: None)


class SmallDisk:
    """A file system of a few blocks, in memory.

    Args:
        at: An empty folder to mount it on.
    """

    def __init__(self, at: Path, options: str) -> None:
        self.at = at
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(at)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip() or done.returncode}")

    def close(self) -> None:
        subprocess.run(["umount", str(self.at)], check=True)

    def fill(self, free_blocks: int) -> Path:
        """Take up all but so many blocks with a file, and return it."""
        ballast = self.at / "ballast"
        found = os.statvfs(self.at)
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(found.f_bavail - free_blocks, 1) * found.f_frsize)
        assert os.statvfs(self.at).f_bavail == free_blocks
        return ballast


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], SmallDisk]]:
    """Mount a small disk: small_disk("size=1m")."""
    mounted: list[SmallDisk] = []

    def mount(options: str) -> SmallDisk:
        at = tmp_path / f"disk{len(mounted)}"
        at.mkdir()
        mounted.append(SmallDisk(at, options))
        return mounted[-1]

    yield mount
    for disk in mounted:
        disk.close()


def after_failure(registry: Registry, older: dict[str, dict[str, bytes]], error: ResourceError) -> None:
    """Nothing has changed, the error says why, and nothing is left over."""
    assert error.exit_code == 7
    assert invariants(registry, older) == {"a:v1"}
    state = load_state(registry.unfinished("a"))
    assert state is not None and state[1]["step"] == 100 and state[2] == []
    assert leftovers(registry.root) == []


def once_there_is_room(registry: Registry, action: str, fill: Fill) -> None:
    """The same action works now, without anything being cleaned up."""
    ACTIONS[action](registry, fill)
    if action == "publish":
        assert registry.resolve("a").number == 2
    else:
        state = load_state(registry.unfinished("a"))
        assert state is not None and state[1]["step"] == 200
    collected(registry)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.usefixtures("tried")
def test_f26_a_disk_full_after_any_number_of_blocks(
    small_disk: Callable[[str], SmallDisk], fill: Fill, action: str
) -> None:
    disk = small_disk("size=1m")
    refused = 0
    for free in range(40):
        registry = begin(disk.at / "weights", fill)
        older = versions(registry)
        ballast = disk.fill(free)
        try:
            ACTIONS[action](registry, fill)
        except ResourceError as e:
            refused += 1
            assert e.why == "the disk is full"
            after_failure(registry, older, e)
        finally:
            ballast.unlink()
        if refused == free + 1:
            once_there_is_room(registry, action, fill)
        elif free > refused + 3:
            break
        fsio.delete(registry.root)
    # The files take so many blocks, and the folders some.
    assert BYTES // 4096 < refused < 40


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.usefixtures("tried")
def test_f26_a_disk_without_room_for_another_file_or_folder(
    small_disk: Callable[[str], SmallDisk], fill: Fill, action: str
) -> None:
    disk = small_disk("size=1m,nr_inodes=60")
    refused = 0
    for free in range(20):
        registry = begin(disk.at / "weights", fill)
        older = versions(registry)
        taken = disk.at / "taken"
        taken.mkdir()
        for i in range(os.statvfs(disk.at).f_ffree - free):
            (taken / str(i)).touch()
        try:
            ACTIONS[action](registry, fill)
        except ResourceError as e:
            refused += 1
            after_failure(registry, older, e)
        finally:
            fsio.delete(taken)
        if refused == free + 1:
            once_there_is_room(registry, action, fill)
        fsio.delete(registry.root)
    assert 2 < refused < 20


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.usefixtures("tried")
def test_f26_files_that_may_not_grow_beyond_a_limit(tmp_path: Path, fill: Fill, action: str) -> None:
    """RLIMIT_FSIZE; Python ignores the signal that comes with it, and the write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = (0, 1, 7, 100, 1000, 4096, 20_000, 24_000, 24_100)
    for limit in limits:
        registry = begin(tmp_path / str(limit), fill)
        older = versions(registry)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(ResourceError) as caught:
                ACTIONS[action](registry, fill)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "size limit" in caught.value.why
        after_failure(registry, older, caught.value)
        once_there_is_room(registry, action, fill)


def test_the_stand_in_for_the_library_behaves_like_it(tmp_path: Path) -> None:
    """Crash tests elsewhere rest on `crashing.library_save`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    outcomes = []
    for name, save_file in (("real", safetensors.torch.save_file), ("stand-in", library_save)):
        folder = tmp_path / name
        folder.mkdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(safetensors.SafetensorError) as caught:
                save_file(TENSORS, folder / "x", metadata={"format": "pt"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        left = os.listdir(folder)
        save_file(TENSORS, folder / "x", metadata={"format": "pt"})
        mode = (folder / "x").stat().st_mode
        outcomes.append((str(caught.value), left, os.listdir(folder), mode, (folder / "x").read_bytes()))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == []


@pytest.mark.parametrize("seed", range(6))
def test_f28_a_run_killed_while_it_saves(tmp_path: Path, fill: Fill, seed: int) -> None:
    """Killed after a random time, in the middle of writing large states one after the other."""
    registry = begin(tmp_path / "weights", fill)
    older = versions(registry)
    child = os.fork()
    if child == 0:
        try:
            large = {"w": torch.zeros(4_000_000)}
            draft = registry.unfinished("a")
            for step in range(200, 100_000, 100):
                save_state(draft, step, large, {"step": step})
        finally:
            os._exit(1)
    time.sleep(0.1 + 0.5 * random.Random(seed).random())
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert invariants(registry, older) == {"a:v1"}
    state = load_state(registry.unfinished("a"))
    assert state is not None and state[2] == []
    assert len(state[0]["w"]) == (6000 if state[1]["step"] == 100 else 4_000_000)
    collected(registry)
    save(registry.unfinished("a"), state[1]["step"] + 1)
    assert publish(registry, fill).reference == "a:v2"
