"""A Hugging Face folder on disk: its files opened safely, its tensors read one at a time.

The weights are one `model.safetensors`, or shards that `model.safetensors.index.json` lists. No file outside
the folder is opened, except in the Hub's own cache, whose snapshots link to its blobs.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio, strictjson
from quill.errors import CorruptError, shorten
from quill.formats.base import LazyTensors
from quill.registry.tensors import raise_system_error, read_layout

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin", "model.pt", "model.pth")
# Vocabularies are the largest; those of 150,000 tokens take 12 MB.
_MOST_JSON_BYTES = 32 << 20
_MOST_SHARDS = 4096


class Folder:
    """A folder, or one safetensors file with the other files in its folder.

    Args:
        path: The folder or the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if path.is_dir() else path.parent
        self._weights = None if path.is_dir() else path.name

    def __contains__(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def json(self, name: str) -> Any:
        """Read a JSON document of the folder; None if there is no such file.

        Raises:
            CorruptError: It is not JSON, too large, or not safe to read.
        """
        raw = self.bytes(name)
        if raw is None:
            return None
        document = strictjson.parse(raw, origin=name, error=CorruptError)
        if document is None:
            raise CorruptError(f"'{name}' is damaged", why="it is null")
        return document

    def bytes(self, name: str) -> bytes | None:
        """Read a small file of the folder; None if there is no such file.

        Raises:
            CorruptError: It is too large, or not safe to read.
        """
        if name not in self:
            return None
        path = self._inside(name)
        with self._open(path, name) as file, fsio.guard(path, "read"):
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_JSON_BYTES:
                raise CorruptError(
                    f"'{name}' is too large",
                    why=f"it has {size:,} bytes, and the limit is {_MOST_JSON_BYTES:,}",
                )
            return file.readall()

    def tensors(self) -> LazyTensors:
        """All tensors, by their names in the files.

        Raises:
            CorruptError: A file is missing, damaged or not safe to read.
        """
        if self._weights is not None:
            return _tensors({self._weights: self._inside(self._weights)}, None)
        if WEIGHTS in self:
            return _tensors({WEIGHTS: self._inside(WEIGHTS)}, None)
        index = self.json(INDEX)
        if index is None:
            raise self._without_weights()
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
            raise CorruptError(f"'{INDEX}' is damaged", why="it has no table 'weight_map' of names to files")
        names = sorted(set(listed.values()))
        if len(names) > _MOST_SHARDS:
            why = f"it lists {len(names):,} files, and the limit is {_MOST_SHARDS:,}"
            raise CorruptError(f"'{INDEX}' lists too many files", why=why)
        for name in names:
            if (
                not name
                or Path(name).name != name
                or "\\" in name
                or "\0" in name
                or not name.endswith(".safetensors")
            ):
                why = f"it lists {shorten(name)}, which is not a safetensors file in the same folder"
                raise CorruptError(f"'{INDEX}' is not safe to read", why=why)
            if name not in self:
                raise CorruptError(
                    f"'{name}' is missing",
                    why=f"{INDEX} lists it for {sum(f == name for f in listed.values())} tensors",
                    hint="download the whole folder again",
                )
        return _tensors({name: self._inside(name) for name in names}, listed)

    def _inside(self, name: str) -> Path:
        """The path of a file that is in the folder, or in the Hub's cache that the folder belongs to."""
        path = self.path / name
        if not path.is_symlink():
            return path
        with suppress(OSError, RuntimeError):
            here, there = self.path.resolve(strict=True), path.resolve(strict=True)
            homes = [here]
            if here.parent.name == "snapshots":
                homes.append(here.parent.parent / "blobs")
            if any(there.is_relative_to(home) for home in homes):
                return there
        raise CorruptError(
            f"'{name}' links to a file outside its folder",
            why="quill does not follow such links, which may point anywhere",
            hint=f"replace the link {shlex.quote(str(path))} by a copy of the file",
        )

    def _open(self, path: Path, name: str) -> FileIO:
        try:
            return fsio.open_plain(path)
        except FileNotFoundError:
            raise CorruptError(f"'{name}' is missing", why="it was there a moment ago") from None

    def _without_weights(self) -> CorruptError:
        pickled = next((name for name in _PICKLED if name in self), None)
        if pickled is None:
            return CorruptError(
                f"'{self.path}' has no weights",
                why=f"it has neither {WEIGHTS} nor {INDEX}",
                hint="download the whole folder again",
            )
        convert = (
            "python -c 'import sys, transformers as t; "
            "t.AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])'"
        )
        return CorruptError(
            f"'{pickled}' is a pickle",
            why="a pickle can run any code; if you trust it, convert it to safetensors, which quill reads",
            hint=f"{convert} {shlex.quote(str(self.path))}",
        )


def _tensors(files: Mapping[str, Path], listed: Mapping[str, str] | None) -> LazyTensors:
    """The tensors of safetensors files, each read when it is looked up.

    Args:
        files: Each file's path, by its name.
        listed: The file of each tensor, from an index; None for a single file.

    Raises:
        CorruptError: A file is damaged, or lacks a tensor that the index lists for it.
    """
    from safetensors import safe_open

    makers: dict[str, Callable[[], Tensor]] = {}
    for name, path in files.items():
        layout = read_layout(path, origin=name)
        if listed is not None:
            lacking = [t for t, f in listed.items() if f == name and t not in layout]
            if lacking:
                why = f"{INDEX} says that it contains {shorten(lacking[0])}"
                raise CorruptError(f"'{name}' is damaged", why=why)
        file = safe_open(path, "pt", backend="pread")
        for tensor in layout:
            if listed is None or listed.get(tensor) == name:
                makers[tensor] = partial(_read, file, tensor, path)
    return LazyTensors(makers)


def _read(file: Any, name: str, path: Path) -> Tensor:
    from safetensors import SafetensorError

    try:
        found: Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as e:
        with fsio.guard(path, "read"):
            raise_system_error(e)
        raise CorruptError(f"'{path}' changed while it was being read", why=shorten(str(e))) from None
    return found
