"""Write a model for other programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quill import discovery
from quill.cli import options
from quill.cli.options import Session
from quill.units import size

_FORMATS = "|".join(discovery.names("formats"))


@options.command()
def command(
    session: Session,
    reference: Annotated[str, Argument(metavar="REF", help="A model: name, name:v2, or a ./folder.")],
    format_name: Annotated[str, Option("--format", "-f", metavar=_FORMATS, help="The format.")] = "hf",
    out: Annotated[
        Path | None,
        Option("--out", "-o", metavar="PATH", help="The file or folder; unset: the model's name, here."),
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            metavar="TYPE", help="How weights are kept: float32, float16, bfloat16, q8_0, as it has them."
        ),
    ] = None,
    verify: Annotated[
        bool, Option("--verify", help="Run it with the foreign program and compare logits.")
    ] = False,
    modelfile: Annotated[
        bool, Option("--modelfile", help="Write Ollama's Modelfile beside it (gguf).")
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace an export that is there.")] = False,
) -> None:
    """Write a model for other programs: transformers, llama.cpp and Ollama, ONNX Runtime, nanoGPT and others.

    Prints the path. Nothing is at that path until it is whole.
    """
    output, version = session.output, session.registry().resolve(reference)

    from quill.formats import exporting

    made = exporting.export(
        version, format_name, out, dtype=dtype, verify=verify, modelfile=modelfile, force=force
    )
    for note in made.notes:
        output.say(note)
    found = made.difference
    if found:
        output.say(str(found))
    output.detail(f"{made.format} in {made.dtype}, {size(made.size)}")
    output.emit(
        "quill.export/1",
        {
            "reference": version.reference,
            "path": str(made.path),
            "format": made.format,
            "dtype": made.dtype,
            "bytes": made.size,
            "notes": list(made.notes),
            "difference": asdict(found) if found else None,
        },
        human=str(made.path),
        quiet=str(made.path),
    )
