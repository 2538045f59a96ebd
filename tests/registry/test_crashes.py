"""A crash, a full disk or a power loss at every single operation of a publish and of a resume save.

Afterwards every visible version is whole, older ones are untouched, and the next run goes on without a
hand's help. The power losses are simulated: what was not synced is lost in part, in any order.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quill import fsio
from quill.errors import CorruptError, QuillError
from quill.registry.checkpoint import load_state, save_state
from quill.registry.store import Registry

OPERATIONS = ("_create", "_write", "_fsync", "_chmod", "_replace", "_rename", "_mkdir", "_unlink")
# What a disk without room refuses; renames and deletions still work on it.
NEEDS_ROOM = ("_create", "_write", "_fsync", "_mkdir")


def save(draft, step):
    return save_state(draft, step, {"w": torch.full((64,), float(step))}, {"step": step})


def publish_next(registry, fill, name="a"):
    draft = registry.unfinished(name) or registry.begin(name)
    # Not synced yet: that is what finishing must see to.
    fill(draft.path, durable=False)
    return draft.finish(parameters=64)


def publish_first(registry, fill):
    return publish_next(registry, fill, "b")


def save_next(registry, fill):
    return save(registry.unfinished("a"), 300)


ACTIONS = {"publish": publish_next, "publish first": publish_first, "save": save_next}
# What is there once the action is done.
DONE = {"publish": {"a:v1", "a:v2"}, "publish first": {"a:v1", "b:v1"}, "save": {"a:v1"}}


@pytest.fixture
def before(registry, publish, fill):
    """A registry with a:v1, and a:v2 in progress with states of steps 100 and 200."""
    publish("a")
    draft = registry.begin("a")
    fill(draft.path)
    draft.set_status({"pid": 1})
    save(draft, 100)
    save(draft, 200)
    return registry


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy(registry: Registry, to: Path) -> Registry:
    shutil.copytree(registry.root, to / "weights")
    return Registry(to / "weights")


def check(registry: Registry, first: dict[str, bytes]) -> set[str]:
    """Hold a registry to what no fault may break; return the versions that it shows."""
    versions = registry.entries(all_versions=True)
    for version in versions:
        assert version.damaged is None
        assert all(version.read_file(name) for name in version.manifest["files"])
    assert snapshot(registry.root / "a" / "v1") == first
    draft = registry.unfinished("a")
    if draft:
        _, info, notes = load_state(draft)
        assert info["step"] in (100, 200, 300)
        assert notes == []
    return {v.reference for v in versions}


def goes_on(registry: Registry, fill) -> None:
    """The next command works, with nothing cleaned up by hand."""
    if registry.unfinished("a"):
        save(registry.unfinished("a"), 400)
        assert load_state(registry.unfinished("a"))[1]["step"] == 400
    last = publish_next(registry, fill)
    assert registry.resolve("a").number == last.number
    assert registry.begin("a").number == last.number + 1


def at_operation(monkeypatch, strike: Callable[[int, str], None]) -> list[int]:
    """Call `strike` before each operation with its ordinal and name; the list's item counts them."""
    count = [0]

    def wrap(name, real):
        def operation(*args):
            count[0] += 1
            strike(count[0], name)
            return real(*args)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(fsio, name, wrap(name, getattr(fsio, name)))
    return count


def number_of_operations(before, tmp_path, fill, action) -> int:
    with pytest.MonkeyPatch.context() as patch:
        count = at_operation(patch, lambda n, name: None)
        ACTIONS[action](copy(before, tmp_path / "counting"), fill)
    return count[0]


@pytest.mark.parametrize("action", ACTIONS)
def test_f28_killed_at_any_operation(before, tmp_path, fill, action):
    first = snapshot(before.root / "a" / "v1")
    total = number_of_operations(before, tmp_path, fill, action)
    assert total > 15
    for k in range(1, total + 1):
        registry = copy(before, tmp_path / str(k))
        child = os.fork()
        if child == 0:
            try:
                at_operation(pytest.MonkeyPatch(), lambda n, name, k=k: os._exit(9) if n == k else None)
                ACTIONS[action](registry, fill)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        check(registry, first)
        goes_on(registry, fill)


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("action", ACTIONS)
def test_f26_f27_refused_at_any_operation(before, tmp_path, fill, action, number, lasting):
    first = snapshot(before.root / "a" / "v1")
    total = number_of_operations(before, tmp_path, fill, action)
    refused = 0
    for k in range(1, total + 1):
        registry = copy(before, tmp_path / str(k))

        def strike(n, name, k=k):
            if (n >= k if lasting else n == k) and (number == errno.EIO or name in NEEDS_ROOM):
                raise OSError(number, os.strerror(number))

        failed = None
        with pytest.MonkeyPatch.context() as patch:
            at_operation(patch, strike)
            try:
                ACTIONS[action](registry, fill)
            except QuillError as e:
                failed = e
        shown = check(registry, first)
        if failed:
            refused += 1
            assert failed.exit_code == 7
        if action != "save" and not (lasting and number == errno.EIO):
            # Who is told of a failure finds no version, who is told of none finds one.
            assert shown == (DONE["save"] if failed else DONE[action])
        goes_on(registry, fill)
    assert refused > 10


class Disk:
    """What a disk would hold after a power loss, from the operations that were asked of it.

    A file's bytes are safe once the file is synced, a folder's entries once the folder is; until then
    each may or may not have reached the disk. A rename is atomic.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.safe: dict[int, bytes] = {}
        self.live: dict[int, bytes] = {}
        self.entries: dict[int, dict[str, int]] = {}
        self.pending: list[list[tuple[int, str, int | None]]] = []
        self.top = self._load(root)

    def _load(self, path: Path) -> int:
        inode = os.lstat(path).st_ino
        if path.is_dir():
            self.entries[inode] = {p.name: self._load(p) for p in path.iterdir()}
        else:
            self.safe[inode] = self.live[inode] = path.read_bytes()
        return inode

    def record(self, monkeypatch, each: Callable[[], None]) -> None:
        """Follow fsio from now on, calling `each` after every operation."""
        real = {name: getattr(fsio, name) for name in OPERATIONS}

        def place(path: Path) -> tuple[int, str]:
            return os.stat(path.parent).st_ino, path.name

        def create(path):
            fd = real["_create"](path)
            inode = os.fstat(fd).st_ino
            self.live[inode] = b""
            self.safe.pop(inode, None)
            self.pending.append([(*place(path), inode)])
            each()
            return fd

        def write(fd, data):
            inode = os.fstat(fd).st_ino
            self.live[inode] += bytes(data)
            real["_write"](fd, data)
            each()

        def fsync(fd):
            inode = os.fstat(fd).st_ino
            real["_fsync"](fd)
            if inode in self.entries:
                for change in [c for c in self.pending if any(folder == inode for folder, _, _ in c)]:
                    self._apply(self.entries, change)
                    self.pending.remove(change)
            else:
                self.safe[inode] = self.live[inode]
            each()

        def move(name):
            def operation(source, target):
                inode = os.lstat(source).st_ino
                change = [(*place(source), None), (*place(target), inode)]
                real[name](source, target)
                self.pending.append(change)
                each()

            return operation

        def mkdir(path):
            real["_mkdir"](path)
            inode = os.stat(path).st_ino
            self.entries[inode] = {}
            self.pending.append([(*place(path), inode)])
            each()

        def unlink(path):
            change = [(*place(path), None)]
            real["_unlink"](path)
            self.pending.append(change)
            each()

        operations = {"_create": create, "_write": write, "_fsync": fsync, "_mkdir": mkdir, "_unlink": unlink}
        for name, operation in (operations | {n: move(n) for n in ("_replace", "_rename")}).items():
            monkeypatch.setattr(fsio, name, operation)

    @staticmethod
    def _apply(entries, change) -> None:
        for folder, name, inode in change:
            if folder in entries:
                entries[folder].pop(name, None)
                if inode is not None:
                    entries[folder][name] = inode

    def lose_power(self, to: Path, luck: random.Random | bool) -> None:
        """Write down one state that the disk may be found in.

        Args:
            to: A folder to write it to.
            luck: Whether each unsynced thing survived: all, none, or drawn.
        """

        def survives() -> bool:
            return luck if isinstance(luck, bool) else luck.random() < 0.5

        entries = {folder: dict(names) for folder, names in self.entries.items()}
        for change in self.pending:
            if survives():
                self._apply(entries, change)

        def put(inode: int, path: Path) -> None:
            if inode in entries:
                path.mkdir()
                for name, child in entries[inode].items():
                    # What lies in the trash or half made is nobody's any more.
                    if name not in (".trash", ".staging"):
                        put(child, path / name)
            else:
                live = self.live.get(inode, b"")
                torn = live[: len(live) // 2]
                path.write_bytes(self.safe.get(inode, torn) if not survives() else live)

        put(self.top, to)


@pytest.mark.parametrize("action", ACTIONS)
def test_f29_power_lost_after_any_operation(before, tmp_path, fill, action, monkeypatch):
    first = snapshot(before.root / "a" / "v1")
    disk = Disk(before.root)
    found: set[frozenset[str]] = set()
    states = 0

    def lose_power_in_many_ways() -> list[Registry]:
        nonlocal states
        lost = []
        for luck in (False, True, *(random.Random(f"{states}-{i}") for i in range(4))):
            states += 1
            folder = tmp_path / f"after-{states}"
            disk.lose_power(folder, luck)
            lost.append(Registry(folder))
        return lost

    def each() -> None:
        for registry in lose_power_in_many_ways():
            found.add(frozenset(check(registry, first)))
            shutil.rmtree(registry.root)

    with monkeypatch.context() as patch:
        disk.record(patch, each)
        ACTIONS[action](before, fill)
    assert states > 100
    assert found == {frozenset(DONE["save"]), frozenset(DONE[action])}
    # What was reported done is done, whatever is lost now.
    for registry in lose_power_in_many_ways():
        assert check(registry, first) == DONE[action]
        if action == "save":
            assert load_state(registry.unfinished("a"))[1]["step"] == 300
        goes_on(registry, fill)


def test_the_power_loss_is_felt_where_nothing_is_synced(before, tmp_path, fill, monkeypatch):
    """The simulation itself: without syncs it does find the damage that they prevent."""
    disk = Disk(before.root)
    with monkeypatch.context() as patch:
        disk.record(patch, lambda: None)
        patch.setattr(fsio, "_fsync", lambda fd: None)
        publish_next(before, fill)
    damaged = 0
    for i in range(20):
        disk.lose_power(tmp_path / f"after-{i}", random.Random(i))
        for version in Registry(tmp_path / f"after-{i}").entries():
            try:
                assert version.damaged is None
                version.read_file("model.safetensors")
            except (AssertionError, CorruptError):
                damaged += 1
    assert damaged > 5
