"""Remove datasets: one rename hides each, then it is deleted."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from quill import fsio, naming
from quill.data import locks, store


class Target(NamedTuple):
    """A dataset to remove, in whatever state.

    Attributes:
        name: Its name.
        path: Its folder, or a link to it.
    """

    name: str
    path: Path

    @property
    def reference(self) -> str:
        """What the command line calls it."""
        return f"{store.PREFIX}{self.name}"

    @property
    def size(self) -> int:
        """Bytes that removing it frees: files shared with another dataset stay."""
        if self.path.is_symlink():
            return 0
        with suppress(OSError):
            files = [e.stat(follow_symlinks=False) for e in os.scandir(self.path)]
            return sum(s.st_size for s in files if stat.S_ISREG(s.st_mode) and s.st_nlink == 1)
        return 0


def find(root: Path, name: str) -> Target:
    """Find a dataset to remove; a damaged one is found too.

    Args:
        root: The data root.
        name: Its name.

    Raises:
        NotFoundError: There is no dataset of that name.
        InputError: It cannot be a name.
    """
    naming.check(name, "dataset")
    if not os.path.lexists(root / name / store.MANIFEST):
        raise store.missing(root, name)
    return Target(name, root / name)


def remove(root: Path, targets: Sequence[Target]) -> list[Target]:
    """Remove datasets: one rename hides each, then it is deleted. Links are not followed.

    Args:
        root: The data root.
        targets: From `find`.

    Returns:
        Those that still existed.

    Raises:
        LockedError: Another process is using one of them; nothing is removed.
        ResourceError: The data root cannot be written.
    """
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(locks.alone(target.path))
        removed = []
        for target in targets:
            if os.path.lexists(target.path):
                fsio.discard(target.path, root / fsio.TRASH)
                fsio.remove_file(store.record_of(target.path))
                removed.append(target)
        return removed
