"""Show what happens inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from quill import fsio
from quill.cli import _prompt, options
from quill.cli.options import Session
from quill.config.settings import SampleConfig

# How the next token is drawn; the other settings are about more than one token.
_SETTINGS = ("temperature", "top_k", "top_p")


@options.command(
    {"": SampleConfig},
    skip=frozenset(SampleConfig.model_fields) - {*_SETTINGS},
    short={"temperature": "-t"},
    examples="""
    quill explain shakespeare "JULIET:"
    quill explain shakespeare "JULIET:" --html juliet.html
    quill explain shakespeare "JULIET:" --json
    """,
    topic="inside",
)
def command(
    session: Session,
    reference: Annotated[str, options.reference("Model to explain: name, name:v2 or ./folder.")],
    words: Annotated[
        list[str] | None,
        Argument(metavar="PROMPT", help="Text that the model reads; '-' reads it from stdin."),
    ] = None,
    prompt: _prompt.Text = None,
    prompt_file: _prompt.File = None,
    html: Annotated[
        Path | None,
        Option(
            "--html", metavar="FILE", help="Write an interactive page that opens in any browser, offline."
        ),
    ] = None,
    last: Annotated[
        int | None,
        Option(
            "--last",
            "-n",
            metavar="INT",
            help="Explain only the last tokens of the prompt, at most 256 (default: 64).",
        ),
    ] = None,
    unknown: _prompt.Unknown = "error",
    device: options.Device = None,
) -> None:
    """Show what happens inside a model, from a prompt to the next token.

    Its parts with their sizes, what each block adds and would say, where each head looks, and the
    probabilities of the next token. The prompt is read from stdin if it is piped in and no other is given.
    """
    from quill.config import reading

    output = session.output
    version = session.registry().find_weights(reference, output.say)
    config = reading.check(SampleConfig, dict(session.overrides), origin="the arguments")
    text = _prompt.find(words or [], prompt, prompt_file)

    from quill.checkpoint.load import load_checkpoint
    from quill.explanation.explanation import SCHEMA, TOKENS, Explanation
    from quill.generation.generator import Generator

    loaded = load_checkpoint(version, session.device(device))
    generator = Generator(loaded.model, loaded.tokenizer, name=version.reference)
    size = TOKENS if last is None else last
    explained = Explanation(generator, text, config, last=size, unknown=unknown)
    if explained.left_out:
        total = explained.left_out + len(explained.ids)
        output.warn(f"explaining only the last {len(explained.ids)} of the prompt's {total:,} tokens")
    if html is not None:
        fsio.write_bytes(html, explained.html().encode())
        document = {"reference": version.reference, "path": str(html)}
        output.show("quill.page/1", document, key="path")
    elif output.form == "human":
        from quill.cli import _explained

        output.draw(_explained.draw(explained, output.canvas))
    else:
        output.show(SCHEMA, explained.to_dict(), key="reference")
