"""The vocabulary of a checkpoint that has none in it: what lies beside it, or what a person gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from quill import discovery, fsio
from quill.errors import CorruptError, InputError, NotFoundError
from quill.formats.torch_files.sandbox import read_plain
from quill.tokenizers import base
from quill.tokenizers.char import CharTokenizer

_PIECE = 1 << 20


def given(wanted: str, rows: int) -> base.Tokenizer:
    """The tokenizer that `--tokenizer` names, held against a model's embedding.

    Args:
        wanted: The name of a published tokenizer (gpt2), a tokenizer.json, a meta.pkl, or the text whose
            sorted characters are the vocabulary.
        rows: How many tokens the model has.

    Raises:
        NotFoundError: There is neither such a name nor such a file.
        InputError: It is the vocabulary of another model.
        CorruptError: It is damaged, or not safe to read.
        ResourceError: It cannot be read, or the published ranks cannot be had.
    """
    path = fsio.expanded(wanted)
    if wanted in published():
        return _fits(published_tokenizer(wanted), rows, wanted, exactly=False)
    if not path.is_file():
        raise NotFoundError(
            f"no tokenizer '{wanted}'",
            why=f"it is neither a file nor one of {', '.join(published())}",
            hint="give a meta.pkl, a tokenizer.json, or the text that the model was trained on",
        )
    if path.suffix == ".json":
        return _fits(base.read(path), rows, wanted, exactly=False)
    if path.suffix == ".pkl":
        return _fits(from_meta(path), rows, wanted, exactly=True)
    return _fits(from_text(path), rows, wanted, exactly=True)


def published() -> tuple[str, ...]:
    """The tokenizers that need no file, because they learn nothing from a text."""
    return tuple(n for n in discovery.names("tokenizers") if base.load(n).learns == "nothing")


def published_tokenizer(name: str) -> base.Tokenizer:
    """One of `published`."""
    return base.load(name).train([])


def from_meta(path: Path) -> CharTokenizer:
    """The vocabulary in nanoGPT's meta.pkl: {vocab_size, stoi: {character: id}, itos: {id: character}}.

    Raises:
        FileNotFoundError: There is none.
        CorruptError: It is damaged, not safe to read, or holds something else.
    """
    meta = read_plain(path)
    if not isinstance(meta, dict) or not isinstance(meta.get("itos"), dict):
        raise CorruptError(f"'{path}' holds no vocabulary", why="it has no table 'itos'")
    itos, stoi = meta["itos"], meta.get("stoi")
    mirrored = isinstance(stoi, dict) and itos == {i: c for c, i in stoi.items() if type(i) is int}
    if not mirrored or len(stoi or ()) != len(itos) or set(itos) != set(range(len(itos))):
        why = "its tables itos and stoi do not give every id from 0 up to one character and back"
        raise CorruptError(f"'{path}' holds no vocabulary", why=why)
    return characters([itos[i] for i in range(len(itos))], str(path))


def from_text(path: Path) -> CharTokenizer:
    """The distinct characters of a text, sorted, with every line end as one newline, as Python reads text."""
    seen: set[str] = set()
    try:
        with fsio.guard(path, "read"), open(path, encoding="utf-8") as file:
            while piece := file.read(_PIECE):
                seen.update(piece)
    except UnicodeDecodeError as e:
        why = f"byte {e.start} of a piece is {e.object[e.start]:#04x}"
        raise InputError(f"'{path}' is not UTF-8", why=why, hint="give the text itself") from None
    return characters(sorted(seen), str(path))


def characters(vocabulary: list[Any], origin: str) -> CharTokenizer:
    """A char tokenizer of characters in the order of their ids.

    Args:
        vocabulary: What was read as such.
        origin: Where, for messages.

    Raises:
        CorruptError: It is not one character an entry, each once.
    """
    if not all(isinstance(c, str) for c in vocabulary):
        raise CorruptError(f"'{origin}' holds no vocabulary", why="an entry of it is no text")
    try:
        return CharTokenizer.train([], vocabulary=vocabulary)
    except InputError as e:
        raise CorruptError(f"'{origin}' holds no vocabulary of characters", why=e.why) from None


def meta(tokenizer: base.Tokenizer) -> dict[str, Any]:
    """What nanoGPT keeps of a char tokenizer."""
    vocabulary = tokenizer.to_dict()["vocabulary"]
    return {
        "vocab_size": len(vocabulary),
        "itos": dict(enumerate(vocabulary)),
        "stoi": {c: i for i, c in enumerate(vocabulary)},
    }


def shown(place: Path, checkpoint: Path) -> str:
    """Where a file was found, from the checkpoint's folder: without the folders of this machine."""
    return Path(os.path.relpath(place, checkpoint.parent)).as_posix()


def _fits(tokenizer: base.Tokenizer, rows: int, origin: str, *, exactly: bool) -> base.Tokenizer:
    size = tokenizer.vocab_size
    if size > rows or (exactly and size != rows):
        raise InputError(
            f"'{origin}' is not the vocabulary of this model",
            why=f"it has {size:,} tokens, the model {rows:,}",
            hint="give the one that it was trained with",
        )
    return tokenizer
