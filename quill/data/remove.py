"""Remove datasets: one rename hides each, then it is deleted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from quill import fsio, naming
from quill.data import locks, store
from quill.data.dataset import MANIFEST, record_of
from quill.errors import NotFoundError


class Removal(NamedTuple):
    """A dataset to remove, in whatever state.

    Attributes:
        what: How the command line refers to it, "data:NAME".
        path: Its folder, or a link to it.
        bytes: What removing it frees; files shared with another dataset stay.
    """

    what: str
    path: Path
    bytes: int


class Plan:
    """Datasets to remove.

    Attributes:
        removals: What to remove.
        missing: The names that no dataset has, as "data:NAME".
    """

    def __init__(self, root: Path, removals: list[Removal], missing: list[str]) -> None:
        self._root, self.removals, self.missing = root, removals, missing

    def execute(self) -> list[Removal]:
        """Remove them; links are not followed.

        Returns:
            Those that still existed.

        Raises:
            LockedError: Another process is using one of them; nothing is removed.
            ResourceError: The data root cannot be written.
        """
        with ExitStack() as stack:
            for removal in self.removals:
                stack.enter_context(locks.alone(removal.path))
            removed = []
            for removal in self.removals:
                if os.path.lexists(removal.path):
                    fsio.discard(removal.path, self._root / fsio.TRASH)
                    fsio.remove_file(record_of(removal.path))
                    removed.append(removal)
            return removed


def plan(root: Path, names: Iterable[str], *, missing_ok: bool = False) -> Plan:
    """Find the datasets to remove; damaged ones are found too.

    Args:
        root: The data root.
        names: Their names, without "data:".
        missing_ok: Skip names that no dataset has.

    Raises:
        InputError: One cannot be a name.
        NotFoundError: No dataset has one of the names.
    """
    removals: list[Removal] = []
    missing: list[str] = []
    for name in dict.fromkeys(names):
        path = root / naming.check(name, "dataset")
        if os.path.lexists(path / MANIFEST):
            removals.append(Removal(store.PREFIX + name, path, _freed(path)))
            continue
        error: NotFoundError = store.missing(root, name)
        if not missing_ok:
            raise error
        missing.append(store.PREFIX + name)
    return Plan(root, removals, missing)


def _freed(path: Path) -> int:
    if path.is_symlink():
        return 0
    with suppress(OSError):
        files = [e.stat(follow_symlinks=False) for e in os.scandir(path)]
        return sum(s.st_size for s in files if stat.S_ISREG(s.st_mode) and s.st_nlink == 1)
    return 0
