"""Verify datasets: files have their sizes and hashes, and ids belong to the vocabulary."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from quill.data import store
from quill.data.dataset import Dataset
from quill.errors import CorruptError, QuillError

State = Literal["ok", "damaged", "unreadable"]


class File(NamedTuple):
    """The result for one file.

    Attributes:
        name: Its name.
        bytes: Its size; None if it is missing.
        error: What is wrong with it, or None.
    """

    name: str
    bytes: int | None
    error: QuillError | None = None

    @property
    def state(self) -> State:
        """The result in one word; an unreadable file may be undamaged."""
        return _state([self.error] if self.error else [])


class Result(NamedTuple):
    """The result for a dataset.

    Attributes:
        reference: How the command line refers to it, "data:NAME".
        files: The results for its files.
        error: What is wrong with it as a whole, or None.
    """

    reference: str
    files: list[File]
    error: QuillError | None = None

    @property
    def kind(self) -> Literal["dataset"]:
        """What it is."""
        return "dataset"

    @property
    def errors(self) -> list[QuillError]:
        """Everything that is wrong with it."""
        return [e for e in (self.error, *(f.error for f in self.files)) if e is not None]

    @property
    def state(self) -> State:
        """The worst of what was found."""
        return _state(self.errors)


def find(root: Path, names: Iterable[str] = ()) -> list[Path]:
    """Find the datasets to verify.

    Args:
        root: The data root.
        names: Their names, without "data:"; without any, all datasets.

    Raises:
        InputError: One cannot be a name.
        NotFoundError: There is no such dataset.
    """
    wanted = list(dict.fromkeys(names)) or [entry.name for entry in store.entries(root)]
    for name in wanted:
        with suppress(CorruptError):
            store.find(root, name)
    return [root / name for name in wanted]


def count_bytes(path: Path) -> int:
    """Approximately how many bytes `verify` will read."""
    with suppress(OSError):
        return sum(e.stat(follow_symlinks=False).st_size for e in os.scandir(path))
    return 0


def verify(path: Path, on_bytes: Callable[[int], None] = lambda n: None) -> Result:
    """Verify a dataset, byte by byte.

    Args:
        path: Its folder.
        on_bytes: Called with the number of bytes after each read.
    """
    reference = store.PREFIX + path.name
    try:
        dataset = Dataset.open(path)
    except QuillError as e:
        return Result(reference, [], e)
    files = []
    for name, facts in dataset.manifest["files"].items():
        try:
            dataset.verify_file(name, on_bytes)
        except QuillError as e:
            files.append(File(name, facts["bytes"], e))
        else:
            files.append(File(name, facts["bytes"]))
    return Result(reference, files)


def _state(errors: Iterable[QuillError]) -> State:
    found = list(errors)
    if not found:
        return "ok"
    return "damaged" if any(isinstance(e, CorruptError) for e in found) else "unreadable"
