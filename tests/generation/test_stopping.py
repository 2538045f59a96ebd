from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quill.errors import InputError
from quill.generation.stopping import StopStrings


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    filter = StopStrings(stops)
    out = [filter.feed(piece) for piece in pieces]
    return [*out, filter.flush()], filter.hit


@pytest.mark.parametrize(
    ("pieces", "stops", "wanted"),
    [
        (["a", "b", "c"], [], ["a", "b", "c", ""]),
        # A beginning is held back until it is known whether it goes on.
        (["x", "E", "N", "D", "y"], ["END"], ["x", "", "", "", "", ""]),
        (["x", "E", "N", "y"], ["END"], ["x", "", "", "ENy", ""]),
        (["x", "E", "N"], ["END"], ["x", "", "", "EN"]),
        # A shorter beginning inside a longer one is found.
        (["a", "a", "b"], ["ab"], ["", "a", "", ""]),
        (["aEND and ENDs"], ["END"], ["a", ""]),
        (["one two three"], ["three", "two"], ["one ", ""]),
        (["sea"], ["s"], ["", ""]),
    ],
)
def test_pieces(pieces: list[str], stops: list[str], wanted: list[str]) -> None:
    assert run(pieces, stops)[0] == wanted


text = st.text("abc", max_size=20)


@given(st.lists(text, max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_what_comes_out_is_the_text_before_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    # The first stop is the one that is complete first, however the text came.
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    out, hit = run(list(whole), stops)
    assert hit is bool(ends)
    assert "".join(out) == (whole[: min(ends)[1]] if ends else whole)


@given(st.lists(text, max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_no_stop_and_no_part_of_one_comes_out(pieces: list[str], stops: list[str]) -> None:
    out, hit = run(pieces, stops)
    shown = "".join(out)
    assert not any(s in shown for s in stops)
    assert "".join(pieces).startswith(shown)
    if not hit:
        assert shown == "".join(pieces)
        before_flush = "".join(out[:-1])
        assert not any(before_flush.endswith(s[:n]) for s in stops for n in range(1, len(s)))


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="stop string") as e:
        StopStrings(["END", ""])
    assert e.value.exit_code == 2
