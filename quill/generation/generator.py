"""Text from a model: a prompt in, and what the model goes on with out, streamed or whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from quill.config.reading import check
from quill.config.settings import SampleConfig
from quill.config.shape import Shape
from quill.errors import InputError
from quill.generation.decoding import FEW_TOKENS, Decoder, for_decoding
from quill.generation.sampling import Sampler
from quill.generation.stopping import StopStrings
from quill.model.gpt import GPT
from quill.tokenizers.base import StreamDecoder, Tokenizer

# Memory that samples drawn side by side may take; more of them are drawn one group after another.
_GROUP_BYTES = 512 << 20


class Generator:
    """Draws text from a model.

    Args:
        model: Any model; it is left in the mode it is in. Its weights count as they are now: after
            training goes on, make another generator.
        tokenizer: The model's own.
        notice: Is told what a person should know, such as a prompt that was cut.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, notice: Callable[[str], None] | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._notice = notice
        self._ready: dict[bool, GPT] = {}

    def stream(
        self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"] = "error"
    ) -> Iterator[str]:
        """Draw one sample and hand it out as it comes.

        With a seed it is the first of what `generate` draws with that seed.

        Args:
            prompt: What the sample goes on from; not repeated in it.
            config: How to draw; num_samples does not matter.
            unknown: What to do with characters of the prompt that have no token.

        Yields:
            Pieces of text, whole characters each, none empty.

        Raises:
            InputError: The prompt has a character that has no token, or a stop string is empty.
            DivergedError: The model's weights are not finite.
        """
        row = _Row(self.tokenizer, config.stop)
        decoder, logits, idx = self._read(prompt, config, unknown)
        sampler = Sampler(config, [0], idx, self.tokenizer.vocab_size)
        for count in range(config.max_new_tokens):
            chosen = sampler(logits)
            piece = row.feed(int(chosen))
            if piece:
                yield piece
            if row.done:
                return
            if count + 1 < config.max_new_tokens:
                logits = decoder.feed(chosen)
        piece = row.flush()
        if piece:
            yield piece

    def generate(
        self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"] = "error"
    ) -> list[str]:
        """Draw num_samples texts, side by side as far as memory allows.

        Sample i depends on the seed and i, not on how many are drawn, but for rounding: a row of a batch
        may differ from the row alone in a logit's last bits.

        Args:
            prompt: What each goes on from; not repeated in them.
            config: How to draw.
            unknown: What to do with characters of the prompt that have no token.

        Returns:
            The texts, without what ended them.

        Raises:
            InputError: The prompt has a character that has no token, or a stop string is empty.
            DivergedError: The model's weights are not finite.
        """
        rows = [_Row(self.tokenizer, config.stop) for _ in range(config.num_samples)]
        decoder, logits, idx = self._read(prompt, config, unknown)
        if config.max_new_tokens:
            size = rows_at_once(self.model.shape)
            for first in range(0, len(rows), size):
                numbers = range(first, min(first + size, len(rows)))
                sampler = Sampler(config, numbers, idx, self.tokenizer.vocab_size)
                group = [rows[i] for i in numbers]
                forked = decoder.fork(len(group))
                _draw(forked, logits.expand(len(group), -1), sampler, group, config.max_new_tokens)
        for row in rows:
            row.flush()
        return [row.text for row in rows]

    def _read(
        self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"]
    ) -> tuple[Decoder, Tensor, Tensor]:
        """Feed the prompt; its decoder, the logits of what follows, and its tokens."""
        ids = self.tokenizer.encode(prompt, unknown=unknown) or [self._first_token()]
        size = self.model.shape.block_size
        if len(ids) > size and self._notice is not None:
            self._notice(f"the prompt has {len(ids):,} tokens; the last {size:,}, all the model sees, count")
        idx = torch.tensor([ids], device=self.model.wte.weight.device)
        copied = config.max_new_tokens >= FEW_TOKENS
        if copied not in self._ready:
            self._ready[copied] = for_decoding(self.model, copied)
        decoder = Decoder(self._ready[copied])
        return decoder, decoder.feed(idx[:, -size:]), idx

    def _first_token(self) -> int:
        """Where a text begins: after a line's end, which every model has seen, else after a text's."""
        try:
            return self.tokenizer.encode("\n")[-1]
        except InputError:
            return self.tokenizer.eot_id or 0


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """Go on from token ids.

    Args:
        model: Any model; it is left in the mode it is in.
        idx: Token ids, (B, T), T at least 1; beyond block_size the last ones count.
        max_new_tokens: How many to draw.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the fewest tokens with this much probability.
        min_p: Drop tokens below this share of the likeliest one's probability.
        repetition_penalty: Above 1 makes tokens already in a row less likely.
        seed: Makes the draw repeatable.

    Returns:
        idx and what was drawn, (B, T + max_new_tokens).

    Raises:
        InputError: A setting is out of bounds.
        DivergedError: The model's weights are not finite.
    """
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    config = check(SampleConfig, settings, origin="generate")
    if not max_new_tokens:
        return idx
    rows, vocab_size = idx.shape[0], model.shape.vocab_size
    decoder = Decoder(for_decoding(model, copied=max_new_tokens >= FEW_TOKENS), rows=rows)
    sampler = Sampler(config, range(rows), idx, vocab_size)
    drawn = [idx, sampler(decoder.feed(idx))]
    for _ in range(max_new_tokens - 1):
        drawn.append(sampler(decoder.feed(drawn[-1])))
    return torch.cat(drawn, 1)


def rows_at_once(shape: Shape) -> int:
    """How many samples are drawn side by side, by the memory that each takes.

    Args:
        shape: The model's.
    """
    cached = 2 * shape.n_layer * shape.n_kv_head * shape.head_size
    # When a window moves on, a layer's widest activations stand in memory twice.
    moving = 2 * max(shape.mlp_size, 3 * shape.n_head * shape.head_size) if shape.n_layer else 0
    return max(1, min(256, _GROUP_BYTES // max(1, 4 * shape.block_size * (cached + moving))))


def _draw(decoder: Decoder, logits: Tensor, sampler: Sampler, rows: Sequence[_Row], limit: int) -> None:
    """Draw side by side until every sample has ended."""
    for count in range(limit):
        chosen = sampler(logits)
        for row, token in zip(rows, chosen[:, 0].tolist(), strict=True):
            row.feed(token)
        if all(row.done for row in rows) or count + 1 == limit:
            return
        logits = decoder.feed(chosen)


class _Row:
    """One sample while it is drawn: what its tokens say so far, and whether it has ended."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._eot = tokenizer.eot_id
        self._characters = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self._pieces: list[str] = []
        self.done = False

    @property
    def text(self) -> str:
        """What the sample says so far."""
        return "".join(self._pieces)

    def feed(self, token: int) -> str:
        """Take in the next token; returns the text that is certain now."""
        if self.done:
            return ""
        if token == self._eot:
            self.done = True
            return self.flush()
        piece = self._stops.feed(self._characters.feed(token))
        self.done = self._stops.hit
        self._pieces.append(piece)
        return piece

    def flush(self) -> str:
        """End the sample here; the text that was still held back."""
        self.done = True
        piece = self._stops.feed(self._characters.flush()) + self._stops.flush()
        self._pieces.append(piece)
        return piece
