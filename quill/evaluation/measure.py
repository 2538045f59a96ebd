"""How well a model knows a text: loss, perplexity, and bits per byte, which compare across tokenizers.

Legend: B batch, T window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quill.data.batches import batch, windows
from quill.errors import DivergedError, InputError
from quill.model.gpt import GPT

if TYPE_CHECKING:
    from quill.data.batches import Tokens
    from quill.tokenizers.base import Tokenizer

# Tokens of one forward pass, 2048 elsewhere: on a CPU more gain no speed, they only leave its caches.
_TOKENS_AT_ONCE = {"cuda": 16384, "mps": 8192}
# Logits that exist at one time, 32 MB of float32, however large the vocabulary.
_LOGITS_AT_ONCE = 1 << 23
# Rows of a batch where the estimate is from random windows and no size is asked for.
_ROWS_OF_ESTIMATE = 16


@dataclass(frozen=True)
class Figures:
    """What a model makes of a text.

    Attributes:
        loss: Mean cross entropy in nats per token.
        perplexity: exp(loss); infinite where that is beyond a float.
        bits_per_byte: Bits that the model needs for a byte of the text's UTF-8.
        tokens: Targets measured.
        bytes: Bytes of text that those targets stand for; with `iters` their share of all.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate(
    model: GPT,
    tokens: Tokens,
    *,
    n_bytes: int,
    block_size: int | None = None,
    iters: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    between: Callable[[], None] = lambda: None,
) -> Figures:
    """Measure a model on a text: the whole of it in consecutive windows, or an estimate.

    Every token but the first is a target exactly once, with the tokens before it in its window as context.
    The result depends on nothing but the weights, the tokens and the settings given.

    Args:
        model: Any model; it is left in the mode it is in.
        tokens: The text as ids, (n,).
        n_bytes: Length in UTF-8 of the text that tokens[1:] stand for.
        block_size: Length of a window, T; the model's where None.
        iters: Batches of random windows to estimate from; all windows where None.
        batch_size: Windows in a forward pass, B; chosen for speed where None.
        seed: Of the random windows.
        between: Called before each forward pass; what it raises ends the measurement.

    Raises:
        InputError: There is no target, or not one window to estimate from.
        DivergedError: The loss is not finite.
    """
    T = min(block_size or model.shape.block_size, model.shape.block_size)
    if len(tokens) < 2 or (iters is not None and len(tokens) <= T):
        needed = 2 if iters is None else T + 1
        raise InputError(
            f"there are {len(tokens):,} tokens to measure on",
            why=f"{needed:,} are needed",
            hint="give more text",
        )
    batches: Iterator[tuple[Tensor, Tensor]]
    if iters is None:
        B = batch_size or max(1, _TOKENS_AT_ONCE.get(model.wte.weight.device.type, 2048) // T)
        batches = windows(tokens, block_size=T, batch_size=B)
    else:
        B = batch_size or _ROWS_OF_ESTIMATE
        batches = (batch(tokens, seed=seed, step=step, batch_size=B, block_size=T) for step in range(iters))
    nats, count = _total(model, batches, between)
    if not math.isfinite(nats):
        raise DivergedError(
            "the loss is not finite",
            why="the model's weights are not finite, or so large that numbers overflow",
            hint="an earlier version, from 'quill list --all-versions'",
        )
    measured = n_bytes * count / (len(tokens) - 1)
    return Figures(
        loss=nats / count,
        perplexity=_exp(nats / count),
        bits_per_byte=nats / math.log(2) / measured if measured else math.nan,
        tokens=count,
        bytes=round(measured),
    )


def evaluate_text(
    model: GPT, tokenizer: Tokenizer, text: str, *, unknown: Literal["error", "skip"] = "error"
) -> Figures:
    """Measure a model on any text.

    Args:
        model: Any model; it is left in the mode it is in.
        tokenizer: The model's own.
        text: At least two tokens of it.
        unknown: What to do with characters that have no token.

    Raises:
        InputError: The text is too short, or has a character that has no token.
        DivergedError: The loss is not finite.
    """
    if unknown == "error":
        tokens = tokenizer.encode_array(text)
        n_bytes = len(text.encode()) - sum(len(tokenizer.token_bytes(int(i))) for i in tokens[:1])
    else:
        # What is left out is not measured, and so has no bytes either.
        ids = tokenizer.encode(text, unknown=unknown)
        tokens = np.array(ids, dtype=tokenizer.dtype)
        n_bytes = sum(len(tokenizer.token_bytes(i)) for i in ids[1:])
    return evaluate(model, tokens, n_bytes=n_bytes)


@torch.inference_mode()
def _total(
    model: GPT, batches: Iterator[tuple[Tensor, Tensor]], between: Callable[[], None]
) -> tuple[float, int]:
    """Sum of the cross entropy over all targets in nats, and their number."""
    device = model.wte.weight.device
    at_once = max(1, _LOGITS_AT_ONCE // (model.shape.vocab_size))
    training = model.training
    model.eval()
    nats, count = 0.0, 0
    try:
        for x, y in batches:
            between()
            hidden = model.hidden(x.to(device)).flatten(0, 1)  # (B T, C)
            targets = y.to(device).flatten()
            # The head's rows by parts, as a large vocabulary's logits take more memory than all else.
            for at in range(0, len(targets), at_once):
                logits = model.head(hidden[at : at + at_once]).float()
                losses = F.cross_entropy(logits, targets[at : at + at_once], reduction="none")
                nats += float(losses.cpu().sum(dtype=torch.float64))
            count += targets.numel()
    finally:
        model.train(training)
    return nats, count


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
