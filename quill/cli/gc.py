"""Remove leftovers of crashed runs, and old versions on request."""

from __future__ import annotations

import math
from typing import Annotated

from typer import Argument, Option

from quill.cli import _confirm, options
from quill.cli._completion import models
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.errors import InputError
from quill.units import size

_MOST_DAYS = 36525.0
_COLUMNS = (
    Column("REMOVED", lambda r: r["what"]),
    Column("KIND", lambda r: r["kind"]),
    Column("SIZE", lambda r: size(r["bytes"]), right=True, drop=1),
)
_PLANNED = (Column("WOULD REMOVE", lambda r: r["what"]), *_COLUMNS[1:])


@options.command(
    examples="""
    quill gc --dry-run
    quill gc 'test*' --keep 3
    """,
    topic="registry",
)
def command(
    session: Session,
    glob: Annotated[
        str | None,
        Argument(
            metavar="GLOB",
            help="Only models whose names match, as in 'test*' (default: all models and the datasets).",
            autocompletion=models(versions=False, aliases=False, drafts=True),
        ),
    ] = None,
    keep: Annotated[
        int | None, Option(metavar="N", help="Also remove all but the newest N versions of each model.")
    ] = None,
    older_than: Annotated[
        float,
        Option(
            metavar="DAYS",
            help="Remove leftovers older than N days; use 0 only when nothing else is running.",
        ),
    ] = 1.0,
    yes: Annotated[bool, Option("--yes", "-y", help="Skip the confirmation prompt of --keep.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print what would be removed; remove nothing.")
    ] = False,
) -> None:
    """Remove leftovers of crashed runs, and old versions on request.

    Leftovers are staging and temporary files, unfinished runs that a newer version replaced, and outdated
    resume states. Versions with an alias, models that are training and unreadable files are never removed.
    """
    from quill.registry import gc

    if keep is not None and keep < 1:
        raise InputError(
            f"--keep {keep} is out of range", why="the newest version is always kept", hint="quill rm --help"
        )
    if not (math.isfinite(older_than) and 0 <= older_than <= _MOST_DAYS):
        raise InputError(f"--older-than {older_than:g} is out of range", why="it takes days, from 0 to 36525")
    output = session.output
    plan = gc.plan(
        session.registry(), session.datasets(), glob=glob, keep=keep, older_than=older_than * gc.DAY
    )
    if dry_run:
        done = gc.Result(plan.removals, plan.skipped, plan.failed)
    else:
        if plan.versions and not yes:
            _confirm.removal(output, [r.what for r in plan.versions], sum(r.bytes for r in plan.versions))
        done = plan.execute()
    output.show(
        "quill.gc/1",
        [{"what": r.what, "kind": r.kind, "bytes": r.bytes} for r in done.removed],
        _PLANNED if dry_run else _COLUMNS,
        key="what",
        within="removed",
        quiet=[str(done.bytes)],
        dry_run=dry_run,
        bytes=done.bytes,
        skipped=[{"what": s.what, "why": s.why} for s in done.skipped],
    )
    for skipped in done.skipped:
        output.say(f"kept {skipped.what}: {skipped.why}")
    if not done.removed:
        output.say("nothing to remove")
    elif dry_run:
        output.say(f"would free {size(done.bytes)}; nothing was removed")
    else:
        output.say(f"freed {size(done.bytes)}")
    if done.failed:
        for failure in done.failed[1:]:
            output.fail(failure)
        raise done.failed[0]
