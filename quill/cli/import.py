"""Import a model from another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quill import discovery
from quill.cli import options
from quill.cli._completion import formats
from quill.cli.options import Session

_FORMATS = "|".join(("auto", *discovery.names("formats")))


@options.command(
    examples="""
    quill import hf:openai-community/gpt2 --name gpt2
    quill import out/ckpt.pt --name mine
    quill import model.gguf
    """,
    topic="formats",
)
def command(
    session: Session,
    source: Annotated[str, Argument(metavar="SOURCE", help="File, folder or hf:REPO.")],
    name: Annotated[
        str | None, Option(metavar="NAME", help="Name of the model (default: from the source).")
    ] = None,
    format_name: Annotated[
        str,
        Option(
            "--format",
            "-f",
            metavar=_FORMATS,
            help="Format of the source; auto detects it.",
            autocompletion=formats("auto"),
        ),
    ] = "auto",
    config: Annotated[
        Path | None, Option(metavar="FILE", help="Config of the source, if it is not next to it.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        Option(
            metavar="FILE|NAME",
            help="Vocabulary, if the source has none: gpt2, a meta.pkl, a tokenizer.json, or the text that "
            "the model was trained on.",
        ),
    ] = None,
    new_version: Annotated[bool, Option("--new-version", help="Add a version to an existing model.")] = False,
) -> None:
    """Import a model from another format.

    Pickles are read without executing code from them. Prints the model's reference.
    """
    output, registry = session.output, session.registry()

    from quill.formats import importing

    version = importing.import_model(
        source,
        registry,
        name=name,
        format_name=format_name,
        config=config,
        tokenizer=tokenizer,
        new_version=new_version,
        notice=output.say,
    )
    imported = version.facts["imported"]
    for note in (imported and imported["notes"]) or ():
        output.say(str(note))
    output.show(
        "quill.import/1", {"reference": version.reference, "manifest": version.manifest}, key="reference"
    )
