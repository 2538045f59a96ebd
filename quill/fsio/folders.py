"""Make, rename, replace and remove folders, each in one step."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quill.errors import CorruptError, InputError, RefusedError, ResourceError
from quill.fsio import layers
from quill.fsio.failures import guard, upwards
from quill.fsio.locking import lock_folder
from quill.fsio.sharing import open_to_group
from quill.fsio.syncing import sync_dir

# Older versions staged folders here; `quill gc` still removes what they left.
STAGING = ".staging"
TRASH = ".trash"
TEMPORARY = ".tmp-"


def make_dir(path: Path) -> None:
    """Create a folder and its missing parents, durably; an existing one is fine."""
    with guard(path, "create"):
        missing = [p for p in upwards(path) if not p.is_dir()]
        for folder in reversed(missing):
            with suppress(FileExistsError):
                os.mkdir(folder)
                open_to_group(folder)
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
            sync_dir(folder.parent)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Create a new empty folder that is deleted at the end, and is locked until then.

    Args:
        parent: The folder to create it in; it exists.
    """
    folder = parent / f"{TEMPORARY}{unique()}"
    with guard(parent, "write to"):
        os.mkdir(folder)
        open_to_group(folder)
    fd = lock_folder(folder, shared=True)
    try:
        yield folder
    finally:
        delete(folder)
        if fd is not None:
            os.close(fd)


@contextmanager
def lasting(parent: Path, key: str, record: str) -> Iterator[Path]:
    """Create a folder for work that a later process can resume, or open the one that was left.

    It is deleted at the end of the context, also after an error in the input, which has to change; after any
    other error it stays if there is something to resume. `quill gc` removes one that nothing uses any more.
    While another process works in it, this is a `scratch` folder.

    Args:
        parent: The folder to create it in; it exists.
        key: At least 12 hex digits that stand for the work.
        record: The file in it that says what is done; without it there is nothing to resume.
    """
    folder = parent / f"{TEMPORARY}0-{key[:12]}"
    while True:
        with guard(parent, "write to"), suppress(FileExistsError):
            os.mkdir(folder)
            open_to_group(folder)
        refuse_link(folder)
        try:
            fd = lock_folder(folder, shared=False)
        except BlockingIOError:
            with scratch(parent) as other:
                yield other
            return
        # Its last user may have deleted it before it was locked.
        if fd is None or (folder.is_dir() and os.path.samestat(os.fstat(fd), os.stat(folder))):
            break
        os.close(fd)
    keep = False
    try:
        yield folder
    except BaseException as e:
        keep = not isinstance(e, InputError | CorruptError) and (folder / record).exists()
        raise
    finally:
        if not keep:
            delete(folder)
        if fd is not None:
            os.close(fd)


def claim(path: Path) -> bool:
    """Create a folder and return whether it is new: of any number of callers, one gets True.

    Args:
        path: The folder; its parent exists.
    """
    with guard(path, "create"):
        try:
            os.mkdir(path)
        except FileExistsError:
            return False
        open_to_group(path)
        sync_dir(path.parent)
    return True


def rename(source: Path, target: Path) -> bool:
    """Rename a folder durably; the caller has made sure that the target does not exist.

    Returns:
        Whether it could be renamed; a folder of a lower layer of overlayfs can only be copied and removed.
    """
    with guard(source, "rename"):
        try:
            os.rename(source, target)
        except OSError as e:
            if layers.is_fixed(e):
                return False
            raise
        sync_dir(target.parent)
    return True


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder durably, in one step; the caller has made sure that the target does not exist."""
    with guard(source, "copy"), scratch(target.parent) as folder:
        layers.clone(source, folder / target.name)
        os.rename(folder / target.name, target)
        sync_dir(target.parent)


def discard(path: Path, trash: Path | None = None) -> None:
    """Remove a file or folder: one rename hides it, then it is deleted. Links are never followed.

    Where a folder cannot be renamed it is removed in place, its manifest first.

    Args:
        path: What to remove.
        trash: A folder on the same filesystem, `.trash` next to it by default. A crash leaves the rest there.

    Raises:
        CorruptError: The trash is a link.
        ResourceError: It cannot be removed.
    """
    trash = trash or path.parent / TRASH
    refuse_link(trash)
    make_dir(trash)
    grave = trash / f"{unique()}-{path.name}"
    with guard(path, "remove"):
        try:
            os.rename(path, grave)
        except OSError as e:
            if not layers.is_fixed(e):
                raise
            layers.remove(path)
            return
        sync_dir(path.parent)
    delete(grave)


def refuse_link(folder: Path) -> None:
    """Raise CorruptError for a folder to write into that is really a link."""
    if folder.is_symlink():
        why = "nothing is written or moved through a link, which may point anywhere"
        raise CorruptError(f"'{folder}' is a symbolic link", why=why, hint=shlex.join(["rm", str(folder)]))


def delete(path: Path) -> None:
    """Delete a temporary file or folder; if that fails now, `quill gc` does it later."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def remove_file(path: Path) -> None:
    """Remove one file, unless it is already gone."""
    with guard(path, "remove"), suppress(FileNotFoundError):
        os.unlink(path)


def put_folder(place: Path, target: Path, *, replace: bool) -> None:
    """Rename a folder to its target, in exchange for the old one, which is then where the new one was."""
    if replace and os.path.lexists(target):
        if not exchange(place, target):
            _replace_folder(place, target)
        return
    try:
        os.rename(place, target)
    except OSError as e:
        if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise already_exists(target) from None  # Another process was faster.
        raise


def exchange(first: Path, second: Path) -> bool:
    """Exchange two files or folders in one step (renameat2(2) of Linux); False where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if not renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange):
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number))


def _replace_folder(place: Path, target: Path) -> None:
    """Replace a folder in two steps; an error or a signal between them puts the old one back."""
    old = target.with_name(f"{TEMPORARY}{unique()}")
    try:
        try:
            os.rename(target, old)
        except OSError as e:
            if not layers.is_fixed(e):
                raise
            layers.clone(target, old)
            layers.remove(target)
        os.rename(place, target)
    except BaseException as e:
        _put_back(old, target, e)
        raise
    delete(old)


def _put_back(old: Path, target: Path, cause: BaseException) -> None:
    """Undo the first half of a replacement, if it was done."""
    if not os.path.lexists(old):
        return
    try:
        # The mark is the last that goes before the folder itself.
        if layers.is_removed(target) or (target.is_dir() and not os.listdir(target)):
            layers.remove(target)
        if os.path.lexists(target):
            delete(old)
        else:
            os.rename(old, target)
    except OSError as e:
        clear = shlex.join(["rm", "-r", str(target)]) + " && " if os.path.lexists(target) else ""
        raise ResourceError(
            f"cannot write '{target}'",
            why=f"{e.strerror}, and what was there before is now '{old}'",
            hint=clear + shlex.join(["mv", str(old), str(target)]),
        ) from cause


def already_exists(target: Path) -> RefusedError:
    return RefusedError(f"'{target}' already exists", why="it is not overwritten")


def unique() -> str:
    return f"{os.getpid()}-{os.urandom(6).hex()}"
