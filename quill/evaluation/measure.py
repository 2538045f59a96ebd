"""How well a model predicts a text: loss, perplexity, and bits per byte, comparable across tokenizers.

Legend: B batch, T window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quill import threads
from quill.data.batches import batch, windows
from quill.errors import DivergedError, InputError
from quill.evaluation.report import Collector, Report
from quill.evaluation.temperature import Fit, Fitted
from quill.model.gpt import GPT
from quill.units import plural

if TYPE_CHECKING:
    from quill.data.batches import Tokens

# Tokens per forward pass, 2048 elsewhere: on a CPU more are no faster, as they leave its caches.
_TOKENS_AT_ONCE = {"cuda": 16384, "mps": 8192}
# Logits in memory at once, 32 MB of float32, however large the vocabulary.
LOGITS_AT_ONCE = 1 << 23
# Default rows per batch for an estimate from random windows.
ROWS_OF_ESTIMATE = 16
# An estimate of more batches than this may read the text this many times.
_MANY_BATCHES, _MOST_READINGS = 10_000, 1000


@dataclass(frozen=True)
class Figures:
    """A model's figures on a text.

    Attributes:
        loss: Mean cross entropy in nats per token.
        perplexity: exp(loss); infinity if that overflows.
        bits_per_byte: Bits the model needs per byte of the text in UTF-8.
        tokens: Targets measured.
        bytes: Bytes of text that the targets stand for; with `iters`, their share of all bytes.
        report: Calibration and loss by context, if it was asked for.
        fitted: The temperature at which the loss is lowest, if it or a report was asked for.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    report: Report | None = field(default=None, repr=False)
    fitted: Fitted | None = field(default=None, repr=False)


def tokens_at_once(device: str) -> int:
    """Tokens of a forward pass on a kind of device, chosen for speed."""
    return _TOKENS_AT_ONCE.get(device, 2048)


def check_iters(
    iters: int, block_size: int, n_tokens: int, *, rows: int = ROWS_OF_ESTIMATE, setting: str = "iters"
) -> None:
    """Refuse an estimate that would read the text over and over.

    Args:
        iters: Number of batches.
        block_size: Length of a window in tokens.
        n_tokens: Tokens of the text.
        rows: Windows in a batch.
        setting: The name of `iters`, for the message.

    Raises:
        InputError: It would.
    """
    times = iters * rows * block_size // max(n_tokens, 1)
    if iters > _MANY_BATCHES and times > _MOST_READINGS:
        raise InputError(
            f"'{setting}' = {iters:,} is too many",
            why=f"an evaluation would read the {n_tokens:,} tokens of the text {times:,} times",
            hint=f"leave {setting} unset to read it once",
        )


def evaluate(
    model: GPT,
    tokens: Tokens,
    *,
    n_bytes: int,
    block_size: int | None = None,
    iters: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    report: bool = False,
    fit: bool = False,
    poll: Callable[[], None] = lambda: None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Figures:
    """Measure a model on a text: all of it in consecutive windows, or an estimate.

    Every token but the first is a target exactly once; its context is the tokens before it in its window.
    The result depends only on the weights, the tokens and the arguments.

    Args:
        model: Any model; its mode does not change.
        tokens: The text as ids, (n,).
        n_bytes: Length in UTF-8 of the text that tokens[1:] stand for.
        block_size: Length of a window, T; the model's context length if None.
        iters: Number of batches of random windows to estimate from; all windows if None.
        batch_size: Windows per forward pass, B; chosen for speed if None.
        seed: Seed of the random windows.
        report: Also measure calibration and the loss by context.
        fit: Also find the temperature at which the loss is lowest.
        poll: Called before each forward pass; an exception from it ends the measurement.
        autocast: The context in which the model computes; default: in the precision of its weights.

    Raises:
        InputError: There are too few tokens, or too many batches.
        DivergedError: The loss is not finite.
    """
    T = min(block_size or model.shape.block_size, model.shape.block_size)
    if len(tokens) < 2 or (iters is not None and len(tokens) <= T):
        needed = 2 if iters is None else T + 1
        raise InputError(
            f"the text has only {plural(len(tokens), 'token')}",
            why=f"measuring requires at least {needed:,}",
            hint="use a longer text",
        )
    batches: Iterator[tuple[Tensor, Tensor]]
    if iters is None:
        B = batch_size or max(1, tokens_at_once(model.wte.weight.device.type) // T)
        batches = windows(tokens, block_size=T, batch_size=B)
    else:
        B = batch_size or ROWS_OF_ESTIMATE
        check_iters(iters, T, len(tokens), rows=B)
        batches = (batch(tokens, seed=seed, step=step, batch_size=B, block_size=T) for step in range(iters))
    collector = Collector(T) if report else None
    temperatures = Fit() if fit or report else None
    nats, count = _total(model, batches, poll, autocast, collector, temperatures)
    if not math.isfinite(nats):
        raise DivergedError(
            "the loss is NaN or infinite",
            why="the model's weights are too, or are so large that numbers overflow",
            hint="quill list --all-versions",
        )
    measured = n_bytes * count / (len(tokens) - 1)
    return Figures(
        loss=nats / count,
        perplexity=_exp(nats / count),
        bits_per_byte=bits_per_byte(nats, measured),
        tokens=count,
        bytes=round(measured),
        report=collector.report() if collector else None,
        fitted=temperatures.best() if temperatures else None,
    )


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Summed cross entropy as bits per byte of the text it was measured on; NaN for a text of no bytes."""
    return nats / math.log(2) / n_bytes if n_bytes else math.nan


@torch.inference_mode()
def _total(
    model: GPT,
    batches: Iterator[tuple[Tensor, Tensor]],
    poll: Callable[[], None],
    autocast: Callable[[], AbstractContextManager[object]],
    collector: Collector | None,
    temperatures: Fit | None,
) -> tuple[float, int]:
    """Return the summed cross entropy of all targets in nats, and their number."""
    device = model.wte.weight.device
    at_once = max(1, LOGITS_AT_ONCE // (model.shape.vocab_size))
    training = model.training
    model.eval()
    nats, count = 0.0, 0
    try:
        # One context for all batches: it keeps the weights that it has cast.
        with autocast(), threads.best_waiting(device.type) as pace:
            for x, y in pace.each(batches):
                poll()
                x = x.to(device)
                hidden = model.hidden(x).flatten(0, 1)  # (B T, C)
                around = model.near(x)
                around = None if around is None else around.flatten(0, 1)
                targets = y.to(device).flatten()
                # The head in slices: the logits of a large vocabulary take more memory than all the rest.
                for at in range(0, len(targets), at_once):
                    part = slice(at, at + at_once)
                    near = None if around is None else around[part]
                    plain = model.head(hidden[part])
                    logits = (plain if near is None else model.mix(plain, near)).float()
                    losses = F.cross_entropy(logits, targets[part], reduction="none")
                    nats += float(losses.cpu().sum(dtype=torch.float64))
                    if collector:
                        places = torch.arange(at, at + len(losses)) % x.shape[1]
                        collector.add(logits, targets[part], losses, places)
                    if temperatures:
                        temperatures.add(model, plain, near, targets[part])
                count += targets.numel()
    finally:
        model.train(training)
    return nats, count


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
