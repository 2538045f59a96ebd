"""Keep a model that was made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quill import discovery
from quill.cli import options
from quill.cli.options import Session

_FORMATS = "|".join(("auto", *discovery.names("formats")))


@options.command()
def command(
    session: Session,
    source: Annotated[str, Argument(metavar="SRC", help="A file, a folder, or hf:REPOSITORY.")],
    name: Annotated[
        str | None, Option(metavar="NAME", help="What to call it; unset: after the source.")
    ] = None,
    format_name: Annotated[
        str, Option("--format", "-f", metavar=_FORMATS, help="The format; auto looks at the source.")
    ] = "auto",
    config: Annotated[
        Path | None, Option(metavar="FILE", help="The foreign project's config, where it lies elsewhere.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        Option(
            metavar="FILE|NAME",
            help="The vocabulary, where the source has none: gpt2, a meta.pkl, a tokenizer.json, or the text "
            "that the model was trained on.",
        ),
    ] = None,
    new_version: Annotated[
        bool, Option("--new-version", help="Keep it beside another model of that name.")
    ] = False,
) -> None:
    """Keep a model that was made elsewhere; from then on it is one like any other.

    Foreign pickles are never executed. Prints the model's reference.
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
    output.emit(
        "quill.import/1",
        {"reference": version.reference, "manifest": version.manifest},
        human=version.reference,
        quiet=version.reference,
    )
