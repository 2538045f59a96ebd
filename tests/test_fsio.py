"""Writes that are whole or not there, whatever the disk, the umask or another process does."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest

from quill import fsio
from quill.errors import CorruptError, RefusedError, ResourceError


@pytest.fixture
def operations(monkeypatch):
    """Record what fsio does to the disk, in order, as (operation, file name)."""
    done: list[tuple[str, str]] = []
    named: dict[int, str] = {}
    create, fsync, replace, rename = fsio._create, fsio._fsync, fsio._replace, fsio._rename
    real_open = os.open

    def opened(path, *rest, **more):
        fd = real_open(path, *rest, **more)
        named[fd] = Path(path).name
        return fd

    def record(name, real):
        def operation(*args):
            what = args[-1] if isinstance(args[-1], Path) else named.get(args[0], "?")
            done.append((name, what.name if isinstance(what, Path) else what))
            return real(*args)

        return operation

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(fsio, "_create", create)
    for name, real in (("_fsync", fsync), ("_replace", replace), ("_rename", rename)):
        monkeypatch.setattr(fsio, name, record(name.strip("_"), real))
    return done


@pytest.fixture
def umask():
    """Set the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_write_returns_the_hash_of_what_is_there(tmp_path):
    path = tmp_path / "a"
    digest = fsio.write_chunks(path, [b"one", memoryview(b"two"), b""])
    assert path.read_bytes() == b"onetwo"
    assert digest == fsio.sha256(path) == hashlib.sha256(b"onetwo").hexdigest()


def test_write_syncs_the_bytes_before_the_rename_and_the_folder_after(tmp_path, operations):
    fsio.write_bytes(tmp_path / "a", b"x")
    kinds = [kind for kind, _ in operations]
    assert kinds == ["fsync", "replace", "fsync"]
    assert operations[0][1].startswith(".tmp-")
    assert operations[2] == ("fsync", tmp_path.name)


@pytest.mark.parametrize("step", ["_create", "_write", "_fsync", "_replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_f26_f27_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step, number):
    path = tmp_path / "a"
    fsio.write_bytes(path, b"old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fsio, step, fail)
    with pytest.raises(ResourceError) as caught:
        fsio.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    assert caught.value.exit_code == 7
    assert str(path) in caught.value.what


def test_an_interrupt_in_the_middle_leaves_the_old_file_and_no_other(tmp_path):
    def chunks():
        yield b"new"
        raise KeyboardInterrupt

    fsio.write_bytes(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt):
        fsio.write_chunks(tmp_path / "a", chunks())
    assert [(tmp_path / n).read_bytes() for n in os.listdir(tmp_path)] == [b"old"]


def test_short_writes_are_carried_on(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    fsio.write_bytes(tmp_path / "a", bytes(range(200)))
    assert (tmp_path / "a").read_bytes() == bytes(range(200))


def test_a_device_that_takes_nothing_is_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(ResourceError, match="cannot write"):
        fsio.write_bytes(tmp_path / "a", b"x")


def make(target: Path, writer, **options) -> None:
    with fsio.workshop(target) as place:
        writer(place)
        fsio.deliver(place, target, **options)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_mode_that_the_umask_gives(tmp_path, umask, mask, expected):
    umask(mask)

    def private(path: Path) -> None:
        path.write_bytes(b"x")
        path.chmod(0o600)

    fsio.write_bytes(tmp_path / "a", b"x")
    make(tmp_path / "b", private)
    assert [mode(tmp_path / n) for n in "ab"] == [expected, expected]


def test_a_workshop_hides_what_a_library_does_on_its_way(tmp_path, operations):
    def writer(path: Path) -> None:
        (path.parent / "scratch").write_bytes(b"left behind")
        (path.parent / "half").write_bytes(b"whole")
        os.replace(path.parent / "half", path)

    make(tmp_path / "model.bin", writer)
    assert os.listdir(tmp_path) == ["model.bin"]
    assert (tmp_path / "model.bin").read_bytes() == b"whole"
    assert operations == [("fsync", "model.bin"), ("replace", "model.bin"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("failing", ["library", "disk"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_f48_what_was_there_stays_when_making_it_anew_fails(tmp_path, monkeypatch, kind, failing):
    def write(path: Path, content: bytes) -> None:
        if kind == "folder":
            path.mkdir()
        (path / "a" if kind == "folder" else path).write_bytes(content)

    target = tmp_path / "out"
    make(target, lambda path: write(path, b"old"))

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    def writer(path: Path) -> None:
        write(path, b"half")
        if failing == "library":
            raise ValueError("library")
        monkeypatch.setattr(fsio, "_fsync", full)

    with pytest.raises(ValueError if failing == "library" else ResourceError):
        make(target, writer, replace=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (target / "a" if kind == "folder" else target).read_bytes() == b"old"


@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_f48_what_exists_is_not_written_over_unasked(tmp_path, there):
    target = tmp_path / "out"
    {"file": target.touch, "folder": target.mkdir, "link": lambda: target.symlink_to("nowhere")}[there]()
    with pytest.raises(RefusedError, match="exists already") as caught:
        make(target, lambda path: path.write_bytes(b"x"))
    assert caught.value.hint == "--force"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    for content in (b"old", b"new"):

        def writer(path: Path, content: bytes = content) -> None:
            path.mkdir()
            (path / content.decode()).write_bytes(content)

        make(tmp_path / "out", writer, replace=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


def deliver_bytes(path: Path, data: bytes) -> None:
    make(path, lambda place: place.write_bytes(data), replace=True)


@pytest.mark.parametrize("write", [fsio.write_bytes, deliver_bytes])
def test_a_special_file_is_never_replaced(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ResourceError):
        write(tmp_path / "pipe", b"x")
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)


def test_f14_a_link_is_replaced_and_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(outside)
    fsio.write_bytes(tmp_path / "link", b"new")
    assert outside.read_bytes() == b"precious"
    assert not (tmp_path / "link").is_symlink()


def test_json_keeps_what_it_was_given(tmp_path):
    value = {"text": "Ünï ☃", "file name": "caf\udce9", "number": 1e-5, "list": [1, None, True]}
    fsio.write_json(tmp_path / "a.json", value)
    assert fsio.strictjson.read(tmp_path / "a.json") == value


@pytest.mark.parametrize(("before", "after"), [(None, ""), ("", ""), ("a\n", "a\n"), ("a\nto", "a\nto\n")])
def test_a_log_is_continued_after_ending_a_torn_line(tmp_path, before, after):
    path = tmp_path / "log"
    if before is not None:
        path.write_text(before)
    log = fsio.Log(path)
    assert path.read_text() == after
    log.append("one")
    log.append("two")
    log.close()
    assert path.read_text() == after + "one\ntwo\n"


def test_lines_of_many_threads_do_not_mix(tmp_path):
    path = tmp_path / "log"
    lines = [str(i) * 2000 for i in range(8)]

    def write(line: str) -> None:
        log = fsio.Log(path)
        for _ in range(20):
            log.append(line)
        log.close()

    threads = [threading.Thread(target=write, args=(line,)) for line in lines]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(path.read_text().splitlines()) == sorted(lines * 20)


def test_of_many_claims_one_wins(tmp_path):
    won: list[bool] = []
    gate = threading.Barrier(8)

    def contend() -> None:
        gate.wait()
        won.append(fsio.claim(tmp_path / "v1"))

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(won) == [False] * 7 + [True]


def test_publish_syncs_everything_before_the_rename(tmp_path, operations):
    with fsio.stage(tmp_path) as staged:
        (staged / "a").write_bytes(b"1")
        (staged / "sub").mkdir()
        (staged / "sub" / "b").write_bytes(b"2")
        operations.clear()
        fsio.publish(staged, tmp_path / "out")
    assert operations == [
        ("fsync", "a"),
        ("fsync", "b"),
        ("fsync", "sub"),
        ("fsync", staged.name),
        ("rename", "out"),
        ("fsync", tmp_path.name),
    ]
    assert (tmp_path / "out" / "sub" / "b").read_bytes() == b"2"
    assert os.listdir(tmp_path / ".staging") == []


def test_publish_gives_files_the_umasks_mode(tmp_path, umask):
    umask(0o027)
    with fsio.stage(tmp_path) as staged:
        (staged / "a").touch(0o600)
        fsio.publish(staged, tmp_path / "out")
    assert mode(tmp_path / "out" / "a") == 0o640


@pytest.mark.parametrize("there", ["file", "full folder", "empty folder", "dangling link"])
def test_publish_never_writes_over_anything(tmp_path, there):
    target = tmp_path / "out"
    if there == "file":
        target.write_text("old")
    elif there == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.mkdir()
        if there == "full folder":
            (target / "old").touch()
    with fsio.stage(tmp_path) as staged:
        (staged / "a").touch()
        with pytest.raises(RefusedError, match="exists already"):
            fsio.publish(staged, target)
        kept = staged
    assert not (target / "a").exists()
    assert not kept.exists()


def test_what_was_staged_and_not_published_is_gone(tmp_path):
    def build() -> None:
        with fsio.stage(tmp_path / "new") as staged:
            (staged / "a").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build()
    assert os.listdir(tmp_path / "new" / ".staging") == []


def test_a_failed_sync_publishes_nothing(tmp_path, monkeypatch):
    with fsio.stage(tmp_path) as staged:
        (staged / "a").touch()

        def fail(fd):
            raise OSError(errno.EIO, "I/O error")

        monkeypatch.setattr(fsio, "_fsync", fail)
        with pytest.raises(ResourceError):
            fsio.publish(staged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settle_refuses_links_and_devices(tmp_path):
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(CorruptError, match="link or a device"):
        fsio.settle(tmp_path)


def test_f14_discard_removes_a_link_and_not_what_it_points_to(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "a").touch()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(precious)
    (tmp_path / "link").symlink_to(precious)
    fsio.discard(inside)
    fsio.discard(tmp_path / "link")
    assert (precious / "a").exists()
    assert sorted(os.listdir(tmp_path)) == [".trash", "precious"]
    assert os.listdir(tmp_path / ".trash") == []


def test_make_dir_accepts_what_exists_and_refuses_a_file(tmp_path):
    fsio.make_dir(tmp_path / "a" / "b")
    fsio.make_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match="cannot create"):
            fsio.make_dir(path)


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "device failed"),
        (errno.EACCES, "permission"),
        (errno.EPERM, "permission"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "not there"),
        (errno.EBUSY, os.strerror(errno.EBUSY)),
    ],
)
def test_what_the_system_refuses_is_told_in_words(tmp_path, number, why):
    with pytest.raises(ResourceError) as caught, fsio.guard(tmp_path / "{a}", "write"):
        raise OSError(number, os.strerror(number))
    assert why in caught.value.why
    assert caught.value.what == f"cannot write '{tmp_path / '{a}'}'"


def test_space_is_asked_for_beforehand(tmp_path):
    fsio.require_space(tmp_path / "not" / "yet", 1, "a byte")
    with pytest.raises(ResourceError) as caught:
        fsio.require_space(tmp_path, 1 << 60, "a very large model")
    assert caught.value.exit_code == 7
    assert "a very large model" in caught.value.what
    assert "df -h" in caught.value.hint


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_f14_f17_only_plain_files_are_opened(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "link":
        (tmp_path / "real").write_text("x")
        path.symlink_to(tmp_path / "real")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(CorruptError) as caught:
        fsio.open_plain(path)
    assert caught.value.exit_code == 5


def test_a_plain_file_is_opened_and_a_missing_one_is_the_callers_matter(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with fsio.open_plain(tmp_path / "a") as file:
        assert file.read() == b"x"
    with pytest.raises(FileNotFoundError):
        fsio.open_plain(tmp_path / "b")
    with pytest.raises(ResourceError):
        fsio.open_plain(tmp_path / "a" / "b")


def test_a_check_that_refuses_leaves_the_old_file_and_no_other(tmp_path):
    def refuse():
        assert len(os.listdir(tmp_path)) == 2, "all is written by then, and nothing replaced"
        raise RefusedError("no")

    def deliver():
        with fsio.workshop(tmp_path / "a") as made:
            made.write_bytes(b"new")
            fsio.deliver(made, tmp_path / "a", replace=True, check=refuse)

    fsio.write_bytes(tmp_path / "a", b"old")
    for write in (
        lambda: fsio.write_bytes(tmp_path / "a", b"new", check=refuse),
        lambda: fsio.write_json(tmp_path / "a", {"new": 1}, check=refuse),
        lambda: fsio.Log(tmp_path / "a", b"new", check=refuse),
        deliver,
    ):
        with pytest.raises(RefusedError):
            write()
        assert os.listdir(tmp_path) == ["a"]
        assert (tmp_path / "a").read_bytes() == b"old"


def test_a_check_that_refuses_leaves_no_new_folder(tmp_path):
    def refuse():
        raise RefusedError("no")

    (tmp_path / "old").mkdir()
    with fsio.workshop(tmp_path / "old") as made:
        made.mkdir()
        (made / "x").write_bytes(b"new")
        with pytest.raises(RefusedError):
            fsio.deliver(made, tmp_path / "old", replace=True, check=refuse)
    with fsio.stage(tmp_path) as staged:
        (staged / "x").write_bytes(b"new")
        with pytest.raises(RefusedError):
            fsio.publish(staged, tmp_path / "new", check=refuse)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".staging", "old"]


def test_a_log_that_another_has_begun_anew_is_appended_to_no_more(tmp_path):
    path = tmp_path / "log"
    first = fsio.Log(path, b"kept\n")
    first.append("one")
    second = fsio.Log(path, path.read_bytes())
    first.append("lost")
    second.append("two")
    assert path.read_text() == "kept\none\ntwo\n"
    first.close()
    first.close()
    second.close()
    assert os.listdir(tmp_path) == ["log"]


def test_f49_a_home_that_nobody_has_stays_as_it_was_typed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert fsio.expanded("~/a") == Path("/home/me/a")
    for odd in ("~nosuchuser/a", "~\0/a", "a~", "./~"):
        assert fsio.expanded(odd) == Path(odd)
