"""Copy a model under another name."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.units import size


@options.command()
def command(
    session: Session,
    reference: Annotated[str, Argument(metavar="REF", help="A model: name, name:v2, or a ./folder.")],
    name: Annotated[str, Argument(metavar="NAME", help="The name; the copy is its next version.")],
    dry_run: Annotated[bool, Option("--dry-run", help="Only check that it can be copied.")] = False,
) -> None:
    """Copy a version, as the next version of a name.

    Every file is checked against its sha256 on the way. What is known of the model, its figures, data, parent
    and seeds, goes with it. Prints the copy's reference.
    """
    from quill.registry import copy

    output = session.output
    plan = copy.plan(session.registry(), reference, name)
    if dry_run:
        output.say(f"{size(plan.bytes)} in {len(plan.files)} files would be copied")
        document = {"dry_run": True, "reference": name, "bytes": plan.bytes, "copied_from": None}
        output.emit("quill.cp/1", document, human=name, quiet=name)
        return
    done = 0
    with output.progress(size) as report:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            report(f"copying {reference}", done, 2 * plan.bytes)

        version = plan.execute(on_bytes)
    output.detail(f"{size(plan.bytes)} in {len(plan.files)} files")
    output.emit(
        "quill.cp/1",
        {
            "dry_run": False,
            "reference": version.reference,
            "bytes": version.size,
            "copied_from": version.facts["copied_from"],
        },
        human=version.reference,
        quiet=version.reference,
    )
