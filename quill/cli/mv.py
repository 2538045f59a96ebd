"""Give a model another name."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from quill.cli import options
from quill.cli.options import Session


@options.command()
def command(
    session: Session,
    name: Annotated[str, Argument(metavar="NAME", help="What the model is called.")],
    new: Annotated[str, Argument(metavar="NEW", help="What it shall be called.")],
) -> None:
    """Give a model another name: all of its versions, its aliases and its unfinished run at once.

    No number is ever given twice: the old name, used again, goes on where it was left, and a name that is or
    was another model's is refused. While the model is being trained it stays (exit code 75). Prints the new
    name.
    """
    from quill.registry import copy as moves

    output = session.output
    versions = moves.move(session.registry(), name, new)
    output.say(f"{name} is {new} now: {', '.join(v.partition(':')[2] for v in versions)}")
    output.emit("quill.mv/1", {"name": new, "was": name, "versions": versions}, human=new, quiet=new)
