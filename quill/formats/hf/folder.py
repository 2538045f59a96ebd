"""A Hugging Face folder on disk: its files opened safely, its tensors as views that take no memory.

Weights: one `model.safetensors`, or shards that `model.safetensors.index.json` lists. No file outside of the
folder is opened, save the Hub's own cache, whose snapshots are links into its blobs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio, strictjson
from quill.errors import CorruptError, shorten
from quill.registry.tensors import TensorInfo, raise_system_error, read_layout

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin", "model.pt", "model.pth")
# Vocabularies are the largest; those of 150,000 tokens take 12 MB.
_MOST_JSON_BYTES = 32 << 20
_MOST_SHARDS = 4096


class Folder:
    """A folder, or one safetensors file with what lies beside it.

    Args:
        path: The folder or the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path if path.is_dir() else path.parent
        self._weights = None if path.is_dir() else path.name

    def __contains__(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def json(self, name: str) -> Any:
        """A JSON document of the folder; None where there is no such file.

        Raises:
            CorruptError: It is not JSON, too large, or not safe to read.
        """
        raw = self.bytes(name)
        if raw is None:
            return None
        document = strictjson.parse(raw, origin=name, error=CorruptError)
        if document is None:
            raise CorruptError(f"'{name}' is damaged", why="it holds null")
        return document

    def bytes(self, name: str) -> bytes | None:
        """A small file of the folder; None where there is none.

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
                    f"'{name}' is not read", why=f"it has {size:,} bytes, {_MOST_JSON_BYTES:,} at most"
                )
            return file.readall()

    def tensors(self) -> Tensors:
        """All tensors, by their names in the files.

        Raises:
            CorruptError: A file is missing, damaged or not safe to read.
        """
        if self._weights is not None:
            return Tensors({self._weights: self._inside(self._weights)}, None)
        if WEIGHTS in self:
            return Tensors({WEIGHTS: self._inside(WEIGHTS)}, None)
        index = self.json(INDEX)
        if index is None:
            raise self._without_weights()
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
            raise CorruptError(f"'{INDEX}' is damaged", why="it has no table 'weight_map' of names to files")
        names = sorted(set(listed.values()))
        if len(names) > _MOST_SHARDS:
            raise CorruptError(f"'{INDEX}' is not read", why=f"it lists {len(names):,} files")
        for name in names:
            if (
                not name
                or Path(name).name != name
                or "\\" in name
                or "\0" in name
                or not name.endswith(".safetensors")
            ):
                why = f"it lists {ascii(name)[:80]}, and weights are safetensors files in the same folder"
                raise CorruptError(f"'{INDEX}' is not safe to read", why=why)
            if name not in self:
                raise CorruptError(
                    f"'{name}' is missing",
                    why=f"{INDEX} lists it, and {sum(f == name for f in listed.values())} tensors are in it",
                    hint="download the folder again, whole",
                )
        return Tensors({name: self._inside(name) for name in names}, listed)

    def _inside(self, name: str) -> Path:
        """The file itself, where it is one of the folder or of the Hub's cache that the folder belongs to."""
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
            f"'{name}' is a link out of its folder",
            why="it may point anywhere, so it is not followed",
            hint=f"put the file itself there: cp --remove-destination \"$(readlink -f '{path}')\" '{path}'",
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
                f"'{self.path}' holds no weights",
                why=f"it has neither {WEIGHTS} nor {INDEX}",
                hint="where they are pickles (pytorch_model.bin), convert them to safetensors first",
            )
        convert = (
            "python -c 'import sys, transformers as t; "
            "t.AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])'"
        )
        return CorruptError(
            f"'{pickled}' is a pickle",
            why="a pickle is a program, and quill runs none; weights are read from safetensors",
            hint=f"if you trust where it is from, convert it: {convert} '{self.path}'",
        )


class Tensors(Mapping[str, "Tensor"]):
    """The tensors of safetensors files, each read when it is looked up.

    Args:
        files: Where each file is, by its name.
        listed: The file of each tensor, from an index; None for a single file.

    Raises:
        CorruptError: A file is damaged, or lacks a tensor that the index says is in it.
    """

    def __init__(self, files: Mapping[str, Path], listed: Mapping[str, str] | None) -> None:
        from safetensors import safe_open

        self._at: dict[str, tuple[Any, TensorInfo, Path]] = {}
        for name, path in files.items():
            layout = read_layout(path, origin=name)
            if listed is not None:
                lacking = [t for t, f in listed.items() if f == name and t not in layout]
                if lacking:
                    why = f"{INDEX} says that {ascii(lacking[0])[1:80]} is in it"
                    raise CorruptError(f"'{name}' is damaged", why=why)
            file = safe_open(path, "pt", backend="pread")
            self._at |= {
                t: (file, info, path) for t, info in layout.items() if listed is None or listed.get(t) == name
            }

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        file, _, path = self._at[name]
        try:
            found: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as e:
            with fsio.guard(path, "read"):
                raise_system_error(e)
            raise CorruptError(f"'{path}' changed while it was being read", why=shorten(str(e))) from None
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._at

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return self._at[name][1].shape
