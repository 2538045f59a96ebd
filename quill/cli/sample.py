"""Generate text with a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from quill.cli import _prompt, options
from quill.cli._completion import models
from quill.cli.options import Session
from quill.config.settings import SampleConfig

if TYPE_CHECKING:
    from quill.cli.output import Output

# What people use.
_FACE = (
    "prompt",
    "num_samples",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "stop",
    "no_echo",
    "device",
)
_BETWEEN = "-" * 20 + "\n"


@options.command(
    {"": SampleConfig},
    short={"num_samples": "-n", "temperature": "-t"},
    face=_FACE,
    examples="""
    quill sample shakespeare "JULIET:"
    quill sample shakespeare:v2 -n 3 --temperature 0.5 --seed 1
    echo "JULIET:" | quill sample shakespeare
    """,
    topic="tutorial",
)
def command(
    session: Session,
    reference: Annotated[
        str,
        Argument(
            metavar="REF",
            help="Model to use: name, name:v2 or ./folder.",
            autocompletion=models(drafts="weights"),
        ),
    ],
    words: Annotated[
        list[str] | None,
        Argument(metavar="PROMPT", help="Text to continue; '-' reads it from stdin."),
    ] = None,
    prompt: _prompt.Text = None,
    prompt_file: _prompt.File = None,
    stream: Annotated[
        bool, Option("--stream/--no-stream", help="Print each token as it is generated, for a single sample.")
    ] = True,
    no_echo: Annotated[
        bool, Option("--no-echo", help="Print the new text only, without the prompt.")
    ] = False,
    unknown: _prompt.Unknown = "error",
    device: options.Device = None,
) -> None:
    """Generate text with a model, starting from a prompt.

    The prompt is read from stdin if it is piped in and no other is given.
    """
    from quill.config import reading

    output = session.output
    version = session.registry().find_weights(reference, session.output.say)
    config = reading.check(SampleConfig, dict(session.overrides), origin="the arguments")
    text = _prompt.find(words or [], prompt, prompt_file)

    from quill.checkpoint.load import load_checkpoint
    from quill.generation import cpu
    from quill.generation.generator import Generator

    loaded = load_checkpoint(version, session.device(device))
    generator = Generator(loaded.model, loaded.tokenizer, notice=output.warn)
    echoed = "" if no_echo else text
    alone = config.num_samples == 1
    on_cpu = generator.device.type == "cpu"
    if output.form != "json" and stream and alone:
        chunks = generator.stream(text, config, unknown)
        _print(output, echoed, cpu.at_best_threads(chunks) if on_cpu else chunks)
        return
    with cpu.one_thread() if alone and on_cpu else nullcontext():
        samples = generator.generate(text, config, unknown)
    if output.form == "json":
        document = {"reference": version.reference, "prompt": text, "samples": samples}
        output.show("quill.sample/1", document, key="reference")
        return
    for i, sample in enumerate(samples):
        if i:
            output.write(_BETWEEN)
        _print(output, echoed, iter([sample]))


def _print(output: Output, echoed: str, chunks: Iterator[str]) -> None:
    """Print a sample as it comes, and end its last line.

    The prompt is printed with the first chunk, so that an error leaves stdout empty.
    """
    last = ""
    try:
        for chunk in chain([echoed + next(chunks, "")], chunks):
            output.stream(chunk)
            last = chunk or last
    except KeyboardInterrupt:
        if last and not last.endswith("\n"):
            output.write("\n")
        raise
    if not last.endswith("\n"):
        output.write("\n")
