"""Where text comes from: a model in this process, or a running server that has the same one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from collections.abc import Generator as TypingGenerator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from typer import Option

from quill.cli._completion import completing
from quill.cli.options import Session
from quill.errors import InputError, QuillError

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.config.settings import SampleConfig
    from quill.generation.generator import Generator
    from quill.registry.folder import Folder

    Generated = TypingGenerator[str, None, None]

# Between one text and the next.
BETWEEN = "-" * 20 + "\n"
_ENVIRONMENT = "QUILL_SERVER"
_AUTO, _OFF = "auto", "off"

Server = Annotated[
    str | None,
    Option(
        "--server",
        metavar="URL|auto|off",
        help="Generate on a running server: at a URL, or the one you started for this registry "
        "(default: QUILL_SERVER, or off).",
        autocompletion=completing(_AUTO, _OFF),
    ),
]
KeyFile = Annotated[
    Path | None,
    Option("--api-key-file", metavar="FILE", help="File with the server's key (default: QUILL_API_KEY)."),
]


class TextGenerator(Protocol):
    """What continues a text."""

    def stream(self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"]) -> Generated:
        """Generate one sample, chunk by chunk; closing it ends the work."""

    def generate(self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"]) -> list[str]:
        """Generate num_samples samples."""


class Opener:
    """Opens models by reference, in this process or on a server, as the flags say.

    Args:
        session: The call of the command.
        root: The registry.
        server: Value of `--server`.
        key_file: Value of `--api-key-file`.
        device: Value of `--device`.
        unknown: Value of `--unknown`.
        notice: Called with what a user should know of a prompt.
    """

    def __init__(
        self,
        session: Session,
        root: Path,
        server: str | None,
        key_file: Path | None,
        device: str | None,
        unknown: str,
        notice: Callable[[str], None],
    ) -> None:
        self._session, self._root, self._key_file, self._device = session, root, key_file, device
        self._unknown, self._notice = unknown, notice
        self._server = server or os.environ.get(_ENVIRONMENT) or _OFF

    def open(self, version: Folder) -> TextGenerator:
        """Open a model.

        Raises:
            QuillError: It cannot be loaded; or there is a server, and it cannot be asked.
        """
        if self._server == _OFF:
            return self._load(version)
        if self._server != _AUTO:
            return self._connect(version, self._server)
        from quill.serving import presence

        why = "you started no server for this registry here"
        for address in presence.addresses(self._root):
            try:
                return self._connect(version, address)
            except QuillError as e:
                why = str(e)
        self._session.output.say(f"no server to use: {why}; sampling in this process")
        return self._load(version)

    def _connect(self, version: Folder, address: str) -> TextGenerator:
        from quill.serving.client import Client, RemoteGenerator
        from quill.serving.keys import read_keys

        for flag, value in (("--device", self._device), ("--unknown", self._unknown)):
            if value not in (None, "error"):
                why = "its device is its own, and it refuses characters that have no token"
                raise InputError(f"a server cannot apply {flag} {value}", why=why, hint="--server off")
        keys = read_keys(str(self._key_file), {}) if self._key_file else read_keys(None)
        client = Client(address, *keys[:1])
        if self._server == _AUTO:
            client.require_ready()
        made = RemoteGenerator(client, version, self._notice)
        self._session.output.detail(f"server: {client.address}")
        return made

    def _load(self, version: Folder) -> TextGenerator:
        from quill.checkpoint.load import load_checkpoint
        from quill.generation.generator import Generator

        loaded = load_checkpoint(version, self._session.device(self._device))
        return _Local(Generator(loaded.model, loaded.tokenizer, notice=self._notice))


class _Local:
    """A model in this process, which has nothing else to compute."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._on_cpu = generator.device.type == "cpu"

    def stream(self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"]) -> Generated:
        from quill.generation import cpu

        chunks = self._generator.stream(prompt, config, unknown)
        yield from cpu.at_best_threads(chunks) if self._on_cpu else chunks

    def generate(self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"]) -> list[str]:
        from quill.threads import one_thread

        alone = config.num_samples == 1
        with one_thread() if alone and self._on_cpu else nullcontext():
            return self._generator.generate(prompt, config, unknown)


def print_text(output: Output, echoed: str, chunks: Iterator[str]) -> None:
    """Print a text as it comes, and end its last line.

    What is echoed is printed with the first chunk, so that an error leaves stdout empty.
    """
    last = ""
    try:
        for chunk in chain([echoed + next(chunks, "")], chunks):
            last = chunk or last
            output.stream(chunk)
    except KeyboardInterrupt:
        if last and not last.endswith("\n"):
            output.write("\n")
        raise
    if not last.endswith("\n"):
        output.write("\n")
