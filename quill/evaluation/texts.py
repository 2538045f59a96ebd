"""The texts that models are evaluated on, as tokens of each model."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from quill.errors import InputError

if TYPE_CHECKING:
    from quill.checkpoint.load import Checkpoint
    from quill.data.batches import Tokens
    from quill.data.dataset import Dataset, Split
    from quill.data.prepare import Observer
    from quill.tokenizers.base import Tokenizer

Unknown = Literal["error", "skip"]


class Text(NamedTuple):
    """A text that a model is evaluated on.

    Attributes:
        name: The name of the data, for tables.
        tokens: Ids of the model's own tokenizer, (n,).
        n_bytes: Length in UTF-8 of the text that tokens[1:] stand for.
    """

    name: str
    tokens: Tokens
    n_bytes: int


class Training(NamedTuple):
    """The text that a model was trained on.

    Attributes:
        name: The name of the data, for tables.
        train: The training split.
        val: The validation split; empty without one.
    """

    name: str
    train: str
    val: str


def find(
    checkpoint: Checkpoint,
    data: str | None,
    split: Split | None,
    root: Path,
    *,
    unknown: Unknown = "error",
    observer: Observer | None = None,
) -> Text:
    """Find the text to evaluate a model on, preparing it if necessary.

    Args:
        checkpoint: The model.
        data: A dataset, a named source, or files; the dataset that the model was trained on if None.
        split: The split of a dataset; "val" if None.
        root: The folder of prepared datasets.
        unknown: What to do with characters that have no token.
        observer: Receives the progress of preparing.

    Raises:
        InputError: There is no such split, or a character of the text has no token.
        NotFoundError: There is no such data.
    """
    found = _source(checkpoint, data, root, observer)
    if not isinstance(found, str):
        return _of_dataset(checkpoint, found, split or "val", unknown)
    if split is not None:
        raise InputError(
            f"'{data}' has no {split} split",
            why="it is a text, which is evaluated whole",
            hint=f"quill prepare {shlex.quote(str(data))} --name my-text",
        )
    return _encode(checkpoint, found, str(data), unknown)


def training(
    checkpoint: Checkpoint, data: str | None, root: Path, *, observer: Observer | None = None
) -> Training:
    """Find the text that a model was trained on.

    Args:
        checkpoint: The model.
        data: Another dataset, named source or text to take for it; a text has no validation split.
        root: The folder of prepared datasets.
        observer: Receives the progress of preparing.

    Raises:
        InputError: The model was imported, so its text is not known.
        NotFoundError: There is no such data.
    """
    found = _source(checkpoint, data, root, observer)
    if isinstance(found, str):
        return Training(str(data), found, "")
    return Training(found.name, _decode(found.tokenizer, found.train), _decode(found.tokenizer, found.val))


def _source(checkpoint: Checkpoint, data: str | None, root: Path, observer: Observer | None) -> Dataset | str:
    """The dataset that is meant, or the text of files that are none."""
    from quill.data import named_sources, resolve, sources
    from quill.data.dataset import MANIFEST, Dataset

    reference, settings = checkpoint.version.reference, checkpoint.config.data
    if data is None:
        if checkpoint.version.manifest is not None and checkpoint.version.facts["data"] is None:
            raise InputError(
                f"{reference} has no dataset",
                why="it was imported",
                hint=f"quill eval {reference} --data TEXT",
            )
        return resolve.ensure(settings, root, observer)
    if "/" not in data and os.path.lexists(root / data / MANIFEST):
        return Dataset.open(root / data)
    if data in named_sources.NAMED:
        # The text is the same whichever tokenizer prepared it.
        return resolve.ensure(settings.model_copy(update={"source": data}), root, observer)
    with sources.find(data, root) as found:
        return "".join(chunk.joined() for chunk in found.chunks("reading"))


def encode(tokenizer: Tokenizer, text: str, unknown: Unknown = "error") -> tuple[Tokens, int]:
    """Encode a text, and count the bytes that all tokens but the first stand for.

    Args:
        tokenizer: The model's own.
        text: Any text.
        unknown: What to do with characters that have no token; skipped ones do not count as bytes.

    Raises:
        InputError: A character has no token, and `unknown` is "error".
    """
    if unknown == "skip":
        ids = tokenizer.encode(text, unknown=unknown)
        n_bytes = sum(len(tokenizer.token_bytes(i)) for i in ids[1:])
        return np.array(ids, dtype=tokenizer.dtype), n_bytes
    tokens = tokenizer.encode_array(text)
    return tokens, len(text.encode()) - _first_bytes(tokenizer, tokens)


def predicted_bytes(dataset: Dataset, split: Split) -> int:
    """Count the UTF-8 bytes that all tokens of a split but the first stand for: those that are predicted."""
    return dataset.count(split, "bytes") - _first_bytes(dataset.tokenizer, dataset.split(split))


def count_bytes(tokenizer: Tokenizer, tokens: Tokens) -> int:
    """Count the UTF-8 bytes that tokens stand for."""
    counts = np.bincount(np.asarray(tokens[:]))
    return sum(
        int(counts[i]) * len(tokenizer.token_bytes(i))
        for i in np.flatnonzero(counts).tolist()
        if i != tokenizer.eot_id
    )


def _of_dataset(checkpoint: Checkpoint, dataset: Dataset, split: Split, unknown: Unknown) -> Text:
    if not dataset.count(split):
        raise InputError(
            f"dataset '{dataset.name}' has no {'validation' if split == 'val' else 'training'} split",
            why=f"it was prepared with val_fraction {dataset.settings['val_fraction']}",
            hint="split=train" if split == "val" else "",
        )
    name = f"{dataset.name}/{split}"
    tokens, tokenizer = dataset.split(split), dataset.tokenizer
    if tokenizer.fingerprint == checkpoint.tokenizer.fingerprint:
        return Text(name, tokens, predicted_bytes(dataset, split))
    return _encode(checkpoint, _decode(tokenizer, tokens), name, unknown)


def _decode(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """The text of a split; documents are joined by newlines, as without an end-of-text token."""
    ids = np.asarray(tokens[:])
    if tokenizer.eot_id is None:
        return tokenizer.decode(ids.tolist())
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    starts = [0, *(ends + 1)]
    return "\n".join(
        tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, [*ends, len(ids)], strict=True)
    )


def _encode(checkpoint: Checkpoint, text: str, name: str, unknown: Unknown) -> Text:
    try:
        return Text(name, *encode(checkpoint.tokenizer, text, unknown))
    except InputError as e:
        raise InputError(
            f"{checkpoint.version.reference} cannot encode '{name}': {e.what}",
            why=e.why,
            hint='unknown="skip"',
        ) from None


def _first_bytes(tokenizer: Tokenizer, tokens: Tokens) -> int:
    """Bytes of the first token, which is never a target."""
    return sum(len(tokenizer.token_bytes(i)) for i in tokens[:1].tolist() if i != tokenizer.eot_id)
