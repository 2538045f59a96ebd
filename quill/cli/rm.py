"""Remove versions of models."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.cli.output import is_terminal, safe_line
from quill.errors import InputError, NotFoundError
from quill.units import size

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.registry.remove import Target

_SHOWN = 6


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
    from quill.registry import remove as removal

    output, registry = session.output, session.registry()
    found: dict[str, Target] = {}
    for ref in references:
        try:
            found |= {t.reference: t for t in removal.find(registry, ref, all_versions=all_versions)}
        except NotFoundError:
            if not missing_ok:
                raise
            output.detail(f"there is no '{ref}'")
    targets = list(found.values())
    sizes = {t.reference: t.size for t in targets}
    if targets and not dry_run:
        if not yes:
            _ask(output, list(sizes), sum(sizes.values()))
        targets = removal.remove(registry, targets)
    removed = [{"reference": t.reference, "bytes": sizes[t.reference]} for t in targets]
    references = [t.reference for t in targets]
    total = sum(sizes[r] for r in references)
    if not targets:
        output.say("nothing to remove")
    elif dry_run:
        output.say(f"{size(total)} would be freed; nothing is removed")
    else:
        output.say(f"{size(total)} freed")
    output.emit(
        "quill.rm/1",
        {"dry_run": dry_run, "bytes": total, "removed": removed},
        human="".join(f"{safe_line(r)}\n" for r in references),
        quiet=references,
    )


def _ask(output: Output, references: list[str], total: int) -> None:
    """Have a person agree; where there is none, nobody can."""
    which = ", ".join(references[:_SHOWN])
    if len(references) > _SHOWN:
        which += f" and {len(references) - _SHOWN} more"
    if output.err is None or not is_terminal(output.err) or not is_terminal(sys.stdin):
        raise InputError(
            f"{which} would be removed, and there is nobody to ask",
            why="stdin and stderr are no terminal",
            hint="the same command with --yes, or with --dry-run",
        )
    output.err.write(f"remove {safe_line(which)} ({size(total)})? [y/N] ")
    output.err.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        output.err.write("\n")
    if answer.strip().lower() not in ("y", "yes"):
        output.say("nothing is removed")
        raise typer.Exit(4)
