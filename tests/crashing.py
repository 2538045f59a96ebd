"""A crash, a full disk, a failing disk or a power loss at every write operation of an action.

An action is anything that changes a registry: publishing, saving a resume state, a command. It is
tried on copies of one registry, each time with a fault at another operation; afterwards `invariants`
must hold and the next action must work. Operations are counted where Python hands them to the system
(`os.write`, `os.rename`, the unlinks of `shutil.rmtree` and so on), so that no layer above can hide one.
The safetensors library writes past Python, so `library_save` stands in for it here; the library itself meets
full disks and kills in `checkpoint/test_full_disks.py`.

    from crashing import WAYS, at_every_operation, invariants, power_loss, snapshot

    def act(registry): registry.begin("a").discard()

    def then(registry, outcome):
        assert invariants(registry, older) == {"a:v1"}
        act(registry)

    @pytest.mark.parametrize("way", WAYS)
    def test_f26_f27_f28_the_action(before, way, injections, tmp_path):
        injections.add("discard", way, at_every_operation(before, act, then, way, tmp_path / "s"))

    def test_f29_the_action(before, injections, tmp_path):
        injections.add("discard", "power loss", power_loss(before, act, then, tmp_path / "s"))
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

from quill import fsio
from quill.checkpoint.resume_state import load_state
from quill.errors import QuillError
from quill.registry import aliases, gc
from quill.registry.store import Registry

# The faults: "exit" ends the process before the operation, "torn" in the middle of a write; "enospc" and
# "eio" fail this operation, or ("lasting") it and all that follow; "short" writes only half of the bytes, and
# with "then enospc" every later operation that needs room fails.
WAYS = (
    "exit",
    "torn",
    "enospc",
    "enospc lasting",
    "eio",
    "eio lasting",
    "short",
    "short then enospc",
)
_KILLED = 9
# Operations that a full disk allows. (A network filesystem may report the error only on closing.)
NEEDS_NO_ROOM = {"replace", "rename", "exchange", "unlink", "rmdir", "chmod", "ftruncate"}
_WRITES = {"write", "pwrite"}


class Outcome(NamedTuple):
    """The outcome of an action.

    Attributes:
        way: The fault, of WAYS, or "power loss".
        operation: The name of the operation that it struck, or after which the power was lost.
        killed: Whether the process ended there, and reported nothing.
        error: The error that was raised; None if it reported success.
    """

    way: str
    operation: str
    killed: bool = False
    error: QuillError | None = None

    @property
    def done(self) -> bool:
        """Whether the action reported success."""
        return not self.killed and self.error is None


Act = Callable[[Registry], object]
Then = Callable[[Registry, Outcome], object]
# Called with the name of each operation before it; what it raises, the operation raises. For a write it may
# return "half", to write only that much, or "torn", to end the process after that.
Strike = Callable[[str], "str | None"]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def versions(registry: Registry) -> dict[str, dict[str, bytes]]:
    """Read the files of every published version, by its folder, for `invariants` to compare."""
    found = registry.entries(all_versions=True)
    return {str(v.path.relative_to(registry.root)): snapshot(v.path) for v in found}


def invariants(registry: Registry, older: Mapping[str, Mapping[str, bytes]]) -> set[str]:
    """Check what no fault may break, I1, I2 and I5, and that unfinished runs can be resumed.

    Args:
        registry: The registry after the fault.
        older: `versions` before it, without those that the action may remove.

    Returns:
        The references of the published versions.
    """
    seen: set[str] = set()
    for version in registry.entries(all_versions=True):
        assert version.damaged is None, version.damaged
        assert version.manifest is not None
        for name in version.manifest["files"]:
            version.read_file(name)
        seen.add(version.reference)
    for path, files in older.items():
        assert snapshot(registry.root / path) == files, f"{path} has changed"
    for folder in registry.root.iterdir():
        # What is being removed is complete under its new name.
        if not folder.name.startswith(".") and folder.is_dir() and not fsio.is_removed(folder):
            for alias, number in aliases.read(folder)["aliases"].items():
                assert registry.resolve(f"{folder.name}:{alias}").number == number
    for draft in registry.drafts():
        if (draft.path / "state").is_dir() and (found := load_state(draft)):
            assert found[2] == [], "a save that was cut short is not damage"
            assert draft.status() is not None, "a run that has a state can be resumed"
    return seen


def collected(registry: Registry) -> None:
    """Check I4: `quill gc` removes every leftover, and nothing else.

    Args:
        registry: The registry after a fault; no process is using it.
    """
    listed = {v.path: v.manifest["files"] for v in registry.entries(all_versions=True) if v.manifest}
    before = {path: {n: (path / n).read_bytes() for n in names} for path, names in listed.items()}
    drafts = {str(d.path): snapshot(d.path) for d in registry.drafts()}
    done = gc.plan(registry, older_than=0).execute()
    assert done.failed == []
    assert leftovers(registry.root) == []
    for path, files in before.items():
        left = snapshot(path)
        assert {n: c for n, c in left.items() if n in files} == files, f"gc has changed {path}"
        assert not [n for n in left if n.startswith("state/")], "a published version needs no resume state"
    for draft in registry.drafts():
        was = drafts[str(draft.path)]
        assert {p: c for p, c in was.items() if not p.startswith(("state/", "."))}.items() <= snapshot(
            draft.path
        ).items()
    assert gc.plan(registry, older_than=0).execute().removed == [], "a second gc finds nothing"


def leftovers(root: Path) -> list[str]:
    """List what a crash left below a folder: staged, in the trash, or under a temporary name."""
    found = []
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        within = bool({".staging", ".trash"} & set(parts[:-1]))
        if within or parts[-1].startswith(".tmp-"):
            found.append(str(path.relative_to(root)))
    return sorted(found)


def copy(registry: Registry, to: Path) -> Registry:
    """Copy a registry to another folder."""
    shutil.copytree(registry.root, to)
    return Registry(to)


def operations(before: Registry, act: Act, scratch: Path) -> list[str]:
    """List the write operations of an action by name, in order; it is done on a copy."""
    found: list[str] = []
    registry = copy(before, scratch / "counted")
    with intercepted(lambda name: found.append(name)), _other_writes() as missed:
        act(registry)
    assert missed == [], "no fault is tried on these writes"
    shutil.rmtree(registry.root)
    return found


def at_every_operation(before: Registry, act: Act, then: Then, way: str, scratch: Path) -> int:
    """Do an action repeatedly, each time with a fault at another of its write operations.

    Args:
        before: The registry; the action is done on copies of it.
        act: The action; it may raise only a QuillError.
        then: Called after each fault, with the copy and the outcome.
        way: One of WAYS.
        scratch: An empty folder.

    Returns:
        The number of operations struck.
    """
    kinds = operations(before, act, scratch)
    struck = [k for k, kind in enumerate(kinds) if _applies(way, kind)]
    for k in struck:
        registry = copy(before, scratch / "registry")
        try:
            if way in ("exit", "torn"):
                _kill_at(k, registry, act, "torn" if way == "torn" else None)
                outcome = Outcome(way, kinds[k], killed=True)
            else:
                outcome = Outcome(way, kinds[k], error=_refuse_at(k, registry, act, way))
            then(registry, outcome)
        except BaseException as e:
            e.add_note(f"{way} at the last of {len(kinds)} operations: {' '.join(kinds[: k + 1])}")
            raise
        shutil.rmtree(registry.root)
    return len(struck)


def power_loss(before: Registry, act: Act, then: Then, scratch: Path, draws: int = 4) -> int:
    """Lose the power after each operation of an action: what was not synced survives in any combination.

    Args:
        before: The registry; the action is done on it.
        act: The action.
        then: Called with each state the disk may be found in; `outcome.killed` until the action is done.
        scratch: An empty folder.
        draws: Random combinations for each operation, besides everything lost and everything kept.

    Returns:
        The number of states of the disk that were checked.
    """
    disk, states, done = Disk(before.root), 0, False

    def after(operation: str) -> None:
        nonlocal states
        for luck in (False, True, *(random.Random(f"{states}-{i}") for i in range(draws))):
            states += 1
            found = scratch / "found"
            disk.lose_power(found, luck)
            try:
                then(Registry(found), Outcome("power loss", operation, killed=not done))
            except BaseException as e:
                e.add_note(f"the power was lost after {operation}, state {states}")
                raise
            shutil.rmtree(found)

    scratch.mkdir(parents=True, exist_ok=True)
    with disk.recorded(after):
        act(before)
    done = True
    after("the end")
    return states


@contextmanager
def intercepted(strike: Strike) -> Iterator[None]:
    """Call `strike` before every operation of this process that changes a disk."""
    with pytest.MonkeyPatch.context() as patch:
        intercept(patch, strike)
        yield


def intercept(patch: pytest.MonkeyPatch, strike: Strike) -> None:
    """Do what `intercepted` does, until the patch is undone."""
    real = {n: getattr(os, n) for n in ("open", "close", "write", "pwrite")}
    written: set[int] = set()

    def plain(name: str, done: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **more: Any) -> Any:
            strike(name)
            return done(*args, **more)

        return operation

    def writing(name: str) -> Callable[..., int]:
        def operation(fd: int, data: Any, *rest: Any) -> int:
            answer = strike(name)
            view = memoryview(data).cast("B")
            count: int = real[name](fd, view[: max(len(view) // 2, 1)] if answer else view, *rest)
            if answer == "torn":
                os._exit(_KILLED)
            written.add(fd)
            return count

        return operation

    def opening(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT and not os.path.lexists(path):
            strike("create")
        return int(real["open"](path, flags, *rest, **more))

    def closing(fd: int) -> None:
        real["close"](fd)
        if fd in written:
            written.remove(fd)
            # The descriptor is closed in any case (close(2) on Linux).
            strike("close")

    patch.setattr(safetensors.torch, "save_file", library_save)
    patch.setattr(os, "open", opening)
    patch.setattr(os, "close", closing)
    for name in _WRITES:
        patch.setattr(os, name, writing(name))
    for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "ftruncate"):
        patch.setattr(os, name, plain(name, getattr(os, name)))
    for name in ("chmod", "fchmod"):
        patch.setattr(os, name, plain("chmod", getattr(os, name)))
    # It is a call of the C library, which Python does not have.
    patch.setattr(fsio.folders, "exchange", plain("exchange", fsio.folders.exchange))


def layered(act: Act) -> Act:
    """Do an action where every folder that is there already is of a lower layer of overlayfs.

    Such a folder cannot be renamed or exchanged; its files can, and the folders that the action makes.
    """

    def fixed(registry: Registry) -> None:
        made: set[int] = set()
        mkdir, rename, exchange = os.mkdir, os.rename, fsio.folders.exchange

        def is_lower(path: Any) -> bool:
            found = os.lstat(path)
            return stat.S_ISDIR(found.st_mode) and found.st_ino not in made

        def making(path: Any, *rest: Any, **more: Any) -> None:
            mkdir(path, *rest, **more)
            made.add(os.lstat(path).st_ino)

        def moving(source: Any, target: Any) -> None:
            if is_lower(source):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            rename(source, target)

        def exchanging(first: Path, second: Path) -> bool:
            return not (is_lower(first) or is_lower(second)) and exchange(first, second)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "mkdir", making)
            patch.setattr(os, "rename", moving)
            patch.setattr(fsio.folders, "exchange", exchanging)
            act(registry)

    return fixed


def library_save(tensors: dict[str, torch.Tensor], filename: Path, metadata: Any = None) -> None:
    """Do to the disk what `safetensors.torch.save_file` does, in operations that can be struck."""
    raw = memoryview(safetensors.torch.save(tensors, metadata))
    temporary = filename.with_name(".tmpAbCdEf")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            header = 8 + int.from_bytes(raw[:8], "little")
            for rest in (raw[:header], raw[header:]):
                while rest:
                    rest = rest[os.write(fd, rest) :]
        finally:
            with suppress(OSError):  # The library does not look at what close returns.
                os.close(fd)
        os.replace(temporary, filename)
    except OSError as e:
        with suppress(OSError):
            os.unlink(temporary)
        why = f"{os.strerror(e.errno or 0)} (os error {e.errno})"
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: {why}") from None


def _applies(way: str, kind: str) -> bool:
    if way in ("torn", "short", "short then enospc"):
        return kind in _WRITES
    if way == "exit":
        return kind != "close"  # Closing changes nothing on the disk.
    return not (way.startswith("enospc") and kind in NEEDS_NO_ROOM)


def _kill_at(k: int, registry: Registry, act: Act, answer: str | None) -> None:
    """Do an action in a process that ends at its operation k, as kill -9 ends one."""
    child = os.fork()
    if child == 0:
        count = -1

        def strike(name: str) -> str | None:
            nonlocal count
            count += 1
            if count == k and answer is None:
                os._exit(_KILLED)
            return answer if count == k else None

        try:
            with intercepted(strike):
                act(registry)
            sys.stderr.write(f"the action came to its end without operation {k}\n")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == _KILLED


def _refuse_at(k: int, registry: Registry, act: Act, way: str) -> QuillError | None:
    """Do an action while its operation k fails or is cut short; return the error it raised."""
    count = -1
    refusal = errno.EIO if way.startswith("eio") else errno.ENOSPC

    def strike(name: str) -> str | None:
        nonlocal count
        count += 1
        if way.startswith("short"):
            if count == k:
                return "half"
            refused = count > k and way == "short then enospc"
        else:
            refused = count >= k if way.endswith("lasting") else count == k
        if refused and not (refusal == errno.ENOSPC and name in NEEDS_NO_ROOM):
            raise OSError(refusal, os.strerror(refusal))
        return None

    try:
        with intercepted(strike):
            act(registry)
    except QuillError as e:
        return e
    return None


_watching: list[list[str]] = []


def _see(event: str, args: tuple[Any, ...]) -> None:
    # Opened by `open` or a library; os.open passes None as the mode.
    if not _watching or event != "open" or args[1] is None or not isinstance(args[0], (str, bytes)):
        return
    if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _watching[-1].append(os.fsdecode(args[0]))


@contextmanager
def _other_writes() -> Iterator[list[str]]:
    """Collect the paths that are opened for writing other than by os.open, where no fault can strike."""
    if not hasattr(_other_writes, "hooked"):
        sys.addaudithook(_see)  # A hook cannot be removed.
        _other_writes.hooked = True  # type: ignore[attr-defined]
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


class Disk:
    """What a disk would contain after a power loss, from the operations that were done on it.

    A file's bytes are safe once the file is synced, a folder's entries once the folder is; until then each
    may or may not have reached the disk, in any order. A rename is atomic.

    Args:
        root: The folder that is followed; what it holds now is safe.
    """

    def __init__(self, root: Path) -> None:
        self._keys: dict[int, int] = {}  # By inode; a reused number is another file.
        self._live: dict[int, bytes] = {}
        self._safe: dict[int, bytes] = {}
        self._entries: dict[int, dict[str, int]] = {}
        self._pending: list[list[tuple[int, str, int | None]]] = []
        self._top = self._load(root)

    def _new(self, inode: int) -> int:
        self._keys[inode] = len(self._live) + len(self._entries)
        return self._keys[inode]

    def _load(self, path: Path) -> int:
        key = self._new(os.lstat(path).st_ino)
        if path.is_dir():
            self._entries[key] = {}
            self._entries[key].update({p.name: self._load(p) for p in path.iterdir()})
        else:
            self._live[key] = self._safe[key] = path.read_bytes()
        return key

    @contextmanager
    def recorded(self, each: Callable[[str], object]) -> Iterator[None]:
        """Record what this process does to the disk, and call `each` with the name of every operation."""
        names = (
            "open",
            "write",
            "pwrite",
            "ftruncate",
            "fsync",
            "replace",
            "rename",
            "mkdir",
            "unlink",
            "rmdir",
            "link",
        )
        real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in names}
        exchange_really = fsio.folders.exchange

        def place(path: Any, dir_fd: int | None) -> tuple[int, str]:
            whole = Path(os.fspath(path))
            inode = os.fstat(dir_fd).st_ino if dir_fd is not None else os.stat(whole.parent).st_ino
            return self._keys.get(inode, -1), whole.name

        def tell(name: str) -> None:
            with pytest.MonkeyPatch.context() as plain:
                for n in names:
                    plain.setattr(os, n, real[n])
                each(name)

        def opening(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            made = bool(flags & os.O_CREAT) and not os.path.lexists(path)
            fd = int(real["open"](path, flags, *rest, **more))
            if made:
                key = self._new(os.fstat(fd).st_ino)
                self._live[key] = b""
                self._pending.append([(*place(path, more.get("dir_fd")), key)])
                tell("create")
            return fd

        def content(name: str, change: Callable[..., bytes]) -> Callable[..., Any]:
            def operation(fd: int, *args: Any) -> Any:
                key = self._keys[os.fstat(fd).st_ino]
                answer = real[name](fd, *args)
                self._live[key] = change(self._live[key], *args)
                tell(name)
                return answer

            return operation

        def at(old: bytes, data: Any, offset: int) -> bytes:
            new = bytes(data)
            return old[:offset].ljust(offset, b"\0") + new + old[offset + len(new) :]

        def fsync(fd: int) -> None:
            key = self._keys.get(os.fstat(fd).st_ino, -1)
            real["fsync"](fd)
            if key in self._entries:
                for change in [c for c in self._pending if any(folder == key for folder, _, _ in c)]:
                    self._apply(self._entries, change)
                    self._pending.remove(change)
            elif key in self._live:
                self._safe[key] = self._live[key]
            tell("fsync")

        def move(name: str) -> Callable[..., None]:
            def operation(source: Any, target: Any) -> None:
                key = self._keys[os.lstat(source).st_ino]
                change = [(*place(source, None), None), (*place(target, None), key)]
                real[name](source, target)
                self._pending.append(change)
                tell(name)

            return operation

        def exchange(first: Path, second: Path) -> bool:
            keys = [self._keys[os.lstat(p).st_ino] for p in (first, second)]
            if done := exchange_really(first, second):
                self._pending.append([(*place(first, None), keys[1]), (*place(second, None), keys[0])])
                tell("exchange")
            return done

        def link(source: Any, target: Any, **more: Any) -> None:
            real["link"](source, target, **more)
            self._pending.append([(*place(target, None), self._keys[os.lstat(source).st_ino])])
            tell("link")

        def mkdir(path: Any, *rest: Any, **more: Any) -> None:
            real["mkdir"](path, *rest, **more)
            key = self._new(os.stat(path).st_ino)
            self._entries[key] = {}
            self._pending.append([(*place(path, more.get("dir_fd")), key)])
            tell("mkdir")

        def remove(name: str) -> Callable[..., None]:
            def operation(path: Any, *, dir_fd: int | None = None) -> None:
                change = [(*place(path, dir_fd), None)]
                real[name](path, dir_fd=dir_fd)
                self._pending.append(change)
                tell(name)

            return operation

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(safetensors.torch, "save_file", library_save)
            patch.setattr(os, "open", opening)
            patch.setattr(os, "write", content("write", lambda old, data: old + bytes(data)))
            patch.setattr(os, "pwrite", content("pwrite", at))
            patch.setattr(os, "ftruncate", content("ftruncate", lambda old, n: old[:n].ljust(n, b"\0")))
            patch.setattr(os, "fsync", fsync)
            patch.setattr(os, "mkdir", mkdir)
            patch.setattr(os, "link", link)
            patch.setattr(fsio.folders, "exchange", exchange)
            for name in ("replace", "rename"):
                patch.setattr(os, name, move(name))
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, remove(name))
            yield

    @staticmethod
    def _apply(entries: dict[int, dict[str, int]], change: list[tuple[int, str, int | None]]) -> None:
        for folder, name, key in change:
            if folder in entries:
                entries[folder].pop(name, None)
                if key is not None:
                    entries[folder][name] = key

    def lose_power(self, to: Path, luck: random.Random | bool) -> None:
        """Write one state that the disk may be found in.

        Args:
            to: A folder to make.
            luck: Whether each unsynced thing survived: all, none, or drawn.
        """

        def survives() -> bool:
            return luck if isinstance(luck, bool) else luck.random() < 0.5

        entries = {folder: dict(names) for folder, names in self._entries.items()}
        for change in self._pending:
            if survives():
                self._apply(entries, change)

        def put(key: int, path: Path) -> None:
            if key in entries:
                path.mkdir()
                for name, child in entries[key].items():
                    put(child, path / name)
                return
            live = self._live[key]
            if survives():
                path.write_bytes(live)
                return
            # What was never synced is cut short, empty, or zeros of its length.
            lost = [self._safe.get(key, live[: len(live) // 2]), b"", bytes(len(live))]
            kept = lost[0] if isinstance(luck, bool) or key in self._safe else luck.choice(lost)
            path.write_bytes(kept)

        put(self._top, to)
