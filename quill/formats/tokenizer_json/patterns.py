"""Patterns by which text is split before pairs are merged, between two dialects of regular expressions.

tiktoken runs them in Rust (https://docs.rs/fancy-regex), the tokenizers library in Oniguruma
(https://github.com/kkos/oniguruma/blob/master/doc/RE). Both know `\\p{L}`, `\\s` and possessive `++`; but to
Oniguruma `{1,3}+` is a repeated `{1,3}`, `$` is every line's end, and `(?i:ss)` is also one letter. Only what
is known to mean the same on both sides is translated.
"""

from __future__ import annotations

import re

_LEXEME = re.compile(
    r"""
    (?P<atom> \\[pP]\{[LMNPSZ][a-z]?\} | \\[sSrnt] | \\[^\w\s]
            | \[\^?(?: \\[pP]\{[LMNPSZ][a-z]?\} | \\[sSrnt] | \\[^\w\s] | [A-Za-z0-9]-[A-Za-z0-9]
                     | [^][\\&~|-] )+\]
            | [^][\\(){}*+?.^$|] )
  | (?P<start> \^ | \\A ) | (?P<end> \$ | \\z )
  | (?P<open> \(\?: | \(\?i: | \(\?! | \(\?= | \(\?> | \((?!\?) )
  | (?P<close> \) ) | (?P<bar> \| )
  | (?P<count> \{\d{1,4}(?:,\d{0,4})?\} ) (?P<greed> [+?]? )
  | (?P<repeat> [*+?][+?]? )
    """,
    re.VERBOSE,
)
# Pairs of letters that Unicode folds a single character to.
_LIGATURES = re.compile(r"ss|st|ff|fi|fl", re.IGNORECASE)
_COUNTED = re.compile(r"\(\?>(?P<atom>.+)(?P<count>\{\d+(?:,\d*)?\})\)", re.DOTALL)


class UntranslatableError(ValueError):
    """A construct that may mean something else on the other side; the construct is the argument."""


def to_oniguruma(pattern: str) -> str:
    """A pattern of tiktoken's, as one of Oniguruma's.

    Raises:
        UntranslatableError: It uses what is not known to mean the same.
    """
    return _translate(pattern, outgoing=True)


def from_oniguruma(pattern: str) -> str:
    """A pattern of Oniguruma's, as one of tiktoken's; undoes `to_oniguruma`.

    Raises:
        UntranslatableError: It uses what is not known to mean the same.
    """
    return _translate(pattern, outgoing=False)


def _translate(pattern: str, *, outgoing: bool) -> str:
    done: list[str] = []  # one entry for each atom, group or quantifier so far
    groups: list[int] = []
    at = 0
    while at < len(pattern):
        found = _LEXEME.match(pattern, at)
        if found is None:
            raise UntranslatableError(pattern[at : at + 12])
        text, at = found.group(), found.end()
        match found.lastgroup if found["count"] is None else "count":
            case "start" | "end" as anchor:
                # The other side's `^` and `$` are those of lines.
                plain, exact = ("^", r"\A") if anchor == "start" else ("$", r"\z")
                if text != (plain if outgoing else exact):
                    raise UntranslatableError(text)
                done.append(exact if outgoing else plain)
            case "open":
                groups.append(len(done))
                done.append(text)
            case "close":
                if not groups:
                    raise UntranslatableError(text)
                begin = groups.pop()
                done[begin:] = [_group("".join(done[begin:]) + text, outgoing)]
            case "count":
                done += _counted(done.pop() if done else "", found["count"], found["greed"], outgoing)
            case _:
                done.append(text)
    if groups:
        raise UntranslatableError(done[groups[-1]])
    return "".join(done)


def _group(text: str, outgoing: bool) -> str:
    if text.startswith("(?i:") and (not text.isascii() or _LIGATURES.search(text)):
        raise UntranslatableError(text)
    counted = _COUNTED.fullmatch(text)
    if not outgoing and counted and _is_one(counted["atom"]):
        return f"{counted['atom']}{counted['count']}+"
    return text


def _counted(repeated: str, count: str, greed: str, outgoing: bool) -> list[str]:
    if repeated[:1] in ("", "*", "+", "?", "{", "|") or greed == "?" or (greed and not outgoing):
        raise UntranslatableError(repeated[-12:] + count + greed)
    return [f"(?>{repeated}{count})"] if greed else [repeated, count]


def _is_one(text: str) -> bool:
    """Whether a quantifier behind it would take all of it: one character or class."""
    found = _LEXEME.match(text)
    return found is not None and found.lastgroup == "atom" and found.end() == len(text)
