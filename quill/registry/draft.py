"""A version that is being written: its number is taken, and its files may change until it is published.

Only this class writes into a draft's folder. Every write is staged, checked against the token of the process
that owns the draft, and renamed into place, so a process that lost its draft cannot damage its successor's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quill import fsio, strictjson
from quill.errors import CorruptError, LockedError, QuillError, RefusedError
from quill.registry import aliases, locks, manifest
from quill.registry.version import Version


class Draft:
    """A version that is being written.

    Args:
        root: The registry.
        name: The model's name.
        number: The version that it becomes.

    Attributes:
        path: Its folder, for reading only.
    """

    def __init__(self, root: Path, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.path = root / name / f"v{number}"
        self._trash = root / fsio.TRASH
        self._token: str | None = None

    def __repr__(self) -> str:
        return f"Draft({self.reference!r})"

    @property
    def reference(self) -> str:
        """The reference that it gets, "name:vN"."""
        return f"{self.name}:v{self.number}"

    def has(self, name: str) -> bool:
        """Whether a file or folder of this name is in its folder."""
        return (self.path / name).exists()

    def read_object(self, name: str) -> dict[str, Any]:
        """Read one of its files as a JSON object.

        Raises:
            FileNotFoundError: There is no such file yet.
            CorruptError: It is not a JSON object, or not a plain file.
        """
        return manifest.read_object(self.path / name)

    def status(self) -> dict[str, Any] | None:
        """The last recorded status: owner, step and so on; None if there is none or it is unreadable."""
        try:
            return self.read_object(manifest.STATUS)
        except (FileNotFoundError, QuillError):
            return None

    def states(self) -> dict[int, Path]:
        """The folders of its resume states by step, the newest first."""
        folder = self.path / manifest.STATE
        with fsio.guard(folder, "read"):
            names = os.listdir(folder) if folder.is_dir() else []
        steps = {int(n[5:]): folder / n for n in names if n.startswith("step-") and n[5:].isdecimal()}
        return dict(sorted(steps.items(), reverse=True))

    def take(self) -> None:
        """Make this process the owner: from now on, every other process's writes to it fail."""
        self._token = os.urandom(8).hex()
        status = (self.status() or {}) | locks.me() | {"token": self._token}
        fsio.write_json(self.path / manifest.STATUS, status, durable=False)

    def check_owner(self) -> None:
        """Raise unless this process still owns what it took with `take`.

        A lock keeps other processes away. Where locks do nothing, the last process to take the draft wins.

        Raises:
            LockedError: Another process has taken it over or published it.
        """
        if self._token is None:
            return
        status = self.status() or {}
        if status.get("token") != self._token or self._is_published():
            raise LockedError(
                f"another process has taken over '{self.reference}'",
                why=f"pid {status.get('pid', '?')} on {status.get('host', '?')}; file locks do not work here",
                hint="quill doctor",
            )

    def update_status(self, **facts: Any) -> None:
        """Add facts to the status that `quill list` and `quill show` read."""
        status = (self.status() or {}) | facts
        with fsio.stage(self.path / manifest.STATUS, durable=False, fence=self.check_owner) as place:
            fsio.create(place, [strictjson.encode(status)])

    def write_json(self, name: str, value: Any) -> None:
        """Write one of its files as JSON, replacing it in one step.

        Raises:
            LockedError: Another process has taken it over; the old file stays, as for every write here.
            ResourceError: Disk or permission; the old file stays.
        """
        self.write_chunks(name, [strictjson.encode(value)])

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one of its files; raises as `write_json` does."""
        self.write_chunks(name, [data])

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> str:
        """Write one of its files from chunks, so that a large one is never in memory whole.

        Args:
            name: Relative to its folder; folders in it are made.
            chunks: Its content.

        Returns:
            The sha256 of what was written, hex.
        """
        path = self.path / name
        fsio.make_dir(path.parent)
        with fsio.stage(path, fence=self.check_owner) as place:
            return fsio.create(place, chunks)

    def write_file(self, name: str, make: Callable[[Path], object]) -> None:
        """Write one of its files with a function or library that needs a path.

        Args:
            name: Relative to its folder.
            make: Called with a staged path of that name to write; it need not sync.
        """
        self.check_owner()
        with fsio.stage(self.path / name, fence=self.check_owner) as place:
            make(place)

    def open_log(self, name: str, content: bytes | None = None) -> fsio.Log:
        """Open a log that lines are appended to.

        Args:
            name: Relative to its folder.
            content: Start a new log with this content, which replaces the old one; None to append to the old
                one. Lines appended after another process started a new log are not part of that.
        """
        self.check_owner()
        return fsio.Log(self.path / name, content, fence=self.check_owner)

    def save_state(self, step: int, make: Callable[[Path], object], keep: int = 2) -> Path:
        """Save a resume state as a whole and remove outdated ones.

        Args:
            step: Optimizer steps done.
            make: Called with an empty staged folder to write the state's files into; it need not sync.
            keep: How many states to keep, this one included.

        Returns:
            The state's folder.

        Raises:
            LockedError: Another process has taken the draft over.
            ResourceError: Disk or permission; the earlier states are untouched.
        """
        self.check_owner()
        folder = self.path / manifest.STATE
        target = folder / f"step-{step:06d}"
        fsio.make_dir(folder)
        # A run that resumed from an earlier state, because this one was damaged, replaces it.
        with fsio.stage(target, fence=self.check_owner) as staged:
            os.mkdir(staged)
            make(staged)
            document = manifest.of_state(staged, self.reference, step)
            fsio.create(staged / manifest.FILE, [strictjson.encode(document)])
        states = self.states()
        # A later step belongs to a future that was given up; it must not count as the newest.
        outdated = [s for s in states if s > step] + [s for s in states if s <= step][max(keep, 1) :]
        for old in outdated:
            fsio.discard(states[old], self._trash)
        return target

    def publish(self, **facts: Any) -> Version:
        """Make it a version: sync and hash its files, write the manifest last, remove the resume states.

        Args:
            **facts: What the manifest says beyond what is found here: data, parent, seeds, device,
                steps, parameters, best_val_loss, seconds.

        Raises:
            CorruptError: A file that every version needs is missing, or one changed while it was published.
            RefusedError: It is published already.
            LockedError: Another process has taken it over.
            ResourceError: Disk or permission; it is still a draft.
        """
        path = self.path / manifest.FILE
        self.check_owner()
        if self._is_published():
            raise RefusedError(f"'{self.reference}' is already published", why="a version never changes")
        with fsio.guard(self.path, "read"):
            leftovers = [Path(e.path) for e in os.scandir(self.path) if e.name.startswith(".")]
        for leftover in leftovers:
            fsio.discard(leftover, self._trash)
        fsio.settle(self.path)
        before = manifest.stamps(self.path)
        document = manifest.build(self.path, self.reference, facts)
        ours = False

        def fence() -> None:
            nonlocal ours
            self.check_owner()
            ours = True

        try:
            with fsio.stage(path, fence=fence) as place:
                fsio.create(place, [strictjson.encode(document)])
            if manifest.stamps(self.path) != before:
                why = "another process wrote into its folder"
                raise CorruptError(f"'{self.reference}' changed while it was published", why=why)
        except BaseException:
            # The rename may have happened without being synced: a failed publish must not be visible.
            if ours:
                with suppress(QuillError):
                    fsio.remove_file(path)
            raise
        self._token = None
        # It is published; a failure to tidy up neither undoes that nor is in the way.
        with suppress(QuillError):
            aliases.reserve(self.path.parent, self.number)
            if (self.path / manifest.STATE).is_dir():
                fsio.discard(self.path / manifest.STATE, self._trash)
            fsio.remove_file(self.path / manifest.STATUS)
        return Version(self.name, self.number, self.path, document)

    def discard(self) -> None:
        """Delete it; its number is never reused."""
        aliases.reserve(self.path.parent, self.number)
        fsio.discard(self.path, self._trash)

    def _is_published(self) -> bool:
        return os.path.lexists(self.path / manifest.FILE)
