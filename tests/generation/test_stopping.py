from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quill.errors import InputError
from quill.generation.stopping import StopStrings


def run(chunks: list[str], stops: list[str]) -> tuple[list[str], bool]:
    filter = StopStrings(stops)
    out = [filter.feed(chunk) for chunk in chunks]
    return [*out, filter.flush()], filter.hit


@pytest.mark.parametrize(
    ("chunks", "stops", "wanted"),
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
        # The one that is complete first counts, not the one that begins first.
        (["abcx"], ["abcx", "bc"], ["a", ""]),
        (["sea"], ["s"], ["", ""]),
    ],
)
def test_chunks_before_and_after_a_stop(chunks: list[str], stops: list[str], wanted: list[str]) -> None:
    assert run(chunks, stops)[0] == wanted


text = st.text("abc", max_size=20)


@given(st.lists(text, max_size=8), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_the_output_is_the_text_before_the_first_stop(chunks: list[str], stops: list[str]) -> None:
    whole = "".join(chunks)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    for cut in (chunks, list(whole), [whole]):
        out, hit = run(cut, stops)
        assert hit is bool(ends)
        assert "".join(out) == (whole[: min(ends)[1]] if ends else whole)


@given(text, st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(deadline=None)
def test_exactly_what_may_start_a_stop_is_held_back(whole: str, stops: list[str]) -> None:
    filter, shown = StopStrings(stops), ""
    for n, character in enumerate(whole, 1):
        shown += filter.feed(character)
        if filter.hit:
            return
        so_far = whole[:n]
        beginnings = [at for at in range(n + 1) if any(s.startswith(so_far[at:]) for s in stops)]
        assert shown == so_far[: min(beginnings)]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="stop string") as e:
        StopStrings(["END", ""])
    assert e.value.exit_code == 2
