"""How likely texts are after other texts: the sum over their tokens, many at a time.

Legend: B pairs, T their longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from quill.evaluation.measure import LOGITS_AT_ONCE, tokens_at_once
from quill.model.gpt import GPT
from quill.tokenizers.base import Tokenizer, Unknown

# Tokens that come before, and tokens to score.
Pair = tuple[Sequence[int], Sequence[int]]


class Score(NamedTuple):
    """How likely a continuation is.

    Attributes:
        nats: Its summed cross entropy, the negative of its log-likelihood.
        greedy: Whether each of its tokens is the likeliest.
    """

    nats: float
    greedy: bool


def split(tokenizer: Tokenizer, text: str, answer: str, unknown: Unknown = "error") -> Pair:
    """Encode a text and its continuation together, as lm-evaluation-harness does.

    White space at the end of the text is scored with the answer, as tokens often begin with a space.

    Args:
        tokenizer: The model's own.
        text: The text before.
        answer: The continuation.
        unknown: What to do with characters that have no token.

    Raises:
        InputError: A character has no token, and `unknown` is "error".
    """
    before = tokenizer.encode(text.rstrip(), unknown=unknown)
    whole = tokenizer.encode(text + answer, unknown=unknown)
    return before, whole[len(before) :]


@torch.inference_mode()
def score(model: GPT, pairs: Sequence[Pair], poll: Callable[[], None] = lambda: None) -> list[Score]:
    """Score continuations, each after as many of the tokens before it as fit in the context.

    Args:
        model: Any model; its mode does not change.
        pairs: What comes before, at least one token, and the continuation, at most block_size tokens.
        poll: Called before each forward pass; an exception from it ends the work.
    """
    T = model.shape.block_size
    at_once = tokens_at_once(model.wte.weight.device.type)
    rows = [([*before, *after][-(T + 1) :], len(after)) for before, after in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    found: dict[int, Score] = {}
    training = model.training
    model.eval()
    try:
        while len(found) < len(order):
            poll()
            longest = len(rows[order[len(found)]][0])
            group = order[len(found) : len(found) + max(1, at_once // longest)]
            found |= zip(group, _scores(model, [rows[i] for i in group]), strict=True)
    finally:
        model.train(training)
    return [found[i] for i in range(len(rows))]


def _scores(model: GPT, rows: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
    """Score the last tokens of some rows in one forward pass."""
    device = model.wte.weight.device
    x = torch.zeros(len(rows), max(len(ids) for ids, _ in rows) - 1, dtype=torch.int64)
    wanted = torch.zeros_like(x, dtype=torch.bool)
    # Nothing looks at what follows it, so any token will do behind the end of a row.
    for i, (ids, n) in enumerate(rows):
        x[i, : len(ids) - 1] = torch.tensor(ids[:-1])
        wanted[i, len(ids) - 1 - n : len(ids) - 1] = True
    targets = torch.tensor([t for ids, n in rows for t in ids[len(ids) - n :]], dtype=torch.int64)
    x, kept = x.to(device), wanted.to(device)
    hidden, near = model.hidden(x)[kept], model.near(x)
    near = None if near is None else near[kept]
    losses, right = [], []
    at_once = max(1, LOGITS_AT_ONCE // model.shape.vocab_size)
    for at in range(0, len(targets), at_once):
        part = slice(at, at + at_once)
        logits = model.head(hidden[part], None if near is None else near[part]).float()
        y = targets[part].to(device)
        losses.append(F.cross_entropy(logits, y, reduction="none").cpu().double())
        right.append((logits.argmax(-1) == y).cpu())
    sizes = [n for _, n in rows]
    nats, greedy = torch.split(torch.cat(losses), sizes), torch.split(torch.cat(right), sizes)
    return [Score(float(a.sum()), bool(b.all())) for a, b in zip(nats, greedy, strict=True)]
