"""What a preparation that was interrupted leaves for the next one: the shards that are complete.

A large text is encoded in a folder that outlives the process. Once a shard is on disk it is recorded there,
with the place in the text where the next one begins. The same preparation, repeated, reads the text again but
encodes only what is not recorded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quill import __version__, fsio, strictjson
from quill.data import shards
from quill.data.encode import Position
from quill.data.named_sources import OnBytes
from quill.data.shards import Written
from quill.errors import QuillError

_RECORD = "shards.json"
_LONGEST_RECORD = 1 << 24
# Part of the folder's name: raised when the same text would be cut into other tasks.
_SCHEMA = 1


class Unfinished:
    """The shards of a dataset that is being prepared.

    Args:
        folder: Where they are.
        on_bytes: Called with "verifying", the bytes done, and the total.
    """

    def __init__(self, folder: Path, on_bytes: OnBytes) -> None:
        self.folder = folder
        self._tokenizer = ""
        self._done: dict[str, list[tuple[Written, Position]]] = {}
        self._on_bytes = on_bytes
        try:
            self._load()
        except FileNotFoundError:
            pass
        except (QuillError, KeyError, TypeError, ValueError, AttributeError):
            self._tokenizer, self._done = "", {}

    def begin(self, fingerprint: str) -> None:
        """Start with a tokenizer; shards of another one are forgotten."""
        if self._tokenizer != fingerprint:
            self._tokenizer, self._done = fingerprint, {}
        kept = {_RECORD, *(shards.name(s, i) for s, found in self._done.items() for i in range(len(found)))}
        for entry in list(os.scandir(self.folder)):
            if entry.name not in kept:
                fsio.delete(Path(entry.path))

    def shards(self, split: str) -> list[Written]:
        """Return the complete shards of a split, in order."""
        return [written for written, _ in self._done.get(split, ())]

    def position(self, split: str) -> Position:
        """Return where the next shard of a split begins."""
        found = self._done.get(split)
        return found[-1][1] if found else Position()

    def note(self, split: str, written: Written, position: Position) -> None:
        """Record one more shard, durably.

        Args:
            split: Its split.
            written: The shard, written to the folder.
            position: Where it ends.
        """
        self._done.setdefault(split, []).append((written, position))
        fsio.settle(self.folder)
        record = {"tokenizer": self._tokenizer, "splits": self._done}
        fsio.write_json(self.folder / _RECORD, record)

    def _load(self) -> None:
        """Read the record, and check each split's shards up to the first that is not as recorded."""
        path = self.folder / _RECORD
        record: Any = strictjson.parse(fsio.read_plain(path, _LONGEST_RECORD), origin=str(path))
        self._tokenizer = str(record["tokenizer"])
        read, total = 0, sum(written[1] for found in record["splits"].values() for written, _ in found)
        for split, entries in record["splits"].items():
            found = self._done.setdefault(split, [])
            for number, (written, position) in enumerate(entries):
                shard = Written(*written)
                if self._hash(shards.name(split, number), read, total) != shard.sha256:
                    break
                read += shard.bytes
                found.append((shard, Position(*position)))

    def _hash(self, name: str, read: int, total: int) -> str:
        digest = hashlib.sha256()
        with suppress(OSError, QuillError), fsio.open_plain(self.folder / name) as file:
            while data := file.read(1 << 22):
                digest.update(data)
                read += len(data)
                self._on_bytes("verifying", read, total)
        return digest.hexdigest()


@contextmanager
def resumed(root: Path, key: str, on_bytes: OnBytes) -> Iterator[Unfinished]:
    """Open the shards of a dataset that is being prepared, in a `lasting` folder.

    Args:
        root: The data root.
        key: The dataset's key.
        on_bytes: Called with "verifying", the bytes done, and the total.
    """
    made_of = [key, shards.SHARD_BYTES, __version__, _SCHEMA]
    with fsio.lasting(root, hashlib.sha256(strictjson.canonical(made_of)).hexdigest(), _RECORD) as folder:
        yield Unfinished(folder, on_bytes)
