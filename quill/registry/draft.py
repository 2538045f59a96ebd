"""A version in progress: its number is taken, its files come and go until it is finished."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quill import fsio
from quill.errors import CorruptError, LockedError, QuillError, RefusedError
from quill.registry import aliases as ledger
from quill.registry import locks
from quill.registry import manifest as manifests
from quill.registry.version import Version


class Draft:
    """A version that is being made.

    Args:
        root: The registry.
        name: The model's name.
        number: The version it will be.

    Attributes:
        path: Its folder; the caller writes config.json, model.safetensors and the rest into it.
        trash: Where what is removed goes first, on the same filesystem.
    """

    def __init__(self, root: Path, name: str, number: int) -> None:
        self.name, self.number = name, number
        self.path = root / name / f"v{number}"
        self.trash = root / fsio.TRASH
        self._token: str | None = None

    def __repr__(self) -> str:
        return f"Draft({self.reference!r})"

    @property
    def reference(self) -> str:
        """What it will be found by, "name:vN"."""
        return f"{self.name}:v{self.number}"

    def set_status(self, status: Mapping[str, Any]) -> None:
        """Say how it stands, for whoever lists it: process, host, start, step."""
        fsio.write_json(self.path / manifests.STATUS, dict(status), durable=False)

    def take(self) -> None:
        """Be the one who works on it, from now on: its status names this process."""
        self._token = os.urandom(8).hex()
        self.set_status((self.status() or {}) | locks.me() | {"token": self._token})

    def check_taken(self) -> None:
        """Hold on to what `take` took, before anything of it is replaced.

        A lock keeps others away; where locks do nothing, whoever came last goes on and the others end here.

        Raises:
            LockedError: Another process has taken it over, or has finished it.
        """
        if self._token is None:
            return
        status = self.status() or {}
        if status.get("token") != self._token or os.path.lexists(self.path / manifests.FILE):
            raise LockedError(
                f"another process has taken over '{self.reference}'",
                why=f"pid {status.get('pid', '?')} on {status.get('host', '?')}; locks do nothing here",
                hint="quill doctor",
            )

    def status(self) -> dict[str, Any] | None:
        """What was last said of it, or None."""
        try:
            return manifests.read_object(self.path / manifests.STATUS)
        except (FileNotFoundError, QuillError):
            return None

    def finish(self, **fields: Any) -> Version:
        """Publish it: everything synced and hashed, the manifest written last, the resume state removed.

        Args:
            **fields: What the manifest says beyond what is found here: data, parent, seeds, device,
                steps, parameters, best_val_loss, seconds.

        Raises:
            CorruptError: A file that every version needs is missing, or one changed meanwhile.
            RefusedError: It is finished already.
            LockedError: Another process has taken it over.
            ResourceError: The disk refused; it is still a draft then.
        """
        path = self.path / manifests.FILE
        self.check_taken()
        if os.path.lexists(path):
            raise RefusedError(f"'{self.reference}' is finished", why="a version never changes")
        with fsio.guard(self.path, "read"):
            leftovers = [Path(e.path) for e in os.scandir(self.path) if e.name.startswith(".")]
        for leftover in leftovers:
            fsio.discard(leftover, self.trash)
        fsio.settle(self.path)
        before = manifests.stamps(self.path)
        document = manifests.build(self.path, self.reference, fields)
        ours = False

        def look_again() -> None:
            nonlocal ours
            self.check_taken()
            ours = True

        try:
            fsio.write_json(path, document, check=look_again)
            if manifests.stamps(self.path) != before:
                why = "another process wrote into it while it was published"
                raise CorruptError(f"'{self.reference}' changed while it was published", why=why)
        except BaseException:
            # Renamed but not known to last: who is told that it failed must not find it published.
            if ours:
                with suppress(QuillError):
                    fsio.remove_file(path)
            raise
        self._token = None
        # It is published; what cannot be tidied up now neither undoes that nor is in anybody's way.
        with suppress(QuillError):
            ledger.reserve(self.path.parent, self.number)
            if (self.path / manifests.STATE).is_dir():
                fsio.discard(self.path / manifests.STATE, self.trash)
            fsio.remove_file(self.path / manifests.STATUS)
        return Version(self.name, self.number, self.path, document)

    def discard(self) -> None:
        """Give it up; its number stays taken."""
        ledger.reserve(self.path.parent, self.number)
        fsio.discard(self.path, self.trash)
