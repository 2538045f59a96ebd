"""A published version of a model."""

from __future__ import annotations

from pathlib import Path

from quill.errors import CorruptError, NotFoundError, QuillError
from quill.registry import manifest
from quill.registry.files import OpenFile
from quill.registry.folder import Folder, State, exists, refuse_link
from quill.registry.manifest import Manifest


class Version(Folder):
    """A published version, or what is left of one.

    Args:
        name: The model's name.
        number: The version, from 1; 0 for a folder that cannot be a model's.
        path: The folder.
        manifest: Its manifest; None for a model put there by hand, and for a damaged one.
        damaged: Why it cannot be used, or None.
        label: The path that it was asked for by, if it was not asked for by name.
        flat: Whether its files were put into the model's own folder by hand.
    """

    kind = "version"

    def __init__(
        self,
        name: str,
        number: int,
        path: Path,
        manifest: Manifest | None = None,
        damaged: str | None = None,
        label: str = "",
        *,
        flat: bool = False,
    ) -> None:
        super().__init__(name, number, path, flat=flat)
        self.manifest, self.damaged, self.label = manifest, damaged, label

    @property
    def reference(self) -> str:
        """What finds it again: "name:vN", or the path that it was asked for by."""
        return self.label or super().reference

    @property
    def state(self) -> State:
        """Whether it can be used."""
        return "damaged" if self.damaged else "ok"

    @property
    def is_published(self) -> bool:
        """Always, damaged or not."""
        return True

    @property
    def size(self) -> int | None:
        """The size of its files in bytes; None if it is damaged."""
        if self.damaged:
            return None
        if self.manifest:
            return sum(entry["bytes"] for entry in self.manifest["files"].values())
        paths = [self.path / name for name in manifest.REQUIRED]
        return sum(p.lstat().st_size for p in paths if p.exists())

    def open_file(self, name: str) -> OpenFile:
        """As for every folder; a version known to be damaged is not read."""
        if self.damaged:
            raise CorruptError(f"'{self.reference}' is damaged", why=self.damaged)
        return super().open_file(name)


def load(name: str, number: int, path: Path, label: str = "", *, flat: bool = False) -> Version:
    """Read a version's manifest and look at its files, without reading them.

    Raises:
        NotFoundError: The folder contains no published version.
        CorruptError: It is damaged, or not safe to read.
        InputError: It was made by a newer quill.
    """
    refuse_link(path)
    try:
        found = Version(name, number, path, manifest.read(path), label=label, flat=flat)
    except NotFoundError:
        missing = [f for f in manifest.REQUIRED if not exists(path / f)]
        if missing and missing != [manifest.TOKENIZER]:
            why = f"{missing[0]} is missing"
            raise NotFoundError(f"no model in '{path}'", why=why, hint="quill list") from None
        if missing:
            why = "without it the model's tokens cannot be decoded to text"
            raise CorruptError(f"'{path}' has no {manifest.TOKENIZER}", why=why) from None
        return Version(name, number, path, label=label, flat=flat)
    listed = found.facts["files"]
    if missing := [f for f in manifest.REQUIRED if f not in listed]:
        raise CorruptError(f"'{path}' is damaged", why=f"its manifest does not list {missing[0]}")
    if wrong := manifest.changed(path, listed):
        # Opening it tells what is wrong with it.
        found.open_file(wrong).file.close()
    return found


def describe(name: str, number: int, path: Path, *, flat: bool = False) -> Version | None:
    """As `load`, for a list: damage becomes part of the description; None if the version is gone."""
    try:
        return load(name, number, path, flat=flat)
    except NotFoundError:
        return None
    except QuillError as e:
        return Version(name, number, path, damaged=str(e), flat=flat)
