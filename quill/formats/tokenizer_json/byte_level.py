"""Byte-level BPE as other libraries spell it: a letter for each byte, merges instead of ranks.

Radford et al. 2019 wrote each byte as a printable letter, so that a vocabulary is text. tiktoken merges the
pair with the lowest rank wherever it stands; other libraries list the pairs. Both give the same ids, because
the merges inside a token depend on that token's bytes alone: each token is made by one pair, the two parts
that are left of its bytes before its own merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise

from quill.errors import InputError

# Finding merges takes time quadratic in a token's length; o200k_base needs a hundredth of this.
_MOST_WORK = 1 << 30


@cache
def letters() -> tuple[str, ...]:
    """The printable character for each byte: the byte's own if it has one, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def spell(token: bytes) -> str:
    """Write a token's bytes as letters."""
    of = letters()
    return "".join([of[byte] for byte in token])


def unspell(text: str) -> bytes:
    """Read the bytes that letters stand for.

    Raises:
        KeyError: A character stands for no byte; it is the argument.
    """
    of = _bytes()
    return bytes([of[letter] for letter in text])


def merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes] | None]:
    """Find the pair that makes each token.

    Args:
        tokens: In the order of their ranks, single bytes included.

    Returns:
        One entry for each token: None for a single byte, and for a token that no merge makes.

    Raises:
        InputError: The tokens are so long that this would take minutes.
    """
    if sum(len(token) ** 2 for token in tokens) > _MOST_WORK:
        longest = max(map(len, tokens))
        raise InputError("the tokenizer's tokens are too long", why=f"one has {longest:,} bytes")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [_pair(token, ranks) for token in tokens]


def _pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    if len(token) == 1:
        return None
    parts = [token[i : i + 1] for i in range(len(token))]
    none = len(ranks)
    found = [ranks.get(a + b, none) for a, b in pairwise(parts)]
    while len(parts) > 2:
        lowest = min(found)
        if lowest == none:
            return None
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del found[at]
        if at > 0:
            found[at - 1] = ranks.get(parts[at - 1] + parts[at], none)
        if at < len(found):
            found[at] = ranks.get(parts[at] + parts[at + 1], none)
    return parts[0], parts[1]


@cache
def _bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(letters())}
