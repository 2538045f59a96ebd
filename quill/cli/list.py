"""List models, or datasets."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from quill.cli import _datasets, _facts, options
from quill.cli._completion import completing, models
from quill.cli._tables import Column, Style
from quill.cli.options import Session
from quill.errors import InputError
from quill.units import count, size

if TYPE_CHECKING:
    from quill.registry.folder import Folder
    from quill.registry.store import Registry

Sort = Literal["name", "created", "loss", "params", "size"]
_STYLES: dict[str, Style] = {"ok": "good", "damaged": "bad", "training": "busy", "unfinished": "warn"}


def style(row: Any) -> Style:
    """The colour of a row's state."""
    return _STYLES.get(row["state"], "")


_COLUMNS = (
    Column("NAME", lambda r: r["reference"]),
    Column("ALIASES", lambda r: ", ".join(r["aliases"]), drop=1, optional=True),
    Column("PARAMS", lambda r: count(r["parameters"]), right=True, drop=2),
    Column("SIZE", lambda r: size(r["bytes"]), right=True, drop=4),
    Column(
        "VAL LOSS",
        lambda r: _facts.loss(r["val_loss"]) + (" (held out)" if r["held_out"] else ""),
        right=True,
    ),
    Column("WHEN", lambda r: _facts.ago(r["created"], time.time()), drop=3),
    Column("STATE", lambda r: _facts.progress(r) + (", shipped" if r.get("shipped") else ""), style=style),
)


@options.command(
    examples="""
    quill list
    quill list 'shake*' --all-versions --sort loss
    quill list --data
    """
)
def command(
    session: Session,
    glob: Annotated[
        str | None,
        Argument(
            metavar="GLOB",
            help="Only names that match, as in 'shake*' (default: all); data:GLOB lists datasets.",
            autocompletion=models(versions=False, aliases=False, drafts=True, datasets=True),
        ),
    ] = None,
    data: Annotated[bool, Option("--data", help="List datasets instead of models.")] = False,
    all_versions: Annotated[
        bool, Option("--all-versions", "-a", help="Include all versions, not just the latest.")
    ] = False,
    sort: Annotated[
        Sort,
        Option(
            metavar="name|created|loss|params|size",
            help="Order of the rows.",
            autocompletion=completing("name", "created", "loss", "params", "size"),
        ),
    ] = "name",
) -> None:
    """List models: the latest version of each, and unfinished runs.

    Models that come with quill are listed as shipped. Prints the registry that it read to stderr.
    """
    if data or (glob is not None and glob.startswith(_datasets.PREFIX)):
        if all_versions:
            raise InputError("--all-versions requires models", why="datasets have no versions")
        _datasets.show_all(session, (glob or "").removeprefix(_datasets.PREFIX), sort)
        return
    registry, output = session.registry(), session.output
    with _no_collection():
        rows = _rows(registry, glob, all_versions)
        rows.sort(key=_order(sort))
        output.show(
            "quill.list/1",
            rows,
            _COLUMNS,
            key="reference",
            within="models",
            registry=str(registry.root),
            why=registry.why,
        )
    output.say(f"{registry.root} ({registry.why})")
    if not rows:
        output.say("no models yet; start with: quill train" if glob is None else f"no model matches '{glob}'")


def _rows(registry: Registry, glob: str | None, all_versions: bool) -> list[dict[str, Any]]:
    rows = []
    for model in registry.each_model(glob, all_versions=all_versions):
        folders: list[Folder] = [*model.versions, *model.drafts]
        rows += [_describe(f, model.aliases) for f in sorted(folders, key=lambda f: f.number)]
    for model in registry.shipped_models(glob, all_versions=all_versions):
        rows += [_describe(v, model.aliases) | {"shipped": True} for v in model.versions]
    return rows


@contextmanager
def _no_collection() -> Iterator[None]:
    """Look for no garbage: thousands of manifests are many objects, and all of them are in use."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _describe(folder: Folder, aliases: dict[str, int]) -> dict[str, Any]:
    facts = folder.facts
    row: dict[str, Any] = {
        "reference": folder.reference,
        "state": folder.state,
        "parameters": facts["parameters"],
        "bytes": folder.size,
        "val_loss": facts["best_val_loss"],
        "held_out": facts["held_out"],
        "created": facts["created"],
        "aliases": [],
    }
    if folder.is_published:
        row["aliases"] = [a for a, number in aliases.items() if number == folder.number]
    else:
        row |= {"step": folder.step, "max_iters": folder.max_iters}
    return row | ({"damage": folder.damaged} if folder.damaged else {})


def _order(sort: Sort) -> Callable[[dict[str, Any]], Any]:
    key = {"created": "created", "loss": "val_loss", "params": "parameters", "size": "bytes"}.get(sort)
    if key is None:
        return lambda row: 0
    if key == "val_loss":
        return lambda row: (row[key] is None, row[key] or 0)
    # Newest and largest first; unknown last.
    if key == "created":
        return lambda row: (not row[key], [-ord(c) for c in row[key] or ""])
    return lambda row: (row[key] is None, -(row[key] or 0))
