"""`quill chat`: a text in turns, typed at a terminal or piped in, in this process or through a server."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from quill.cli.app import main

RUN = [sys.executable, "-c", "from quill.cli.app import run; run()"]
BETWEEN = "-" * 20 + "\n"


@pytest.fixture(autouse=True)
def _there(tiny_registry, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    monkeypatch.setenv("QUILL_DEVICE", "cpu")


Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(capsys, monkeypatch) -> Chat:
    """Run a session whose standard input is a text; at a terminal, if that is asked for."""

    def run(typed: str, *arguments: str, terminal: bool = False) -> tuple[int, str, str]:
        stdin = io.TextIOWrapper(
            io.BytesIO(typed.encode(errors="surrogateescape")), encoding="utf-8", newline="\n"
        )
        monkeypatch.setattr(stdin, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        code = main(["chat", "tiny", "--seed=1", "--max-new-tokens=12", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def sampled(capsys) -> Callable[..., str]:
    """What `quill sample` continues a text with."""

    def run(prompt: str, *arguments: str) -> str:
        flags = ["--seed=1", "--max-new-tokens=12", *arguments, "--no-echo", "--json"]
        assert main(["sample", "tiny", "--prompt", prompt, *flags]) == 0
        return json.loads(capsys.readouterr().out)["samples"][0]

    return run


def line_of(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def test_each_piped_line_is_a_turn_that_continues_what_was_said(chat, sampled):
    one = sampled("3 bells")
    said = line_of("3 bells" + one) + "the tide"
    two = sampled(said)
    three = sampled(said + two)
    code, out, err = chat("3 bells\nthe tide\n\n")
    assert code == 0
    assert out == BETWEEN.join(map(line_of, (one, two, three)))
    # The text outgrew the context in the second turn, which is said once.
    assert err.count("warning: using only the last 16 tokens") == 1
    # A slash is nothing special there, and the last line needs no end.
    assert chat("/3", "--unknown=skip")[1] == line_of(sampled("/3", "--unknown=skip"))


def test_json_has_a_line_for_each_turn(chat, sampled):
    code, out, _ = chat("3 bells\r\nbells\n", "--json")
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert first == {
        "schema": "quill.chat/1",
        "reference": "tiny:v1",
        "prompt": "3 bells",
        "text": sampled("3 bells"),
    }
    assert second["prompt"] == "bells"
    assert chat("", "--json")[:2] == (0, "")


def test_a_piped_line_that_cannot_be_continued_ends_the_command(chat):
    code, out, err = chat("é\n3 bells\n")
    assert (code, out) == (2, "")
    assert "unknown character 'é'" in err
    assert "--unknown skip" in err
    code, out, _ = chat("3é\n", "--unknown=skip")
    assert (code, len(out)) == (0, 13)


def test_f61_bytes_that_are_no_text_do_not_end_a_session(chat):
    code, out, err = chat("3 bells\udcff\n", terminal=True)
    assert (code, out) == (0, "")
    assert "the line is not UTF-8" in err
    assert "0xff" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--temperature=-1"], 2), (["--num-samples=2"], 2), (["--server=http://127.0.0.1:9"], 7)],
)
def test_what_is_wrong_with_the_arguments(arguments, code, chat):
    assert chat("x\n", *arguments)[:2] == (code, "")
    assert main(["chat", "tine"]) == 3


def test_commands_change_the_session(chat, sampled):
    typed = """3 bells
/set temperature 0.3
/set parameter top_k 3
/set stop "e" '\\n'
/set unknown skip
/seed 5
/show
/clear
3 bells
/show text
/seed
/set stop none
/set
/bye
never read
"""
    code, out, err = chat(typed, terminal=True)
    one = sampled("3 bells")
    two = sampled("3 bells", "--temperature=0.3", "--top-k=3", "--stop=e", "--stop=\n", "--seed=5")
    assert code == 0
    assert out == line_of(one) + line_of(two) + "3 bells" + two + "\n"
    for shown in (
        "temperature         0.3",
        "top_k               3",
        "seed                5",
        "unknown             skip",
        "stop                'e' '\\n'",
        "model               tiny:v1",
        "the text is forgotten",
        "stop                none",
        "seed                none",
    ):
        assert f"{shown}\n" in err
    assert "it was not trained to answer" in err


def test_errors_do_not_end_the_session(chat, sampled, tiny_registry):
    typed = """/retry
/nothing
/set temperature -1
/set temperature
/set n 3
/set stop "
/model nope
é
3 bells
"""
    code, out, err = chat(typed, terminal=True)
    assert code == 0
    # Neither those settings nor those words were kept.
    assert out == line_of(sampled("3 bells"))
    for words in (
        "there is nothing to try again",
        "no command '/nothing'",
        "'temperature' = -1 in /set is invalid",
        "no value for 'temperature'",
        "no setting 'n'",
        "cannot read '/set stop \"'",
        "no model named 'nope'",
        "unknown character 'é'",
        "try: /set unknown skip",
    ):
        assert words in err
    assert err.count("error: ") == 8


def test_retry_and_an_empty_line_continue_with_what_is_there(chat, sampled):
    code, out, err = chat("3 bells\n/retry\n\n/show text\n/set seed none\n/retry\n", terminal=True)
    one, again = sampled("3 bells"), sampled("3 bells", "--seed=2")
    more = sampled("3 bells" + again, "--seed=2")
    assert code == 0
    begun = ("3 bells" + again).rpartition("\n")[2]
    shown = line_of(one) + line_of("3 bells" + again) + line_of(begun + more)
    assert out.startswith(shown + f"3 bells{again}{more}\n" + begun)
    assert "seed: none" in err


def test_words_of_several_lines_are_put_between_quotes(chat, sampled):
    code, out, _ = chat('"""3 bells\n4 bells"""\n/clear\n"""\n3"""\n"""3""" ""\n', terminal=True)
    assert code == 0
    assert out.startswith(line_of(sampled("3 bells\n4 bells")) + line_of(sampled("\n3")))


class Terminal:
    """A session on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        pty = pytest.importorskip("pty")
        self.pid, self._fd = pty.fork()
        if not self.pid:
            os.execvpe(RUN[0], [*RUN, "chat", "tiny", *arguments], {**os.environ, "TERM": "dumb"})
        self._status: int | None = None

    def type(self, text: str, until: str = ">>> ") -> str:
        """Type, and return what is shown until the end of some text."""
        os.write(self._fd, text.encode())
        return self.read(until)

    def read(self, until: str, patience: float = 90) -> str:
        """Return what is shown until the end of some text, or until nothing is shown for some seconds."""
        found, wanted = b"", until.encode().replace(b"\n", b"\r\n")
        while wanted not in found and select.select([self._fd], [], [], patience)[0]:
            found += os.read(self._fd, 1)
        return found.decode(errors="replace").replace("\r\n", "\n")

    def status(self) -> int:
        """The exit code, once it has ended."""
        if self._status is None:
            # The end of a terminal is an error on Linux, and no data elsewhere.
            with suppress(OSError):
                while os.read(self._fd, 65536):
                    pass
            os.close(self._fd)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def end(self) -> None:
        """Make sure that it has ended."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status()


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    """Start a session on a terminal."""
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.end()


def test_a_session_on_a_terminal(open_terminal, sampled):
    session = open_terminal("--seed=1", "--max-new-tokens=12")
    assert "Ctrl-D ends the session" in session.read(">>> ").replace("\n", " ")
    first = session.type("3 bells\n")
    assert first == "3 bells\n" + line_of(sampled("3 bells")) + ">>> "
    session.type("/clear\n")
    # The arrow up brings back what was typed; Ctrl-A and an arrow go to where it is changed.
    wanted = line_of(sampled("3 bells and bells")) + ">>> "
    assert wanted in session.type("\x1b[A\x1b[A\x01\x1b[C bells and\n", wanted)
    # Ctrl-C stops what is generated, and the session remains.
    session.type("/set max_new_tokens 2000000000\n")
    session.type("\n", wanted.rpartition("\n")[0][-5:])
    session.read("e")
    assert session.type("\x03").endswith("\n>>> ")
    session.type("half a line", "half a line")
    # Python looks for signals only while readline waits, so the first may come too early.
    os.write(session._fd, b"\x03")
    while "/bye or Ctrl-D" not in session.read("/bye or Ctrl-D", patience=1):
        os.write(session._fd, b"\x03")
    session.type("/show\n", "tiny:v1")
    session.read(">>> ")
    session.type("\x04", "")
    assert session.status() == 0


def test_a_termination_ends_a_session(open_terminal):
    session = open_terminal()
    session.read(">>> ")
    os.kill(session.pid, signal.SIGTERM)
    # As above: the end of the line makes Python look.
    with suppress(OSError):
        os.write(session._fd, b"\n")
    assert session.status() == 143
