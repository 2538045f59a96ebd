"""How well a model predicts text: loss, perplexity, and bits per byte, which compares across tokenizers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from quill.data import batches
from quill.errors import DivergedError, InputError
from quill.model.gpt import GPT

if TYPE_CHECKING:
    from quill.data.batches import Tokens
    from quill.tokenizers.base import Tokenizer

# Enough tokens to keep the processor busy, few enough that the logits of a large vocabulary fit.
_MOST_TOKENS = 16_384
_MOST_LOGITS = 1 << 25


@dataclass(frozen=True)
class Figures:
    """What an evaluation found.

    Attributes:
        loss: Mean cross entropy in nats per token.
        perplexity: Its exponential; infinite where that overflows.
        bits_per_byte: Bits that predicting the text costs, per byte of its UTF-8.
        tokens: Tokens predicted.
        bytes: Bytes of text they stand for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.inference_mode()
def evaluate(
    model: GPT,
    tokens: Tokens,
    *,
    n_bytes: int,
    block_size: int | None = None,
    iters: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Figures:
    """Measure a model on a split: every token but the first predicted once, deterministically.

    Args:
        model: Put in eval mode for the while.
        tokens: The split's ids, (n,).
        n_bytes: Bytes of text that the split stands for.
        block_size: Length of the windows; the model's own context where None.
        iters: Batches at random places instead, for a quick estimate.
        batch_size: Windows in one forward pass; chosen to suit the machine where None.
        seed: Of the quick estimate's places.

    Raises:
        DivergedError: The loss is not finite.
        InputError: There is nothing to predict.
    """
    T = block_size or model.config.block_size
    V = model.config.vocab_size or 1
    if len(tokens) < 2:
        raise InputError(f"there is nothing to predict in {len(tokens)} tokens", why="it takes two at least")
    B = batch_size or max(1, min(_MOST_TOKENS // T, _MOST_LOGITS // (T * V)))
    device = model.wte.weight.device
    training = model.training
    model.eval()
    # Summed in double precision: a split has more tokens than a float has digits for.
    total, count = torch.zeros((), dtype=torch.float64), 0
    if iters is None:
        pairs = batches.windows(tokens, block_size=T, batch_size=B)
    else:
        batches.check_length(len(tokens), T, "validation")
        pairs = (batches.batch(tokens, seed=seed, step=i, batch_size=B, block_size=T) for i in range(iters))
    try:
        for x, y in pairs:
            logits = model(x.to(device))
            part = F.cross_entropy(logits.flatten(0, 1).float(), y.to(device).flatten(), reduction="sum")
            total += part.double().cpu()
            count += y.numel()
    finally:
        model.train(training)
    return _figures(float(total), count, n_bytes * count / (len(tokens) - 1))


def evaluate_text(model: GPT, tokenizer: Tokenizer, text: str) -> Figures:
    """Measure a model on any text.

    Args:
        model: The model.
        tokenizer: Its own.
        text: What to predict.

    Raises:
        InputError: The text has characters the tokenizer does not know, or is too short.
    """
    return evaluate(model, tokenizer.encode_array(text), n_bytes=len(text.encode("utf-8", "replace")))


def _figures(nats: float, count: int, n_bytes: float) -> Figures:
    loss = nats / count
    if not math.isfinite(loss):
        raise DivergedError(
            "the loss is not finite",
            why=f"it is {loss} over {count:,} tokens: the weights are damaged or diverged",
        )
    perplexity = math.exp(loss) if loss < 700 else math.inf
    bits = nats / math.log(2) / n_bytes if n_bytes else math.nan
    return Figures(loss, perplexity, bits, count, round(n_bytes))
