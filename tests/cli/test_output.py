"""The sink: three forms of one result, nothing dangerous on a terminal, no colour in a pipe."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill import units
from quill.cli import output
from quill.cli._tables import Column, wrap
from quill.cli.output import Output
from quill.errors import InputError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def sink(form="human", *, terminal=False, env=None, clock=None, verbose=False):
    kind = Terminal if terminal else io.StringIO
    out, err = kind(), kind()
    given = {"clock": clock} if clock else {}
    return Output(form, out=out, err=err, env=env or {}, verbose=verbose, **given), out, err


ROWS = [
    {"reference": "shakespeare:v1", "loss": 1.5, "when": "3 hours ago", "state": "ok", "note": ""},
    {"reference": "b:v2", "loss": None, "when": "", "state": "damaged", "note": ""},
]
COLUMNS = (
    Column("NAME", lambda r: r["reference"]),
    Column("NOTE", lambda r: r["note"], optional=True),
    Column("LOSS", lambda r: "" if r["loss"] is None else f"{r['loss']:.4f}", right=True, drop=2),
    Column("WHEN", lambda r: r["when"], drop=1),
    Column("STATE", lambda r: r["state"], style=lambda r: "bad" if r["state"] == "damaged" else "good"),
)


def test_rows_in_their_three_forms_side_by_side():
    shown = {}
    for form in ("human", "json", "quiet"):
        o, out, err = sink(form)
        o.show("quill.x/1", ROWS, COLUMNS, key="reference", within="models", root="/r")
        shown[form] = out.getvalue()
        assert err.getvalue() == ""
    assert shown["human"].splitlines() == [
        "NAME              LOSS  WHEN         STATE",
        "shakespeare:v1  1.5000  3 hours ago  ok",
        "b:v2                                 damaged",
    ]
    assert json.loads(shown["json"]) == {"schema": "quill.x/1", "root": "/r", "models": ROWS}
    assert shown["quiet"] == "shakespeare:v1\nb:v2\n"


def test_one_record_in_its_three_forms_side_by_side():
    shown = {}
    for form in ("human", "json", "quiet"):
        o, out, _ = sink(form)
        o.show("quill.x/1", ROWS[0], COLUMNS, key="reference")
        shown[form] = out.getvalue()
    assert shown["human"].splitlines() == [
        "NAME   shakespeare:v1",
        "LOSS   1.5000",
        "WHEN   3 hours ago",
        "STATE  ok",
    ]
    assert json.loads(shown["json"]) == {"schema": "quill.x/1", **ROWS[0]}
    assert shown["quiet"] == "shakespeare:v1\n"


def test_without_columns_people_see_the_key():
    o, out, _ = sink()
    o.show("quill.x/1", ROWS, key="reference", within="models", quiet=["7"])
    assert out.getvalue() == "shakespeare:v1\nb:v2\n"
    o, out, _ = sink("quiet")
    o.show("quill.x/1", ROWS, key="reference", within="models", quiet=["7"])
    assert out.getvalue() == "7\n"


def test_no_rows_print_only_the_document():
    for form, shown in (
        ("human", ""),
        ("quiet", ""),
        ("json", '{\n  "schema": "quill.x/1",\n  "a": []\n}\n'),
    ):
        o, out, _ = sink(form)
        o.show("quill.x/1", [], COLUMNS, key="reference", within="a")
        assert out.getvalue() == shown


def test_json_has_null_where_a_number_is_not_finite():
    o, out, _ = sink("json")
    o.show("quill.x/1", {"a": math.inf, "b": [math.nan, 1.0], "c": {"d": -math.inf}}, key="a")
    assert json.loads(out.getvalue()) == {
        "schema": "quill.x/1",
        "a": None,
        "b": [None, 1.0],
        "c": {"d": None},
    }


@given(st.text())
def test_json_keeps_any_text_and_shows_no_control_character(text):
    o, out, _ = sink("json")
    o.event("quill.x/1", {"text": text})
    line = out.getvalue()
    assert json.loads(line)["text"] == text
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line[:-1])
    assert line.count("\n") == 1


@given(st.text())
def test_f15_escaped_text_holds_no_control_character(text):
    for c in output.safe_line(text):
        assert ord(c) >= 32
        assert not 127 <= ord(c) < 160
        assert c not in "\u2028\u2029\u202e\u2066"
    assert output.safe_line("plain é 中 🙂") == "plain é 中 🙂"


def test_f15_model_text_is_stripped_on_a_terminal_and_raw_in_a_pipe():
    text = "a\x1b[31mred\x07\x9b2J\r\n\tb\u202ec"
    o, out, _ = sink(terminal=True)
    o.stream(text)
    assert out.getvalue() == "a[31mred2J\n\tbc"
    o, out, _ = sink()
    o.stream(text)
    assert out.getvalue() == text


def test_an_error_is_three_lines_whatever_it_quotes():
    o, out, err = sink()
    o.fail(InputError("no 'a\nb\x1b[2J'", why="because\nof it", hint="quill list"))
    assert out.getvalue() == ""
    assert err.getvalue().splitlines() == [
        "error: no 'a\\nb\\x1b[2J'",
        "  why: because\\nof it",
        "  try: quill list",
    ]


@pytest.mark.parametrize(
    ("env", "terminal", "coloured"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"GITHUB_ACTIONS": "true"}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_f49_colour_depends_on_the_stream_and_the_environment(env, terminal, coloured):
    o, out, err = sink(terminal=terminal, env=env)
    o.show("quill.x/1", ROWS, COLUMNS, key="reference", within="models")
    o.fail(InputError("x"))
    assert ("\x1b" in out.getvalue(), "\x1b" in err.getvalue()) == (coloured, coloured)


def drawn(columns: int, monkeypatch, rows=ROWS) -> list[str]:
    """A table on a terminal of that width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    o, out, _ = sink(terminal=True, env={"TERM": "dumb"})
    o.show("quill.x/1", rows, COLUMNS, key="reference", within="models")
    return out.getvalue().splitlines()


def test_a_table_on_a_narrow_terminal_drops_columns_in_their_order_then_folds(monkeypatch):
    assert drawn(80, monkeypatch)[0].split() == ["NAME", "LOSS", "WHEN", "STATE"]
    assert drawn(43, monkeypatch)[0].split() == ["NAME", "WHEN", "STATE"]
    assert drawn(25, monkeypatch)[0].split() == ["NAME", "STATE"]
    folded = drawn(20, monkeypatch)
    assert len(folded) > 3
    assert max(map(len, folded)) <= 20
    for columns in range(8, 90):
        assert max(map(len, drawn(columns, monkeypatch))) <= columns


def test_states_are_coloured_on_a_terminal():
    o, out, _ = sink(terminal=True)
    o.show("quill.x/1", ROWS, COLUMNS, key="reference", within="models")
    assert "\x1b[32mok" in out.getvalue()
    assert "\x1b[1;31mdamaged" in out.getvalue()


def test_a_record_on_a_terminal_folds_its_values_under_themselves(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    o, out, _ = sink(terminal=True, env={"TERM": "dumb"})
    path = Column("path", lambda r: "/home/someone/projects/quill/weights/shakespeare")
    o.show("quill.x/1", {}, [path, Column("note", lambda r: "some words to fold at a space")], key="")
    assert out.getvalue().splitlines() == [
        "path  /home/someone/projects/",
        "      quill/weights/",
        "      shakespeare",
        "note  some words to fold at a",
        "      space",
    ]


def test_an_error_on_a_terminal_folds_at_words_and_its_command_stays_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    o, _, err = sink(terminal=True, env={"NO_COLOR": "1"})
    command = "quill train configs/a-long-name-of-a-config.json --force"
    o.fail(InputError("the model has no name, and none can be found", why="short", hint=command))
    assert err.getvalue().splitlines() == [
        "error: the model has no name, and none",
        "       can be found",
        "  why: short",
        f"  try: {command}",
    ]


@given(st.text(alphabet="ab/ ", max_size=80), st.integers(1, 30))
def test_wrapping_loses_nothing_and_fits(text, width):
    lines = wrap(text, width)
    assert max(map(len, lines)) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_progress_in_a_pipe_is_one_line_every_thirty_seconds():
    now = [0.0]
    o, out, err = sink(clock=lambda: now[0])
    with o.progress(units.size) as report:
        for second in range(100):
            now[0] = float(second)
            report("encoding", second * 1e6, 100e6)
        now[0] = 120.0
        report("receiving", 5e6, None)
    left = {30: "1m 10s", 60: "40s", 90: "10s"}
    assert err.getvalue().splitlines() == [
        *(f"encoding: {done} MB, {done}% of 100 MB, {left[done]} left" for done in left),
        "receiving: 5.0 MB",
    ]
    assert out.getvalue() == ""


def test_the_time_left_is_that_of_the_speed_now():
    now = [0.0]
    o, _, err = sink(clock=lambda: now[0])
    with o.progress(units.size) as report:
        for second, megabytes in ((0, 0), (10, 500), (30, 500), (60, 530)):
            now[0] = second
            report("encoding", megabytes * 1e6, 1000e6)
        report("encoding", 531e6, 1000e6)
    assert err.getvalue().splitlines() == [
        "encoding: 500 MB, 50% of 1.0 GB, 30s left",
        "encoding: 530 MB, 53% of 1.0 GB, 7m 50s left",
    ]


@pytest.mark.parametrize(
    ("total", "shown"), [(100e6, r" +60% 60 MB of 100 MB [-0-9:]{7}"), (None, r" +60 MB *")]
)
def test_a_bar_has_bytes_and_the_time_left_where_the_size_is_known(monkeypatch, total, shown):
    monkeypatch.setenv("COLUMNS", "70")
    o, _, err = sink(terminal=True, env={})
    with o.progress(units.size) as report:
        for step in range(1, 4):
            report("encoding", step * 20e6, total)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err.getvalue())
    last = [line for line in re.split(r"[\r\n]+", drawn) if line.strip()][-1]
    assert re.fullmatch(f"encoding [━╸╺]+{shown}", last)
    assert len(last) <= 70


def test_a_warning_has_a_line_of_its_own_above_a_progress_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    o, _, err = sink(terminal=True, env={})
    with o.progress() as report:
        report("reading", 1, 2)
        before = len(err.getvalue())
        o.warn("take care")
        during = err.getvalue()[before:]
        report("reading", 2, 2)
        assert "reading" in err.getvalue()[before + len(during) :], "the bar comes back"
    # The line of the bar is erased (EL) before the warning is written.
    assert "\x1b[2K" in during.partition("warning:")[0]
    assert during.endswith("take care\n")


def test_quiet_prints_warnings_but_no_remarks():
    o, _, err = sink("quiet", clock=lambda: 1e9)
    o.say("by the way")
    with o.progress() as report:
        report("reading", 1, 2)
    assert err.getvalue() == ""
    o.warn("take care")
    assert err.getvalue() == "warning: take care\n"


def test_details_require_verbose():
    for verbose, expected in ((False, ""), (True, "more\n")):
        o, _, err = sink(verbose=verbose)
        o.detail("more")
        assert err.getvalue() == expected


@pytest.mark.parametrize(
    ("form", "env", "terminal", "live"),
    [
        ("human", {}, True, True),
        ("human", {}, False, False),
        ("human", {"CI": "true"}, True, False),
        ("human", {"TERM": "dumb"}, True, False),
        ("quiet", {}, True, False),
        ("json", {}, True, False),
    ],
)
def test_progress_bars_are_shown_on_terminals_only(form, env, terminal, live):
    o, *_ = sink(form, terminal=terminal, env=env)
    assert o.live is live


def test_a_closed_stderr_does_not_stop_the_work():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    o = Output(out=io.StringIO(), err=Gone(), env={})
    o.say("still here")
    o.fail(InputError("x"))
    o = Output(out=io.StringIO(), err=io.StringIO(), env={})
    o._err = o._out = None
    o.say("nobody listens")
    o.write("nobody reads")


def test_a_closed_pipe_is_noticed_on_stdout():
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Output(out=Gone(), err=io.StringIO(), env={}).stream("x")
