"""Prepared datasets, which list, show and rm know as data:NAME."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from quill.cli import _facts
from quill.cli._tables import Column, Style
from quill.errors import InputError, shorten
from quill.units import count, plural, size

if TYPE_CHECKING:
    from quill.cli.options import Session
    from quill.data.dataset import Dataset
    from quill.data.store import Entry

PREFIX = "data:"
# How much of its text is shown.
_CHARACTERS = 400
_LINES = 5
_SOURCES = 8


def _style(row: Any) -> Style:
    return "good" if row["state"] == "ok" else "bad"


def _created(row: Any) -> str:
    return f"{row['created']} ({_facts.ago(row['created'], time.time())})" if row["created"] else ""


def _sources(given: list[str]) -> str:
    shown = ", ".join(source if len(source) <= 200 else shorten(source, 200) for source in given[:_SOURCES])
    return f"{shown} and {len(given) - _SOURCES:,} more" if len(given) > _SOURCES else shown


_ROW = (
    Column("DATASET", lambda r: r["reference"]),
    Column("TOKENIZER", lambda r: r["tokenizer"] or "", drop=2),
    Column("VOCABULARY", lambda r: _facts.number(r["vocab_size"]), right=True, drop=3),
    Column("TRAIN", lambda r: count(r["train_tokens"]), right=True),
    Column("VAL", lambda r: count(r["val_tokens"]), right=True, drop=1),
    Column("SIZE", lambda r: size(r["bytes"]), right=True, drop=5),
    Column("WHEN", lambda r: _facts.ago(r["created"], time.time()), drop=4),
    Column("STATE", _facts.progress, style=_style),
)
_RECORD = (
    Column("dataset", lambda r: r["reference"]),
    Column("path", lambda r: r["path"]),
    Column("created", _created),
    Column("size", lambda r: size(r["bytes"])),
    Column("tokens", lambda r: f"{r['train_tokens']:,} for training, {r['val_tokens']:,} for validation"),
    Column("tokenizer", lambda r: f"{r['tokenizer']}, vocabulary of {r['vocab_size']:,}"),
    Column("alphabet", lambda r: shorten(r["alphabet"], 160) if r["alphabet"] else ""),
    Column("text", lambda r: f"{size(r['text_bytes'])} in {plural(r['documents'], 'document')}"),
    Column("dropped", lambda r: _facts.dropped(r["duplicates"])),
    Column("sources", lambda r: _sources(r["sources"])),
    Column("sha256", lambda r: r["sha256"]),
    Column("train on it", lambda r: f"quill train {r['name']}"),
    Column("starts", lambda r: " / ".join(filter(None, r["starts"]))),
)


def show_all(session: Session, glob: str, sort: str) -> None:
    """List the datasets whose names match."""
    from quill.data import store

    if sort not in ("name", "created", "size"):
        raise InputError(
            f"datasets have no {sort} to sort by", why="they are sorted by name, created or size"
        )
    root, output = session.datasets(), session.output
    rows = [_row(entry) for entry in store.entries(root) if fnmatchcase(entry.name, glob or "*")]
    if sort == "size":
        rows.sort(key=lambda r: -(r["bytes"] or 0))
    elif sort == "created":
        rows.sort(key=lambda r: r["created"] or "", reverse=True)
    output.show("quill.datasets/1", rows, _ROW, key="reference", within="datasets", root=str(root))
    output.say(str(root))
    if not rows:
        output.say(
            f"no dataset matches '{glob}'" if glob else "no datasets yet; start with: quill prepare FILE"
        )


def show_one(session: Session, name: str, *, path: bool) -> None:
    """Show everything known about a dataset, or its path alone.

    Raises:
        NotFoundError: There is no dataset of that name.
        CorruptError: It is damaged.
    """
    from quill.data import store

    dataset = store.find(session.datasets(), name)
    if path:
        row = {"reference": PREFIX + name, "path": str(dataset.path)}
        session.output.show("quill.path/1", row, key="path")
        return
    session.output.show("quill.dataset/1", _record(dataset), _RECORD, key="reference")


def _row(entry: Entry) -> dict[str, Any]:
    found = entry.dataset
    row: dict[str, Any] = {
        "reference": PREFIX + entry.name,
        "name": entry.name,
        "state": "ok" if found else "damaged",
        "bytes": found.size if found else None,
        "train_tokens": found.count("train") if found else None,
        "val_tokens": found.count("val") if found else None,
        "tokenizer": found.kind if found else None,
        "vocab_size": found.vocab_size if found else None,
        "created": found.created if found else None,
    }
    return row | {"damage": entry.damage or None}


def _record(dataset: Dataset) -> dict[str, Any]:
    source = dataset.manifest["source"]
    vocabulary = dataset.tokenizer.to_dict().get("vocabulary") if dataset.kind == "char" else None
    return {
        "reference": PREFIX + dataset.name,
        "name": dataset.name,
        "path": str(dataset.path),
        "created": dataset.created,
        "bytes": dataset.size,
        "train_tokens": dataset.count("train"),
        "val_tokens": dataset.count("val"),
        "tokenizer": dataset.kind,
        "vocab_size": dataset.vocab_size,
        "alphabet": vocabulary,
        "text_bytes": source.get("bytes"),
        "documents": source.get("documents"),
        "duplicates": dataset.duplicates or None,
        "sources": source["given"],
        "sha256": source["sha256"],
        "starts": dataset.head(_CHARACTERS).splitlines()[:_LINES],
        "manifest": dataset.manifest,
    }
