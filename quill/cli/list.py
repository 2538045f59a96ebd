"""List the models of the registry."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.errors import QuillError
from quill.units import count, size

if TYPE_CHECKING:
    from pathlib import Path

    from quill.registry.store import Draft, Registry, Version

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
    versions, drafts = registry.entries(glob, all_versions=all_versions), registry.drafts(glob)
    aliases = {name: aliases_of(registry, name) for name in {v.name for v in versions}}
    found = [(v.name, v.number, _describe(v, aliases[v.name])) for v in versions]
    at_work = running(registry, drafts)
    found += [(d.name, d.number, describe_draft(d, d.reference in at_work)) for d in drafts]
    rows = [row for *_, row in sorted(found, key=lambda entry: entry[:2])]
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


def aliases_of(registry: Registry, name: str) -> dict[str, int]:
    """The aliases of a name and their numbers; none where they cannot be read."""
    from quill.registry import aliases as ledger

    with suppress(QuillError):
        aliases: dict[str, int] = ledger.read(registry.root / name).get("aliases", {})
        return aliases
    return {}


def running(registry: Registry, drafts: Iterable[Draft]) -> set[str]:
    """The references of those drafts that a process is at work on: of a name that is held, the last."""
    from quill.registry import locks

    last = {d.name: d for d in drafts}
    return {d.reference for d in last.values() if locks.holder(registry.root, d.name)}


def is_running(draft: Draft) -> bool:
    """Whether a process is at work on a version in progress."""
    from quill.registry.store import Registry

    registry = Registry(draft.path.parent.parent)
    return draft.reference in running(registry, registry.drafts(draft.name))


def describe_draft(draft: Draft, at_work: bool) -> dict[str, Any]:
    """What is known of a version in progress, without reading its metrics.

    Args:
        draft: The version.
        at_work: Whether a process is at work on it.
    """
    status = draft.status() or {}
    known = {k: v for k, v in status.items() if type(v) in (int, float) and v >= 0 and math.isfinite(v)}
    step = known.get("step")
    if at_work:
        # The status tells the step that was saved; the metrics are ahead of it.
        step = max(filter(None, [step, _last_step(draft.path)]), default=step)
    return {
        "reference": draft.reference,
        "state": "training" if at_work else "unfinished",
        "parameters": known.get("parameters"),
        "bytes": None,
        "val_loss": known.get("best_val_loss"),
        "created": None,
        "aliases": [],
        "step": step,
        "max_iters": _max_iters(draft),
    }


def _last_step(folder: Path) -> int | None:
    from quill import fsio
    from quill.evaluation import curves

    with suppress(QuillError, OSError), fsio.open_plain(folder / curves.METRICS) as file:
        file.seek(max(0, file.seek(0, 2) - 4096))
        return max((line["step"] for line in curves.parse(file.readall())), default=None)
    return None


def _max_iters(draft: Draft) -> int | None:
    from quill.registry import manifest

    with suppress(QuillError, OSError):
        train = manifest.read_object(draft.path / manifest.REQUIRED[0]).get("train")
        most = train.get("max_iters") if isinstance(train, dict) else None
        return most if type(most) is int and most >= 0 else None
    return None


def _describe(version: Version, aliases: dict[str, int]) -> dict[str, Any]:
    manifest = version.manifest or {}
    return {
        "reference": version.reference,
        "state": "damaged" if version.damaged else "ok",
        "parameters": manifest.get("parameters"),
        "bytes": None if version.damaged else version.size,
        "val_loss": manifest.get("best_val_loss"),
        "created": manifest.get("created"),
        "aliases": sorted(a for a, number in aliases.items() if number == version.number),
        **({"damage": version.damaged} if version.damaged else {}),
    }


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
