"""What may be a name, and what a reference means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill.errors import InputError
from quill.registry import names
from quill.registry.names import Reference

BAD = [
    "../x", "/etc", "a/b", "", ".", "..", "-x", "_x", ".x", "a\0b", "a\nb", "a\n", "a" * 65, "a" * 300,
    "cafe\u0301", "café", "\u0430bc", "CON", "con", "nul", "com1", "lpt9", "aux.txt", "A", "Abc", "a..b",
    "a.",    "a b", "a:b", "a\\b", "~", "~root", "*", "\ud800", "ａ", "a\u200b", "\x1b[31mred",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_f13_a_bad_name_is_refused_and_quoted_harmlessly(name):
    with pytest.raises(InputError) as caught:
        names.check_name(name)
    assert caught.value.exit_code == 2
    assert caught.value.why
    said = f"{caught.value} {caught.value.hint}"
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 400


@pytest.mark.parametrize(
    "name", ["a", "0", "shakespeare-cpu", "gpt2.124m_v1", "a" * 64, "console", "com10", "v3"]
)
def test_a_good_name_is_itself(name):
    assert names.check_name(name) == name


@given(st.text(max_size=80))
def test_f13_whatever_passes_is_one_plain_folder_name(text):
    try:
        name = names.check_name(text)
    except InputError:
        return
    assert name == name.casefold() == text
    assert name.isascii()
    assert not set(name) & set('/\\:*?"<>|\0\n ')
    assert name not in (".", "..")


def test_a_suggestion_is_a_good_name():
    with pytest.raises(InputError) as caught:
        names.check_name("My Model!")
    assert caught.value.hint == "use 'my-model'"
    assert names.check_name("my-model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shakespeare", Reference("shakespeare")),
        ("shakespeare:v4", Reference("shakespeare", version=4)),
        ("shakespeare:v123456789", Reference("shakespeare", version=123456789)),
        ("shakespeare:champion", Reference("shakespeare", alias="champion")),
        ("shakespeare:latest", Reference("shakespeare", alias="latest")),
    ],
)
def test_a_reference_is_a_name_and_which_version(text, expected):
    assert names.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "a:",
        ":v1",
        "a:v0",
        "a:v01",
        "a:3",
        "a:V3",
        "a:v1:v2",
        "a:-1",
        "a:../b",
        "a:v9999999999",
        "../a:v1",
        "a:v１",
    ],
)
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(InputError):
        names.parse(text)


@pytest.mark.parametrize("text", ["./x", "a/b", "/abs", "..", ".", ".hidden"])
def test_a_slash_or_a_dot_in_front_makes_a_path(text):
    assert names.is_path(text)


@pytest.mark.parametrize("text", ["x", "x:v1", "x.y", "x-y"])
def test_a_name_is_no_path(text):
    assert not names.is_path(text)
