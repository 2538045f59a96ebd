"""Remove versions of models."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import _confirm, options
from quill.cli._completion import models
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.units import size

_COLUMNS = (
    Column("REMOVED", lambda r: r["reference"]),
    Column("SIZE", lambda r: size(r["bytes"]), right=True, drop=1),
)
_PLANNED = (Column("WOULD REMOVE", lambda r: r["reference"]), _COLUMNS[1])


@options.command(
    examples="""
    quill rm shakespeare:v1
    quill rm 'old-model' --all-versions --dry-run
    """,
    topic="registry",
)
def command(
    session: Session,
    references: Annotated[
        list[str],
        Argument(
            metavar="REF",
            help="Versions such as name:v2, or the name of a model with a single version.",
            autocompletion=models(drafts=True),
        ),
    ],
    all_versions: Annotated[
        bool, Option("--all-versions", "-a", help="Remove all versions of each name, and its unfinished run.")
    ] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Skip the confirmation prompt.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print what would be removed; remove nothing.")
    ] = False,
    missing_ok: Annotated[
        bool, Option("--missing-ok", help="Do not fail if a reference does not exist.")
    ] = False,
) -> None:
    """Remove versions of models, including damaged and unfinished ones.

    Version numbers are never reused. A version with an alias is refused (exit code 4), and one that is being
    trained too (75). Prints the removed references.
    """
    from quill.registry import remove

    output = session.output
    plan = remove.plan(session.registry(), references, all_versions=all_versions, missing_ok=missing_ok)
    for ref in plan.missing:
        output.detail(f"'{ref}' does not exist")
    removed = plan.removals
    if removed and not dry_run:
        if not yes:
            _confirm.removal(output, removed)
        removed = plan.execute()
    total = sum(r.bytes for r in removed)
    output.show(
        "quill.rm/1",
        [{"reference": r.what, "bytes": r.bytes} for r in removed],
        (_PLANNED if dry_run else _COLUMNS) if output.terminal else (),
        key="reference",
        within="removed",
        dry_run=dry_run,
        bytes=total,
    )
    if not removed:
        output.say("nothing to remove")
    elif dry_run:
        output.say(f"would free {size(total)}; nothing was removed")
    else:
        output.say(f"freed {size(total)}")
