"""Remove versions of models, or datasets."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import _confirm, options
from quill.cli._completion import models
from quill.cli._datasets import PREFIX
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
            help="Versions such as name:v2, names of models with a single version, or data:NAME.",
            autocompletion=models(drafts=True, datasets=True),
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
    """Remove versions of models, including damaged and unfinished ones, or datasets.

    Version numbers are never reused. A version with an alias is refused (exit code 4), and so are versions
    that are being trained and datasets in use (75). Prints the removed references.
    """
    from quill.data import remove as datasets
    from quill.registry import remove

    output = session.output
    plan = remove.plan(
        session.registry(),
        [r for r in references if not r.startswith(PREFIX)],
        all_versions=all_versions,
        missing_ok=missing_ok,
    )
    prepared = datasets.plan(
        session.datasets(),
        [r.removeprefix(PREFIX) for r in references if r.startswith(PREFIX)],
        missing_ok=missing_ok,
    )
    for ref in [*plan.missing, *prepared.missing]:
        output.detail(f"'{ref}' does not exist")
    sizes = {r.what: r.bytes for r in plan.removals} | {r.what: r.bytes for r in prepared.removals}
    removed = list(sizes)
    if removed and not dry_run:
        if not yes:
            _confirm.removal(output, removed, sum(sizes.values()))
        # Datasets first: a training that uses one of them also holds its model.
        gone = [r.what for r in prepared.execute()]
        removed = [*(r.what for r in plan.execute()), *gone]
    rows = [{"reference": reference, "bytes": sizes[reference]} for reference in removed]
    total = sum(sizes[reference] for reference in removed)
    output.show(
        "quill.rm/1",
        rows,
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
