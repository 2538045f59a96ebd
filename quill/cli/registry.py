"""Share the registry with a group of users."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from quill.cli import options
from quill.cli.options import Session


@options.command(examples="quill registry share --group lab")
def share(
    session: Session,
    group: Annotated[
        str | None, Option(metavar="NAME", help="Group of users (default: the registry's group).")
    ] = None,
) -> None:
    """Let a group of users train, rename and remove models in the registry, and prepare datasets.

    The registry, its datasets and everything in them become writable for the group, as does whatever quill
    makes in them later, whatever the umask. Prints the registry's folder.
    """
    from quill.registry import share as sharing

    output, root = session.output, session.registry().root
    done = sharing.share([root, session.datasets()], group)
    known = sharing.group_of(root)
    if done.refused:
        others = f"{len(done.refused)} files and folders belong to other users, such as '{done.refused[0]}'"
        output.warn(f"{others}: each of them must run quill registry share too")
    output.say(f"shared with group {known}: changed {done.changed} files and folders")
    row = {"path": str(root), "group": known, "changed": done.changed, "refused": len(done.refused)}
    output.show("quill.registry.share/1", row, key="path")


COMMANDS = {"share": share}
