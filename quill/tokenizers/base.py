"""What every tokenizer is: text to ids and back, its own JSON form, and a fingerprint of it.

A tokenizer is one file in this folder holding one subclass of Tokenizer; the file's name is its kind.
Numpy and tiktoken are imported only where bulk work or a byte-pair encoder needs them, so that reading a
model's tokenizer to draw a few characters costs nothing.
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
from quill.errors import CorruptError, InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.unsignedinteger[Any]]

SCHEMA_VERSION = 1

Unknown = Literal["error", "skip"]

# After a letter or a digit, where every tokenizer here starts another token. Python's own view of
# Unicode is newer or older than that of a regex engine, so only what was a letter or a digit in
# Unicode 3.2 already counts.
_STOPS = frozenset(" \n。、，！？：；")
_LOOK_BACK = 65536
_NAMED_AT_MOST = 100


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        kind: The registered name, which is the name of the file that holds the class.
        learns: What training looks at: "nothing", the distinct "characters", or the whole "text".
        learn_chars: How much text training looks at, at the most, in characters; None is all of it.
        eot_id: Id of the token between documents, where there is one.
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
        """Number of ids: one more than the largest."""

    @classmethod
    @abstractmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int | None = None,
        vocabulary: Sequence[str] | None = None,
    ) -> Self:
        """Learn a tokenizer, or make the one there is.

        Args:
            texts: Pieces of the text, cut where `boundary` allows; read once. What learns from characters
                may be given the distinct ones alone.
            vocab_size: How many ids to learn, or at the most to keep.
            vocabulary: The characters in the order of their ids, where that is given and not learnt.

        Raises:
            InputError: A setting does not apply to this kind, or the text does not allow it.
        """

    @abstractmethod
    def encode(self, text: str, *, unknown: Unknown = "error") -> list[int]:
        """Text to ids. Special tokens written out in the text are plain text.

        Args:
            text: Any text.
            unknown: What to do with characters that have no id: refuse, or leave them out.

        Raises:
            InputError: Naming each character that has no id.
        """

    def encode_array(self, text: str) -> Ids:
        """Text to ids in bulk: the same ids as `encode`, as uint16 where they fit and uint32 otherwise."""
        import numpy as np

        return np.array(self.encode(text), dtype=self.dtype)

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token, which may be a part of a character.

        Raises:
            InputError: There is no such id.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD.

        Raises:
            InputError: There is no such id.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    @classmethod
    def boundary(cls, text: str) -> int:
        """Last place where the text may be cut and its parts encoded apart with no id changed.

        The text may go on after its end. Holds for whatever starts a new token at the space, line end or
        full stop after a word; a tokenizer that does not, or that can be cut anywhere, says so here.

        Returns:
            An index into the text; 0 where there is no such place.
        """
        from unicodedata import ucd_3_2_0

        for i in range(len(text) - 1, max(0, len(text) - _LOOK_BACK), -1):
            if text[i] in _STOPS and ucd_3_2_0.category(text[i - 1])[0] in "LN":
                return i
        return 0

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `tokenizer.json` holds: `schema`, `kind`, and what the kind needs."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The tokenizer whose `to_dict` this is.

        Raises:
            CorruptError: The object is not one that `to_dict` makes.
        """

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the JSON form: equal for tokenizers that give the same ids, in hex."""
        return hashlib.sha256(strictjson.canonical(self.to_dict())).hexdigest()

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """How ids are kept in bulk: uint16 up to 65536 of them, else uint32."""
        import numpy as np

        return np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)


class StreamDecoder:
    """Ids to text one at a time, holding back the bytes of a character that is not whole yet.

    Args:
        tokenizer: Whose ids they are.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that is certain once this token is known; often empty."""
        return self._decoder.decode(self._bytes(token))

    def flush(self) -> str:
        """What is still held back, at the end of the ids."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text


def load(kind: str) -> type[Tokenizer]:
    """The tokenizer class registered under a name.

    Raises:
        InputError: Nothing is registered under it.
    """
    module = discovery.load("tokenizers", kind)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Tokenizer) and value.kind == kind:
            return value
    raise AssertionError(f"quill/tokenizers/{kind}.py holds no Tokenizer")


def read(data: dict[str, Any] | bytes | Path, *, origin: str = "tokenizer.json") -> Tokenizer:
    """Read a tokenizer from its JSON form.

    Args:
        data: The object, the bytes of the file, or the file.
        origin: Where it came from, for messages.

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
        raise CorruptError(f"'{origin}' is not a tokenizer", why="a JSON object is needed")
    schema, kind = data.get("schema"), data.get("kind")
    if type(schema) is int and schema > SCHEMA_VERSION:
        raise InputError(
            f"'{origin}' is of schema {schema}",
            why=f"a newer quill wrote it; this one reads up to {SCHEMA_VERSION}",
            hint="upgrade quill",
        )
    if type(schema) is not int or schema < 1:
        raise CorruptError(f"'{origin}' is not a tokenizer", why=f"'schema' is {short(schema)}")
    if kind not in discovery.names("tokenizers"):
        raise CorruptError(
            f"'{origin}' holds a tokenizer of kind {short(kind)}",
            why=f"there is {', '.join(discovery.names('tokenizers'))}",
        )
    try:
        return load(kind).from_dict(data)
    except CorruptError as e:
        raise CorruptError(f"'{origin}' is not a {kind} tokenizer", why=str(e)) from None


def take(data: dict[str, Any], key: str, type_: type[Any]) -> Any:
    """One value of a tokenizer's JSON form, of exactly the type it must have.

    Raises:
        CorruptError: It is missing or of another type.
    """
    value = data.get(key)
    if type(value) is not type_:
        raise CorruptError(f"'{key}' is not a {type_.__name__}")
    return value


def encodable(text: str, unknown: Unknown) -> str:
    """The text without lone surrogates, which have no UTF-8 form and so no place in any vocabulary.

    Raises:
        InputError: There are some, and they are not to be left out.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        lone = [c for c in text if "\ud800" <= c <= "\udfff"]
        if unknown == "error":
            raise unknown_characters(lone, "lone surrogates are not characters") from None
        return "".join(c for c in text if not "\ud800" <= c <= "\udfff")
    return text


def unknown_characters(
    characters: Iterable[str], why: str, hint: str = "--unknown skip leaves them out"
) -> InputError:
    """The refusal of characters that have no id, naming each one once."""
    distinct = list(dict.fromkeys(characters))
    shown = ", ".join(f"{_show(c)} (U+{ord(c):04X})" for c in distinct[:_NAMED_AT_MOST])
    more = f" and {len(distinct) - _NAMED_AT_MOST} more" if len(distinct) > _NAMED_AT_MOST else ""
    plural = "characters" if len(distinct) > 1 else "character"
    return InputError(f"unknown {plural} {shown}{more}", why=why, hint=hint)


def short(value: object) -> str:
    """A value of somebody else's making, as a message may show it."""
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def no_such_token(token: object, vocab_size: int) -> InputError:
    """The refusal of an id beyond the vocabulary."""
    return InputError(f"no token has the id {token!r}", why=f"ids go from 0 to {vocab_size - 1}")


def _show(character: str) -> str:
    # What a terminal would act on, or has no form of its own, is shown as its escape.
    return f"'{character}'" if character.isprintable() else ascii(character)
