"""The vocabulary of a checkpoint that does not contain it: found in another file, or supplied by the user."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from quill import discovery, fsio
from quill.errors import CorruptError, InputError, NotFoundError
from quill.formats.torch_files.sandbox import read_plain
from quill.tokenizers import base
from quill.tokenizers.char import CharTokenizer

_CHUNK = 1 << 20


def given(wanted: str, rows: int) -> base.Tokenizer:
    """The tokenizer that the user supplied, checked against a model's embedding.

    Args:
        wanted: A published tokenizer (gpt2), a tokenizer.json, a meta.pkl, or the text whose sorted
            characters are the vocabulary.
        rows: The number of tokens that the model has.

    Raises:
        NotFoundError: It is neither the name of a tokenizer nor a file.
        InputError: It is the vocabulary of another model.
        CorruptError: It is damaged, or not safe to read.
        ResourceError: It cannot be read, or the published ranks cannot be downloaded.
    """
    path = fsio.expanded(wanted)
    if wanted in published():
        tokenizer, exact = published_tokenizer(wanted), False
    elif not path.is_file():
        raise NotFoundError(
            f"no tokenizer '{wanted}'",
            why=f"it is neither a file nor one of {', '.join(published())}",
            hint="pass a meta.pkl, a tokenizer.json, or the text that the model was trained on",
        )
    elif path.suffix == ".json":
        tokenizer, exact = base.read(path), False
    elif path.suffix == ".pkl":
        tokenizer, exact = from_meta(path), True
    else:
        tokenizer, exact = from_text(path), True
    size = tokenizer.vocab_size
    if size > rows or (exact and size != rows):
        raise InputError(
            f"'{wanted}' is not the vocabulary of this model",
            why=f"it has {size:,} tokens; the model has {rows:,}",
            hint="pass the vocabulary that the model was trained with",
        )
    return tokenizer


def hint(path: Path) -> str:
    """What to do for a checkpoint whose vocabulary is missing: pass the text next to it, if there is one."""
    text = path.parent / "input.txt"
    if text.is_file() and '"' not in str(text):
        return f'tokenizer="{text}"'
    return "pass the text that the model was trained on, or its meta.pkl, as tokenizer="


def published() -> tuple[str, ...]:
    """The tokenizers that need no file, because they are not trained."""
    return tuple(n for n in discovery.names("tokenizers") if base.load(n).learns == "nothing")


def published_tokenizer(name: str) -> base.Tokenizer:
    """One of `published`."""
    return base.load(name).train([])


def from_meta(path: Path) -> CharTokenizer:
    """The vocabulary in nanoGPT's meta.pkl: {vocab_size, stoi: {character: id}, itos: {id: character}}.

    Raises:
        FileNotFoundError: It does not exist.
        CorruptError: It is damaged, not safe to read, or contains something else.
    """
    meta = read_plain(path)
    if not isinstance(meta, dict) or not isinstance(meta.get("itos"), dict):
        raise CorruptError(f"'{path}' is not a vocabulary", why="it has no table 'itos'")
    itos, stoi = meta["itos"], meta.get("stoi")
    mirrored = isinstance(stoi, dict) and itos == {i: c for c, i in stoi.items() if type(i) is int}
    if not mirrored or len(stoi or ()) != len(itos) or set(itos) != set(range(len(itos))):
        why = "its tables itos and stoi do not map every id from 0 up to one character and back"
        raise CorruptError(f"'{path}' is not a vocabulary", why=why)
    return characters([itos[i] for i in range(len(itos))], str(path))


def to_meta(tokenizer: base.Tokenizer) -> dict[str, Any]:
    """What nanoGPT's meta.pkl contains for a char tokenizer."""
    vocabulary = tokenizer.to_dict()["vocabulary"]
    return {
        "vocab_size": len(vocabulary),
        "itos": dict(enumerate(vocabulary)),
        "stoi": {c: i for i, c in enumerate(vocabulary)},
    }


def from_text(path: Path) -> CharTokenizer:
    """The distinct characters of a text, sorted, with every line ending read as one newline."""
    seen: set[str] = set()
    try:
        with fsio.guard(path, "read"), open(path, encoding="utf-8") as file:
            while chunk := file.read(_CHUNK):
                seen.update(chunk)
    except UnicodeDecodeError as e:
        why = f"it contains the byte {e.object[e.start]:#04x} where a character starts"
        raise InputError(f"'{path}' is not UTF-8", why=why, hint="pass the text in UTF-8") from None
    return characters(sorted(seen), str(path))


def characters(vocabulary: list[Any], origin: str) -> CharTokenizer:
    """A char tokenizer of characters in the order of their ids.

    Args:
        vocabulary: The characters, as they were read.
        origin: Where they were read from, for messages.

    Raises:
        CorruptError: An entry is not one character, or is there twice.
    """
    if not all(isinstance(c, str) for c in vocabulary):
        raise CorruptError(f"'{origin}' is not a vocabulary", why="one of its entries is not a string")
    try:
        return CharTokenizer.train([], vocabulary=vocabulary)
    except InputError as e:
        raise CorruptError(f"'{origin}' is not a vocabulary of characters", why=e.why) from None


def relative(place: Path, checkpoint: Path) -> str:
    """Where a file was found, relative to the checkpoint's folder, without the folders of this computer."""
    return Path(os.path.relpath(place, checkpoint.parent)).as_posix()
