"""The fields of a `tokenizer.json`, written and checked.

Format: https://huggingface.co/docs/tokenizers/api/models and the pages next to it. A file may contain
anything, so each field's type is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quill.errors import CorruptError, InputError

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


def added_tokens(found: Any, origin: str) -> dict[str, int]:
    """Read the ids of the tokens that are added to a model's vocabulary.

    Raises:
        CorruptError: They are not a list of tokens with ids.
    """
    entries = [] if found is None else found
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("content"), str) and type(e.get("id")) is int
        for e in entries
    ):
        raise CorruptError(f"'{origin}' is damaged", why="its added_tokens are not a list of tokens with ids")
    return {e["content"]: e["id"] for e in entries}


def unsupported(origin: str, why: str) -> InputError:
    """The refusal of a tokenizer that is sound, but unlike any of quill's."""
    return InputError(f"quill does not support the tokenizer in '{origin}'", why=why, hint="tokenizer=gpt2")
