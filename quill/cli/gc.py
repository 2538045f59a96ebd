"""Remove what crashes left behind, and on request old versions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from quill.cli import _confirm, options
from quill.cli.options import Session
from quill.errors import InputError
from quill.units import size

if TYPE_CHECKING:
    from quill.registry.gc import Result

_MOST_DAYS = 36525.0


@options.command()
def command(
    session: Session,
    glob: Annotated[
        str | None,
        Argument(
            metavar="GLOB", help="Only models whose names match, as in 'test*', and nothing beside them."
        ),
    ] = None,
    keep: Annotated[
        int | None, Option(metavar="N", help="Of each model keep only its newest N versions; else all.")
    ] = None,
    older_than: Annotated[
        float,
        Option(
            metavar="DAYS", help="Leftovers of so many days and more; 0 only while nothing else is running."
        ),
    ] = 1.0,
    yes: Annotated[bool, Option("--yes", "-y", help="Skip the confirmation prompt of --keep.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print what would be removed.")] = False,
) -> None:
    """Remove what crashes left behind, and on request old versions.

    That is: staging, trash and half-written files, in the registry and in the folder of datasets; unfinished
    runs that a later version superseded; resume states that a run no longer goes on from. With --keep also
    all but the newest versions of each model. Never a version with an alias, a model that is being trained,
    or anything that cannot be read. Prints what was removed.
    """
    from quill.registry import gc

    if keep is not None and keep < 1:
        raise InputError(
            f"--keep {keep} is refused", why="at least the newest version stays", hint="quill rm"
        )
    if not (math.isfinite(older_than) and 0 <= older_than <= _MOST_DAYS):
        raise InputError(f"--older-than {older_than:g} is refused", why="it is days, from 0 to a century")
    output = session.output
    plan = gc.plan(
        session.registry(), session.datasets(), glob=glob, keep=keep, older_than=older_than * gc.DAY
    )
    if dry_run:
        done = gc.Result(plan.removals, plan.skipped, plan.failed)
    else:
        if plan.versions and not yes:
            _confirm.removal(output, plan.versions)
        done = plan.execute()
    output.emit(
        "quill.gc/1",
        {
            "dry_run": dry_run,
            "bytes": done.bytes,
            "removed": [{"what": r.what, "kind": r.kind, "bytes": r.bytes} for r in done.removed],
            "skipped": [{"what": s.what, "why": s.why} for s in done.skipped],
        },
        human=_table(session, done) if done.removed else "",
        quiet=str(done.bytes),
    )
    for skipped in done.skipped:
        output.say(f"{skipped.what} stays: {skipped.why}")
    if not done.removed:
        output.say("nothing to remove")
    else:
        output.say(f"{size(done.bytes)} {'would be freed; nothing was removed' if dry_run else 'freed'}")
    if done.failed:
        for failure in done.failed[1:]:
            output.fail(failure)
        raise done.failed[0]


def _table(session: Session, done: Result) -> str:
    rows = [[r.what, r.kind, size(r.bytes)] for r in done.removed]
    return session.output.table(["REMOVED", "KIND", "SIZE"], rows, right=("SIZE",))
