"""The files of a dataset: made of a text, or shared with an equal dataset that is there already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio, strictjson
from quill.data import encode, sources
from quill.data.store import TOKENIZER, Dataset
from quill.data.survey import Survey
from quill.errors import InputError
from quill.tokenizers import base

if TYPE_CHECKING:
    from quill.tokenizers.base import Ids


def build(
    staged: Path,
    text: sources.Text,
    survey: Survey,
    settings: dict[str, Any],
    *,
    tokenizer: base.Tokenizer | None,
    stored: Iterable[Dataset],
    workers: int | None,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Learn the tokenizer, encode both splits and write them.

    Args:
        staged: An empty folder.
        text: The text.
        survey: What its first reading told.
        settings: The dataset's settings, by their names in DataConfig.
        tokenizer: What to encode with; None: one is learnt, or found.
        stored: Datasets whose tokenizers may be used again.
        workers: Threads that encode.
        notice: Told of what is otherwise than was asked for.

    Returns:
        What the manifest says of the files.

    Raises:
        InputError: The text changed since it was surveyed, or does not allow the tokenizer.
        ResourceError: The disk does not take it.
    """
    tokenizer = tokenizer or _tokenizer(text, survey, settings, stored, notice)
    width = tokenizer.dtype.itemsize
    one_each = tokenizer.learns == "characters"
    # A byte-pair token is some four bytes of text.
    needed = survey.characters * width if one_each else survey.bytes * width // 4
    fsio.require_space(staged, needed, "the tokens")
    at = cut(survey.characters, settings["val_fraction"])
    reading = encode.Reading(text, at, "encoding")
    files: dict[str, dict[str, Any]] = {}
    splits: dict[str, dict[str, int]] = {}
    for split, blocks in (("train", reading.first()), ("val", reading.second())):
        counted = _Counted(encode.encode(blocks, tokenizer, workers=workers))
        try:
            sha256 = fsio.write_chunks(staged / f"{split}.bin", counted, durable=False)
        except InputError:
            # What passed the first reading fails now because it is another text.
            text.require_unchanged()
            raise
        files[f"{split}.bin"] = {"bytes": counted.n * width, "sha256": sha256}
        splits[split] = {"tokens": counted.n}
    if reading.sha256 != survey.sha256:
        raise sources.changed(text.names[0])
    splits["train"] |= {"bytes": reading.bytes[0], "characters": at}
    splits["val"] |= {"bytes": reading.bytes[1], "characters": survey.characters - at}
    raw = strictjson.dumps(tokenizer.to_dict()).encode()
    files[TOKENIZER] = {"bytes": len(raw), "sha256": fsio.write_bytes(staged / TOKENIZER, raw, durable=False)}
    return {
        "source": {"documents": survey.documents, "bytes": survey.bytes, "sha256": survey.sha256},
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.fingerprint,
        },
        "dtype": tokenizer.dtype.name,
        "splits": splits,
        "files": files,
    }


def link(staged: Path, same: Dataset) -> dict[str, Any]:
    """Give the files of an equal dataset a second name, or copy them where that cannot be.

    Args:
        staged: An empty folder on the same file system.
        same: The dataset.

    Returns:
        What the manifest says of the files.
    """
    for name in same.manifest["files"]:
        try:
            os.link(same.path / name, staged / name)
        except OSError:
            fsio.write_chunks(staged / name, _stretches(same.path / name), durable=False)
    facts = {k: same.manifest[k] for k in ("tokenizer", "dtype", "splits", "files")}
    return {"source": dict(same.manifest["source"]), **facts}


def cut(characters: int, val_fraction: float) -> int:
    """Characters of the training split, as nanoGPT counts them: int(n * 0.9)."""
    return int(characters * (1 - val_fraction))


def _tokenizer(
    text: sources.Text,
    survey: Survey,
    settings: dict[str, Any],
    stored: Iterable[Dataset],
    notice: Callable[[str], None],
) -> base.Tokenizer:
    kind = base.load(settings["tokenizer"])
    vocab_size, vocabulary = settings["vocab_size"], settings["vocabulary"]
    if kind.learns == "nothing":
        # One that was stored with another dataset needs no network.
        known = (d for d in stored if d.manifest["tokenizer"]["kind"] == kind.kind)
        if vocab_size is None and vocabulary is None and (dataset := next(known, None)):
            return dataset.tokenizer
    texts = [survey.alphabet] if kind.learns == "characters" else _lessons(text, survey.characters, kind)
    tokenizer = kind.train(texts, vocab_size=vocab_size, vocabulary=vocabulary)
    if vocab_size and tokenizer.vocab_size < vocab_size:
        notice(
            f"the vocabulary has {tokenizer.vocab_size:,} tokens, not {vocab_size:,}: "
            "this text has no more to learn"
        )
    return tokenizer


def _lessons(text: sources.Text, characters: int, kind: type[base.Tokenizer]) -> Iterator[str]:
    """What a tokenizer learns from: all of the text, or as much as it takes, evenly spread."""
    share = min(1.0, (kind.learn_chars or characters) / characters)
    for i, unit in enumerate(encode.units(text.blocks("learning"), kind.boundary, joined=True)):
        if int((i + 1) * share) > int(i * share):
            yield from (part for part in unit if part is not None)


def _stretches(path: Path) -> Iterator[bytes]:
    with fsio.guard(path, "read"), open(path, "rb", buffering=0) as file:
        while data := file.read(1 << 22):
            yield data


class _Counted:
    """Arrays passed on, and how many ids they held."""

    def __init__(self, arrays: Iterator[Ids]) -> None:
        self._arrays = arrays
        self.n = 0

    def __iter__(self) -> Iterator[Ids]:
        for array in self._arrays:
            self.n += len(array)
            yield array
