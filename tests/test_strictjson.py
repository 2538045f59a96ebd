"""Strict JSON: what Python's reader lets pass is refused, and every refusal says where and why."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill import strictjson
from quill.errors import CorruptError, InputError, NotFoundError, QuillError

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def refusal(text: str | bytes, error: type[QuillError] = InputError) -> QuillError:
    raw = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(error) as caught:
        strictjson.parse(raw, origin="x.json", error=error)
    assert "'x.json'" in caught.value.what
    return caught.value


@given(DOCUMENTS)
def test_every_document_reads_back(value: Any) -> None:
    for raw in (strictjson.encode(value), strictjson.canonical(value)):
        assert strictjson.parse(raw, origin="x") == value


@given(st.dictionaries(st.text(), st.integers()))
def test_canonical_bytes_do_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert strictjson.canonical(value) == strictjson.canonical(dict(reversed(value.items())))


def test_lone_surrogates_are_written_as_escapes() -> None:
    raw = strictjson.encode({"file": "caf\udce9 é"})
    assert raw.decode("utf-8") == '{\n  "file": "caf\\udce9 é"\n}\n'
    assert strictjson.parse(raw, origin="x") == {"file": "caf\udce9 é"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_f06_numbers_that_json_lacks_are_never_written(value: float) -> None:
    for write in (strictjson.dumps, strictjson.encode, strictjson.canonical):
        with pytest.raises(ValueError, match="JSON compliant"):
            write({"a": value})


def test_f06_numbers_that_are_not_finite_are_left_to_whoever_validates() -> None:
    found = strictjson.parse(b"[NaN, Infinity, -Infinity, 1e999, -1e999]", origin="x")
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, -math.inf, math.inf, -math.inf]


def test_f11_integers_of_any_length_are_read() -> None:
    assert strictjson.parse(b"[12345678901234567890123]", origin="x") == [12345678901234567890123]
    assert strictjson.parse(b"[" + b"9" * 5000 + b"]", origin="x") == [math.inf]


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 1}', '{"b": [{"a": 1, "c": 2, "a": 3}]}', '{"a": 1, "\\u0061": 2}']
)
def test_f08_a_duplicate_key_is_refused_at_any_depth(text: str) -> None:
    assert "the key 'a' twice" in refusal(text).what


def test_f08_a_long_duplicate_key_is_cut() -> None:
    key = "k" * 5000
    assert len(refusal(json.dumps({key: 1})[:-1] + f', "{key}": 2}}').what) < 200


@pytest.mark.parametrize(
    ("text", "place", "why", "hint"),
    [
        ('{"a": 1,}', r"1:\d+", "a comma before", "remove the trailing comma"),
        ('{\n  "a": [1, 2,\n  ]\n}', r"(2:13|3:3)", "a comma before", "remove the trailing comma"),
        ('{\n  // why\n  "a": 1\n}', "2:3", "no comments", "remove the comment"),
        ('{"a": 1 # why\n}', "1:9", "no comments", "remove the comment"),
        ("{'a': 1}", "1:2", "single quotes", "double quotes"),
        ('{"a": 1} {"b": 2}', "1:10", "after the end", "after the last bracket"),
        ('{"a": \n\n  }', "3:3", "expecting value", "check that line"),
        ('{"a": "never closed}', "1:7", "unterminated string", "check that line"),
        ('{"a": tru}', "1:7", "expecting value", "check that line"),
    ],
)
def test_f09_a_syntax_error_names_its_place_its_reason_and_the_fix(
    text: str, place: str, why: str, hint: str
) -> None:
    error = refusal(text)
    assert re.search(f"is not JSON at {place}$", error.what)
    assert why in error.why
    assert hint in error.hint


@pytest.mark.parametrize("raw", [b"", b"  \n", b"\xef\xbb\xbf"])
def test_f09_nothing_is_not_a_document(raw: bytes) -> None:
    assert "is empty" in refusal(raw).what


@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_f09_nesting_is_limited_and_located(bracket: str) -> None:
    deep = strictjson.MAX_DEPTH
    closing = "]" if bracket == "[" else "}"
    allowed = bracket * deep + ("" if bracket == "[" else "1") + closing * deep
    strictjson.parse(allowed.encode(), origin="x")
    column = deep * len(bracket) + 1
    for text in (bracket * (deep + 1), bracket * 10_000, bracket * 1_000_000):
        assert f"nests too deep at 1:{column}" in refusal(text).what
    assert "nests too deep at 3:2" in refusal("\n" + "[" * deep + "\n [").what


def test_f09_brackets_in_strings_do_not_nest() -> None:
    value = {'[{"' * 400: '\\"[[' * 400}
    assert strictjson.parse(strictjson.encode(value), origin="x") == value
    assert "unterminated" in refusal('{"a": "' + "[" * 400).why


def test_f10_a_byte_order_mark_is_accepted_and_utf16_is_not() -> None:
    assert strictjson.parse(b"\xef\xbb\xbf[1]", origin="x") == [1]
    assert "UTF-16" in refusal('{"a": 1}'.encode("utf-16")).what
    assert "byte 7 is 0xe9" in refusal(b'{"caf": \xe9}'.replace(b" ", b"")).why


def test_files_are_read_and_missing_ones_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[1]")
    assert strictjson.read(tmp_path / "a.json") == [1]
    with pytest.raises(NotFoundError):
        strictjson.read(tmp_path / "b.json")
    with pytest.raises(CorruptError, match="is a folder"):
        strictjson.read(tmp_path, error=CorruptError)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_in_words(raw: bytes) -> None:
    try:
        strictjson.parse(raw, origin="x")
    except QuillError as e:
        assert e.what.startswith("'x'")
