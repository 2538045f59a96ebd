"""What a run works on: its parent, its dataset, and the settings that follow from both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill.checkpoint.load import read_config, read_tokenizer
from quill.config.settings import DataConfig, RunConfig, TrainConfig
from quill.data import prepare, resolve
from quill.errors import InputError, NotFoundError
from quill.formats import importing
from quill.registry.folder import Folder
from quill.registry.store import Registry
from quill.training import finetune
from quill.training.splits import Splits

if TYPE_CHECKING:
    from quill.data.dataset import Dataset
    from quill.tokenizers.base import Tokenizer

_DERIVED = ("learning_rate", "muon_learning_rate")
_DEFAULTS = {name: field.default for name, field in TrainConfig.model_fields.items()}
# Fine-tuning at the rates of a first training forgets what the parent knows.
_FINE_TUNING_SHARE = 0.1
# Counting sorts all sequences of the text in memory.
_MAX_COUNTED = 100_000_000


@dataclass(frozen=True)
class Inputs:
    """A run's settings and data, which fit each other.

    Attributes:
        config: The settled config: every setting has the value it runs with.
        dataset: The prepared data.
        derived: Settings that were not given and follow from others, by dotted path.
        notes: What the user should know about them, a sentence each.
    """

    config: RunConfig
    dataset: Dataset
    derived: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @cached_property
    def tokens(self) -> Splits:
        """What the run trains on and is evaluated on."""
        return Splits(self.dataset, self.config.train.holdout)

    def adopt(self, ran: RunConfig) -> RunConfig:
        """The config with the derived settings that an earlier call of this run has chosen."""
        names = [path.removeprefix("train.") for path in self.derived]
        chosen = {name: getattr(ran.train, name) for name in names}
        return self.config.model_copy(update={"train": self.config.train.model_copy(update=chosen)})


def settle(
    config: RunConfig, data_root: Path, parent: Folder | None, on_data: prepare.Observer | None = None
) -> Inputs:
    """Prepare the dataset and complete the settings that depend on it.

    Args:
        config: The run as typed.
        data_root: Where prepared datasets are.
        parent: The model to start from, which gives shape and tokenizer.
        on_data: Receives the progress of preparing the data.

    Raises:
        InputError: The data is too short for the context, or does not fit the parent.
    """
    data, model = config.data, config.model
    known = None
    if parent is not None:
        known = read_tokenizer(parent)
        model = finetune.shape(model, read_config(parent).model, parent.reference)
        if data.tokenizer not in (None, known.kind):
            raise InputError(
                f"'data.tokenizer' = '{data.tokenizer}' is not the tokenizer of {parent.reference}",
                why=f"its weights belong to its own {known.kind} tokenizer",
                hint="leave data.tokenizer unset",
            )
        data = _with_tokenizer_of(data, known)
    dataset = resolve.ensure(data, data_root, on_data, tokenizer=known)
    tokens = dataset.tokenizer.vocab_size
    if parent is not None:
        model = model.model_copy(update={"vocab_size": max(model.vocab_size or 0, tokens)})
        if data.vocabulary is not None:
            data = data.model_copy(update={"vocabulary": list(dataset.tokenizer.to_dict()["vocabulary"])})
    elif model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": tokens})
    elif model.vocab_size < tokens:
        raise InputError(
            f"'model.vocab_size' = {model.vocab_size} is too small",
            why=f"the tokenizer of '{dataset.name}' has {tokens:,} tokens",
            hint="leave model.vocab_size unset",
        )
    splits = Splits(dataset, config.train.holdout)
    splits.check(model.block_size)
    if model.ngram:
        _check_ngram(model.ngram, model.shape().vocab_size, splits.train_tokens)
    data = data.model_copy(update={"tokenizer": dataset.tokenizer.kind, "unknown": config.data.unknown})
    train, notes = rates(config.train, fine_tuning=parent is not None)
    derived = frozenset(f"train.{name}" for name in _DERIVED if not _is_given(config.train, name))
    settled = config.model_copy(update={"data": data, "model": model, "train": train})
    return Inputs(settled, dataset, derived, notes)


def _check_ngram(context: int, vocab_size: int, tokens: int) -> None:
    """Refuse n-grams that cannot be counted in memory or coded as 64-bit numbers."""
    if tokens > _MAX_COUNTED:
        raise InputError(
            "'model.ngram' is for small texts",
            why=f"the training split has {tokens:,} tokens; at most {_MAX_COUNTED:,} are counted",
            hint="set model.ngram=0",
        )
    longest = longest_ngram(vocab_size, tokens)
    if context > longest:
        raise InputError(
            f"'model.ngram' = {context} is too many",
            why=f"of a vocabulary of {vocab_size:,} tokens and a text of {tokens:,}, at most {longest} fit",
            hint=f"set model.ngram={max(0, longest)}",
        )


def longest_ngram(vocab_size: int, tokens: int) -> int:
    """The most tokens of context that can be counted: with the next one they are coded as a 64-bit number."""
    return min(int(62 / math.log2(max(2, vocab_size))) - 1, tokens - 2)


def rates(train: TrainConfig, *, fine_tuning: bool) -> tuple[TrainConfig, tuple[str, ...]]:
    """Derive the learning rates that were not given: lower for fine-tuning, Muon's after AdamW's.

    Returns:
        The settings, and a sentence for each derived rate that is not the default.
    """
    chosen: dict[str, float] = {}
    notes = []
    rate = train.learning_rate
    lower = float(f"{_FINE_TUNING_SHARE * _DEFAULTS['learning_rate']:.6g}")
    if fine_tuning and not _is_given(train, "learning_rate") and train.min_lr <= lower:
        rate = chosen["learning_rate"] = lower
        notes.append(f"fine-tuning at a learning rate of {lower:g}, a tenth of the default for a new model")
    if train.optimizer == "muon" and not _is_given(train, "muon_learning_rate"):
        # The scale match_rms_adamw is made for AdamW's own rate.
        is_alike = train.muon_scale == "match_rms_adamw"
        base = _DEFAULTS["learning_rate" if is_alike else "muon_learning_rate"]
        muon = min(100.0, float(f"{rate / _DEFAULTS['learning_rate'] * base:.6g}"))
        if muon != train.muon_learning_rate:
            chosen["muon_learning_rate"] = muon
            follows = "the same as learning_rate" if is_alike else "in proportion to learning_rate"
            notes.append(f"Muon's learning rate is {muon:g}, {follows}")
    return train.model_copy(update=chosen), tuple(notes)


def parent_of(
    config: RunConfig, registry: Registry, notice: Callable[[str], None] = lambda message: None
) -> Folder | None:
    """The model that a run starts from, downloaded first if it is on the Hub.

    A run with a resume state no longer needs its parent. If that is gone, the draft stands in for it: it has
    the same shape and tokenizer. A run that starts from its own name has no parent the first time.

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
        status = draft.status() if draft is not None and draft.states() else None
        if status is not None and status["parent"]:
            return draft
        if config.train.init_from != config.name:
            raise
        notice(f"there is no version of {config.name} yet: training starts from random weights")
        return None


def _is_given(train: TrainConfig, name: str) -> bool:
    return name in train.model_fields_set


def _with_tokenizer_of(data: DataConfig, known: Tokenizer) -> DataConfig:
    """Data settings that encode a text with the parent's tokenizer."""
    own: dict[str, Any] = {"tokenizer": known.kind, "vocab_size": None, "vocabulary": None}
    if known.learns == "characters":
        own["vocabulary"] = list(known.to_dict()["vocabulary"])
        own["unknown"] = data.unknown or "add"
    return data.model_copy(update=own)
