"""The settings of a run that reads a text so many times: the shipped configs as one rule.

`quill/docs/recipe.md` says what each number comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quill.config.settings import TrainConfig
from quill.training.inputs import longest_ngram

# Tokens that a run reads for each parameter, at least; parameters for each token of the text, at most.
TOKENS_PER_PARAMETER, PARAMETERS_PER_TOKEN = 1.0, 10.0
# A run that reads its text more often learns it by heart.
MOST_EPOCHS = 40
WIDTHS = (64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1600)
MOST_EVALUATIONS = 10
_HEAD_SIZE, _BLOCK_SIZE, _SHORTEST_BLOCK = 64, 256, 8
# A step of a run that reads S tokens has so many times sqrt(S) of them.
_TOKENS_OF_STEP = 2.5
# Weights remember about one reading of the text, and at least this share of the run.
_SHORTEST_MEMORY = 0.04
# Readings from which on so much is dropped.
_DROPOUT = {20: 0.2, 10: 0.15, 2: 0.1}
# Counts help a network that has read few tokens; they were tried on characters.
_NGRAM, NGRAM_TOKENS, _SMALL_VOCABULARY = 5, 10_000_000, 512
_WARMUP = 0.03


@dataclass(frozen=True)
class Recipe:
    """The settings of one run.

    Attributes:
        width: Width of the model.
        read: Tokens that the run reads.
        train_tokens: Tokens of the text to train on.
        val_tokens: Tokens to evaluate on; 0 without a validation split.
        vocab_size: Size of the tokenizer.
    """

    width: int
    read: float
    train_tokens: int
    val_tokens: int
    vocab_size: int

    @property
    def epochs(self) -> float:
        """How often the text is read."""
        return self.read / self.train_tokens

    @property
    def block_size(self) -> int:
        """Context length; shorter than usual only if a split is."""
        shortest = min(self.train_tokens, self.val_tokens or self.train_tokens)
        return max(_SHORTEST_BLOCK, min(_BLOCK_SIZE, 1 << max(shortest.bit_length() - 2, 0)))

    @property
    def batch_size(self) -> int:
        """Sequences of a batch, a multiple of 4."""
        return max(4, 4 * round(_TOKENS_OF_STEP * math.sqrt(self.read) / self.block_size / 4))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.block_size

    @property
    def ngram(self) -> int:
        """Tokens of context that are counted; 0 if counts would not help."""
        if max(self.read, self.train_tokens) > NGRAM_TOKENS or self.vocab_size > _SMALL_VOCABULARY:
            return 0
        return max(0, min(_NGRAM, longest_ngram(self.vocab_size, self.train_tokens)))

    @property
    def dropout(self) -> float:
        """Probability of dropping an activation."""
        return next((p for epochs, p in _DROPOUT.items() if self.epochs >= epochs), 0.0)

    @property
    def memory(self) -> float:
        """The share of the run that the weights remember; all of it if the text is read once."""
        return min(1.0, max(_SHORTEST_MEMORY, 1 / self.epochs))

    def weight_decay(self, steps: int) -> float:
        """The decay with which weights have that memory: a step shrinks them by rate x decay."""
        if self.epochs <= 1:
            return 0.0
        rate = TrainConfig.model_fields["muon_learning_rate"].default
        return float(f"{1 / (rate * steps * self.memory):.2g}")

    def model(self) -> dict[str, Any]:
        """The settings of the model."""
        settings: dict[str, Any] = {
            "block": "modern",
            "n_layer": max(3, min(6, 2 + self.width // 64), self.width // 64),
            "n_head": max(2, self.width // _HEAD_SIZE),
            "n_embd": self.width,
            "block_size": self.block_size,
            "dropout": self.dropout,
        }
        if self.ngram:
            settings["ngram"] = self.ngram
        if self.vocab_size <= _SMALL_VOCABULARY:
            settings["tie_embeddings"] = False
        return settings

    def train(self, steps: int, evaluations: int = MOST_EVALUATIONS) -> dict[str, Any]:
        """The settings of training.

        Args:
            steps: Number of steps.
            evaluations: Number of evaluations.
        """
        return {
            "optimizer": "muon",
            "muon_coefficients": "polar_express",
            "batch_size": self.batch_size,
            "max_iters": steps,
            "schedule": "linear",
            "warmup_iters": max(1, round(_WARMUP * steps)),
            "weight_decay": self.weight_decay(steps),
            "eval_interval": math.ceil(steps / evaluations),
        }
