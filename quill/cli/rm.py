"""Remove versions of models."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import _confirm, options
from quill.cli.options import Session
from quill.cli.output import safe_line
from quill.units import size


@options.command()
def command(
    session: Session,
    references: Annotated[
        list[str], Argument(metavar="REF", help="Versions, as in name:v2, or names of a single version.")
    ],
    all_versions: Annotated[
        bool, Option("--all-versions", "-a", help="All versions of each name, and its unfinished run.")
    ] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask; needed where nobody can answer.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print what would be removed.")] = False,
    missing_ok: Annotated[bool, Option("--missing-ok", help="What is gone already is no failure.")] = False,
) -> None:
    """Remove versions of models, whole, damaged or unfinished.

    A version's number is never given again. What has an alias stays (exit code 4), and so does what is being
    trained (75). Prints the references that were removed.
    """
    from quill.registry import remove

    output, registry = session.output, session.registry()
    plan = remove.plan(registry, references, all_versions=all_versions, missing_ok=missing_ok)
    for ref in plan.missing:
        output.detail(f"there is no '{ref}'")
    removed = plan.removals
    if removed and not dry_run:
        if not yes:
            _confirm.removal(output, removed)
        removed = plan.execute()
    total = sum(r.bytes for r in removed)
    if not removed:
        output.say("nothing to remove")
    elif dry_run:
        output.say(f"{size(total)} would be freed; nothing was removed")
    else:
        output.say(f"{size(total)} freed")
    output.emit(
        "quill.rm/1",
        {
            "dry_run": dry_run,
            "bytes": total,
            "removed": [{"reference": r.what, "bytes": r.bytes} for r in removed],
        },
        human="".join(f"{safe_line(r.what)}\n" for r in removed),
        quiet=[r.what for r in removed],
    )
