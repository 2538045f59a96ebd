"""Share a registry with a group of users."""

from __future__ import annotations

from pathlib import Path

from quill import fsio
from quill.errors import InputError

# POSIX's (gid_t)-1 leaves the group as it is.
_NO_GROUP = 2**32 - 1
_DIGITS = 10


def share(folders: list[Path], group: str | None = None) -> fsio.Shared:
    """Open folders, and everything in them, to a group; what quill makes in them later is open to it too.

    Args:
        folders: The registry, and the folder of its datasets; created if they are missing.
        group: The group's name; None for the folder's own group.

    Raises:
        InputError: There is no such group, or the system has no groups.
        ResourceError: A folder belongs to another user, or the user is not in the group.
    """
    number = _number(group) if group else None
    changed = 0
    refused: list[Path] = []
    for folder in folders:
        fsio.make_dir(folder)
        with fsio.guard(folder, "share"):
            done = fsio.share(folder, number)
        changed, refused = changed + done.changed, refused + done.refused
    return fsio.Shared(changed, refused)


def group_of(folder: Path) -> str:
    """The name of a folder's group, or its number if it has no name."""
    try:
        import grp

        return grp.getgrgid(folder.stat().st_gid).gr_name
    except (ImportError, KeyError):
        return str(folder.stat().st_gid)


def _number(group: str) -> int:
    try:
        import grp
    except ImportError:
        why = "folders on Windows are shared by their access lists"
        raise InputError("this system has no groups", why=why) from None
    try:
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        if group.isdecimal() and len(group) <= _DIGITS and int(group) < _NO_GROUP:
            return int(group)
        raise InputError(f"no group named '{group}'", why="see the output of: getent group") from None
