"""Export a model to another format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Option

from quill import discovery
from quill.cli import options
from quill.cli._completion import formats
from quill.cli.options import Session
from quill.units import size

_FORMATS = "|".join(discovery.names("formats"))


@options.command(
    examples="""
    quill export shakespeare --format hf --out shakespeare-hf
    quill export shakespeare:v2 --format gguf --dtype q8_0 --modelfile
    quill export shakespeare --format onnx --verify
    """,
    topic="formats",
)
def command(
    session: Session,
    reference: Annotated[str, options.reference("Model to export: name, name:v2 or ./folder.")],
    format_name: Annotated[
        str, Option("--format", "-f", metavar=_FORMATS, help="Target format.", autocompletion=formats())
    ] = "hf",
    out: Annotated[
        Path | None,
        Option("--out", "-o", metavar="PATH", help="File or folder to write (default: the model's name)."),
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            metavar="TYPE",
            help="Type of the weights, where the format has it: float32, float16, bfloat16, q8_0 "
            "(default: the format's).",
        ),
    ] = None,
    verify: Annotated[
        bool, Option("--verify", help="Run the export in its own runtime and compare the logits.")
    ] = False,
    modelfile: Annotated[
        bool, Option("--modelfile", help="Also write a Modelfile for Ollama (gguf).")
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace an existing export.")] = False,
    device: options.VerifyDevice = None,
) -> None:
    """Export a model to another format.

    For transformers, llama.cpp, Ollama, ONNX Runtime, nanoGPT and others. The export appears under its path
    only when it is complete. Prints the path.
    """
    output, version = session.output, session.registry().find_weights(reference, session.output.say)

    from quill.formats import exporting

    made = exporting.export(
        version,
        format_name,
        out,
        dtype=dtype,
        verify=verify,
        modelfile=modelfile,
        force=force,
        device=session.device(device),
    )
    for note in made.notes:
        output.say(note)
    found = made.difference
    if found:
        output.say(str(found))
    output.detail(f"{made.format} in {made.dtype}, {size(made.size)}")
    row = {
        "reference": version.reference,
        "path": str(made.path),
        "format": made.format,
        "dtype": made.dtype,
        "bytes": made.size,
        "notes": list(made.notes),
        "difference": asdict(found) if found else None,
    }
    output.show("quill.export/1", row, key="path")
