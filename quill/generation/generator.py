"""Text from a model: a prompt in, its continuation out, streamed or whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Literal, Unpack

import torch
from torch import Tensor

from quill import threads
from quill.config.keyword_types import SampleSettings
from quill.config.keywords import documented
from quill.config.reading import check
from quill.config.settings import SampleConfig
from quill.config.shape import Shape
from quill.errors import InputError
from quill.generation.cpu import FEW_TOKENS, for_batches, for_decoding
from quill.generation.decoding import AHEAD, Decoder
from quill.generation.row import Row
from quill.generation.sampling import Sampler
from quill.model.gpt import GPT
from quill.tokenizers.base import Tokenizer
from quill.units import count

# Memory for samples generated side by side; more of them are generated in groups.
_GROUP_BYTES = 512 << 20


class Samples(list[str]):
    """Generated texts; a notebook shows each of them with its line breaks."""

    def _repr_html_(self) -> str:
        return "<hr>".join(f"<pre>{escape(text)}</pre>" for text in self)


class Generator:
    """Generates text with a model.

    On a CPU whose cores may be busy, stream a single sample through `cpu.at_best_threads` if the program has
    nothing else to compute.

    Args:
        model: Any model; its mode does not change. The first call may copy the weights, so make another
            generator after training further.
        tokenizer: The model's own.
        notice: Called with what a user should know, such as that the prompt was cut.
        name: The model's name, for display.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        notice: Callable[[str], None] | None = None,
        *,
        name: str = "",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self._notice = notice
        self._ready: dict[tuple[bool, bool], GPT] = {}

    def __repr__(self) -> str:
        return f"<{self.name or 'model'}: {self._facts}>"

    def _repr_html_(self) -> str:
        return f"<b>{escape(self.name or 'model')}</b>: {escape(self._facts)}"

    @property
    def _facts(self) -> str:
        parameters = count(sum(p.numel() for p in self.model.parameters()))
        shape = self.model.shape
        facts = f"{parameters} parameters, {shape.block} x {shape.n_layer}, context {shape.block_size}"
        return f"{facts}, {self.tokenizer.kind} tokenizer, {self.device}"

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.wte.weight.device

    @documented({"": SampleConfig})
    def stream(
        self,
        prompt: str = "",
        config: SampleConfig | None = None,
        unknown: Literal["error", "skip"] = "error",
        **settings: Unpack[SampleSettings],
    ) -> Iterator[str]:
        """Generate one sample, chunk by chunk.

        With a seed it equals the first sample that `generate` returns for that seed.

        Args:
            prompt: Text to continue; not repeated in the sample.
            config: How to sample; num_samples is ignored.
            unknown: What to do with characters of the prompt that have no token.
            **settings: Fields of SampleConfig, such as temperature=0.5; they win over `config`.

        Yields:
            Chunks of whole characters, none empty.

        Raises:
            InputError: A setting is invalid, or a character of the prompt has no token.
            DivergedError: The model's weights contain NaN or infinity.
        """
        config = _settled(config, settings)
        row = Row(self.tokenizer, config.stop)
        decoder, logits, idx = self._read(prompt, config, unknown)
        sampler = Sampler(config, [0], idx, self.tokenizer.vocab_size)
        for drawn in range(config.max_new_tokens):
            chosen = sampler(logits)
            chunk = row.feed(int(chosen))
            if chunk:
                yield chunk
            if row.done:
                return
            if drawn + 1 < config.max_new_tokens:
                logits = decoder.feed(chosen)
        chunk = row.flush()
        if chunk:
            yield chunk

    @documented({"": SampleConfig})
    def generate(
        self,
        prompt: str = "",
        config: SampleConfig | None = None,
        unknown: Literal["error", "skip"] = "error",
        **settings: Unpack[SampleSettings],
    ) -> Samples:
        """Generate num_samples samples, side by side as far as memory allows.

        Sample i depends on the seed and i, not on num_samples, except for rounding: a row of a batch may
        differ from the row alone in the last bits of a logit.

        Args:
            prompt: Text to continue; not repeated in the samples.
            config: How to sample.
            unknown: What to do with characters of the prompt that have no token.
            **settings: Fields of SampleConfig, such as temperature=0.5; they win over `config`.

        Returns:
            The samples, without the stop string or end-of-text token that ended them.

        Raises:
            InputError: A setting is invalid, or a character of the prompt has no token.
            DivergedError: The model's weights contain NaN or infinity.
        """
        config = _settled(config, settings)
        rows = [Row(self.tokenizer, config.stop) for _ in range(config.num_samples)]
        size = rows_at_once(self.model.shape)
        decoder, logits, idx = self._read(prompt, config, unknown, min(size, len(rows)))
        if config.max_new_tokens:
            for first in range(0, len(rows), size):
                numbers = range(first, min(first + size, len(rows)))
                sampler = Sampler(config, numbers, idx, self.tokenizer.vocab_size)
                group = [rows[i] for i in numbers]
                forked = decoder.fork(len(group))
                _draw(forked, logits.expand(len(group), -1), sampler, group, config.max_new_tokens)
        for row in rows:
            row.flush()
        return Samples(row.text for row in rows)

    def _read(
        self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"], rows: int = 1
    ) -> tuple[Decoder, Tensor, Tensor]:
        """Feed the prompt; return the decoder, the logits of the next token, and `prompt_ids`."""
        size = self.model.shape.block_size
        ids = self.prompt_ids(prompt, config, unknown)
        if len(ids) > size and self._notice is not None:
            self._notice(f"using only the last {size:,} tokens of the prompt: the context length")
        idx = torch.tensor([ids], device=self.device)
        decoder = Decoder(self.ready(config.max_new_tokens, rows))
        return decoder, decoder.feed(idx[:, -size:]), idx

    def prompt_ids(
        self, prompt: str, config: SampleConfig, unknown: Literal["error", "skip"] = "error", *, more: int = 0
    ) -> list[int]:
        """Encode a prompt, or the end of a long one, unless a repetition penalty counts all of its tokens.

        Args:
            prompt: Any text; an empty one has the model's first token.
            config: How to sample.
            unknown: What to do with characters that have no token.
            more: Tokens that are needed besides those that fit into the context.

        Returns:
            All tokens, or the last: more than block_size and `more` together.

        Raises:
            InputError: A character of the prompt has no token.
        """
        if config.repetition_penalty == 1:
            most = self.model.shape.block_size + more
            ids = self.tokenizer.encode_tail(prompt, most + 1, unknown=unknown)
        else:
            ids = self.tokenizer.encode(prompt, unknown=unknown)
        return ids or [self.first_token()]

    def ready(self, max_new_tokens: int, rows: int = 1) -> GPT:
        """The twin of the model that generates so many tokens in each row fastest; made once."""
        copies = max_new_tokens >= FEW_TOKENS
        kind = copies, copies and rows > 1
        if kind not in self._ready:
            self._ready[kind] = for_batches(self.model) if kind[1] else for_decoding(self.model, copies)
        return self._ready[kind]

    def first_token(self) -> int:
        """The token before an empty prompt: a newline, else the end-of-text token."""
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
    """Continue sequences of token ids.

    Args:
        model: Any model; its mode does not change.
        idx: Token ids, (B, T), T at least 1; the last block_size of them are the context.
        max_new_tokens: Number of tokens to generate for each row.
        temperature: Divisor of the logits; 0 always picks the likeliest token.
        top_k: Sample from the k likeliest tokens.
        top_p: Sample from the fewest tokens whose probabilities add up to this.
        min_p: Skip tokens less likely than this fraction of the likeliest token's probability.
        repetition_penalty: Above 1 makes tokens already in the row less likely.
        seed: Seed of the random numbers.

    Returns:
        idx followed by the new tokens, (B, T + max_new_tokens).

    Raises:
        InputError: A setting is invalid.
        DivergedError: The model's weights contain NaN or infinity.
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
    decoder = Decoder(for_decoding(model, copy_weights=max_new_tokens >= FEW_TOKENS), rows=rows)
    sampler = Sampler(config, range(rows), idx, vocab_size)
    drawn = [idx, sampler(decoder.feed(idx))]
    for _ in range(max_new_tokens - 1):
        drawn.append(sampler(decoder.feed(drawn[-1])))
    return torch.cat(drawn, 1)


def _settled(config: SampleConfig | None, settings: SampleSettings) -> SampleConfig:
    if config is not None and not settings:
        return config
    given = {**(config.model_dump() if config else {}), **settings}
    return check(SampleConfig, given, origin="the arguments")


def rows_at_once(shape: Shape) -> int:
    """Number of samples to generate side by side, from the memory that each takes."""
    # A second cache, of half of the context, reads ahead.
    cached = 3 * shape.n_layer * shape.n_kv_head * shape.head_size * shape.block_size
    # While it does, a layer's widest activations exist twice.
    reading = 2 * max(shape.mlp_size, 3 * shape.n_head * shape.head_size) * AHEAD if shape.n_layer else 0
    return max(1, min(256, _GROUP_BYTES // max(1, 4 * (cached + reading))))


def _draw(decoder: Decoder, logits: Tensor, sampler: Sampler, rows: Sequence[Row], limit: int) -> None:
    """Sample side by side until every row has ended."""
    with threads.best_waiting(logits.device.type) as pace:
        for drawn in pace.each(range(limit)):
            chosen = sampler(logits)
            for row, token in zip(rows, chosen[:, 0].tolist(), strict=True):
                row.feed(token)
            if all(row.done for row in rows) or drawn + 1 == limit:
                return
            logits = decoder.feed(chosen)
