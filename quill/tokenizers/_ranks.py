"""The base of the byte-pair tokenizers: ranks and a split pattern, run by tiktoken.

Byte-level BPE: Radford et al. 2019 (GPT-2), after Sennrich et al. 2016, arXiv:1508.07909. The JSON form has
the ranks, the pattern and the special tokens, so a stored tokenizer needs neither network nor training.
Decoding is a table of bytes and does not need tiktoken.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from quill.errors import CorruptError, InputError, ResourceError, shorten
from quill.tokenizers import _patterns, base

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"

# The regular expression engine fails on about ten times as much white space; real text has far less.
LONGEST_BLANK = 1 << 16
# The lookbehind makes it try each run once, from its start.
_BLANKS = re.compile(rf"(?<!\s)\s{{{LONGEST_BLANK},}}")
_LARGEST_ID = 1 << 24
_SMALLEST_HALF = 1024

T = TypeVar("T")


class RankTokenizer(base.Tokenizer):
    """Byte-pair encoding by ranks.

    Args:
        ranks: The bytes of each token in the order of their ranks; see `rank_ids` for their ids.
        specials: Tokens that no text is encoded to, by name.
        pattern: The regular expression, in tiktoken's syntax, that splits text before pairs are merged.
        added: Tokens that stand for their own name wherever a text contains it, before it is split.

    Attributes:
        specials_last: Whether the ids of special tokens come after those of the ranks.
    """

    specials_last: ClassVar[bool] = False

    def __init__(
        self,
        ranks: Sequence[bytes],
        specials: Mapping[str, int],
        pattern: str,
        added: Mapping[str, int] | None = None,
    ) -> None:
        self._ranks = list(ranks)
        self._specials = dict(specials)
        self._added = dict(added or {})
        self._pattern = pattern
        self._of_threads = threading.local()
        self.eot_id = self._specials.get(END_OF_TEXT)
        named = {**self._specials, **self._added}
        self._ids = rank_ids(len(self._ranks), named.values())
        # Ids between the ranks and the special tokens may be unused; they decode to nothing.
        self._bytes = [b""] * (1 + max([self._ids[-1], *named.values()]))
        for i, token in zip(self._ids, self._ranks, strict=True):
            self._bytes[i] = token
        for name, i in named.items():
            self._bytes[i] = name.encode()
        # Of two names that begin at the same place the longer one counts.
        longest_first = sorted(self._added, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first))) if self._added else None

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._bytes)

    def encode(self, text: str, *, unknown: base.Unknown = "error") -> list[int]:
        """Encode text; only lone surrogates are unknown, since all other characters have bytes."""
        text = base.encodable(text, unknown)
        encode = self._encoding.encode_ordinary
        ids: list[int] = []
        for between, name in self._names_in(text):
            for chunk in chunks(between):
                for found in _guarded(encode, chunk):
                    ids += found
            if name:
                ids.append(self._added[name])
        return ids

    def encode_array(self, text: str) -> base.Ids:
        """Encode text in bulk, without a Python object per id and without blocking other threads."""
        import numpy as np

        found: list[base.Ids] = []
        try:
            for between, name in self._names_in(text):
                found += [ids for chunk in chunks(between) for ids in _guarded(self._encode_numpy, chunk)]
                if name:
                    found.append(np.array([self._added[name]], np.uint32))
        except UnicodeEncodeError:
            base.encodable(text, "error")
            raise
        whole = found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint32), *found])
        return whole.astype(self.dtype, copy=False)

    def covers(self, text: str) -> bool:
        """Whether there are no lone surrogates: all other characters have bytes."""
        return _is_text(text)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, or the name of a special one."""
        if not 0 <= token < len(self._bytes):
            raise base.no_such_token(token, len(self._bytes))
        return self._bytes[token]

    def to_dict(self) -> dict[str, Any]:
        """Return the pattern, the special and added tokens, and the ranks in base64, separated by spaces."""
        stored = {
            "schema": 1,
            "kind": self.kind,
            "pattern": self._pattern,
            "specials": self._specials,
            "ranks": " ".join(base64.b64encode(token).decode() for token in self._ranks),
        }
        return {**stored, "added": self._added} if self._added else stored

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the tokenizer of those ranks."""
        pattern = base.take(data, "pattern", str)
        specials = base.take(data, "specials", dict)
        added = base.take(data, "added", dict) if "added" in data else {}
        if pattern not in _patterns.KNOWN:
            raise CorruptError(f"'pattern' is {shorten(pattern)}", why="quill splits text by no such pattern")
        try:
            ranks = [
                base64.b64decode(token, validate=True) for token in base.take(data, "ranks", str).split()
            ]
        except (binascii.Error, ValueError):
            raise CorruptError("'ranks' is not base64") from None
        missing = {bytes([b]) for b in range(256)}.difference(ranks)
        if missing:
            raise CorruptError(f"'ranks' has no token for the byte {min(missing)[0]:#04x}")
        if len(set(ranks)) != len(ranks) or b"" in ranks:
            raise CorruptError("'ranks' has a token twice or an empty one")
        ids = [*specials.values(), *added.values()]
        if any(type(i) is not int or not 0 <= i < _LARGEST_ID for i in ids) or len(set(ids)) < len(ids):
            raise CorruptError("'specials' has an id that is taken or out of range")
        if not all(name and _is_text(name) for name in (*specials, *added)):
            raise CorruptError("'specials' has a name that is not text")
        if cls.specials_last and any(i < len(ranks) for i in ids):
            raise CorruptError("'specials' has an id of an ordinary token")
        if set(specials) & set(added) or END_OF_TEXT in added or any(map(cls.boundary, added)):
            raise CorruptError("'added' has a name that is special, or that text may be cut in")
        return cls(ranks, specials, pattern, added)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return self._make_encoding()

    def _make_encoding(self) -> tiktoken.Encoding:
        import tiktoken

        try:
            return tiktoken.Encoding(
                self.kind,
                pat_str=self._pattern,
                mergeable_ranks=dict(zip(self._ranks, self._ids, strict=True)),
                special_tokens=self._specials,
            )
        except ValueError as e:
            raise CorruptError(f"the {self.kind} tokenizer's pattern is invalid", why=str(e)) from None

    def _names_in(self, text: str) -> Iterator[tuple[str, str]]:
        """The text up to each name of an added token, with the name; and the rest."""
        at = 0
        for found in self._names.finditer(text) if self._names else ():
            yield text[at : found.start()], found[0]
            at = found.end()
        yield text[at:], ""

    def _encode_numpy(self, text: str) -> base.Ids:
        if threading.current_thread() is threading.main_thread():
            encoding = self._encoding
        else:
            # Threads that share one wait for each other at every word: two were slower than one.
            own = self._of_threads
            if not hasattr(own, "encoding"):
                own.encoding = self._make_encoding()
            encoding = own.encoding
        # The name of a special token is plain text.
        return encoding.encode_to_numpy(text, disallowed_special=())


class PublishedTokenizer(RankTokenizer):
    """A tokenizer with published ranks, which tiktoken downloads on first use.

    Attributes:
        urls: Where the ranks are, for placing them by hand.
    """

    urls: ClassVar[tuple[str, ...]] = ()
    specials_last: ClassVar[bool] = True

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> Self:
        """Return the published tokenizer, whatever the text."""
        refuse_vocabulary(cls.kind, vocabulary)
        ranks, specials, pattern = _published(cls.kind, cls.urls)
        tokenizer = cls(ranks, specials, pattern)
        if vocab_size not in (None, tokenizer.vocab_size):
            raise InputError(
                f"vocab_size {vocab_size} does not apply to {cls.kind}",
                why=f"it has {tokenizer.vocab_size} tokens",
                hint="set data.tokenizer=bpe",
            )
        return tokenizer


def rank_ids(n: int, taken: Iterable[int]) -> Sequence[int]:
    """The ids of n ordinary tokens in the order of their ranks: the smallest that no named token has."""
    named = set(taken)
    if not named or min(named) >= n:
        return range(n)
    return [i for i in range(n + len(named)) if i not in named][:n]


def chunks(text: str) -> Iterator[str]:
    """Cut a text only where white space is longer than the regular expression engine can take."""
    # A run that long covers a whole window of half its length, wherever it begins.
    step = LONGEST_BLANK // 2
    if not any(text[i : i + step].isspace() for i in range(0, len(text), step)):
        yield text
        return
    at = 0
    for run in _BLANKS.finditer(text):
        for end in range(run.start() + LONGEST_BLANK, run.end() + 1, LONGEST_BLANK):
            yield text[at:end]
            at = end
    if at < len(text) or not text:
        yield text[at:]


def refuse_vocabulary(kind: str, vocabulary: Sequence[str] | None) -> None:
    """Refuse a list of characters for a tokenizer whose tokens are not characters.

    Raises:
        InputError: There is one.
    """
    if vocabulary is not None:
        raise InputError(
            f"vocabulary does not apply to the {kind} tokenizer",
            why="it lists characters, and these tokens are not characters",
            hint="set data.tokenizer=char",
        )


def is_panic(error: BaseException) -> bool:
    """Return whether a library written in Rust failed; its panics are not subclasses of Exception."""
    return type(error).__name__ == "PanicException"


def _guarded(encode: Callable[[str], T], text: str) -> Iterator[T]:
    """Encode a text, or its halves where the library panics."""
    try:
        yield encode(text)
        return
    except BaseException as e:
        if not is_panic(e):
            raise
        if len(text) < _SMALLEST_HALF:
            raise InputError(f"the tokenizer failed on {shorten(text, 40)}", why=str(e)) from None
    middle = len(text) // 2
    yield from _guarded(encode, text[:middle])
    yield from _guarded(encode, text[middle:])


def _published(kind: str, urls: Sequence[str]) -> tuple[list[bytes], dict[str, int], str]:
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS  # type: ignore[import-untyped]

    try:
        found = ENCODING_CONSTRUCTORS[kind]()
    except (OSError, ValueError, AssertionError) as e:
        folder = os.environ.get("TIKTOKEN_CACHE_DIR")
        place = folder or "$TIKTOKEN_CACHE_DIR"
        fetch = "; ".join(f"curl -o '{place}/{hashlib.sha1(url.encode()).hexdigest()}' {url}" for url in urls)
        raise ResourceError(
            f"cannot download the ranks of the {kind} tokenizer",
            why=f"{', '.join(urls)}: {_reason(e)}",
            hint=f"{'' if folder else 'set TIKTOKEN_CACHE_DIR to a folder; '}place them by hand: {fetch}",
        ) from e
    ranks = sorted(found["mergeable_ranks"], key=found["mergeable_ranks"].__getitem__)
    pattern = found["pat_str"] if found["pat_str"] in _patterns.KNOWN else _patterns.PUBLISHED[kind]
    return ranks, found["special_tokens"], pattern


def _reason(error: BaseException) -> str:
    """Return the innermost cause of what several network libraries wrapped."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error) or type(error).__name__


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
