"""The parts that a `tokenizer.json` is put together from, made and looked at.

Format: https://huggingface.co/docs/tokenizers/api/models and the pages beside it. What a file holds is
anything, so each part is held to its type before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quill.errors import CorruptError, InputError

# What a BPE model says of itself beside its vocabulary, where it says nothing special.
PLAIN_BPE: Mapping[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def split(pattern: str) -> dict[str, Any]:
    """A split into the matches of a pattern."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def split_of(step: Mapping[str, Any]) -> str | None:
    """The pattern of a split into its matches; None for any other step."""
    pattern = step.get("pattern")
    found = pattern.get("Regex") if isinstance(pattern, dict) else None
    kept = (step.get("behavior"), step.get("invert", False)) in (("Isolated", False), ("Removed", True))
    return found if step.get("type") == "Split" and kept and isinstance(found, str) else None


def steps(step: Any, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or post-processor, flat.

    Args:
        step: The part of the document.
        key: What a sequence calls its steps.
    """
    strange = {"type": None}
    if step is None:
        return []
    if not isinstance(step, dict):
        return [strange]
    if step.get("type") != "Sequence":
        return [step]
    inner = step.get(key)
    return [s if isinstance(s, dict) else strange for s in inner] if isinstance(inner, list) else [strange]


def vocabulary(found: Any, origin: str) -> dict[str, int]:
    """A vocabulary of tokens to ids, each id once.

    Raises:
        CorruptError: It is none.
    """
    if not isinstance(found, dict) or not found:
        raise CorruptError(f"'{origin}' is no tokenizer", why="it has no vocabulary")
    ids = list(found.values())
    if any(type(i) is not int or i < 0 for i in ids) or len(set(ids)) < len(ids):
        why = "in its vocabulary an id is no number, or is there twice"
        raise CorruptError(f"'{origin}' is damaged", why=why)
    return found


def in_order(tokens: Mapping[str, int], origin: str) -> list[str]:
    """The tokens by id.

    Raises:
        InputError: The ids have gaps.
    """
    ordered = sorted(tokens, key=tokens.__getitem__)
    if tokens[ordered[-1]] != len(ordered) - 1:
        raise foreign(origin, "its ids have gaps")
    return ordered


def pairs(merges: Any, origin: str) -> list[tuple[str, str]]:
    """Merges, written as two strings or as one with a space between.

    Raises:
        CorruptError: They are not pairs.
    """
    found = merges if isinstance(merges, list) else [None]
    made: list[tuple[str, str]] = []
    for merge in found:
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(halves, list) or len(halves) != 2 or not all(isinstance(h, str) for h in halves):
            raise CorruptError(f"'{origin}' is damaged", why="its merges are no list of pairs")
        made.append((halves[0], halves[1]))
    return made


def added(found: Any, origin: str) -> dict[str, int]:
    """Added tokens and their ids.

    Raises:
        CorruptError: They are no such list.
    """
    entries = [] if found is None else found
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("content"), str) and type(e.get("id")) is int
        for e in entries
    ):
        raise CorruptError(f"'{origin}' is damaged", why="its added_tokens are no list of tokens with ids")
    return {e["content"]: e["id"] for e in entries}


def foreign(origin: str, why: str) -> InputError:
    """The refusal of a tokenizer that is sound and none of quill's."""
    return InputError(
        f"quill has no such tokenizer as '{origin}'", why=why, hint="--tokenizer FILE, or --tokenizer gpt2"
    )
