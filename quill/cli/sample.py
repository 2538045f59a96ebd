"""Draw text from a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.config.settings import SampleConfig
from quill.errors import InputError, NotFoundError, ResourceError

if TYPE_CHECKING:
    from quill.cli.output import Output

_STDIN = "-"
_BETWEEN = "-" * 20 + "\n"


@options.command({"": SampleConfig}, short={"num_samples": "-n"})
def command(
    session: Session,
    reference: Annotated[str, Argument(metavar="REF", help="A model: name, name:v2, or ./folder.")],
    words: Annotated[
        str | None, Argument(metavar="PROMPT", help="What the text goes on from; '-' reads it from stdin.")
    ] = None,
    prompt: Annotated[
        str | None, Option("--prompt", "-p", metavar="TEXT", help="The same as a flag; '-' is a dash here.")
    ] = None,
    prompt_file: Annotated[
        Path | None, Option("--prompt-file", metavar="FILE", help="The same from a file.")
    ] = None,
    stream: Annotated[
        bool, Option("--stream/--no-stream", help="Print each token as it comes, if one sample is drawn.")
    ] = True,
    no_echo: Annotated[bool, Option("--no-echo", help="Leave the prompt out of what is printed.")] = False,
    unknown: Annotated[
        Literal["error", "skip"],
        Option(metavar="error|skip", help="What to do with characters that the model never saw."),
    ] = "error",
) -> None:
    """Draw text from a model, going on from a prompt."""
    from quill.config import reading

    output = session.output
    version = session.registry().resolve(reference)
    config = reading.check(SampleConfig, dict(session.overrides), origin="the arguments")
    text = _prompt(words, prompt, prompt_file)

    from quill.checkpoint.load import load_checkpoint
    from quill.generation import cpu
    from quill.generation.generator import Generator

    loaded = load_checkpoint(version, session.device())
    generator = Generator(loaded.model, loaded.tokenizer, notice=output.warn)
    echoed = "" if no_echo else text
    alone = config.num_samples == 1
    with cpu.one_thread() if alone and generator.device.type == "cpu" else nullcontext():
        if output.form != "json" and stream and alone:
            _print(output, echoed, generator.stream(text, config, unknown))
            return
        samples = generator.generate(text, config, unknown)
    if output.form == "json":
        document = {"reference": version.reference, "prompt": text, "samples": samples}
        output.emit("quill.sample/1", document, human="", quiet="")
        return
    for i, sample in enumerate(samples):
        if i:
            output.write(_BETWEEN)
        _print(output, echoed, iter([sample]))


def _print(output: Output, echoed: str, pieces: Iterator[str]) -> None:
    """Print a sample as it comes, its last line ended.

    The prompt waits for the first piece, so that a refusal leaves stdout empty.
    """
    last = echoed
    try:
        output.stream(echoed + next(pieces, ""))
        for piece in pieces:
            output.stream(piece)
            last = piece
    except KeyboardInterrupt:
        output.write("\n")
        raise
    if not last.endswith("\n"):
        output.write("\n")


def _prompt(words: str | None, flag: str | None, file: Path | None) -> str:
    """The prompt from wherever it was given; stdin is read only if that was asked for.

    Raises:
        InputError: It was given twice, or is not UTF-8.
    """
    given = [n for n, v in (("PROMPT", words), ("--prompt", flag), ("--prompt-file", file)) if v is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are both given", why="there is one prompt", hint="leave one")
    if file is not None:
        try:
            return _decode(file.read_bytes(), str(file))
        except FileNotFoundError:
            raise NotFoundError(f"no file '{file}'", hint="check the path") from None
        except IsADirectoryError:
            raise InputError(f"'{file}' is a folder", why="a prompt is a file's text") from None
        except OSError as e:
            raise ResourceError(f"cannot read '{file}'", why=e.strerror or str(e)) from e
    if words == _STDIN:
        if sys.stdin is None:
            raise InputError("standard input is closed", why="'-' reads the prompt from there")
        return _decode(sys.stdin.buffer.read(), "standard input")
    return flag if flag is not None else words or ""


def _decode(raw: bytes, origin: str) -> str:
    try:
        # The "utf-8-sig" codec counts from behind the byte order mark.
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise InputError(
            f"'{origin}' is not UTF-8", why=f"byte {e.start} is {raw[e.start]:#04x}", hint="save it as UTF-8"
        ) from None
