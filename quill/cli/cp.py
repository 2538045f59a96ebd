"""Copy a version to another name."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import models
from quill.cli.options import Session
from quill.units import size


@options.command(examples="quill cp shakespeare:v2 backup")
def command(
    session: Session,
    reference: Annotated[
        str,
        Argument(metavar="REF", help="Version to copy: name, name:v2 or ./folder.", autocompletion=models()),
    ],
    name: Annotated[
        str,
        Argument(
            metavar="NAME",
            help="Name of the copy, which becomes its next version.",
            autocompletion=models(versions=False, aliases=False),
        ),
    ],
    dry_run: Annotated[bool, Option("--dry-run", help="Only check that it can be copied.")] = False,
) -> None:
    """Copy a version to another name, as its next version.

    Every file is verified on the way. The copy keeps the original's metrics and lineage. Prints its
    reference.
    """
    from quill.registry import copy

    output = session.output
    plan = copy.plan(session.registry(), reference, name)
    if dry_run:
        output.say(f"would copy {size(plan.bytes)} in {len(plan.files)} files")
        row = {"dry_run": True, "reference": name, "bytes": plan.bytes, "copied_from": None}
        output.show("quill.cp/1", row, key="reference")
        return
    done = 0
    with output.progress(size) as report:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            report(f"copying {reference}", done, 2 * plan.bytes)

        version = plan.execute(on_bytes)
    output.detail(f"{size(plan.bytes)} in {len(plan.files)} files")
    row = {
        "dry_run": False,
        "reference": version.reference,
        "bytes": version.size,
        "copied_from": version.facts["copied_from"],
    }
    output.show("quill.cp/1", row, key="reference")
