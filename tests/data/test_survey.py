"""The first pass over a text: exact counts, its layout and its alphabet."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from quill.data import sources, survey


def test_a_survey_counts_what_is_there(tmp_path: Path, data: Path) -> None:
    texts = ["one é", "two 😀\n" * 1000, "three"]
    files = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
        files.append(str(tmp_path / f"{i}.txt"))
    whole = "\n".join(texts)
    with sources.find(files, data) as found:
        counted = survey.survey(found, alphabet=True, share=0.1)
        assert survey.survey(found, alphabet=False, share=0.1).alphabet == ""
    assert counted.characters == len(whole)
    assert counted.bytes == len(whole.encode())
    assert counted.documents == 3
    assert counted.alphabet == "".join(sorted(set(whole)))
    assert counted.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert not counted.blank
    assert not counted.uniform


def test_the_layout_of_documents_counts(tmp_path: Path, data: Path) -> None:
    def layout(*texts: str) -> tuple[str, str]:
        files = []
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
            files.append(str(tmp_path / f"{i}.txt"))
        with sources.find(files, data) as found:
            counted = survey.survey(found, alphabet=False, share=0.1)
        return counted.sha256, counted.layout

    one, other = layout("a\nb", "c"), layout("a", "b\nc")
    assert one[0] == other[0] == layout("a\nb\nc")[0]
    assert len({one[1], other[1], layout("a\nb\nc")[1]}) == 3


@given(texts=st.lists(st.text(max_size=30)))
def test_an_alphabet_is_every_character_seen(texts: list[str]) -> None:
    alphabet = survey._Alphabet()
    for text in texts:
        alphabet.add(text, text.encode())
    assert alphabet.sorted() == "".join(sorted(set("".join(texts))))
