"""Give a model another name."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session


@options.command()
def command(
    session: Session,
    name: Annotated[str, Argument(metavar="NAME", help="What the model is called.")],
    new: Annotated[str, Argument(metavar="NEW", help="What it shall be called.")],
    dry_run: Annotated[bool, Option("--dry-run", help="Only check that it can be renamed.")] = False,
) -> None:
    """Give a model another name: all of its versions, its aliases and its unfinished run at once.

    No number is ever given twice: the old name, used again, goes on where it was left, and a name that is or
    was another model's is refused. While the model is being trained it stays (exit code 75). Prints the new
    name.
    """
    from quill.registry import rename

    output = session.output
    plan = rename.plan(session.registry(), name, new)
    references = plan.references if dry_run else plan.execute()
    numbers = ", ".join(r.partition(":")[2] for r in references)
    output.say(
        f"{name} would be renamed to {new}: {numbers}" if dry_run else f"{name} is now {new}: {numbers}"
    )
    document = {"dry_run": dry_run, "name": new, "was": name, "versions": references}
    output.emit("quill.mv/1", document, human=new, quiet=new)
