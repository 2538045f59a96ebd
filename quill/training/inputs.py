"""What a run works on: its parent, its dataset, and the settings that follow from both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill.checkpoint.load import read_config, read_tokenizer
from quill.config.settings import DataConfig, RunConfig
from quill.data import prepare
from quill.data.batches import check_length
from quill.errors import InputError, NotFoundError
from quill.formats import importing
from quill.registry.folder import Folder
from quill.registry.store import Registry

if TYPE_CHECKING:
    from quill.data.store import Dataset
    from quill.tokenizers.base import Tokenizer


def settle(
    config: RunConfig, data_root: Path, parent: Folder | None, on_data: prepare.Observer | None = None
) -> tuple[RunConfig, Dataset]:
    """Prepare the dataset and complete the settings that depend on it.

    Args:
        config: The run as typed.
        data_root: Where prepared datasets are.
        parent: The model to start from, which gives shape and tokenizer.
        on_data: Receives the progress of preparing the data.

    Returns:
        The settled config, with vocabulary size and tokenizer, and the dataset.

    Raises:
        InputError: The data is too short for the context, or does not fit the parent.
    """
    data, model = config.data, config.model
    known = None
    if parent is not None:
        known = read_tokenizer(parent)
        model = read_config(parent).model.model_copy(update={"dropout": model.dropout})
        if data.tokenizer not in (None, known.kind):
            raise InputError(
                f"'data.tokenizer' = '{data.tokenizer}' is not the tokenizer of {parent.reference}",
                why=f"its weights belong to its own {known.kind} tokenizer",
                hint="leave data.tokenizer unset",
            )
        data = _with_tokenizer_of(data, known)
    dataset = prepare.ensure(data, data_root, on_data, tokenizer=known)
    tokens = dataset.tokenizer.vocab_size
    if model.vocab_size is None or parent is not None:
        model = model.model_copy(update={"vocab_size": model.vocab_size or tokens})
    if model.vocab_size is not None and model.vocab_size < tokens:
        raise InputError(
            f"'model.vocab_size' = {model.vocab_size} is too small",
            why=f"the tokenizer of '{dataset.name}' has {tokens:,} tokens",
            hint="leave model.vocab_size unset",
        )
    check_length(dataset.count("train"), model.block_size, "train", dataset=dataset.name)
    if dataset.settings["val_fraction"]:
        check_length(dataset.count("val"), model.block_size, "validation", dataset=dataset.name)
    data = data.model_copy(update={"tokenizer": dataset.tokenizer.kind})
    return config.model_copy(update={"data": data, "model": model}), dataset


def parent_of(
    config: RunConfig, registry: Registry, notice: Callable[[str], None] = lambda message: None
) -> Folder | None:
    """The model that a run starts from, downloaded first if it is on the Hub.

    A run with a resume state no longer needs its parent. If that is gone, the draft stands in for it: it has
    the same shape and tokenizer.

    Args:
        config: The run.
        registry: Where models are.
        notice: Receives a sentence before a download.

    Returns:
        None if the run starts from random weights.

    Raises:
        NotFoundError: There is no such model.
    """
    if not config.train.init_from:
        return None
    try:
        return importing.ensure(config.train.init_from, registry, notice)
    except NotFoundError:
        draft = registry.unfinished(config.name) if config.name else None
        if draft is None or not draft.states():
            raise
        return draft


def _with_tokenizer_of(data: DataConfig, known: Tokenizer) -> DataConfig:
    """Data settings that encode a text with the parent's tokenizer."""
    own: dict[str, Any] = {"tokenizer": known.kind, "vocab_size": None, "vocabulary": None}
    if known.learns == "characters":
        own["vocabulary"] = list(known.to_dict()["vocabulary"])
    return data.model_copy(update=own)
