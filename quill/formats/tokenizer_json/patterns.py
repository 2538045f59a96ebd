"""The patterns that split text, in two dialects of regular expressions.

tiktoken runs them in Rust (https://docs.rs/fancy-regex), the tokenizers library in Oniguruma
(https://github.com/kkos/oniguruma/blob/master/doc/RE). To Oniguruma `{1,3}+` repeats `{1,3}`, and `$` is the
end of every line. A pattern that is not in this table could split text differently there, and is refused.
"""

from __future__ import annotations

from quill.tokenizers import _patterns

# As Oniguruma spells them, by tiktoken's spelling. Most are the same.
_ONIGURUMA = {
    **{p: p for p in (_patterns.GPT2, _patterns.O200K, _patterns.LLAMA3, _patterns.QWEN2)},
    _patterns.GPT2_POSSESSIVE: (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
    ),
    _patterns.CL100K: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|(?>\p{N}{1,3})| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z"
        r"|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    _patterns.QUILL: (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|(?>\p{N}{1,3})| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
}
_TIKTOKEN = {theirs: ours for ours, theirs in _ONIGURUMA.items()}


def to_oniguruma(pattern: str) -> str | None:
    """Oniguruma's spelling of one of tiktoken's patterns; None if it is unknown."""
    return _ONIGURUMA.get(pattern)


def from_oniguruma(pattern: str) -> str | None:
    """tiktoken's spelling of one of Oniguruma's patterns; None if it is unknown."""
    return _TIKTOKEN.get(pattern)
