"""Locks keep two writers of a name apart, tell who holds it, and end with their process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from holding import held_elsewhere
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quill import fsio
from quill.errors import CorruptError, LockedError, ResourceError
from quill.registry import aliases, locks


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def no_flock(monkeypatch):
    """A filesystem where flock says yes to everybody, as some network filesystems do."""
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)


def note(root: Path, **changes) -> None:
    """Leave a note in a lock file, as a process that was killed does."""
    path = locks.path_of(root, "a")
    fsio.make_dir(path.parent)
    path.write_text(json.dumps(locks.me() | changes))


def can_be_held(root: Path) -> bool:
    try:
        with locks.hold(root, "a"):
            return True
    except LockedError:
        return False


def test_f30_a_name_that_is_held_is_refused_naming_who_holds_it(root):
    with held_elsewhere(root) as pid:
        start = time.monotonic()
        with pytest.raises(LockedError) as caught, locks.hold(root, "a"):
            pass
        assert time.monotonic() - start < 5
        assert caught.value.exit_code == 75
        holder = locks.holder(root, "a")
        assert holder is not None
        assert holder["pid"] == pid
        for part in (f"pid {pid}", socket.gethostname(), holder["started"]):
            assert part in caught.value.why
        assert caught.value.hint == "try again later"
        with locks.hold(root, "b"):
            pass
    assert locks.holder(root, "a") is None
    assert can_be_held(root)


def test_f30_a_killed_holder_holds_nothing(root):
    with held_elsewhere(root) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        # Nobody has asked for its exit status yet: a zombie is no process at work.
        assert locks.holder(root, "a") is None
        assert can_be_held(root)
    assert locks.path_of(root, "a").read_bytes() == b""


def test_f30_waiting_ends_when_the_holder_does(root):
    with held_elsewhere(root) as pid:
        timer = threading.Timer(0.7, os.kill, (pid, signal.SIGKILL))
        timer.start()
        start = time.monotonic()
        with locks.hold(root, "a", wait=30):
            assert 0.5 < time.monotonic() - start < 20
        timer.join()


def test_f30_waiting_has_an_end(root):
    with held_elsewhere(root):
        start = time.monotonic()
        with pytest.raises(LockedError), locks.hold(root, "a", wait=1.0):
            pass
        assert 0.9 < time.monotonic() - start < 10


def test_the_file_stays_and_its_note_goes(root):
    path = locks.path_of(root, "a")
    with locks.hold(root, "a"):
        inode = path.stat().st_ino
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert locks.holder(root, "a")["pid"] == os.getpid()
        assert not can_be_held(root), "not even by the one who has it"
    assert path.read_bytes() == b""
    with locks.hold(root, "a"):
        assert path.stat().st_ino == inode


def test_an_exception_lets_go(root):
    with pytest.raises(ZeroDivisionError), locks.hold(root, "a"):
        raise ZeroDivisionError
    assert can_be_held(root)


def test_asking_who_holds_it_changes_nothing(root):
    assert locks.holder(root, "a") is None
    assert not root.exists()
    with held_elsewhere(root):
        before = locks.path_of(root, "a").read_bytes()
        locks.holder(root, "a")
        assert locks.path_of(root, "a").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"process": "another boot/1"},
        {"pid": 1, "process": "another boot/1"},
        {"pid": 2**22 + 1},
        {"pid": 0},
        {"pid": -1},
        {"pid": 2**70},
        {"pid": True},
        {"pid": "1"},
        {"pid": None},
        {"host": "elsewhere"},
        {"host": None},
    ],
)
def test_f33_a_note_of_no_live_process_here_holds_nothing(root, changes):
    note(root, **changes)
    assert locks.holder(root, "a") is None
    assert can_be_held(root)


def test_f33_the_note_of_a_live_process_counts_without_its_lock(root, no_flock):
    with held_elsewhere(root) as pid:
        assert locks.holder(root, "a")["pid"] == pid
        # The same number, another process: it was given again after a restart.
        path = locks.path_of(root, "a")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"process": "another boot/1"}))
        assert locks.holder(root, "a") is None
        assert can_be_held(root)


def test_f33_another_hosts_lock_counts_while_it_is_held(root):
    with held_elsewhere(root):
        path = locks.path_of(root, "a")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere", "pid": 7}))
        assert locks.holder(root, "a")["host"] == "elsewhere"
        with pytest.raises(LockedError, match="elsewhere"), locks.hold(root, "a"):
            pass
    assert locks.holder(root, "a") is None
    assert can_be_held(root)


def test_f33_a_lock_file_deleted_while_it_is_asked_for_is_made_again(root, monkeypatch):
    path, real, times = locks.path_of(root, "a"), fcntl.flock, iter(range(100))

    def flock(fd, how):
        real(fd, how)
        if next(times) == 0:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.hold(root, "a"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not can_be_held(root)


def test_f32_without_locks_the_note_of_a_live_process_refuses_a_second(root, no_flock):
    with held_elsewhere(root) as pid, pytest.raises(LockedError, match=f"pid {pid}"), locks.hold(root, "a"):
        pass
    assert can_be_held(root)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_f32_a_filesystem_that_has_no_locks_at_all(root, monkeypatch, number):
    def flock(fd, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held_elsewhere(root):
        assert not can_be_held(root)
    assert can_be_held(root)


def test_f32_whether_locks_work_is_found_out(tmp_path, monkeypatch):
    assert locks.works(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)
    assert not locks.works(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "folder"])
def test_f14_a_lock_that_is_no_plain_file_is_neither_followed_nor_changed(root, tmp_path, kind):
    path, outside = locks.path_of(root, "a"), tmp_path / "outside"
    fsio.make_dir(path.parent)
    outside.write_text("precious")
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises((CorruptError, ResourceError)) as caught, locks.hold(root, "a"):
        pass
    assert caught.value.exit_code == (7 if kind == "folder" else 5)
    assert locks.holder(root, "a") is None
    assert outside.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@given(
    content=st.binary(max_size=80) | st.sampled_from([b"[1]", b'{"pid": 1e999}', b"[" * 5000, b"9" * 4096])
)
@hypothesis_settings(max_examples=50, deadline=None)
def test_no_note_makes_a_lock_stumble(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp() / "weights"
    path = locks.path_of(root, "a")
    fsio.make_dir(path.parent)
    path.write_bytes(content)
    assert locks.holder(root, "a") is None
    assert can_be_held(root)


def test_f31_changes_of_many_processes_follow_each_other(root):
    (root / "a").mkdir(parents=True)
    children = []
    for i in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for k in range(15):
                    aliases.update(
                        root / "a", lambda held, i=i, k=k: held | {"tags": held["tags"] | {f"{i}-{k}": "x"}}
                    )
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0] * 4
    assert len(aliases.read(root / "a")["tags"]) == 60


@pytest.mark.parametrize("which", [".locks", ".locks/ledgers"])
def test_f14_a_folder_of_locks_that_is_a_link_is_not_followed(root, tmp_path, which):
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / which).parent.mkdir(parents=True)
    (root / which).symlink_to(outside)
    held = locks.hold(root, "a") if which == ".locks" else locks.record(root / "a")
    with pytest.raises(CorruptError, match="symbolic link"), held:
        pass
    assert os.listdir(outside) == []
