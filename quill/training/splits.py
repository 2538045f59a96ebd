"""What a run trains on and is evaluated on: the splits of its dataset, or parts of the training split."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from quill.data.batches import check_length
from quill.evaluation import texts

if TYPE_CHECKING:
    from quill.data.dataset import Dataset
    from quill.data.shards import Shard


class Splits:
    """The tokens of a run. Nothing is read before it is used.

    Args:
        dataset: The dataset.
        holdout: Fraction of the training split, taken from its end, to evaluate on instead of the validation
            split, which is then not read; 0 for the validation split.

    Attributes:
        held_out: Number of tokens held out of the training split; None for the validation split.
        train_tokens: Number of tokens to train on.
        val_tokens: Number of tokens to evaluate on; 0 without a validation split.
    """

    def __init__(self, dataset: Dataset, holdout: float) -> None:
        self.dataset = dataset
        present = dataset.count("train")
        self.held_out = max(1, round(holdout * present)) if holdout else None
        self.train_tokens = present - (self.held_out or 0)
        self.val_tokens = dataset.count("val") if self.held_out is None else self.held_out

    @cached_property
    def train(self) -> Shard:
        """Ids to train on, (train_tokens,)."""
        return self.dataset.train.part(0, self.train_tokens) if self.held_out else self.dataset.train

    @cached_property
    def val(self) -> Shard:
        """Ids to evaluate on, (val_tokens,)."""
        if self.held_out is None:
            return self.dataset.val
        return self.dataset.train.part(self.train_tokens, self.train_tokens + self.held_out)

    @cached_property
    def val_bytes(self) -> int:
        """Length in UTF-8 of the text that all tokens of `val` but the first stand for."""
        if self.held_out is None:
            return texts.predicted_bytes(self.dataset, "val")
        return texts.count_bytes(self.dataset.tokenizer, self.val[1:])

    def check(self, block_size: int) -> None:
        """Refuse splits that are too short for a context length.

        Raises:
            InputError: With the number of tokens.
        """
        name = self.dataset.name
        check_length(self.train_tokens, block_size, "train", dataset=name)
        if self.held_out is not None:
            check_length(self.val_tokens, block_size, "held-out", dataset=name)
        elif self.dataset.settings["val_fraction"]:
            check_length(self.val_tokens, block_size, "validation", dataset=name)
