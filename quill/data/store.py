"""The datasets under a data root: where they are, listed, found by name, and put in place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quill import __version__, fsio, naming, strictjson
from quill.data.dataset import MANIFEST, SCHEMA_VERSION, SPLITS, Dataset
from quill.errors import NotFoundError, QuillError, RefusedError

PREFIX = "data:"  # What marks a dataset among the names of models.


def locate(registry_root: Path, env: Mapping[str, str] = os.environ) -> Path:
    """Return the data root: QUILL_DATA, else `data` next to the registry.

    Args:
        registry_root: The registry's folder.
        env: The environment.
    """
    given = env.get("QUILL_DATA")
    return fsio.expanded(given) if given else registry_root.parent / "data"


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


def write_manifest(staged: Path, key: str, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the manifest of a staged dataset.

    Args:
        staged: Its folder, named as the dataset.
        key: Its key.
        settings: What `matching.settings_of` returned.
        facts: About its source, tokenizer, splits and files.
    """
    sharded = len(facts["files"]) > len(SPLITS) + 1
    manifest = {
        # Earlier releases can read a dataset whose splits are one file each.
        "schema": SCHEMA_VERSION if sharded else 1,
        "name": staged.name,
        "key": key,
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "quill": __version__,
        "settings": settings,
        **facts,
    }
    fsio.create(staged / MANIFEST, [strictjson.encode(manifest)])


def find(root: Path, name: str) -> Dataset:
    """Open a dataset by its name.

    Args:
        root: The data root.
        name: Its name, without "data:".

    Raises:
        InputError: It cannot be a name.
        NotFoundError: There is no dataset of that name.
        CorruptError: It is damaged.
    """
    naming.check(name, "dataset")
    try:
        return Dataset.open(root / name)
    except NotFoundError:
        raise missing(root, name) from None


def missing(root: Path, name: str) -> NotFoundError:
    """Return the error for a name that no dataset has."""
    have = [entry.name for entry in entries(root)]
    return NotFoundError(
        f"no dataset named '{name}' in {root}",
        why=f"datasets: {', '.join(have) or 'none'}",
        close=[PREFIX + close for close in difflib.get_close_matches(name, have)],
    )


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
    with fsio.open_plain(path) as file, fsio.guard(path, "read"):
        while data := file.read(1 << 22):
            yield data
