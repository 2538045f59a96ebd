"""List the models of the registry."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.cli.output import count, size

if TYPE_CHECKING:
    from quill.registry.store import Draft, Version

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
    sort: Annotated[Sort, Option(help="Order of the rows.")] = "name",
) -> None:
    """List the models of the registry.

    A name alone means its newest complete version. A damaged model is listed as such and hides no other.
    """
    registry, output = session.registry(), session.output
    found = [(v.name, v.number, _describe(v)) for v in registry.entries(glob, all_versions=all_versions)]
    found += [(d.name, d.number, _describe_draft(d)) for d in registry.drafts(glob)]
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


def _describe(version: Version) -> dict[str, Any]:
    manifest = version.manifest or {}
    return {
        "reference": version.reference,
        "state": "damaged" if version.damaged else "ok",
        "parameters": manifest.get("parameters"),
        "bytes": None if version.damaged else version.size,
        "val_loss": manifest.get("best_val_loss"),
        "created": manifest.get("created"),
        **({"damage": version.damaged} if version.damaged else {}),
    }


def _describe_draft(draft: Draft) -> dict[str, Any]:
    status = draft.status() or {}
    number = {k: v for k, v in status.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {
        "reference": draft.reference,
        "state": "training" if runs(status) else "unfinished",
        "parameters": number.get("parameters"),
        "bytes": None,
        "val_loss": number.get("best_val_loss"),
        "created": None,
        "step": number.get("step"),
        "max_iters": number.get("max_iters"),
    }


def runs(status: dict[str, Any]) -> bool:
    """Whether the process that a status names is alive, as far as this machine can tell."""
    pid, host = status.get("pid"), status.get("host")
    if type(pid) is not int or pid <= 0 or not isinstance(host, str):
        return False
    import socket

    if host != socket.gethostname():
        # Another machine's process cannot be asked; its own word stands.
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


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
    header = ["NAME", "PARAMS", "SIZE", "VAL LOSS", "WHEN", "STATE"]
    cells = [
        [
            row["reference"],
            count(row["parameters"]),
            size(row["bytes"]),
            "" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
            ago(row["created"], now),
            _state(row),
        ]
        for row in rows
    ]
    return session.output.table(header, cells, right=("PARAMS", "SIZE", "VAL LOSS"))


def _state(row: dict[str, Any]) -> str:
    if row["state"] == "damaged":
        return f"damaged: {row['damage']}"
    if row.get("step") is not None:
        of = f"/{row['max_iters']:,}" if row.get("max_iters") else ""
        return f"{row['state']}, step {row['step']:,}{of}"
    return str(row["state"])
