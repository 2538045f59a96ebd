"""A prepared dataset on disk: its manifest, its tokenizer, and its ids, verified before use.

A folder contains `train.bin`, `val.bin`, `tokenizer.json` and `manifest.json`; a large split is several files
(see shards.py). The manifest is written last, so a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from quill import fsio, strictjson
from quill.data import hub, shards
from quill.data.named_sources import NAMED, OnBytes
from quill.data.shards import Shard
from quill.errors import CorruptError, NotFoundError, QuillError, ResourceError, newer, shorten
from quill.tokenizers import base

SCHEMA_VERSION = 2  # A split may be several files.
MANIFEST = fsio.MANIFEST
TOKENIZER = "tokenizer.json"

VERIFIED = ".verified"

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

# A list of characters may be long; everything else in a manifest is short.
_LONGEST_MANIFEST = 1 << 26
_LONGEST_RECORD = 1 << 20
# A file written this shortly before it was verified could change again and look the same.
_SETTLED_SECONDS = 2.0

# Settings that `quill prepare` takes as flags, and their defaults.
_FLAGS = {
    "tokenizer": "char",
    "vocab_size": None,
    "val_fraction": 0.1,
    "encoding": "utf-8",
    "text_field": "text",
    "dedup": None,
    "split": None,
    "shard": None,
}


class Dataset:
    """A prepared dataset, open for reading.

    Attributes:
        path: Its folder.
        name: The folder's name.
        manifest: The content of `manifest.json`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.name = path.name
        self.manifest = manifest
        self._held = False

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a dataset, checking that its files have the sizes in its manifest.

        Raises:
            NotFoundError: There is no dataset.
            CorruptError: A file is missing or has another size, or the manifest cannot be parsed.
            InputError: A newer quill wrote it.
        """
        try:
            raw = fsio.read_plain(path / MANIFEST, _LONGEST_MANIFEST)
        except FileNotFoundError:
            raise NotFoundError(f"no dataset in '{path}'", why=f"there is no {MANIFEST}") from None
        except ResourceError as e:
            if isinstance(e.__cause__, NotADirectoryError):
                raise NotFoundError(f"no dataset in '{path}'", why="it is not a folder") from None
            raise
        manifest = strictjson.parse(raw, origin=str(path / MANIFEST), error=CorruptError)
        _validate(path, manifest)
        dataset = cls(path, manifest)
        for name, facts in manifest["files"].items():
            try:
                found = os.lstat(path / name)
            except OSError as e:
                raise dataset.damaged(f"{name}: {e.strerror}") from None
            if not stat.S_ISREG(found.st_mode):
                raise dataset.damaged(f"{name} is not a regular file")
            if found.st_size != facts["bytes"]:
                raise dataset.damaged(
                    f"{name} has {found.st_size:,} bytes, not {facts['bytes']:,} as in {MANIFEST}"
                )
        return dataset

    def __repr__(self) -> str:
        counts = f"{self.count('train'):,} tokens for training, {self.count('val'):,} for validation"
        return f"<{self.name}: {counts}, {self.kind} vocabulary of {self.vocab_size:,}>"

    @property
    def key(self) -> str:
        """sha256 of the text and the settings that it was made from, in hex."""
        return str(self.manifest["key"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it was prepared with, by their names in DataConfig."""
        return dict(self.manifest["settings"])

    @property
    def duplicates(self) -> dict[str, int]:
        """Counts of the text's documents, and of those dropped, exact and near; empty if none were sought."""
        found: dict[str, int] = self.manifest["source"].get("duplicates", {})
        return found

    @property
    def origin(self) -> str | None:
        """Hash of its sources' absolute paths; None if it was made of a stream."""
        origin: str | None = self.manifest["source"].get("whence")
        return origin

    @property
    def stamp(self) -> str | None:
        """State of its source files when they were last read, as `Text.stamp` returns it."""
        stamp: str | None = self.manifest["source"].get("stamp")
        return stamp

    @property
    def kind(self) -> str:
        """The tokenizer's kind."""
        return str(self.manifest["tokenizer"]["kind"])

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer has."""
        return int(self.manifest["tokenizer"]["vocab_size"])

    @property
    def created(self) -> str:
        """When it was prepared, in UTC, ISO 8601."""
        return str(self.manifest.get("created") or "")[:40]

    @property
    def size(self) -> int:
        """Bytes of its files, without the manifest."""
        return sum(int(facts["bytes"]) for facts in self.manifest["files"].values())

    @cached_property
    def tokenizer(self) -> base.Tokenizer:
        """The tokenizer of its ids.

        Raises:
            CorruptError: The file is not the one that was written.
        """
        return self._read_tokenizer()

    @cached_property
    def train(self) -> Shard:
        """Ids of the training split, (n,), verified, and read from the file as they are needed.

        Raises:
            CorruptError: The file does not match its sha256, or has an id outside the vocabulary.
        """
        return self._shard("train")

    @cached_property
    def val(self) -> Shard:
        """Ids of the validation split, as for `train`."""
        return self._shard("val")

    def split(self, name: Split) -> Shard:
        """Return the ids of a split."""
        return self.train if name == "train" else self.val

    def count(self, name: Split, of: Literal["tokens", "bytes", "characters"] = "tokens") -> int:
        """Return the tokens, UTF-8 bytes or characters of a split."""
        return int(self.manifest["splits"][name][of])

    def files(self, name: Split) -> list[str]:
        """Return the names of the files of a split, in order."""
        return shards.names(name, self.manifest["files"])

    def head(self, characters: int) -> str:
        """Decode the start of the training split.

        Args:
            characters: The most to return.
        """
        # A token has at least one byte, and a character at most four.
        ids = self.train[: 4 * characters].tolist()
        return self.tokenizer.decode(ids)[:characters]

    def restamp(self, stamp: str) -> None:
        """Record that the source files, touched but equal, need not be read next time.

        Args:
            stamp: What `Text.stamp` returns for the files now.
        """
        if self.path.is_symlink():
            return  # Nothing is written through a link.
        source = {**self.manifest["source"], "stamp": stamp}
        self.manifest = {**self.manifest, "source": source}
        fsio.write_json(self.path / MANIFEST, self.manifest)

    def verify(self, on_bytes: OnBytes | None = None, *, again: bool = True) -> None:
        """Compare every file with its sha256, and every id with the vocabulary.

        Args:
            on_bytes: Called with "verifying", the bytes done, and the total.
            again: Also read files that have not changed since they were last verified.

        Raises:
            CorruptError: Naming the first file that does not match.
            ResourceError: A file cannot be read.
        """
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            if on_bytes:
                on_bytes("verifying", done, self.size)

        for name in self.manifest["files"]:
            self.verify_file(name, advance, again=again)

    def verify_file(
        self, name: str, on_bytes: Callable[[int], None] = lambda n: None, *, again: bool = True
    ) -> None:
        """Verify one file.

        Args:
            name: Its name in the manifest.
            on_bytes: Called with the number of bytes after each read.
            again: As for `verify`.

        Raises:
            CorruptError: It does not match its sha256.
            ResourceError: It cannot be read.
        """
        if name == TOKENIZER:
            self._read_tokenizer()
            on_bytes(int(self.manifest["files"][name]["bytes"]))
        else:
            self._verified(name, on_bytes, again=again).close()

    def prepare_command(
        self, *, name: str = "", settings: Mapping[str, Any] | None = None, force: bool = False
    ) -> str:
        """Write the command that prepares it again; empty if its text is gone or it cannot be typed.

        Args:
            name: Another name for it.
            settings: Settings to change.
            force: Replace the dataset of that name.
        """
        given = self.manifest["source"]["given"]
        wanted = {**self.settings, **(settings or {})}
        if not given or not all(g in NAMED or hub.is_hub(g) or os.path.exists(g) for g in given):
            return ""
        if wanted.get("vocabulary") or "tokenizer_sha256" in wanted:
            return ""
        if self.manifest["source"]["documents"] > 1:
            wanted.setdefault("split", "end")
        if wanted.get("tokenizer") != self.settings.get("tokenizer"):
            wanted["vocab_size"] = (settings or {}).get("vocab_size")
        suffix = f"-{self.settings['shard'].replace('/', '-of-')}" if "shard" in self.settings else ""
        words = ["quill", "prepare", *given, "--name", name or self.name.removesuffix(suffix)]
        for key, default in _FLAGS.items():
            if wanted.get(key, default) != default:
                words += [f"--{key.replace('_', '-')}", str(wanted[key])]
        return shlex.join(words + ["--force"] * force)

    def damaged(self, why: str) -> CorruptError:
        """Return the error for a file that is not what the manifest says."""
        return _damaged(self.path, why, self.prepare_command(force=True))

    def _read_tokenizer(self) -> base.Tokenizer:
        facts = self.manifest["files"][TOKENIZER]
        try:
            raw = fsio.read_plain(self.path / TOKENIZER, strictjson.MOST_BYTES)
        except FileNotFoundError:
            raise self.damaged(f"{TOKENIZER} is missing") from None
        if hashlib.sha256(raw).hexdigest() != facts["sha256"]:
            raise self.damaged(f"{TOKENIZER} does not match its sha256")
        tokenizer = base.read(raw, origin=str(self.path / TOKENIZER))
        if tokenizer.kind != self.kind or tokenizer.vocab_size != self.vocab_size:
            raise self.damaged(f"{TOKENIZER} is not the tokenizer in {MANIFEST}")
        return tokenizer

    def _shard(self, split: Split) -> Shard:
        shard = Shard.joined([self._verified(name) for name in self.files(split)])
        if not self._held:
            self._held = True
            fsio.keep_locked(self, self.path)
        return shard

    def _verified(
        self, name: str, on_bytes: Callable[[int], None] = lambda n: None, *, again: bool = False
    ) -> Shard:
        """Open a file of ids, reading all of them unless they were verified in this state before."""
        facts = self.manifest["files"][name]
        sha256 = facts["sha256"]
        with self._open(name) as file:
            shard = Shard(
                file,
                self.path / name,
                tokens=facts["bytes"] // shards.WIDTHS[self.manifest["dtype"]],
                dtype=self.manifest["dtype"],
                vocab_size=self.vocab_size,
                # A bound method would make a cycle, and the lock would wait for the garbage collector.
                damaged=partial(_damaged, self.path, hint=self.prepare_command(force=True)),
            )
            state = _state(file)
            if again or self._remembered().get(name) != [*state, sha256]:
                if shard.sha256(on_bytes) != sha256:
                    raise self.damaged(f"{name} does not match its sha256")
                if _state(file) != state:
                    raise self.damaged(f"{name} changed while it was read")
                self._remember(name, [*state, sha256])
        return shard

    def _open(self, name: str) -> FileIO:
        try:
            return fsio.open_plain(self.path / name)
        except FileNotFoundError:
            raise self.damaged(f"{name} is missing") from None

    def _remembered(self) -> dict[str, Any]:
        """Read the states in which files were verified, by name; empty if there are none."""
        try:
            record = record_of(self.path)
            found = strictjson.parse(fsio.read_plain(record, _LONGEST_RECORD), origin=str(record))
        except (OSError, QuillError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remember(self, name: str, state: list[Any]) -> None:
        # A file this new could change again without a sign.
        if max(state[1:3]) > (time.time() - _SETTLED_SECONDS) * 1e9:
            return
        record = record_of(self.path)
        # Where nothing can be written, the files are verified each time.
        with suppress(QuillError, OSError):
            if not record.parent.is_symlink():
                fsio.make_dir(record.parent)
                fsio.write_json(record, {**self._remembered(), name: state}, durable=False)


def _state(file: FileIO) -> list[int]:
    """Return what changes when a file does: size, times and inode."""
    found = os.fstat(file.fileno())
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def record_of(path: Path) -> Path:
    """Where the states of a dataset's verified files are recorded."""
    return path.parent / VERIFIED / f"{path.name}.json"


def _validate(path: Path, manifest: Any) -> None:
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is int and schema > SCHEMA_VERSION:
        raise newer(f"the dataset in '{path}'", schema, SCHEMA_VERSION)
    try:
        sizes = {n: (f["bytes"], f["sha256"]) for n, f in manifest["files"].items()}
        known = {TOKENIZER}
        width = shards.WIDTHS[manifest["dtype"]]
        for split in SPLITS:
            facts = manifest["splits"][split]
            whole = all(type(facts[of]) is int and facts[of] >= 0 for of in ("tokens", "bytes", "characters"))
            files = shards.names(split, sizes)
            whole = whole and bool(files) and not any(sizes[name][0] % width for name in files)
            known.update(files)
            if not whole or sum(sizes[name][0] for name in files) != facts["tokens"] * width:
                raise _damaged(path, f"the counts of the {split} split in {MANIFEST} do not agree")
        source, settings, tokenizer = manifest["source"], manifest["settings"], manifest["tokenizer"]
        valid = (
            type(schema) is int
            and sizes.keys() == known
            and all(type(n) is int and type(h) is str for n, h in sizes.values())
            and isinstance(manifest["key"], str)
            and isinstance(source["sha256"], str)
            and len(source["sha256"]) == 64
            and all(type(source[of]) is int and source[of] >= 0 for of in ("bytes", "documents"))
            and isinstance(source["given"], list)
            and all(isinstance(given, str) for given in source["given"])
            and all(type(n) is int for n in source.get("duplicates", {}).values())
            and isinstance(settings["tokenizer"], str)
            and type(settings["val_fraction"]) in (int, float)
            and isinstance(tokenizer["kind"], str)
            and len(tokenizer["kind"]) <= 64
            and type(tokenizer["vocab_size"]) is int
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise _damaged(path, f"{MANIFEST} is not a dataset's: {shorten(e)}") from None
    if not valid:
        raise _damaged(path, f"{MANIFEST} is not a dataset's")


def _damaged(path: Path, why: str, hint: str = "") -> CorruptError:
    return CorruptError(
        f"dataset '{path.name}' in {path.parent} is damaged",
        why=why,
        hint=hint or f"prepare its text again under the name '{path.name}'",
    )
