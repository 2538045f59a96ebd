"""Starting from another model: its shape is kept, its weights are copied, new characters get rows."""

from __future__ import annotations

import torch
from torch import Tensor

from quill.config.settings import ModelConfig
from quill.errors import InputError
from quill.model.gpt import GPT

# Tensors with a row for each token of the vocabulary.
_TABLES = ("wte.weight", "lm_head.weight", "lm_head.bias")
# Neither changes a tensor of the network, so each run may choose its own.
_FREE = frozenset({"dropout", "ngram"})


def shape(asked: ModelConfig, parent: ModelConfig, reference: str) -> ModelConfig:
    """The model settings of a run that starts from a parent.

    Args:
        asked: As typed; sizes that were not given follow the parent.
        parent: The parent's own.
        reference: The parent, for messages.

    Raises:
        InputError: A given setting would make another model; a shorter context length is possible.
    """
    names = [n for n in ModelConfig.model_fields if n in asked.model_fields_set - _FREE]
    given = {name: getattr(asked, name) for name in names}
    crop = given.get("block_size", parent.block_size) <= parent.block_size
    other = {
        name: value
        for name, value in given.items()
        if value != getattr(parent, name) and not (name == "block_size" and crop)
    }
    if other:
        told = [f"'model.{name}' = {value}" for name, value in other.items()]
        has = ", ".join(f"model.{name}={getattr(parent, name)}" for name in other)
        raise InputError(
            f"{', '.join(told)} cannot be set for a model that starts from {reference}",
            why=f"its weights have {has}" + ("" if crop else "; a context length can only be cropped"),
            hint=f"leave {', '.join(f'model.{name}' for name in other)} unset",
        )
    kept = {"dropout": asked.dropout, "block_size": given.get("block_size", parent.block_size)}
    if "ngram" in asked.model_fields_set:
        kept["ngram"] = asked.ngram
    return parent.model_copy(update=kept)


@torch.no_grad()
def copy_weights(parent: GPT, model: GPT, known: int, tokens: int) -> None:
    """Copy a parent's weights into a model that may have a larger vocabulary or a shorter context.

    The row of a new token starts as the mean of the rows of all known tokens.

    Args:
        parent: The trained model.
        model: The model to fill, of the same shape otherwise.
        known: Number of tokens in the parent's vocabulary; its rows beyond that are padding.
        tokens: Number of tokens in the new vocabulary.
    """
    source = parent.network().state_dict()
    for name, target in model.network().state_dict().items():
        values = source[name]
        if name in _TABLES and tokens > known:
            values = _with_new_rows(values, target.shape[0], known, tokens)
            if values.shape != target.shape:  # a bigram table also has a column for each token
                values = _with_new_rows(values.T, target.shape[1], known, tokens).T
        elif target.shape != values.shape:
            values = values[: target.shape[0]]  # learned positions, cropped
        target.copy_(values)


def _with_new_rows(values: Tensor, rows: int, known: int, tokens: int) -> Tensor:
    grown = values.new_empty((rows, *values.shape[1:]))
    grown[: len(values)] = values
    grown[known:tokens] = values[:known].mean(dim=0)
    return grown
