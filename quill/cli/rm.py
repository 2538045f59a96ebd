"""Remove versions of models, or datasets."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import _confirm, options
from quill.cli._completion import models
from quill.cli._datasets import PREFIX
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.errors import NotFoundError
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

    Version numbers are never reused. A version with an alias is refused (exit code 4), and one that is being
    trained too (75). Prints the removed references.
    """
    from quill.data import remove as datasets
    from quill.registry import remove

    output, root = session.output, session.datasets()
    plan = remove.plan(
        session.registry(),
        [r for r in references if not r.startswith(PREFIX)],
        all_versions=all_versions,
        missing_ok=missing_ok,
    )
    missing, prepared = list(plan.missing), []
    for ref in dict.fromkeys(r for r in references if r.startswith(PREFIX)):
        try:
            prepared.append(datasets.find(root, ref.removeprefix(PREFIX)))
        except NotFoundError:
            if not missing_ok:
                raise
            missing.append(ref)
    for ref in missing:
        output.detail(f"'{ref}' does not exist")
    sizes = {r.what: r.bytes for r in plan.removals} | {t.reference: t.size for t in prepared}
    removed = list(sizes)
    if removed and not dry_run:
        if not yes:
            _confirm.removal(output, removed, sum(sizes.values()))
        removed = [r.what for r in plan.execute()]
        removed += [t.reference for t in datasets.remove(root, prepared)]
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
