"""The fields of a `tokenizer.json`, written and checked.

Format: https://huggingface.co/docs/tokenizers/api/models and the pages next to it. A file may contain
anything, so each field's type is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from quill.errors import CorruptError, InputError, shorten
from quill.tokenizers._ranks import END_OF_TEXT
from quill.tokenizers.base import Tokenizer

# The fields of a BPE model besides its vocabulary and merges, with their defaults.
BPE_DEFAULTS: Mapping[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def split_step(pattern: str) -> dict[str, Any]:
    """Split text into the matches of a pattern."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def split_pattern(step: Mapping[str, Any]) -> str | None:
    """The pattern of a step that splits text into its matches; None for any other step."""
    pattern = step.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    kept = (step.get("behavior"), step.get("invert", False)) in (("Isolated", False), ("Removed", True))
    return found if step.get("type") == "Split" and kept and isinstance(found, str) else None


def character_class(characters: Iterable[str]) -> str:
    """Write the inside of a character class, in ranges.

    Args:
        characters: In ascending order.
    """
    ranges: list[list[int]] = []
    for point in map(ord, characters):
        if ranges and point == ranges[-1][1] + 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    return "".join(_literal(first) + (f"-{_literal(last)}" if last > first else "") for first, last in ranges)


def _literal(point: int) -> str:
    return f"\\{chr(point)}" if chr(point) in "\\]^-[&~|" else chr(point)


def steps(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, as a flat list.

    Args:
        step: The field of the document.
        key: The name under which a sequence lists its steps.
    """
    unknown = {"type": None}
    if step is None:
        return []
    if not isinstance(step, dict):
        return [unknown]
    if step.get("type") != "Sequence":
        return [step]
    inner = step.get(key)
    return [s if isinstance(s, dict) else unknown for s in inner] if isinstance(inner, list) else [unknown]


def vocabulary(found: Any, origin: str) -> dict[str, int]:
    """Check that a vocabulary maps tokens to distinct ids.

    Raises:
        CorruptError: It does not.
    """
    if not isinstance(found, dict) or not found:
        raise CorruptError(f"'{origin}' is not a tokenizer", why="it has no vocabulary")
    ids = list(found.values())
    if any(type(i) is not int or i < 0 for i in ids) or len(set(ids)) < len(ids):
        why = "an id in its vocabulary is not a number, or occurs twice"
        raise CorruptError(f"'{origin}' is damaged", why=why)
    return found


def by_id(tokens: Mapping[str, int], origin: str) -> list[str]:
    """The tokens in the order of their ids.

    Raises:
        InputError: The ids have gaps.
    """
    ordered = sorted(tokens, key=tokens.__getitem__)
    if tokens[ordered[-1]] != len(ordered) - 1:
        raise unsupported(origin, "its ids have gaps")
    return ordered


def merges(found: Any, origin: str) -> list[tuple[str, str]]:
    """Read merges, each written as two strings or as one with a space between.

    Raises:
        CorruptError: They are not pairs.
    """
    made: list[tuple[str, str]] = []
    for merge in found if isinstance(found, list) else [None]:
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(halves, list) or len(halves) != 2 or not all(isinstance(h, str) for h in halves):
            raise CorruptError(f"'{origin}' is damaged", why="its merges are not a list of pairs")
        made.append((halves[0], halves[1]))
    return made


class AddedTokens(NamedTuple):
    """The ids of tokens that are added to a model's vocabulary, by name.

    Attributes:
        special: Tokens that quill encodes no text to.
        ordinary: Tokens that stand for their name in a text.
    """

    special: dict[str, int]
    ordinary: dict[str, int]


def added_tokens(found: Any, origin: str) -> AddedTokens:
    """Read the tokens that are added to a model's vocabulary.

    Raises:
        CorruptError: They are not a list of tokens with ids.
        InputError: The library finds one of them in text by a rule that quill does not have.
    """
    entries = [] if found is None else found
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("content"), str) and type(e.get("id")) is int
        for e in entries
    ):
        raise CorruptError(f"'{origin}' is damaged", why="its added_tokens are not a list of tokens with ids")
    made = AddedTokens({}, {})
    for entry in entries:
        name, i = entry["content"], entry["id"]
        if entry.get("special") or name == END_OF_TEXT:
            made.special[name] = i
            continue
        if rule := next((r for r in ("single_word", "lstrip", "rstrip") if entry.get(r)), None):
            raise unsupported(origin, f"its token {shorten(name)} has {rule}, which quill does not have")
        made.ordinary[name] = i
    names = list(made.ordinary)
    # The library looks for names that it normalizes in a second pass.
    passes = {bool(e.get("normalized", True)) for e in entries if e["content"] in made.ordinary}
    if len(passes) > 1 and any(overlap(a, b) for a in names for b in names if a != b):
        raise unsupported(origin, "its added tokens overlap, and only some of them are normalized")
    check_added(names, origin)
    return made


def check_added(names: Iterable[str], origin: str) -> None:
    """Refuse added tokens that quill would cut while it reads a text in chunks.

    Raises:
        InputError: One has white space or a full stop after a letter or digit.
    """
    for name in names:
        if not name or Tokenizer.boundary(name):
            raise unsupported(
                origin, f"its added token {shorten(name)} has a space or full stop after a letter"
            )


def overlap(a: str, b: str) -> bool:
    """Whether a text can contain two names that share characters."""
    shorter = min(len(a), len(b))
    ends = any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, shorter + 1))
    return ends or a in b or b in a


def unsupported(origin: str, why: str) -> InputError:
    """The refusal of a tokenizer that is sound, but unlike any of quill's."""
    return InputError(f"quill does not support the tokenizer in '{origin}'", why=why, hint="tokenizer=gpt2")
