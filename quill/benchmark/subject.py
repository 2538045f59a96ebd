"""What is measured: a model of a config's shape, on the text that comes with quill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quill.config.settings import DataConfig, RunConfig, TrainConfig
from quill.data.dataset import Dataset
from quill.model.gpt import GPT
from quill.registry.folder import Folder
from quill.training import autotune, memory
from quill.training.device import Device, find_device
from quill.training.inputs import settle

TEXT = "harpoon"


@dataclass(frozen=True)
class Subject:
    """A model, and what it trains on.

    Attributes:
        config: The settled config.
        model: With random weights, on the device; speed does not depend on them.
        dataset: The text in the tokens of its tokenizer.
        device: Where it runs, and in which precision.
        step: The settings of the training step that is timed: as many sequences of a batch as can be timed.
    """

    config: RunConfig
    model: GPT
    dataset: Dataset
    device: Device
    step: TrainConfig

    @property
    def passes(self) -> float:
        """How many times the sequences that are timed go into a step of the config."""
        c = self.config.train
        return c.batch_size * c.gradient_accumulation_steps / self.step.batch_size


def load(config: RunConfig, version: Folder | None, data_root: Path) -> Subject:
    """Build what is measured.

    Args:
        config: The run whose shape and settings are measured; its data, parent and teachers are not used.
        version: A model whose tokenizer is used; None for that of the config.
        data_root: An empty folder for the dataset.

    Raises:
        InputError: The model does not fit in memory, or its context is longer than the text.
    """
    data = config.data
    unknown: Literal["skip"] | None = "skip" if data.vocabulary is not None or version is not None else None
    own = DataConfig(
        source=TEXT,
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        vocabulary=data.vocabulary,
        unknown=unknown,
    )
    # Trying whether compiling pays takes minutes.
    compiled = "on" if config.train.compile == "on" else "off"
    unused: dict[str, Any] = {"init_from": None, "teacher": [], "holdout": 0.0, "compile": compiled}
    train = config.train.model_copy(update=unused)
    model, rows = config.model, config.model.vocab_size
    if version is None:
        # The text may have more tokens than the config's own.
        model = model.model_copy(update={"vocab_size": None})
    measured = config.model_copy(update={"data": own, "model": model, "train": train})
    inputs = settle(measured, data_root, version)
    model = inputs.config.model
    model = model.model_copy(update={"vocab_size": max(rows or 0, model.vocab_size or 0)})
    settled = inputs.config.model_copy(update={"model": model})
    name = find_device(train.device)
    memory.check(settled, name)
    gpt = GPT(settled.model.shape(), train.seed).to(name)
    step = autotune.share_of(gpt, settled.train)
    chosen = autotune.choose(gpt, settled.model_copy(update={"train": step}), inputs.dataset, name)
    return Subject(settled, gpt, inputs.dataset, chosen, step)
