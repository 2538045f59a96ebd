"""Publish an unfinished run."""

from __future__ import annotations

from typing import Annotated

from quill.cli import options
from quill.cli.options import Session


@options.command(
    examples="""
    quill publish shakespeare
    quill publish shakespeare:v2
    """
)
def command(
    session: Session,
    reference: Annotated[str, options.reference("Unfinished run: name or name:v2.")],
    device: options.Device = None,
) -> None:
    """Publish an unfinished run.

    Its best weights so far become a version, and the run ends. A run that is being trained is refused (exit
    code 75). Prints the reference.
    """
    output, registry = session.output, session.registry()

    from quill.training import publish

    was = registry.find(reference, in_progress=True).kind
    version = publish.publish_run(registry, reference, session.device(device))
    if was == "version":
        output.say(f"{version.reference} is already published")
    row = {"reference": version.reference, "manifest": version.manifest}
    output.show("quill.publish/1", row, key="reference")
