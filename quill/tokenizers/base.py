"""The interface of all tokenizers: text to ids and back, a JSON form, and a fingerprint of it.

A tokenizer is one file in this folder with one subclass of Tokenizer; the file's name is its kind. numpy and
tiktoken are imported only for bulk work and byte-pair encoding, so loading a char tokenizer is fast.
"""

from __future__ import annotations

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from quill import discovery, strictjson
from quill.errors import CorruptError, InputError, newer, shorten

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.unsignedinteger[Any]]

SCHEMA_VERSION = 1

Unknown = Literal["error", "skip"]

# Every tokenizer here starts a new token at one of these after a letter or a digit. Regex engines know
# newer or older versions of Unicode than Python, so only letters and digits of Unicode 3.2 count.
_STOPS = frozenset(" \n。、，！？：；")
_LOOK_BACK = 65536
_MOST_NAMED = 40
# Characters per token at first, to encode the end of a text.
_TAIL = 16


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: The registered name: that of the file with the class.
        learns: What training reads: "nothing", the distinct "characters", or the whole "text".
        learn_chars: Most characters that training reads; None: the whole text.
        eot_id: Id of the token between documents, if there is one.
    """

    kind: ClassVar[str]
    learns: ClassVar[Literal["nothing", "characters", "text"]] = "nothing"
    learn_chars: ClassVar[int | None] = None
    eot_id: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.kind = cls.__module__.rpartition(".")[2]

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids: the largest plus one."""

    @classmethod
    @abstractmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> Self:
        """Train a tokenizer, or return the only one of its kind.

        Args:
            texts: Chunks of the text, cut where `boundary` allows; read once. For a tokenizer that learns
                from characters, the distinct ones are enough.
            vocab_size: Number of ids to learn, or the most to keep.
            vocabulary: The characters in the order of their ids, instead of those in the text.

        Raises:
            InputError: A setting does not apply to this kind, or the text does not allow it.
        """

    @abstractmethod
    def encode(self, text: str, *, unknown: Unknown = "error") -> list[int]:
        """Encode text. Names of special tokens in it are plain text.

        Args:
            text: Any text.
            unknown: Refuse or skip characters without an id.

        Raises:
            InputError: Naming each character without an id.
        """

    def encode_array(self, text: str) -> Ids:
        """Encode text in bulk: the same ids as `encode`, as uint16 or uint32; see `dtype`."""
        import numpy as np

        return np.array(self.encode(text), dtype=self.dtype)

    def encode_tail(self, text: str, count: int, *, unknown: Unknown = "error") -> list[int]:
        """Encode the end of a text, without encoding the rest of a long one.

        Args:
            text: Any text.
            count: How many of the last tokens are needed.
            unknown: As for `encode`.

        Returns:
            The last ids of those that `encode` returns for the whole text: `count` or more, or all of them.

        Raises:
            InputError: As for `encode`.
        """
        size = _TAIL * count
        while size < len(text):
            cut = len(text) - size
            before = text[max(0, cut - _LOOK_BACK) : cut]
            found = self.boundary(before)
            if found:
                cut -= len(before) - found
                if unknown == "error" and not self.covers(text):
                    break
                ids = self.encode(text[cut:], unknown=unknown)
                if len(ids) >= count:
                    return ids
            size *= 4
        return self.encode(text, unknown=unknown)

    def covers(self, text: str) -> bool:
        """Whether every character certainly has an id, as far as that is known without encoding the text."""
        return False

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one token, perhaps only some of a character's.

        Raises:
            InputError: There is no such id.
        """

    def spelled(self, token: int) -> str:
        """Return one token as text; a part of a character as `bytes:\\xe2`, so that no two tokens are alike.

        Raises:
            InputError: There is no such id.
        """
        raw = self.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: There is no such id.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    @classmethod
    def boundary(cls, text: str) -> int:
        """Return the last position at which the text may be cut without changing any id.

        The ids of both sides, encoded separately, are those of the whole, whatever follows the text. This
        holds for tokenizers that start a new token at the space, line end or full stop after a word; others
        override it.

        Returns:
            An index into the text; 0 if there is none.
        """
        from unicodedata import ucd_3_2_0

        for i in range(len(text) - 1, max(0, len(text) - _LOOK_BACK), -1):
            if text[i] in _STOPS and ucd_3_2_0.category(text[i - 1])[0] in "LN":
                return i
        return 0

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the content of `tokenizer.json`: `schema`, `kind`, and what the kind needs."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Make the tokenizer that `to_dict` described.

        Raises:
            CorruptError: `to_dict` cannot have returned this.
        """

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the JSON form, in hex: equal tokenizers have equal ones."""
        return hashlib.sha256(strictjson.canonical(self.to_dict())).hexdigest()

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Type of ids in bulk: uint16 up to a vocabulary of 65,536, else uint32."""
        import numpy as np

        return np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)


class StreamDecoder:
    """Decodes ids one at a time, holding back the bytes of an incomplete character.

    Args:
        tokenizer: The tokenizer of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Return the text that is complete after this token; often empty."""
        return self._decoder.decode(self._bytes(token))

    def flush(self) -> str:
        """Return what is held back, at the end of the ids."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


def load(kind: str) -> type[Tokenizer]:
    """Return the tokenizer class of a kind.

    Raises:
        InputError: There is no such kind.
    """
    module = discovery.load("tokenizers", kind)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Tokenizer) and value.kind == kind:
            return value
    raise AssertionError(f"quill/tokenizers/{kind}.py has no Tokenizer")


def read(data: dict[str, Any] | bytes | Path, *, origin: str = "tokenizer.json") -> Tokenizer:
    """Read a tokenizer from its JSON form.

    Args:
        data: The object, the bytes of the file, or the file.
        origin: Its source, for messages.

    Raises:
        CorruptError: It is not the JSON form of a tokenizer.
        InputError: A newer quill wrote it.
        NotFoundError: There is no such file.
    """
    if isinstance(data, Path):
        origin = str(data)
        data = strictjson.read(data, error=CorruptError)
    elif isinstance(data, bytes):
        data = strictjson.parse(data, origin=origin, error=CorruptError)
    if not isinstance(data, dict):
        raise CorruptError(f"'{origin}' is not a tokenizer", why="it is not a JSON object")
    schema, kind = data.get("schema"), data.get("kind")
    if type(schema) is int and schema > SCHEMA_VERSION:
        raise newer(f"'{origin}'", schema, SCHEMA_VERSION)
    if type(schema) is not int or schema < 1:
        raise CorruptError(f"'{origin}' is not a tokenizer", why=f"'schema' is {shorten(schema)}")
    if kind not in discovery.names("tokenizers"):
        raise CorruptError(
            f"'{origin}' is a tokenizer of kind {shorten(kind)}",
            why=f"the kinds are {', '.join(discovery.names('tokenizers'))}",
        )
    try:
        return load(kind).from_dict(data)
    except CorruptError as e:
        raise CorruptError(f"'{origin}' is not a {kind} tokenizer", why=str(e)) from None


def take(data: dict[str, Any], key: str, type_: type[Any]) -> Any:
    """Return one value of a tokenizer's JSON form, checking its type.

    Raises:
        CorruptError: It is missing or has another type.
    """
    value = data.get(key)
    if type(value) is not type_:
        raise CorruptError(f"'{key}' is not a {type_.__name__}")
    return value


def encodable(text: str, unknown: Unknown) -> str:
    """Refuse or skip lone surrogates, which have no UTF-8 form.

    Raises:
        InputError: There are some, and `unknown` is "error".
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        lone = [c for c in text if "\ud800" <= c <= "\udfff"]
        if unknown == "error":
            raise unknown_characters(lone, "lone surrogates are not characters") from None
        return "".join(c for c in text if not "\ud800" <= c <= "\udfff")
    return text


def unknown_characters(characters: Iterable[str], why: str, hint: str = 'unknown="skip"') -> InputError:
    """Return the error for characters without an id, naming each one once."""
    distinct = list(dict.fromkeys(characters))
    shown = ", ".join(f"{_show(c)} (U+{ord(c):04X})" for c in distinct[:_MOST_NAMED])
    more = f" and {len(distinct) - _MOST_NAMED} more" if len(distinct) > _MOST_NAMED else ""
    plural = "characters" if len(distinct) > 1 else "character"
    return InputError(f"unknown {plural} {shown}{more}", why=why, hint=hint)


def no_such_token(token: object, vocab_size: int) -> InputError:
    """Return the error for an id outside the vocabulary."""
    return InputError(f"no token has the id {shorten(token)}", why=f"ids go from 0 to {vocab_size - 1}")


def _show(character: str) -> str:
    return f"'{character}'" if character.isprintable() else ascii(character)
