"""Rename a model."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import models
from quill.cli.options import Session

_names = models(versions=False, aliases=False, drafts=True)


@options.command(examples="quill mv shakespeare bard")
def command(
    session: Session,
    name: Annotated[str, Argument(metavar="NAME", help="Current name.", autocompletion=_names)],
    new: Annotated[str, Argument(metavar="NEW", help="New name.")],
    dry_run: Annotated[bool, Option("--dry-run", help="Only check that it can be renamed.")] = False,
) -> None:
    """Rename a model, with all of its versions, aliases and its unfinished run.

    Version numbers are never reused, so the new name must not be or have been another model's. Exits with
    code 75 while the model is training. Prints the new name.
    """
    from quill.registry import rename

    output = session.output
    plan = rename.plan(session.registry(), name, new)
    references = plan.references if dry_run else plan.execute()
    numbers = ", ".join(r.partition(":")[2] for r in references)
    output.say(f"{'would rename' if dry_run else 'renamed'} {name} to {new}: {numbers}")
    row = {"dry_run": dry_run, "name": new, "was": name, "versions": references}
    output.show("quill.mv/1", row, key="name")
