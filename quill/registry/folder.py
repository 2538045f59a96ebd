"""The folder of one version of a model, published or still being written, and how it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from html import escape
from io import FileIO
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from quill import fsio, strictjson
from quill.errors import CorruptError, LockedError, NotFoundError, QuillError, ResourceError
from quill.registry import manifest, names
from quill.registry.files import OpenFile, corrupt
from quill.registry.manifest import Manifest

State = Literal["ok", "damaged", "training", "unfinished"]
Kind = Literal["model", "version", "unfinished run", "resume state"]


class Folder:
    """The folder of one version of a model.

    Args:
        name: The model's name.
        number: The version, from 1; 0 for a folder that cannot be a model's.
        path: The folder.
        flat: Whether its files were put into the model's own folder by hand.

    Attributes:
        kind: What it is; "model" for the folder of a whole model.
        manifest: Its manifest; None for a draft, a model put there by hand and a damaged version.
        damaged: Why it cannot be used, or None.
        label: The path that it was asked for by, if it was not asked for by name.
    """

    kind: Kind = "model"
    manifest: Manifest | None = None
    damaged: str | None = None
    label: str = ""

    def __init__(self, name: str, number: int, path: Path, *, flat: bool = False) -> None:
        self.name, self.number, self.path, self.flat = name, number, path, flat

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reference!r})"

    def _repr_html_(self) -> str:
        known = {"model": self.reference, "state": self.state, "path": self.path, **self.facts}
        known["val loss"] = None if known["best_val_loss"] is None else f"{known['best_val_loss']:.4f}"
        shown = ("model", "state", "path", "parameters", "val loss", "steps", "created")
        rows = (
            f"<tr><th>{k}</th><td>{escape(str(known[k]))}</td></tr>" for k in shown if known[k] is not None
        )
        return f"<table>{''.join(rows)}</table>"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.path))

    @property
    def reference(self) -> str:
        """What finds it: "name:vN"."""
        return f"{self.name}:v{self.number}" if self.number else self.name

    @property
    def state(self) -> State:
        """In one word, what it is good for."""
        return "unfinished"

    @property
    def is_published(self) -> bool:
        """Whether it is a version, in whatever state."""
        return False

    @property
    def digest(self) -> str | None:
        """The sha256 of its weights, hex, by which another version names it as its parent."""
        return self.manifest["files"][manifest.WEIGHTS]["sha256"] if self.manifest else None

    @property
    def root(self) -> Path:
        """The registry that it is in."""
        return self.path.parent if self.flat else self.path.parent.parent

    @property
    def facts(self) -> Manifest:
        """Its manifest; one in which nothing is known for what has none."""
        return self.manifest or manifest.UNKNOWN

    @property
    def size(self) -> int | None:
        """The size of its files in bytes; None while they are being written."""
        return None

    @property
    def updated(self) -> str | None:
        """When its run last saved, in UTC; None once it is published."""
        return None

    def holder(self) -> dict[str, Any] | None:
        """The process that is working on it, {"pid", "host", "started"}, or None."""
        return None

    def require_weights(self) -> None:
        """Raise NotFoundError if it has no weights yet; a version always has."""

    def is_running(self) -> bool:
        """Whether a process is working on it."""
        return self.holder() is not None

    @property
    def step(self) -> int | None:
        """The optimizer steps done; None if it is not known."""
        return self.facts["steps"]

    @property
    def max_iters(self) -> int | None:
        """The steps that its run was to do; None if its config does not say."""
        most = self.train_setting("max_iters")
        return most if manifest.fits(most, int) else None

    def train_setting(self, name: str) -> Any:
        """A training setting of its run as it is stored, not validated; None if there is none."""
        with suppress(QuillError):
            train = self.config().get("train")
            return train.get(name) if isinstance(train, dict) else None
        return None

    @property
    def disk_size(self) -> int:
        """The bytes that removing it would free."""
        return sum(disk_size(f) for f in flat_files(self.path)) if self.flat else disk_size(self.path)

    def has(self, name: str) -> bool:
        """Whether one of its files is there to be read."""
        return name in self.manifest["files"] if self.manifest else (self.path / name).exists()

    def read_file(self, name: str) -> bytes:
        """Read one of its files whole; its size and sha256 are those of the manifest.

        Args:
            name: Relative to its folder, such as "tokenizer.json".

        Raises:
            CorruptError: It is missing, not a plain file, damaged, or larger than any file of its kind.
            NotFoundError: It is missing from a draft.
            ResourceError: It cannot be read, or does not fit in memory.
        """
        with self.open_file(name) as file:
            if name != manifest.WEIGHTS:
                fsio.check_size(self.path / name, file.size, manifest.most_bytes(name))
            return file.whole()

    def read_object(self, name: str) -> dict[str, Any]:
        """Read one of its files as a JSON object; raises as `read_file` does."""
        path, raw = self.path / name, self.read_file(name)
        if not raw.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            raise corrupt(path, raw[:512], len(raw), "a JSON object is needed")
        document: dict[str, Any] = strictjson.parse(raw, origin=str(path), error=CorruptError)
        return document

    def open_file(self, name: str) -> OpenFile:
        """Open one of its files, to look at it before memory is allocated for all of it.

        Args:
            name: Relative to its folder.

        Raises:
            CorruptError: It is missing, not a plain file, or not of the manifest's size.
            NotFoundError: It is missing from a draft.
        """
        path = self.path / name
        entry = self.manifest["files"].get(name) if self.manifest else None
        if self.manifest and entry is None:
            raise CorruptError(f"'{path}' is not safe to read", why="the manifest does not list it")
        try:
            return OpenFile(path, entry)
        except FileNotFoundError:
            with self.reading():
                raise self._missing(name) from None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Say that it was renamed or removed if that is why something in it cannot be read.

        Raises:
            NotFoundError: It is no longer where it was found.
        """
        try:
            yield
        except (CorruptError, NotFoundError, ResourceError, FileNotFoundError):
            if os.path.lexists(self.path) and (self.manifest is None or exists(self.path / manifest.FILE)):
                raise
            raise NotFoundError(
                f"'{self.reference}' was renamed or removed in the meantime",
                why=f"there is no '{self.path}' any more",
                hint="quill list",
            ) from None

    def config(self) -> dict[str, Any]:
        """Read its config as it is stored; raises as `read_file` does."""
        return self.read_object(manifest.CONFIG)

    def metrics(self) -> Iterator[bytes]:
        """Read its metrics in chunks, as they are stored: one JSON object a line; nothing if there are none.

        Raises:
            CorruptError: They are not a plain file, too large, or, which is raised at their end, damaged.
            ResourceError: They cannot be read.
        """
        if not self.has(manifest.METRICS):
            return
        try:
            file = self.open_file(manifest.METRICS)
        except NotFoundError:
            return
        with file:
            fsio.check_size(file.path, file.size, manifest.most_bytes(manifest.METRICS))
            yield from file.verified()

    def open_run_log(self) -> FileIO:
        """Open the log of the run that made it.

        Raises:
            NotFoundError: It has none.
            CorruptError: It is not a regular file, or larger than any log.
        """
        path = self.path / manifest.LOG
        try:
            file = fsio.open_plain(path)
            try:
                fsio.check_size(path, os.fstat(file.fileno()).st_size, manifest.most_bytes(manifest.LOG))
            except CorruptError:
                file.close()
                raise
            return file
        except FileNotFoundError:
            raise NotFoundError(
                f"'{self.reference}' has no log",
                why=f"there is no {manifest.LOG} in its folder; imported and copied models have none",
                hint=f"quill show {self.reference}",
            ) from None

    def _missing(self, name: str) -> QuillError:
        return CorruptError(f"'{self.path / name}' is missing", why="a version is incomplete without it")


def is_published(folder: Path | str) -> bool:
    """Whether a version's folder has a manifest, in whatever state."""
    return exists(os.path.join(folder, manifest.FILE))


def is_flat(folder: Path | str) -> bool:
    """Whether a model's files were put into its folder by hand, without versions."""
    return all(exists(os.path.join(folder, f)) for f in manifest.REQUIRED[:2])


def flat_files(folder: Path) -> list[Path]:
    """The files that a model put there by hand consists of, those without which it is none first."""
    return [folder / f for f in (*manifest.REQUIRED, manifest.METRICS, manifest.CARD) if exists(folder / f)]


def numbers(folder: Path | str) -> list[int]:
    """The version numbers in use in a model's folder, whatever is in their place, the highest first.

    Raises:
        CorruptError: The folder is a link.
    """
    refuse_link(folder)
    found = (names.version_number(e.name) for e in scan(folder))
    return sorted((n for n in found if n), reverse=True)


def unpublished(folder: Path | str, known: Mapping[int, bool] | None = None) -> Iterator[int]:
    """The numbers of the drafts in a model's folder, the highest first.

    Args:
        folder: The model's folder.
        known: The numbers in use, and whether each is published, if they are known already.
    """
    for number in numbers(folder) if known is None else known:
        if known is not None and known[number]:
            continue
        path = Path(folder, f"v{number}")
        if not is_published(path) and path.is_dir() and not path.is_symlink() and not fsio.is_removed(path):
            yield number


def refuse_link(path: Path | str) -> None:
    """Raise CorruptError for a folder that is really a link."""
    if os.path.islink(path):
        raise CorruptError(
            f"'{path}' is a symbolic link",
            why="links are not followed inside a registry: they may point anywhere",
            hint=f"quill show $(readlink -f '{path}')",
        )


def refuse_busy(folder: Folder) -> None:
    """Raise LockedError for a draft that a process is writing, such as a copy in progress."""
    if not folder.is_published and fsio.is_in_use(folder.path):
        raise LockedError(
            f"a process is writing '{folder.reference}'",
            why="a copy, an import or a training is in progress",
            hint="try again later",
        )


def scan(folder: Path | str) -> list[os.DirEntry[str]]:
    """The entries of a folder, by name; none if there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=attrgetter("name"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        with fsio.guard(folder, "read"):
            raise


def disk_size(path: Path) -> int:
    """The bytes that a file or folder takes; a file with another hard link counts there."""
    try:
        found = os.lstat(path)
        if not os.path.isdir(path) or os.path.islink(path):
            return found.st_size if found.st_nlink == 1 else 0
        return sum(disk_size(Path(e.path)) for e in os.scandir(path))
    except OSError:
        return 0


def exists(path: Path | str) -> bool:
    """Whether there is anything at a path, also a broken link; a denied permission raises ResourceError."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        with fsio.guard(Path(path), "read"):
            raise
    return True
