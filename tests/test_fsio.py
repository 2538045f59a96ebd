"""Durable writes: whole or not at all, whatever the disk, the umask or another process does."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from crashing import WAYS, Outcome, at_every_operation
from faults import Injections

from quill import fsio, strictjson
from quill.errors import CorruptError, RefusedError, ResourceError
from quill.registry.store import Registry

Operations = list[tuple[str, str]]


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Operations:
    """Record the syncs and renames done, in order, as (operation, file name)."""
    done: Operations = []
    named: dict[int, str] = {}
    opened, fsync = os.open, fsio.syncing.fsync

    def record_open(path: Any, *rest: Any, **more: Any) -> int:
        fd = opened(path, *rest, **more)
        named[fd] = Path(path).name
        return fd

    def record_fsync(fd: int) -> None:
        done.append(("fsync", named[fd]))
        fsync(fd)

    def recording(name: str, rename: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def operation(source: Any, target: Any) -> None:
            done.append((name, Path(target).name))
            rename(source, target)

        return operation

    monkeypatch.setattr(os, "open", record_open)
    monkeypatch.setattr(fsio.syncing, "fsync", record_fsync)
    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, recording(name, getattr(os, name)))
    return done


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Set the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make(target: Path, write: Callable[[Path], object], **options: Any) -> None:
    with fsio.stage(target, **options) as place:
        write(place)


def make_file(content: bytes) -> Callable[[Path], object]:
    return lambda place: place.write_bytes(content)


def make_folder(content: bytes) -> Callable[[Path], object]:
    def write(place: Path) -> None:
        (place / "sub").mkdir(parents=True)
        (place / "a").write_bytes(content)
        (place / "sub" / "b").write_bytes(content)

    return write


MAKERS = {"file": make_file, "folder": make_folder}


def content(target: Path) -> bytes:
    return (target / "sub" / "b" if target.is_dir() else target).read_bytes()


class TestStage:
    def test_a_file_is_synced_before_the_rename_and_its_folder_after(
        self, tmp_path: Path, operations: Operations
    ) -> None:
        make(tmp_path / "a", make_file(b"x"))
        assert operations == [("fsync", "a"), ("replace", "a"), ("fsync", tmp_path.name)]

    def test_everything_in_a_folder_is_synced_before_the_rename(
        self, tmp_path: Path, operations: Operations
    ) -> None:
        make(tmp_path / "out", make_folder(b"x"))
        assert operations == [
            ("fsync", "a"),
            ("fsync", "b"),
            ("fsync", "sub"),
            ("fsync", "out"),
            ("rename", "out"),
            ("fsync", tmp_path.name),
        ]
        assert os.listdir(tmp_path) == ["out"]

    def test_what_need_not_last_is_not_synced(self, tmp_path: Path, operations: Operations) -> None:
        make(tmp_path / "a", make_file(b"x"), durable=False)
        assert operations == [("replace", "a")]

    def test_a_library_may_leave_files_and_rename(self, tmp_path: Path, operations: Operations) -> None:
        def library(place: Path) -> None:
            (place.parent / "rest").write_bytes(b"left behind")
            (place.parent / "half").write_bytes(b"whole")
            os.replace(place.parent / "half", place)

        make(tmp_path / "model.bin", library)
        assert os.listdir(tmp_path) == ["model.bin"]
        assert (tmp_path / "model.bin").read_bytes() == b"whole"
        assert operations[-3:] == [
            ("fsync", "model.bin"),
            ("replace", "model.bin"),
            ("fsync", tmp_path.name),
        ]

    @pytest.mark.parametrize("failure", ["body", "sync", "fence", "rename"])
    @pytest.mark.parametrize("kind", MAKERS)
    def test_f48_a_failure_leaves_the_old_content_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, failure: str
    ) -> None:
        target = tmp_path / "out"
        make(target, MAKERS[kind](b"old"))

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "full")

        def refuse() -> None:
            assert content(target) == b"old"
            raise RefusedError("no")

        def write(place: Path) -> None:
            MAKERS[kind](b"new")(place)
            if failure == "body":
                raise ValueError("library")
            if failure == "sync":
                monkeypatch.setattr(fsio.syncing, "fsync", full)
            if failure == "rename":
                for name in ("replace", "rename"):
                    monkeypatch.setattr(os, name, full)
                monkeypatch.setattr(fsio.folders, "exchange", full)

        error = {"body": ValueError, "fence": RefusedError}.get(failure, ResourceError)
        with pytest.raises(error):
            make(target, write, fence=refuse if failure == "fence" else None)
        assert os.listdir(tmp_path) == ["out"]
        assert content(target) == b"old"

    def test_an_interrupt_leaves_the_old_content_and_nothing_else(self, tmp_path: Path) -> None:
        def chunks() -> Iterator[bytes]:
            yield b"new"
            raise KeyboardInterrupt

        fsio.write_bytes(tmp_path / "a", b"old")
        with pytest.raises(KeyboardInterrupt):
            fsio.write_chunks(tmp_path / "a", chunks())
        assert [(tmp_path / n).read_bytes() for n in os.listdir(tmp_path)] == [b"old"]

    @pytest.mark.parametrize("there", ["file", "folder", "full folder", "link"])
    @pytest.mark.parametrize("kind", MAKERS)
    def test_f48_what_exists_is_refused_unless_it_may_be_replaced(
        self, tmp_path: Path, kind: str, there: str
    ) -> None:
        target = tmp_path / "out"
        if there == "file":
            target.touch()
        elif there == "link":
            target.symlink_to("nowhere")
        else:
            target.mkdir()
        if there == "full folder":
            (target / "old").touch()
        with pytest.raises(RefusedError, match="already exists"):
            make(target, MAKERS[kind](b"new"), replace=False)
        assert os.listdir(tmp_path) == ["out"]
        assert not (target / "a").exists()
        assert target.is_symlink() or (target / "old").exists() == (there == "full folder")

    def test_a_folder_that_another_process_made_first_is_refused(self, tmp_path: Path) -> None:
        def other() -> None:
            make_folder(b"theirs")(tmp_path / "out")

        with pytest.raises(RefusedError, match="already exists"):
            make(tmp_path / "out", make_folder(b"ours"), replace=False, fence=other)
        assert content(tmp_path / "out") == b"theirs"

    @pytest.mark.parametrize("kind", MAKERS)
    def test_a_folder_is_replaced_whole(self, tmp_path: Path, kind: str) -> None:
        make(tmp_path / "out", MAKERS[kind](b"old"))
        (tmp_path / "out2").write_bytes(b"other")
        make(tmp_path / "out", make_folder(b"new"))
        assert sorted(os.listdir(tmp_path)) == ["out", "out2"]
        assert sorted(os.listdir(tmp_path / "out")) == ["a", "sub"]
        assert content(tmp_path / "out") == b"new"

    @pytest.mark.parametrize("atomic", [True, False], ids=["exchange", "two renames"])
    @pytest.mark.parametrize("way", WAYS)
    def test_f55_the_old_folder_or_the_new_is_there_after_a_fault_at_any_operation(
        self, tmp_path: Path, way: str, atomic: bool, monkeypatch: pytest.MonkeyPatch, injections: Injections
    ) -> None:
        if not atomic:
            monkeypatch.setattr(fsio.folders, "exchange", lambda first, second: False)
        before = Registry(tmp_path / "before")
        before.root.mkdir()
        make(before.root / "out", make_folder(b"old"))

        def replace(registry: Registry) -> None:
            with fsio.stage(registry.root / "out") as place:
                (place / "sub").mkdir(parents=True)
                for name in ("a", "sub/b"):
                    fsio.create(place / name, [b"new"])

        def then(after: Registry, outcome: Outcome) -> None:
            target = after.root / "out"
            if atomic or (outcome.error and "lasting" not in way) or outcome.done:
                assert content(target) in (b"old", b"new")
            if outcome.done:
                assert content(target) == b"new"
                assert way.startswith("eio") or os.listdir(after.root) == ["out"]
            elif outcome.error and target.exists():
                assert content(target) == b"old" or outcome.operation == "fsync" or "lasting" in way
            elif not target.exists():
                [left] = [p for p in after.root.iterdir() if not (p / "out").exists()]
                assert content(left) == b"old"
                assert outcome.killed or str(left) in str(outcome.error.why)  # type: ignore[union-attr]

        struck = at_every_operation(before, replace, then, way, tmp_path / "struck")
        injections.add(f"replace a folder, {'exchange' if atomic else 'two renames'}", way, struck)

    @pytest.mark.parametrize("nth", range(3))
    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_f55_a_signal_between_two_renames_puts_the_old_folder_back(
        self, tmp_path: Path, nth: int, after: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make(tmp_path / "out", make_folder(b"old"))
        monkeypatch.setattr(fsio.folders, "exchange", lambda first, second: False)
        rename, count = os.rename, iter(range(10))

        def interrupted(source: Path, target: Path) -> None:
            strikes = next(count) == nth
            if strikes and not after:
                raise KeyboardInterrupt
            rename(source, target)
            if strikes:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "rename", interrupted)
        with suppress(KeyboardInterrupt):
            make(tmp_path / "out", make_folder(b"new"))
        assert content(tmp_path / "out") == (b"new" if nth == 2 or (nth, after) == (1, True) else b"old")

    def test_f55_folders_are_exchanged_in_one_step_where_the_filesystem_can(self, tmp_path: Path) -> None:
        make(tmp_path / "a", make_folder(b"1"))
        make(tmp_path / "b", make_folder(b"2"))
        if not fsio.folders.exchange(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this system cannot exchange folders")
        assert (content(tmp_path / "a"), content(tmp_path / "b")) == (b"2", b"1")
        with pytest.raises(FileNotFoundError):
            fsio.folders.exchange(tmp_path / "a", tmp_path / "none")

    @pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
    def test_files_get_the_mode_that_the_umask_asks_for(
        self, tmp_path: Path, umask: Callable[[int], int], mask: int, expected: int
    ) -> None:
        def private(place: Path) -> None:
            place.touch(0o600)

        def private_folder(place: Path) -> None:
            place.mkdir()
            (place / "d").touch(0o600)

        umask(mask)
        fsio.write_bytes(tmp_path / "a", b"x")
        make(tmp_path / "b", private)
        make(tmp_path / "c", private_folder)
        assert [mode(tmp_path / n) for n in ("a", "b", "c/d")] == [expected] * 3

    @pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
    def test_f56_a_special_file_is_never_replaced_nor_appended_to(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "special"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(str(path))
        before = path.lstat()
        for use in (
            lambda: fsio.write_bytes(path, b"x"),
            lambda: fsio.Log(path),
            lambda: fsio.Log(path, [b""]),
            lambda: fsio.open_plain(path),
        ):
            with pytest.raises(CorruptError, match="not a regular file"):
                use()
        assert os.path.samestat(before, path.lstat())
        assert os.listdir(tmp_path) == ["special"]

    def test_f56_a_file_larger_than_its_kind_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "huge"
        with path.open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(CorruptError, match=r"1\.1 TB"):
            fsio.read_plain(path, 1 << 20)
        os.truncate(path, 1 << 20)
        assert fsio.read_plain(path, 1 << 20) == bytes(1 << 20)

    def test_f14_a_link_is_replaced_and_not_written_through(self, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.write_bytes(b"precious")
        (tmp_path / "link").symlink_to(outside)
        fsio.write_bytes(tmp_path / "link", b"new")
        assert outside.read_bytes() == b"precious"
        assert not (tmp_path / "link").is_symlink()

    def test_links_and_devices_are_not_saved(self, tmp_path: Path) -> None:
        def write(place: Path) -> None:
            place.mkdir()
            (place / "link").symlink_to("/etc/hostname")

        with pytest.raises(CorruptError, match="link or a device"):
            make(tmp_path / "out", write)
        assert os.listdir(tmp_path) == []

    def test_a_scratch_folder_is_deleted_at_the_end(self, tmp_path: Path) -> None:
        with fsio.scratch(tmp_path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "a").touch()
            assert [folder.name] == os.listdir(tmp_path)
        assert os.listdir(tmp_path) == []


class TestWrites:
    def test_the_hash_is_that_of_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        digest = fsio.write_chunks(path, [b"one", memoryview(b"two"), b""])
        assert path.read_bytes() == b"onetwo"
        assert digest == fsio.sha256(path) == hashlib.sha256(b"onetwo").hexdigest()

    @pytest.mark.parametrize("step", ["mkdir", "open", "write", "fsync", "replace"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EFBIG])
    def test_f26_f27_a_failed_write_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
    ) -> None:
        path = tmp_path / "a"
        fsio.write_bytes(path, b"old")
        opened = os.open

        def fail(*arguments: Any, **more: Any) -> int:
            if step == "open" and not arguments[1] & os.O_CREAT:
                return opened(*arguments, **more)
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(ResourceError) as caught:
                fsio.write_bytes(path, b"new")
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a"]
        assert caught.value.exit_code == 7
        wrong = f"cannot write to '{tmp_path}'" if step == "mkdir" else f"cannot write '{path}'"
        assert caught.value.what == wrong

    def test_short_writes_are_continued(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        fsio.write_bytes(tmp_path / "a", bytes(range(200)))
        assert (tmp_path / "a").read_bytes() == bytes(range(200))

    def test_a_device_that_accepts_nothing_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "write", lambda fd, data: 0)
        with pytest.raises(ResourceError, match="cannot write"):
            fsio.write_bytes(tmp_path / "a", b"x")

    def test_json_reads_back(self, tmp_path: Path) -> None:
        value = {"text": "Ünï ☃", "file name": "caf\udce9", "number": 1e-5, "list": [1, None, True]}
        fsio.write_json(tmp_path / "a.json", value)
        assert strictjson.read(tmp_path / "a.json") == value

    def test_space_is_checked_beforehand(self, tmp_path: Path) -> None:
        fsio.require_space(tmp_path / "not" / "yet", 1, "a byte")
        with pytest.raises(ResourceError) as caught:
            fsio.require_space(tmp_path, 1 << 60, "a very large model")
        assert caught.value.exit_code == 7
        assert "a very large model" in caught.value.what
        assert caught.value.hint == f"df -h {tmp_path}"


class TestLogs:
    @pytest.mark.parametrize(
        ("before", "after"), [(None, ""), ("", ""), ("a\n", "a\n"), ("a\nto", "a\nto\n")]
    )
    def test_a_log_is_continued_after_completing_a_cut_line(
        self, tmp_path: Path, before: str | None, after: str
    ) -> None:
        path = tmp_path / "log"
        if before is not None:
            path.write_text(before)
        log = fsio.Log(path)
        assert path.read_text() == after
        log.append("one")
        log.append("two")
        log.close()
        assert path.read_text() == after + "one\ntwo\n"

    def test_lines_of_many_threads_do_not_mix(self, tmp_path: Path) -> None:
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

    def test_a_log_that_was_replaced_no_longer_reaches_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        first = fsio.Log(path, [b"kept\n"])
        first.append("one")
        second = fsio.Log(path, [path.read_bytes()])
        first.append("lost")
        second.append("two")
        assert path.read_text() == "kept\none\ntwo\n"
        first.close()
        first.close()
        second.close()
        assert os.listdir(tmp_path) == ["log"]

    def test_a_log_whose_fence_refuses_leaves_the_old_one(self, tmp_path: Path) -> None:
        def refuse() -> None:
            raise RefusedError("no")

        fsio.write_bytes(tmp_path / "log", b"old")
        open_files = len(os.listdir("/dev/fd"))
        with pytest.raises(RefusedError):
            fsio.Log(tmp_path / "log", [b"new"], fence=refuse)
        assert os.listdir(tmp_path) == ["log"]
        assert (tmp_path / "log").read_bytes() == b"old"
        assert len(os.listdir("/dev/fd")) == open_files


class TestFolders:
    def test_of_many_claims_one_wins(self, tmp_path: Path) -> None:
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

    def test_make_dir_accepts_a_folder_and_refuses_a_file(self, tmp_path: Path) -> None:
        fsio.make_dir(tmp_path / "a" / "b")
        fsio.make_dir(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ResourceError, match="cannot create"):
                fsio.make_dir(path)

    def test_f14_discard_removes_a_link_and_not_its_target(self, tmp_path: Path) -> None:
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

    def test_settle_refuses_links_and_devices(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("/etc/hostname")
        with pytest.raises(CorruptError, match="link or a device"):
            fsio.settle(tmp_path)

    def test_f49_a_home_that_does_not_exist_is_left_as_typed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        assert fsio.expanded("~/a") == Path("/home/me/a")
        for odd in ("~nosuchuser/a", "~\0/a", "a~", "./~"):
            assert fsio.expanded(odd) == Path(odd)


class TestReads:
    @pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
    def test_f14_f17_only_regular_files_are_opened(self, tmp_path: Path, kind: str) -> None:
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

    def test_a_missing_file_is_left_to_the_caller(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x")
        with fsio.open_plain(tmp_path / "a") as file:
            assert file.read() == b"x"
        with pytest.raises(FileNotFoundError):
            fsio.open_plain(tmp_path / "b")
        with pytest.raises(ResourceError):
            fsio.open_plain(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "input/output error"),
        (errno.EACCES, "permission"),
        (errno.EPERM, "permission"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "does not exist"),
        (errno.EFBIG, "size limit"),
        (errno.EBUSY, os.strerror(errno.EBUSY)),
    ],
)
def test_errors_of_the_system_are_explained(tmp_path: Path, number: int, why: str) -> None:
    with pytest.raises(ResourceError) as caught, fsio.guard(tmp_path / "{a}", "write"):
        raise OSError(number, os.strerror(number))
    assert why in caught.value.why
    assert caught.value.what == f"cannot write '{tmp_path / '{a}'}'"


def test_hints_quote_the_path_and_name_no_flag(tmp_path: Path) -> None:
    odd = tmp_path / "it's {odd}"
    odd.mkdir()
    for number in fsio.failures.REASONS:
        with pytest.raises(ResourceError) as caught, fsio.guard(odd / "a", "write"):
            raise OSError(number, os.strerror(number))
        assert "--" not in caught.value.hint
        if str(tmp_path) in caught.value.hint:
            assert caught.value.hint.endswith("""it'"'"'s {odd}'""")


@pytest.mark.parametrize("use", [fsio.make_dir, lambda path: fsio.require_space(path, 1, "a test")])
def test_a_path_that_is_too_long_is_refused_before_its_parents_are_named(use):
    class Long(type(Path())):
        @property
        def parents(self):
            raise AssertionError("naming thousands of parents takes seconds")

    with pytest.raises(ResourceError, match="cannot"):
        use(Long("ab/" * 20_000))
