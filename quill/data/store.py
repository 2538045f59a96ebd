"""Prepared datasets on disk: one folder each, found by name.

A folder contains `train.bin`, `val.bin`, `tokenizer.json` and `manifest.json`. The manifest is written last,
so a folder with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quill import fsio, strictjson
from quill.data import shards
from quill.data.named_sources import NAMED
from quill.errors import CorruptError, NotFoundError, QuillError, RefusedError, ResourceError, newer
from quill.tokenizers import base

if TYPE_CHECKING:
    from quill.data.batches import Tokens

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

Split = Literal["train", "val"]

# Settings that `quill prepare` takes as flags, and their defaults.
_FLAGS = {
    "tokenizer": "char",
    "vocab_size": None,
    "val_fraction": 0.1,
    "encoding": "utf-8",
    "text_field": "text",
}


def locate(registry_root: Path, env: Mapping[str, str] = os.environ) -> Path:
    """Return the data root: QUILL_DATA, else `data` next to the registry.

    Args:
        registry_root: The registry's folder.
        env: The environment.
    """
    given = env.get("QUILL_DATA")
    return fsio.expanded(given) if given else registry_root.parent / "data"


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

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a dataset, checking that its files have the sizes in its manifest.

        Raises:
            NotFoundError: There is no dataset.
            CorruptError: A file is missing or has another size, or the manifest cannot be parsed.
            InputError: A newer quill wrote it.
        """
        if not (path / MANIFEST).is_file():
            raise NotFoundError(f"no dataset in '{path}'", why=f"there is no {MANIFEST}")
        manifest = strictjson.read(path / MANIFEST, error=CorruptError)
        _validate(path, manifest)
        dataset = cls(path, manifest)
        for name, facts in manifest["files"].items():
            try:
                size = (path / name).stat().st_size
            except OSError as e:
                raise dataset.damaged(f"{name}: {e.strerror}") from None
            if size != facts["bytes"]:
                raise dataset.damaged(f"{name} has {size:,} bytes, not {facts['bytes']:,} as in {MANIFEST}")
        return dataset

    @property
    def key(self) -> str:
        """sha256 of the text and the settings that it was made from, in hex."""
        return str(self.manifest["key"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it was prepared with, by their names in DataConfig."""
        return dict(self.manifest["settings"])

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
    def size(self) -> int:
        """Bytes of its files, without the manifest."""
        return sum(int(facts["bytes"]) for facts in self.manifest["files"].values())

    @cached_property
    def tokenizer(self) -> base.Tokenizer:
        """The tokenizer of its ids.

        Raises:
            CorruptError: The file is not the one that was written.
        """
        file = self.path / TOKENIZER
        try:
            raw = file.read_bytes()
        except OSError as e:
            raise ResourceError(f"cannot read '{file}'", why=e.strerror or str(e)) from e
        if hashlib.sha256(raw).hexdigest() != self.manifest["files"][TOKENIZER]["sha256"]:
            raise self.damaged(f"{TOKENIZER} does not match its sha256")
        return base.read(raw, origin=str(file))

    @cached_property
    def train(self) -> Tokens:
        """Ids of the training split, (n,), mapped from the file."""
        return self._open("train")

    @cached_property
    def val(self) -> Tokens:
        """Ids of the validation split, (n,), mapped from the file."""
        return self._open("val")

    def split(self, name: Split) -> Tokens:
        """Return the ids of a split."""
        return self.train if name == "train" else self.val

    def count(self, name: Split, of: Literal["tokens", "bytes", "characters"] = "tokens") -> int:
        """Return the tokens, UTF-8 bytes or characters of a split."""
        return int(self.manifest["splits"][name][of])

    def head(self, characters: int) -> str:
        """Decode the start of the training split.

        Args:
            characters: The most to return.
        """
        # Few tokens are longer than 16 bytes, and none is empty.
        ids = self.train[:characters].tolist()
        return self.tokenizer.decode(ids)[:characters]

    def restamp(self, stamp: str) -> None:
        """Record that the source files, touched but equal, need not be read next time.

        Args:
            stamp: What `Text.stamp` returns for the files now.
        """
        source = {**self.manifest["source"], "stamp": stamp}
        self.manifest = {**self.manifest, "source": source}
        fsio.write_json(self.path / MANIFEST, self.manifest)

    def verify(self) -> None:
        """Compare every file with its sha256.

        Raises:
            CorruptError: Naming the first file that differs.
        """
        for name, facts in self.manifest["files"].items():
            if fsio.sha256(self.path / name) != facts["sha256"]:
                raise self.damaged(f"{name} does not match its sha256")

    def prepare_command(
        self, *, name: str = "", settings: Mapping[str, Any] | None = None, force: bool = False
    ) -> str:
        """Write the command that prepares it again; empty if its text is gone or it cannot be typed.

        Args:
            name: Another name for it.
            settings: Settings to change.
            force: Replace the dataset of that name.
        """
        given = self.manifest["source"].get("given") or []
        wanted = {**self.settings, **(settings or {})}
        if not given or not all(g in NAMED or os.path.exists(g) for g in given):
            return ""
        if wanted.get("vocabulary") or "tokenizer_sha256" in wanted:
            return ""
        if wanted.get("tokenizer") != self.settings.get("tokenizer"):
            wanted["vocab_size"] = (settings or {}).get("vocab_size")
        words = ["quill", "prepare", *given, "--name", name or self.name]
        for key, default in _FLAGS.items():
            if wanted.get(key, default) != default:
                words += [f"--{key.replace('_', '-')}", str(wanted[key])]
        return shlex.join(words + ["--force"] * force)

    def damaged(self, why: str) -> CorruptError:
        """Return the error for a file that is not what the manifest says."""
        return _damaged(self.path, why, self.prepare_command(force=True))

    def _open(self, name: Split) -> Tokens:
        return shards.open_tokens(self.path / f"{name}.bin", self.manifest["dtype"], self.count(name))


@dataclass(frozen=True)
class Entry:
    """A dataset in a listing.

    Attributes:
        name: Its name.
        dataset: The dataset; None if it is damaged.
        damage: What is wrong with it; empty if nothing is.
    """

    name: str
    dataset: Dataset | None
    damage: str = ""


def entries(root: Path) -> list[Entry]:
    """List the datasets under a data root by name, damaged ones included."""
    try:
        names = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    except OSError:
        return []
    found = []
    for name in names:
        try:
            found.append(Entry(name, Dataset.open(root / name)))
        except NotFoundError:
            continue
        except QuillError as e:
            found.append(Entry(name, None, e.why or e.what))
    return found


def datasets(root: Path) -> list[Dataset]:
    """List the datasets under a data root that can be used, by name."""
    return [entry.dataset for entry in entries(root) if entry.dataset]


@contextmanager
def stage(target: Path, key: str, *, replace: bool) -> Iterator[Path]:
    """Stage a dataset's folder, and rename it into place at the end.

    An equal dataset that another process published first is just as good.

    Args:
        target: Its folder; the one above it exists.
        key: Its key.
        replace: Replace a dataset that is there.

    Yields:
        An empty folder on the same file system.

    Raises:
        RefusedError: Another dataset took the name in the meantime.
    """
    try:
        with fsio.stage(target, replace=replace) as staged:
            staged.mkdir()
            yield staged
    except RefusedError:
        if not target.is_dir() or Dataset.open(target).key != key:
            raise


def link(staged: Path, same: Dataset) -> dict[str, Any]:
    """Hard-link the files of an equal dataset, or copy them where that fails.

    Args:
        staged: An empty folder on the same file system.
        same: The equal dataset.

    Returns:
        The manifest's facts about the files.
    """
    for name in same.manifest["files"]:
        try:
            os.link(same.path / name, staged / name)
        except OSError:
            fsio.create(staged / name, _chunks(same.path / name))
    facts = {k: same.manifest[k] for k in ("tokenizer", "dtype", "splits", "files")}
    return {"source": dict(same.manifest["source"]), **facts}


def _chunks(path: Path) -> Iterator[bytes]:
    with fsio.guard(path, "read"), open(path, "rb", buffering=0) as file:
        while data := file.read(1 << 22):
            yield data


def _validate(path: Path, manifest: Any) -> None:
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is int and schema > SCHEMA_VERSION:
        raise newer(f"the dataset in '{path}'", schema, SCHEMA_VERSION)
    try:
        sizes = {n: (f["bytes"], f["sha256"]) for n, f in manifest["files"].items()}
        width = shards.WIDTHS[manifest["dtype"]]
        for split in ("train", "val"):
            facts = manifest["splits"][split]
            whole = all(type(facts[of]) is int and facts[of] >= 0 for of in ("tokens", "bytes", "characters"))
            if not whole or sizes[f"{split}.bin"][0] != facts["tokens"] * width:
                raise _damaged(path, f"the counts of the {split} split in {MANIFEST} do not agree")
        tokenizer = manifest["tokenizer"]
        valid = (
            type(schema) is int
            and TOKENIZER in sizes
            and all(type(n) is int and type(h) is str and "/" not in name for name, (n, h) in sizes.items())
            and isinstance(manifest["key"], str)
            and isinstance(manifest["source"], dict)
            and isinstance(manifest["settings"], dict)
            and isinstance(tokenizer["kind"], str)
            and type(tokenizer["vocab_size"]) is int
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise _damaged(path, f"{MANIFEST} is not a dataset's: {e!r}") from None
    if not valid:
        raise _damaged(path, f"{MANIFEST} is not a dataset's")


def _damaged(path: Path, why: str, hint: str = "") -> CorruptError:
    return CorruptError(
        f"dataset '{path.name}' in {path.parent} is damaged",
        why=why,
        hint=hint or f"prepare its text again under the name '{path.name}'",
    )
