"""Write a text in turns with a model."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from quill.cli import _errors, _flags, _prompt, options
from quill.cli._conversation import UNUSED, Conversation
from quill.cli._generator import BETWEEN, KeyFile, Opener, Server, print_text
from quill.cli._signals import Interrupted
from quill.cli.options import Session
from quill.cli.output import is_terminal
from quill.config.settings import SampleConfig
from quill.errors import InputError, QuillError

if TYPE_CHECKING:
    from quill.registry.store import Registry

_FACE = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "device", "server")
_READY, _MORE = ">>> ", "... "
_QUOTES = '"""'
_HELP = f"""\
/set NAME VALUE   set temperature, top_k ...; /set stop "\\n" ends at a newline
/seed N           set the seed; without N the text differs each time
/retry            continue again from where you spoke last
/model REF        switch to another model; the text stays
/show             show the model and the settings; /show text: the text
/clear            forget the text
/bye              end the session, as Ctrl-D does

An empty line lets the model continue, and Ctrl-C stops it. Several lines, or
words that begin with a slash, are put between {_QUOTES} and {_QUOTES}."""
_ASSIGNED = re.compile(r'(?:sample\.)?(\w+)="?([^"]*)"?')


@options.command(
    {"": SampleConfig},
    skip=UNUSED,
    short={"temperature": "-t"},
    face=_FACE,
    examples="""
    quill chat shakespeare
    quill chat shakespeare --temperature 0.5 --stop "ROMEO:"
    printf 'ROMEO:\\nJULIET:\\n' | quill chat shakespeare --json
    """,
    topic="chat",
)
def command(
    session: Session,
    reference: Annotated[str, options.reference("Model to use: name, name:v2 or ./folder.")],
    unknown: _prompt.Unknown = "error",
    device: options.Device = None,
    server: Server = None,
    api_key_file: KeyFile = None,
) -> None:
    """Write a text in turns with a model, which continues what was said.

    If stdin is not a terminal, each of its lines is a turn.
    """
    from quill.config import reading

    registry = session.registry()
    config = reading.check(SampleConfig, dict(session.overrides), origin="the arguments")
    remarks: list[str] = []

    def remark(message: str) -> None:
        # That the text is longer than the context is worth saying once.
        if not remarks:
            session.output.warn(message)
        remarks.append(message)

    opener = Opener(session, registry.root, server, api_key_file, device, unknown, remark)
    Chat(session, registry, opener, Conversation(config, unknown), reference).run()


class Chat:
    """A session.

    Args:
        session: The call of the command.
        registry: Where models are.
        opener: Opens them.
        conversation: The text.
        reference: The model to begin with.

    Raises:
        QuillError: It cannot be loaded.
    """

    def __init__(
        self,
        session: Session,
        registry: Registry,
        opener: Opener,
        conversation: Conversation,
        reference: str,
    ) -> None:
        self._output, self._registry, self._opener = session.output, registry, opener
        self._conversation = conversation
        self._at_terminal = is_terminal(sys.stdin)
        self.switch(reference)
        self._commands = {
            "help": self._help,
            "?": self._help,
            "set": self._set,
            "seed": lambda rest: self._set(f"seed {rest or 'none'}"),
            "retry": self._retry,
            "model": self.switch,
            "load": self.switch,
            "show": self._show,
            "clear": self._clear,
        }

    def switch(self, reference: str) -> None:
        """Continue with another model.

        Raises:
            QuillError: It cannot be loaded; the session keeps the one that it has.
        """
        version = self._registry.find_weights(reference.strip(), self._output.say)
        self._model, self._reference = self._opener.open(version), version.reference

    def run(self) -> None:
        """Take turns until the input ends."""
        if self._at_terminal:
            self._converse()
        else:
            self._answer_lines()

    def _answer_lines(self) -> None:
        first = True
        while sys.stdin is not None and (raw := sys.stdin.buffer.readline(_prompt.MOST_BYTES + 1)):
            if not first and self._output.form != "json":
                self._output.write(BETWEEN)
            first = False
            self._turn(_prompt.decode(raw, "standard input").removesuffix("\n"))

    def _converse(self) -> None:
        with suppress(ImportError):
            # What makes `input` edit lines and remember them.
            import readline  # noqa: F401
        self._output.say(
            f"{self._reference} continues your text; it was not trained to answer. /help lists commands, "
            "Ctrl-D ends the session."
        )
        while True:
            speaks = False
            try:
                if (line := self._read()) is None:
                    return
                speaks = True
                self._obey(line)
            except Interrupted:
                raise
            except KeyboardInterrupt:
                if not speaks:
                    self._output.ask("")
                    self._output.say("/bye or Ctrl-D ends the session.")
            except QuillError as e:
                self._output.fail(_translated(e))

    def _read(self) -> str | None:
        """What is typed next, without the quotes around several lines; None at the end of the session."""
        try:
            line = self._line(_READY)
            if line.split(maxsplit=1)[:1] in (["/bye"], ["/exit"], ["/quit"]):
                return None
            if not line.startswith(_QUOTES):
                return line
            lines = [line.removeprefix(_QUOTES)]
            while not lines[-1].endswith(_QUOTES):
                lines.append(self._line(_MORE))
            return _QUOTES + "\n".join(lines).removesuffix(_QUOTES)
        except EOFError:
            self._output.ask("")
            return None

    def _line(self, prompt: str) -> str:
        try:
            if self._output.terminal:
                return input(prompt)
            self._output.ask(prompt.strip())
            line = sys.stdin.readline()
        except UnicodeDecodeError as e:
            raise InputError(
                "the line is not UTF-8", why=f"a byte of it is {e.object[e.start]:#04x}"
            ) from None
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _obey(self, line: str) -> None:
        if not line.startswith("/"):
            self._turn(line.removeprefix(_QUOTES))
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name not in self._commands:
            raise InputError(
                f"no command '/{name}'", why="a line that begins with a slash is one", hint="/help"
            )
        self._commands[name](rest.strip())

    def _turn(self, words: str) -> None:
        # Where the text continues in the middle of a line, that line is shown again.
        begun = "" if words else self._conversation.text.rpartition("\n")[2]
        self._print(words, self._conversation.say(self._model, words), begun)

    def _print(self, words: str, chunks: Iterator[str], begun: str = "") -> None:
        if self._output.form == "json":
            document = {"reference": self._reference, "prompt": words, "text": "".join(chunks)}
            self._output.event("quill.chat/1", document)
        else:
            print_text(self._output, begun if self._at_terminal else "", chunks)

    def _help(self, rest: str) -> None:
        self._output.say(_HELP)

    def _retry(self, rest: str) -> None:
        chunks, begun = self._conversation.retry(self._model)
        if (seed := self._conversation.config.seed) is not None:
            self._output.say(f"seed: {seed}")
        self._print("", chunks, begun)

    def _clear(self, rest: str) -> None:
        self._conversation.clear()
        self._output.say("the text is forgotten")

    def _show(self, rest: str) -> None:
        if rest == "text":
            self._output.write(self._conversation.text + "\n")
            return
        facts = {"model": self._reference, **self._conversation.settings()}
        facts["text"] = f"{len(self._conversation.text):,} characters"
        for name, value in facts.items():
            shown = " ".join(map(repr, value)) if isinstance(value, list) else value
            self._output.say(f"  {name:<19} {'none' if shown in (None, '') else shown}")

    def _set(self, rest: str) -> None:
        try:
            name, *values = shlex.split(rest.removeprefix("parameter ")) or [""]
        except ValueError as e:
            raise InputError(f"cannot read '/set {rest}'", why=str(e).lower()) from None
        if not name:
            self._show("")
            return
        self._conversation.set(_flags.normal(name).replace("-", "_"), values)
        self._output.say(f"{name}: {' '.join(values)}")


def _translated(error: QuillError) -> QuillError:
    """An error as a session says it: settings are set with /set."""
    if found := _ASSIGNED.fullmatch(error.hint):
        error.hint = f"/set {found[1]} {found[2]}"
    return _errors.explain(error)
