"""Settings and data that fit each other: the text prepared, the vocabulary filled in, lengths checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill.config.settings import DataConfig, RunConfig
from quill.data import prepare
from quill.data.batches import check_length
from quill.errors import InputError
from quill.registry import checkpoint
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.data.shards import Dataset


def settle(
    config: RunConfig, data_root: Path, parent: Version | None, on_data: prepare.Observer | None = None
) -> tuple[RunConfig, Dataset]:
    """Settings and data that fit each other: the dataset prepared, the vocabulary filled in.

    Args:
        config: What was asked for.
        data_root: Where prepared datasets are.
        parent: The model to start from; its shape and tokenizer are taken over.
        on_data: Told of progress while data is prepared.

    Raises:
        InputError: The data is too short for the context, or does not fit the parent.
    """
    data, model = config.data, config.model
    if parent is not None:
        known = checkpoint.read_tokenizer(parent)
        model = checkpoint.read_config(parent).model.model_copy(update={"dropout": model.dropout})
        data = _with_tokenizer_of(data, known.to_dict(), parent)
    dataset = prepare.resolve(data, data_root, on_data)
    if parent is not None and dataset.tokenizer.fingerprint != known.fingerprint:
        raise InputError(
            f"'{dataset.name}' was prepared with another tokenizer than {parent.reference}'s",
            why=f"{dataset.tokenizer.kind} against {known.kind}, or other text behind the same kind",
            hint="prepare the text with the model's own tokenizer",
        )
    tokens = dataset.tokenizer.vocab_size
    if model.vocab_size is None or parent is not None:
        model = model.model_copy(update={"vocab_size": model.vocab_size or tokens})
    if model.vocab_size is not None and model.vocab_size < tokens:
        raise InputError(
            f"'model.vocab_size' = {model.vocab_size} is too small",
            why=f"the tokenizer of '{dataset.name}' has {tokens:,} tokens",
            hint="leave it unset",
        )
    check_length(dataset.count("train"), model.block_size, "train", dataset=dataset.name)
    if data.val_fraction and dataset.count("train"):
        check_length(dataset.count("val"), model.block_size, "validation", dataset=dataset.name)
    data = data.model_copy(update={"tokenizer": dataset.tokenizer.kind})
    return config.model_copy(update={"data": data, "model": model}), dataset


def _with_tokenizer_of(data: DataConfig, known: dict[str, Any], parent: Version) -> DataConfig:
    """Have the text prepared with the parent's characters rather than with its own."""
    if known.get("kind") == "char" and data.tokenizer in (None, "char"):
        return data.model_copy(update={"tokenizer": "char", "vocabulary": list(known["vocabulary"])})
    return data if data.tokenizer else data.model_copy(update={"tokenizer": known.get("kind")})
