"""Upload a model to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import models
from quill.cli.options import Session


@options.command(
    examples="""
    quill push shakespeare hf:OWNER/shakespeare
    quill push shakespeare:v2 hf:OWNER/shakespeare --private
    """,
    topic="formats",
)
def command(
    session: Session,
    reference: Annotated[
        str,
        Argument(metavar="REF", help="Model to upload: name, name:v2 or ./folder.", autocompletion=models()),
    ],
    repository: Annotated[str, Argument(metavar="REPO", help="Repository on the Hub: hf:OWNER/REPO.")],
    private: Annotated[
        bool, Option("--private", help="Create a private repository, and refuse an existing public one.")
    ] = False,
    dtype: Annotated[
        str | None,
        Option(metavar="TYPE", help="Type of the weights: float32, float16 or bfloat16 (default: float32)."),
    ] = None,
    verify: Annotated[
        bool, Option("--verify", help="Compare the logits of transformers with quill's first.")
    ] = False,
) -> None:
    """Upload a model to the Hugging Face Hub.

    The repository gets what `quill export --format hf` writes, in one commit, and is created if it does not
    exist. Log in first with `hf auth login`. Prints the repository's address.
    """
    output, version = session.output, session.registry().resolve(reference)

    from quill.formats.hf.push import push

    address = push(version, repository, private=private, dtype=dtype, verify=verify, notice=output.say)
    row = {"reference": version.reference, "repository": repository, "address": address, "private": private}
    output.show("quill.push/1", row, key="address")
