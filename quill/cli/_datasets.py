"""Prepared datasets, which list, show and rm know as data:NAME."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from quill.cli import _facts
from quill.cli._tables import Column, Style
from quill.units import count, size

if TYPE_CHECKING:
    from quill.cli.options import Session
    from quill.data.store import Dataset

PREFIX = "data:"


def _style(row: Any) -> Style:
    return "good" if row["state"] == "ok" else "bad"


_LISTED = (
    Column("DATASET", lambda r: r["reference"]),
    Column("TOKENIZER", lambda r: r["tokenizer"] or "", drop=2),
    Column("VOCABULARY", lambda r: _facts.number(r["vocab_size"]), right=True, drop=3),
    Column("TRAIN", lambda r: count(r["train_tokens"]), right=True),
    Column("VAL", lambda r: count(r["val_tokens"]), right=True, drop=1),
    Column("SIZE", lambda r: size(r["bytes"]), right=True, drop=4),
    Column("STATE", lambda r: f"damaged: {r['damage']}" if r["damage"] else "ok", style=_style),
)
_SHOWN = (
    Column("dataset", lambda r: r["reference"]),
    Column("path", lambda r: r["path"]),
    Column("tokenizer", lambda r: f"{r['tokenizer']}, vocabulary of {r['vocab_size']:,}"),
    Column("training", lambda r: f"{r['train_tokens']:,} tokens"),
    Column("validation", lambda r: f"{r['val_tokens']:,} tokens"),
    Column("size", lambda r: size(r["bytes"])),
    Column("created", lambda r: str(r["manifest"].get("created") or "")),
    Column("train on it", lambda r: f"quill train {r['name']}"),
)


def show_all(session: Session, glob: str) -> None:
    """List the datasets whose names match."""
    from quill.data import store

    root, output = session.datasets(), session.output
    rows = []
    for entry in store.entries(root):
        if fnmatchcase(entry.name, glob or "*"):
            known = _row(entry.dataset) if entry.dataset else {"reference": PREFIX + entry.name}
            empty = dict.fromkeys(("tokenizer", "vocab_size", "train_tokens", "val_tokens", "bytes"))
            state = "damaged" if entry.damage else "ok"
            rows.append({**empty, **known, "state": state, "damage": entry.damage or None})
    output.show("quill.datasets/1", rows, _LISTED, key="reference", within="datasets", root=str(root))
    output.say(str(root))
    if not rows:
        output.say("no datasets yet; start with: quill prepare FILE")


def show_one(session: Session, name: str) -> None:
    """Show everything known about a dataset.

    Raises:
        NotFoundError: There is no dataset of that name.
    """
    from quill.data import store

    dataset = store.find(session.datasets(), name)
    row = {**_row(dataset), "name": dataset.name, "path": str(dataset.path), "manifest": dataset.manifest}
    session.output.show("quill.dataset/1", row, _SHOWN, key="reference")


def _row(dataset: Dataset) -> dict[str, Any]:
    tokenizer = dataset.manifest["tokenizer"]
    return {
        "reference": PREFIX + dataset.name,
        "tokenizer": tokenizer["kind"],
        "vocab_size": tokenizer["vocab_size"],
        "train_tokens": dataset.count("train"),
        "val_tokens": dataset.count("val"),
        "bytes": sum(f["bytes"] for f in dataset.manifest["files"].values()),
    }
