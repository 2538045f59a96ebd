"""JSON as the standard has it, read strictly and located: every refusal names line and column.

Python's reader takes NaN, Infinity and the last of duplicate keys without a word, and overflows to
infinity at 1e999; a setting that changes meaning in silence is worse than one that is refused.
Format: RFC 8259.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from json import scanner
from pathlib import Path
from typing import Any

from quill.errors import InputError, NotFoundError, QuillError, ResourceError

# No document here nests more than a handful of levels.
MOST_LEVELS = 100
# Strings whole, also one without an end, so that brackets are only found outside of them.
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\Z)|([\[\]{}])', re.DOTALL)


def read(path: Path, *, error: type[QuillError] = InputError) -> Any:
    """Read one JSON document from a file.

    Args:
        path: The file; UTF-8, with or without a byte order mark.
        error: What to raise when the content is not strict JSON.

    Raises:
        NotFoundError: There is no such file.
        ResourceError: It cannot be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"no file '{path}'", hint="check the path") from None
    except IsADirectoryError:
        raise error(f"'{path}' is a folder", why="a JSON file is needed") from None
    except OSError as e:
        raise ResourceError(f"cannot read '{path}'", why=e.strerror or str(e)) from e
    return parse(raw, origin=str(path), error=error)


def parse(raw: bytes, *, origin: str, error: type[QuillError] = InputError) -> Any:
    """Parse one JSON document.

    Args:
        raw: The bytes, UTF-8; a byte order mark is accepted.
        origin: Where they came from, for messages.
        error: What to raise when they are not strict JSON.
    """
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise error(f"'{origin}' is UTF-16", why="JSON here is UTF-8", hint="save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise error(f"'{origin}' is not UTF-8", why=f"byte {e.start} is {raw[e.start]:#04x}") from None
    if not text.strip():
        raise error(f"'{origin}' is empty", why="a JSON document is needed")
    if place := _too_deep(text):
        raise error(
            f"'{origin}' is not usable at {place}",
            why=f"it nests deeper than the {MOST_LEVELS} levels that are read",
        )
    try:
        return _Decoder(origin, error).decode(text)
    except json.JSONDecodeError as e:
        why, hint = _explain(text, e)
        raise error(f"'{origin}' is not JSON at {e.lineno}:{e.colno}", why=why, hint=hint) from None


def dumps(value: Any) -> str:
    """Write a document for people: two-space indent, non-ASCII kept, a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def canonical(value: Any) -> bytes:
    """The same bytes for the same value, whatever the key order: what hashes are taken of."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode()


def _too_deep(text: str) -> str:
    """Where a document begins to nest too deep, as line:column; empty where it does not.

    Looked for beforehand: how deep a reader itself may go differs from Python to Python, and whoever writes
    out or walks what was read has to come as deep again.
    """
    if text.count("[") + text.count("{") <= MOST_LEVELS:
        return ""
    depth = 0
    for found in _BRACKETS.finditer(text):
        bracket = found[1]
        if bracket is None:
            continue
        depth += 1 if bracket in "[{" else -1
        if depth > MOST_LEVELS:
            at = found.start()
            return f"{text.count(chr(10), 0, at) + 1}:{at - text.rfind(chr(10), 0, at)}"
    return ""


class _Decoder(json.JSONDecoder):
    """The standard decoder with every leniency turned into an error."""

    def __init__(self, origin: str, error: type[QuillError]) -> None:
        self._origin, self._error = origin, error
        super().__init__(
            object_pairs_hook=self._pairs,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._int,
        )
        # Subclass hooks reach the C scanner only when it is built after them.
        self.scan_once = scanner.make_scanner(self)  # type: ignore[arg-type]

    def _pairs(self, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out:
                raise self._error(
                    f"'{self._origin}' has the key '{key if len(key) <= 60 else key[:57] + '...'}' twice",
                    why="which of the two is meant cannot be told",
                    hint="remove one of them",
                )
            out[key] = value
        return out

    def _constant(self, word: str) -> Any:
        # Left to the settings' own check, which knows the key and can name it.
        return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}[word]

    def _float(self, digits: str) -> float:
        return float(digits)

    def _int(self, digits: str) -> int | float:
        # int() refuses beyond 4300 digits with a ValueError of its own.
        return int(digits) if len(digits) < 400 else math.inf


def _explain(text: str, e: json.JSONDecodeError) -> tuple[str, str]:
    """Why a document is refused and what mends it, in the words of whoever typed it."""
    rest = text[e.pos :].lstrip()
    before = text[: e.pos].rstrip()
    if rest[:2] in ("//", "/*") or rest[:1] == "#":
        return "JSON has no comments", "remove the comment"
    if rest[:1] in ("}", "]") and before.endswith(","):
        return f"a comma before the closing '{rest[0]}'", "remove the trailing comma"
    if e.msg.startswith("Illegal trailing comma"):
        return "a comma before a closing bracket", "remove the trailing comma"
    if e.msg == "Extra data":
        return "something follows the document's end", "remove what follows the last bracket"
    if rest[:1] == "'":
        return "a string in single quotes", 'use double quotes: "..."'
    return e.msg[:1].lower() + e.msg[1:], "check that line"
