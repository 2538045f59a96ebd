"""Generate text with a model."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from quill.cli import _prompt, options
from quill.cli._generator import BETWEEN, KeyFile, Opener, Server, print_text
from quill.cli.options import Session
from quill.config.settings import SampleConfig

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
    reference: Annotated[str, options.reference("Model to use: name, name:v2 or ./folder.")],
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
    server: Server = None,
    api_key_file: KeyFile = None,
) -> None:
    """Generate text with a model, starting from a prompt.

    The prompt is read from stdin if it is piped in and no other is given.
    """
    from quill.config import reading

    output = session.output
    registry = session.registry()
    version = registry.find_weights(reference, output.say)
    config = reading.check(SampleConfig, dict(session.overrides), origin="the arguments")
    text = _prompt.find(words or [], prompt, prompt_file)
    opener = Opener(session, registry.root, server, api_key_file, device, unknown, output.warn)
    generator = opener.open(version)
    echoed = "" if no_echo else text
    if output.form != "json" and stream and config.num_samples == 1:
        print_text(output, echoed, generator.stream(text, config, unknown))
        return
    samples = generator.generate(text, config, unknown)
    if output.form == "json":
        document = {"reference": version.reference, "prompt": text, "samples": samples}
        output.show("quill.sample/1", document, key="reference")
        return
    for i, sample in enumerate(samples):
        if i:
            output.write(BETWEEN)
        print_text(output, echoed, iter([sample]))
