"""List the models of the registry."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.units import count, size

if TYPE_CHECKING:
    from quill.registry.folder import Folder

_UNITS = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"))


Sort = Literal["name", "created", "loss", "params", "size"]


@options.command()
def command(
    session: Session,
    glob: Annotated[
        str | None, Argument(metavar="GLOB", help="Only names that match, as in 'shake*'.")
    ] = None,
    all_versions: Annotated[
        bool, Option("--all-versions", "-a", help="Not only the newest of each.")
    ] = False,
    sort: Annotated[
        Sort, Option(metavar="name|created|loss|params|size", help="Order of the rows.")
    ] = "name",
) -> None:
    """List the models of the registry.

    A name alone means its newest complete version. A damaged model is listed as such and hides no other.
    """
    registry, output = session.registry(), session.output
    rows = []
    for model in registry.models(glob, all_versions=all_versions):
        folders: list[Folder] = [*model.versions, *model.drafts]
        for folder in sorted(folders, key=lambda f: f.number):
            rows.append(describe(folder, model.aliases))
    rows.sort(key=_order(sort))
    output.emit(
        "quill.list/1",
        {"registry": str(registry.root), "why": registry.why, "models": rows},
        human=_table(session, rows) if rows else "",
        quiet=[row["reference"] for row in rows],
    )
    output.say(f"{registry.root} ({registry.why})")
    if not rows:
        output.say("no models yet: quill train" if glob is None else f"no model matches '{glob}'")


def ago(created: str | None, now: float) -> str:
    """A time in UTC, ISO 8601, as a person says it: "3 hours ago"; empty when it is not known.

    Args:
        created: As the manifest has it.
        now: Seconds since the epoch.
    """
    if not created:
        return ""
    from datetime import datetime

    try:
        passed = now - datetime.fromisoformat(created).timestamp()
    except ValueError:
        return created
    if passed < -60:
        # A clock that went back is no reason to say something false.
        return created
    for seconds, unit in _UNITS:
        if passed >= seconds:
            n = int(passed // seconds)
            return f"{n} {unit}{'s' if n > 1 else ''} ago"
    return "just now"


def describe(folder: Folder, aliases: dict[str, int]) -> dict[str, Any]:
    """A row of the list: what is known of a version or an unfinished run.

    Args:
        folder: The version or run.
        aliases: The version number that each alias of the model names.
    """
    facts = folder.facts
    row: dict[str, Any] = {
        "reference": folder.reference,
        "state": folder.state,
        "parameters": facts["parameters"],
        "bytes": folder.size,
        "val_loss": facts["best_val_loss"],
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
    # The newest and the largest first; what is not known last.
    if key == "created":
        return lambda row: (not row[key], [-ord(c) for c in row[key] or ""])
    return lambda row: (row[key] is None, -(row[key] or 0))


def _table(session: Session, rows: list[dict[str, Any]]) -> str:
    now = time.time()
    header = ["NAME", "ALIASES", "PARAMS", "SIZE", "VAL LOSS", "WHEN", "STATE"]
    cells = [
        [
            row["reference"],
            ", ".join(row["aliases"]),
            count(row["parameters"]),
            size(row["bytes"]),
            "" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
            ago(row["created"], now),
            _state(row),
        ]
        for row in rows
    ]
    if not any(row["aliases"] for row in rows):
        header, cells = [c for c in header if c != "ALIASES"], [[row[0], *row[2:]] for row in cells]
    return session.output.table(header, cells, right=("PARAMS", "SIZE", "VAL LOSS"))


def _state(row: dict[str, Any]) -> str:
    if row["state"] == "damaged":
        return f"damaged: {row['damage']}"
    if row.get("step") is not None:
        of = f"/{row['max_iters']:,}" if row.get("max_iters") else ""
        return f"{row['state']}, step {row['step']:,}{of}"
    return str(row["state"])
