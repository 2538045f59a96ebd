"""Errors: what, why and hint, with values of any length made fit for a message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill.errors import InputError, cut, shorten


def test_an_error_reads_as_what_and_why():
    error = InputError("no model 'x'", why="the registry is empty", hint="quill train")
    assert str(error) == "no model 'x': the registry is empty"
    assert str(InputError("no model 'x'")) == "no model 'x'"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("gpt", "'gpt'"),
        ("it's", '"it\'s"'),
        ("naïve 中 🙂", "'naïve 中 🙂'"),
        ("a\x1b[31m\n\u202e\udcff", r"'a\x1b[31m\n\u202e\udcff'"),
        (b"\x80", r"b'\x80'"),
        (6.0, "6.0"),
        (True, "True"),
        (None, "None"),
        ([1, "a"], "[1, 'a']"),
        ("x" * 100, "'" + "x" * 75 + "...'"),
        ([10] * 100, "[" + "10, " * 19 + "..."),
    ],
)
def test_shorten(value, shown):
    assert shorten(value) == shown
    assert len(shown) <= 80


def test_numbers_that_python_does_not_write_are_described():
    assert shorten(10**5000) == "a number of 16,610 bits"
    assert shorten([10**5000]) == "a huge value"


@given(st.text() | st.binary() | st.lists(st.text()), st.integers(10, 90))
def test_shortened_values_fit_and_are_printable(value, limit):
    shown = shorten(value, limit)
    assert len(shown) <= limit
    assert shown.isprintable()


def test_quoted_values_are_cut_and_paths_are_not():
    long, path = "x" * 500, "/" + "d" * 200
    error = InputError(f"no model '{long}'", why=f"'{path}' has none, and the user's '{long}'", hint=long)
    assert error.what == "no model '" + "x" * 75 + "...'"
    assert error.why == f"'{path}' has none, and the user's '" + "x" * 75 + "...'"
    assert error.hint == long
    assert InputError("/" + "d" * 700).what == "/" + "d" * 700
    assert len(InputError(f"no file '{'/' + 'd' * 9000}'").what) < 4200


def test_apostrophes_do_not_quote():
    text = f"the model's {'long ' * 30}and the dataset's tokens"
    assert InputError(text).what == text


@pytest.mark.parametrize("long", ["x" * 70_000, "../" * 30_000, "\u4e2d" * 5000, "\udcff" * 2000])
@pytest.mark.parametrize("message", ["no model '{}'", "unexpected argument ({})", "downloading {}", "{}"])
def test_f61_a_giant_value_is_cut_with_and_without_quotes(long, message):
    error = InputError(message.format(long), why=message.format(long), hint=f"quill show {long}")
    assert len(error.what) < 120
    assert len(error.why) < 120
    assert error.hint == ""
    assert cut(error.what) == error.what


def test_f61_values_of_usual_length_stay_whole():
    path = "/home/me/" + "models/" * 100
    error = InputError(f"cannot read '{path}'", why=f"'{'x' * 78}' is not a name", hint=f"ls {path}")
    assert (error.what, error.why) == (f"cannot read '{path}'", f"'{'x' * 78}' is not a name")
    assert error.hint == f"ls {path}"
