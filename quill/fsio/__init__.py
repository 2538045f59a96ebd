"""Durable writes: every file or folder appears whole or not at all.

Each write is made under a temporary name on the same filesystem, synced, renamed to its target, and the
target's folder synced. Readers see the old content or the new, never a mixture. A rename is atomic
(POSIX.1-2017, rename), but it survives a power loss only once its folder is synced, and a file's bytes only
once the file is.
"""

from quill.fsio.failures import guard, require_space, upwards
from quill.fsio.folders import (
    STAGING,
    TRASH,
    claim,
    copy_folder,
    delete,
    discard,
    lasting,
    make_dir,
    refuse_link,
    remove_file,
    rename,
    scratch,
)
from quill.fsio.layers import MANIFEST, REMOVED, is_removed
from quill.fsio.locking import is_in_use, keep_locked, lock_folder
from quill.fsio.reading import check_size, expanded, open_plain, read_plain, sha256
from quill.fsio.sharing import Shared, open_to_group, share
from quill.fsio.syncing import settle, sync_dir
from quill.fsio.writing import Log, create, stage, write_bytes, write_chunks, write_json

__all__ = [
    "MANIFEST",
    "REMOVED",
    "STAGING",
    "TRASH",
    "Log",
    "Shared",
    "check_size",
    "claim",
    "copy_folder",
    "create",
    "delete",
    "discard",
    "expanded",
    "guard",
    "is_in_use",
    "is_removed",
    "keep_locked",
    "lasting",
    "lock_folder",
    "make_dir",
    "open_plain",
    "open_to_group",
    "read_plain",
    "refuse_link",
    "remove_file",
    "rename",
    "require_space",
    "scratch",
    "settle",
    "sha256",
    "share",
    "stage",
    "sync_dir",
    "upwards",
    "write_bytes",
    "write_chunks",
    "write_json",
]
