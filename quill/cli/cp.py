"""Copy a model under another name."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from quill.cli import options
from quill.cli.options import Session
from quill.units import size


@options.command()
def command(
    session: Session,
    reference: Annotated[str, Argument(metavar="REF", help="A model: name, name:v2, or a ./folder.")],
    name: Annotated[str, Argument(metavar="NAME", help="The name; the copy is its next version.")],
) -> None:
    """Copy a version, as the next version of a name.

    Every file is checked against its sha256 on the way. What is known of the model, its figures, data, parent
    and seeds, goes with it. Prints the copy's reference.
    """
    from quill.registry import copy as moves

    output, registry = session.output, session.registry()
    done = 0
    with output.progress(size) as report:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            report(f"copying {reference}", done, None)

        version = moves.copy(registry, reference, name, on_bytes)
    source = (version.manifest or {}).get("copied_from")
    output.detail(f"{size(version.size)} in {len((version.manifest or {}).get('files', ()))} files")
    output.emit(
        "quill.cp/1",
        {"reference": version.reference, "bytes": version.size, "copied_from": source},
        human=version.reference,
        quiet=version.reference,
    )
