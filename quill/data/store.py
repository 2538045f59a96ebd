"""A prepared dataset on disk: two files of token ids, their tokenizer, and a manifest.

`train.bin` and `val.bin` are bare little-endian uint16 (uint32 beyond 65536 ids), as nanoGPT has them.
The manifest is written last, so that its presence means the dataset is whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quill import fsio, strictjson
from quill.errors import CorruptError, InputError, NotFoundError, ResourceError
from quill.tokenizers import base

if TYPE_CHECKING:
    from quill.data.batches import Tokens

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

Split = Literal["train", "val"]


def locate(registry_root: Path, env: Mapping[str, str] = os.environ) -> Path:
    """Where prepared datasets are: QUILL_DATA, else `data` beside the registry.

    Args:
        registry_root: The registry's folder.
        env: The environment.
    """
    given = env.get("QUILL_DATA")
    return fsio.expanded(given) if given else registry_root.parent / "data"


class Dataset:
    """A prepared dataset, opened for reading.

    Attributes:
        path: Its folder.
        name: The folder's name.
        manifest: What `manifest.json` holds.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.name = path.name
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a dataset and check that its files are as long as its manifest says.

        Raises:
            NotFoundError: There is no dataset there.
            CorruptError: A file is missing, of another length, or the manifest cannot be read.
            InputError: A newer quill wrote it.
        """
        if not (path / MANIFEST).is_file():
            raise NotFoundError(f"no dataset in '{path}'", why=f"it holds no {MANIFEST}")
        manifest = strictjson.read(path / MANIFEST, error=CorruptError)
        _check_manifest(path, manifest)
        for name, facts in manifest["files"].items():
            try:
                size = (path / name).stat().st_size
            except OSError as e:
                raise _damaged(path, f"{name}: {e.strerror}") from None
            if size != facts["bytes"]:
                raise _damaged(path, f"{name} has {size:,} bytes, its manifest says {facts['bytes']:,}")
        return cls(path, manifest)

    @property
    def key(self) -> str:
        """sha256 of what the dataset was made from: the text and the settings, in hex."""
        return str(self.manifest["key"])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it was prepared with, by their names in DataConfig."""
        return dict(self.manifest["settings"])

    @cached_property
    def tokenizer(self) -> base.Tokenizer:
        """The tokenizer its ids are of.

        Raises:
            CorruptError: The file is not the one that was written.
        """
        file = self.path / TOKENIZER
        try:
            raw = file.read_bytes()
        except OSError as e:
            raise ResourceError(f"cannot read '{file}'", why=e.strerror or str(e)) from e
        if hashlib.sha256(raw).hexdigest() != self.manifest["files"][TOKENIZER]["sha256"]:
            raise _damaged(self.path, f"{TOKENIZER} is not what its manifest says (sha256)")
        return base.read(raw, origin=str(file))

    @cached_property
    def train(self) -> Tokens:
        """Ids of the training split, (n,), mapped from the file and not read into memory."""
        return self._map("train")

    @cached_property
    def val(self) -> Tokens:
        """Ids of the validation split, (n,), mapped from the file."""
        return self._map("val")

    def split(self, name: Split) -> Tokens:
        """Ids of a split by its name."""
        return self.train if name == "train" else self.val

    def count(self, name: Split, of: Literal["tokens", "bytes", "characters"] = "tokens") -> int:
        """Tokens, UTF-8 bytes or characters of a split."""
        return int(self.manifest["splits"][name][of])

    def verify(self) -> None:
        """Compare every file's sha256 with the manifest's.

        Raises:
            CorruptError: Naming the first file that differs.
        """
        for name, facts in self.manifest["files"].items():
            if fsio.sha256(self.path / name) != facts["sha256"]:
                raise _damaged(self.path, f"{name} is not what its manifest says (sha256)")

    def _map(self, name: Split) -> Tokens:
        import numpy as np

        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        if not self.count(name):
            return np.empty(0, dtype)
        return np.memmap(self.path / f"{name}.bin", dtype=dtype, mode="r")


def datasets(root: Path) -> list[Dataset]:
    """Every whole dataset under a data root, by name; what is damaged or unfinished is passed over."""
    try:
        names = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    except OSError:
        return []
    found = []
    for name in names:
        try:
            found.append(Dataset.open(root / name))
        except (NotFoundError, CorruptError, InputError, ResourceError):
            continue
    return found


def _check_manifest(path: Path, manifest: Any) -> None:
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is int and schema > SCHEMA_VERSION:
        raise InputError(
            f"the dataset in '{path}' is of schema {schema}",
            why=f"a newer quill wrote it; this one reads up to {SCHEMA_VERSION}",
            hint="upgrade quill",
        )
    try:
        sizes = {n: (f["bytes"], f["sha256"]) for n, f in manifest["files"].items()}
        width = {"uint16": 2, "uint32": 4}[manifest["dtype"]]
        for split in ("train", "val"):
            facts = manifest["splits"][split]
            whole = all(type(facts[of]) is int and facts[of] >= 0 for of in ("tokens", "bytes", "characters"))
            if not whole or sizes[f"{split}.bin"][0] != facts["tokens"] * width:
                raise _damaged(path, f"the manifest's counts of the {split} split do not agree")
        settings, kind = manifest["settings"], manifest["tokenizer"]["kind"]
        sound = (
            type(schema) is int
            and TOKENIZER in sizes
            and all(type(n) is int and type(h) is str and "/" not in name for name, (n, h) in sizes.items())
            and isinstance(manifest["key"], str)
            and isinstance(manifest["source"], dict)
            and isinstance(settings, dict)
            and isinstance(kind, str)
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise _damaged(path, f"{MANIFEST} is not a dataset's: {e!r}") from None
    if not sound:
        raise _damaged(path, f"{MANIFEST} is not a dataset's")


def _damaged(path: Path, why: str) -> CorruptError:
    return CorruptError(
        f"the dataset '{path.name}' in {path.parent} is damaged",
        why=why,
        hint=f"quill prepare FILE --name {path.name} --force",
    )
