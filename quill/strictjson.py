"""Strict JSON: duplicate keys are refused, and syntax errors name the line and column.

Python's reader silently keeps the last of duplicate keys. NaN, Infinity and numbers too large for a float
are read as the floats they stand for, so that the validation of the document can name their key.
Format: RFC 8259.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quill.errors import InputError, NotFoundError, QuillError, ResourceError, shorten

# quill's own documents nest only a few levels.
MAX_DEPTH = 100
# A tokenizer of a million tokens has a few tens of megabytes.
MOST_BYTES = 1 << 27

# Matches whole strings, even one without an end, so that only brackets outside of strings are captured.
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\Z)|([\[\]{}])', re.DOTALL)


class _NotFiniteError(Exception):
    """A number is NaN, infinite or too large for a float."""


class _TwiceError(Exception):
    """An object has a key, which is the argument, twice."""


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _NotFiniteError
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _decoder(number: Callable[[str], float]) -> json.JSONDecoder:
    def integer(digits: str) -> int | float:
        # int() raises a ValueError beyond 4300 digits.
        return int(digits) if len(digits) < 400 else number(digits)

    return json.JSONDecoder(
        object_pairs_hook=_unique, parse_int=integer, parse_float=number, parse_constant=number
    )


# By whether numbers must be finite. A list of thousands of models is read with the second one.
_DECODERS = (_decoder(float), _decoder(_finite))


def read(path: Path, *, error: type[QuillError] = InputError, most: int = MOST_BYTES) -> Any:
    """Read one JSON document from a file.

    Args:
        path: The file; UTF-8, with or without a byte order mark.
        error: What to raise when the content is not strict JSON.
        most: The most bytes that it may have.

    Raises:
        NotFoundError: The file does not exist.
        ResourceError: It cannot be read.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(most + 1)
    except FileNotFoundError:
        raise NotFoundError(f"no file '{path}'", hint="check the path") from None
    except IsADirectoryError:
        raise error(f"'{path}' is a folder", why="a JSON file is required") from None
    except OSError as e:
        raise ResourceError(f"cannot read '{path}'", why=e.strerror or str(e)) from e
    if len(raw) > most:
        raise error(f"'{path}' is too large", why=f"such a file has at most {most >> 20} MiB")
    return parse(raw, origin=str(path), error=error)


def parse(raw: bytes, *, origin: str, error: type[QuillError] = InputError, finite: bool = False) -> Any:
    """Parse one JSON document.

    Args:
        raw: The bytes, UTF-8; a byte order mark is accepted.
        origin: Where they came from, for messages.
        error: What to raise when they are not strict JSON.
        finite: Refuse NaN, Infinity and numbers too large for a float.
    """
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise error(f"'{origin}' is UTF-16", why="JSON must be UTF-8", hint="save it as UTF-8")
    try:
        # The "utf-8-sig" codec counts from behind the byte order mark.
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise error(f"'{origin}' is not UTF-8", why=f"byte {e.start} is {raw[e.start]:#04x}") from None
    if not text.strip():
        raise error(f"'{origin}' is empty", why="a JSON document is required")
    if (at := _too_deep(text)) is not None:
        place = f"{text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}"
        raise error(f"'{origin}' nests too deep at {place}", why=f"the limit is {MAX_DEPTH} levels")
    try:
        return _DECODERS[finite].decode(text)
    except _NotFiniteError:
        raise error(f"'{origin}' is damaged", why="a number in it is not finite") from None
    except _TwiceError as e:
        key = shorten(e.args[0], 60)
        raise error(f"'{origin}' contains the key {key} twice", hint="remove one of them") from None
    except json.JSONDecodeError as e:
        why, hint = _explain(text, e)
        raise error(f"'{origin}' is not JSON at {e.lineno}:{e.colno}", why=why, hint=hint) from None


def dumps(value: Any) -> str:
    """Write a document for people: two-space indent, non-ASCII kept, a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def encode(value: Any) -> bytes:
    """Write a document as `dumps` does, as UTF-8; lone surrogates, as in some file names, are escaped."""
    return dumps(value).encode("utf-8", "backslashreplace")


def canonical(value: Any) -> bytes:
    """Write the same bytes for equal values, whatever the key order, to be hashed."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode()


def _too_deep(text: str) -> int | None:
    """Find where a document starts to nest too deep; Python's own limit differs between versions."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return None
    depth = 0
    for found in _BRACKETS.finditer(text):
        if found[1]:
            depth += 1 if found[1] in "[{" else -1
            if depth > MAX_DEPTH:
                return found.start()
    return None


def _explain(text: str, e: json.JSONDecodeError) -> tuple[str, str]:
    """Say why the text is refused and how to fix it, in plain words."""
    rest = text[e.pos :].lstrip()
    before = text[: e.pos].rstrip()
    if rest[:2] in ("//", "/*") or rest[:1] == "#":
        return "JSON has no comments", "remove the comment"
    if rest[:1] in ("}", "]") and before.endswith(","):
        return f"there is a comma before the closing '{rest[0]}'", "remove the trailing comma"
    if e.msg.startswith("Illegal trailing comma"):
        return "there is a comma before a closing bracket", "remove the trailing comma"
    if e.msg == "Extra data":
        return "there is text after the end of the document", "remove everything after the last bracket"
    if rest[:1] == "'":
        return "a string is in single quotes", 'use double quotes: "..."'
    return e.msg[:1].lower() + e.msg[1:], "check that line"
