"""A GPT: token ids to logits, for every block.

Legend: B batch, T query length, C n_embd, V vocabulary. The module has parameters only; positions are
computed and caches passed in, so that the state dict is exactly the weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from quill import discovery
from quill.config import blocks
from quill.config.shape import Shape
from quill.model.dropout import dropout
from quill.model.kv_cache import KVCache, last_tokens
from quill.model.ngram import NGram
from quill.model.rope import Rope


class GPT(nn.Module):
    """Decoder-only transformer; without layers, a bigram table.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    Args:
        shape: Its sizes, from `ModelConfig.shape`.
        seed: Seed of the initial weights.
    """

    def __init__(self, shape: Shape, seed: int = 1337) -> None:
        super().__init__()
        self.shape = shape
        V, C = shape.vocab_size, shape.n_embd
        self._rope: Rope | None = None
        if shape.n_layer == 0:
            # Row i of the table has the logits of the token after token i.
            self.wte = nn.Embedding(V, V)
        else:
            family = discovery.load(blocks.PACKAGE, shape.block, "block")
            self.wte = nn.Embedding(V, C)
            self.learned_positions = blocks.facts(shape.block).positions == "learned"
            if self.learned_positions:
                self.wpe = nn.Embedding(shape.block_size, C)
            self.h = nn.ModuleList(family.Block(shape) for _ in range(shape.n_layer))
            self.ln_f = family.norm(shape)
            if not shape.tie_embeddings:
                self.lm_head = nn.Linear(C, V, bias=shape.head_bias)
        if shape.ngram:
            self.ngram = NGram(shape.ngram, V)
        if self.wte.weight.device.type != "meta":
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the initial weights: N(0, 0.02) outside the blocks; each block draws its own."""
        device = self.wte.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        if self.shape.n_layer == 0:
            self.wte.weight.normal_(0.0, 1.0, generator=generator)
        else:
            for name, p in self.named_parameters():
                if not name.startswith(("h.", "ngram.")) and p.dim() == 2:
                    p.normal_(0.0, 0.02, generator=generator)
            if self.shape.head_bias:
                nn.init.zeros_(self.lm_head.bias)
            for block in self.h:
                block.init_weights(self.shape.n_layer, generator)  # type: ignore[operator]
        if self.shape.ngram:
            self.ngram.init_weights(generator)

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        last_only: bool = False,
        dropped: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Logits of the token after each position; in training mode the network's alone.

        Args:
            idx: Token ids, (B, T); T plus the cached positions is at most block_size.
            cache: Keys and values already seen; extended in place.
            last_only: Compute only the last position's logits.
            dropped: Positions whose token embedding is replaced by zeros, (B, T), bool.
            recompute: Store only the input of each block, and compute the rest again for the backward pass.

        Returns:
            (B, T, V), or (B, 1, V).
        """
        x = self.hidden(idx, cache, dropped, recompute)
        near = None if self.training else self.near(idx, cache)
        if last_only:
            x, near = x[:, -1:], None if near is None else near[:, -1:]
        return self.head(x, near)

    def hidden(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        dropped: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Activations of each position before the last norm.

        Args:
            idx: Token ids, (B, T); T plus the cached positions is at most block_size.
            cache: Keys and values already seen; extended in place.
            dropped: As for `forward`.
            recompute: As for `forward`.

        Returns:
            (B, T, C); without layers (B, T, V).
        """
        x: Tensor = self.wte(idx)  # (B, T, C)
        if dropped is not None:
            x = x.masked_fill(dropped[..., None], 0.0)
        T = idx.shape[1]
        if cache is not None:
            cache.remember(idx)
        if self.shape.n_layer == 0:
            if cache is not None:
                cache.advance(T)
            return x
        start = cache.length if cache is not None else 0
        rope = None
        if cache is not None and cache.positions is not None:
            # Rows of different lengths, one token each.
            if self.learned_positions:
                x = x + self.wpe.weight[cache.positions][:, None]
            else:
                rope = self.rotations().at(cache.positions)
        elif self.learned_positions:
            x = x + self.wpe.weight.narrow(0, start, T)
        else:
            rope = self.rotations().span(start, T)
        if self.training and self.shape.dropout:
            x = dropout(x, self.shape.dropout)
        if cache is None:
            for block in self.h:
                x = checkpoint(block, x, rope, use_reentrant=False) if recompute else block(x, rope)
        else:
            for block, layer in zip(self.h, cache.layers, strict=True):
                x = block(x, rope, layer)
            cache.advance(T)
        return x

    def near(self, idx: Tensor, cache: KVCache | None = None) -> Tensor | None:
        """What the n-gram counts are asked about after each position.

        Args:
            idx: Token ids, (B, T).
            cache: As `hidden` left it.

        Returns:
            The last tokens of the window, this one included, (B, T, ngram), -1 before its start; None for a
            model without n-gram counts.
        """
        K = self.shape.ngram
        if not K:
            return None
        return last_tokens(idx, K) if cache is None else cache.last_tokens(idx.shape[1], K)

    def head(self, x: Tensor, near: Tensor | None = None) -> Tensor:
        """Logits from the activations that `hidden` returns.

        Args:
            x: (..., C), or without layers (..., V); any of the positions.
            near: What `near` returns for them, to mix in the n-gram counts.

        Returns:
            (..., V).
        """
        if self.shape.n_layer:
            x = self.unembed(self.ln_f(x))
        return x if near is None else self.mix(x, near)

    def mix(self, logits: Tensor, near: Tensor) -> Tensor:
        """Mix n-gram counts into the network's logits.

        Args:
            logits: (..., V).
            near: What `near` returns for them.

        Returns:
            (..., V).
        """
        return cast(Tensor, self.ngram(logits.flatten(0, -2), near.flatten(0, -2))).view(logits.shape)

    def unembed(self, x: Tensor) -> Tensor:
        """Logits from activations behind the last norm, (..., C) to (..., V); an affine map."""
        if self.shape.tie_embeddings:
            return F.linear(x, self.wte.weight)
        return cast(Tensor, self.lm_head(x))

    def network(self) -> GPT:
        """This model without n-gram counts, over the same weights."""
        if not self.shape.ngram:
            return self
        twin = copy.copy(self)
        twin.shape = replace(self.shape, ngram=0)
        twin._modules = {n: m for n, m in self._modules.items() if n != "ngram"}
        return twin

    def divided(self, temperature: float) -> dict[str, Tensor]:
        """The weights of this model with the network's logits divided by a temperature.

        The last norm takes the factor, so that the model is of the same kind as before.
        """
        scaled = ("ln_f.", "lm_head.bias") if self.shape.n_layer else ("wte.",)
        return {n: p / temperature if n.startswith(scaled) else p for n, p in self.state_dict().items()}

    @property
    def uses_rotations(self) -> bool:
        """Whether positions rotate queries and keys, rather than being added to the embeddings."""
        return self.shape.n_layer > 0 and not self.learned_positions

    def rotations(self) -> Rope:
        """The rotary table for the whole context length, on the device of the weights."""
        device = self.wte.weight.device
        if self._rope is None or self._rope.cos.device != device:
            c = self.shape
            # A table made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                self._rope = Rope.table(c.block_size, c.head_size, c.rope_theta, device)
        return self._rope

    def twin(self) -> GPT:
        """A model with modules of its own and the same parameters, in eval mode."""
        memo: dict[int, object] = {id(x): x for x in (self.shape, *self.parameters())}
        # deepcopy takes what is in the memo as already copied, so only the modules are new.
        return copy.deepcopy(self, memo).eval()

    def new_cache(self, batch_size: int = 1, length: int | None = None) -> KVCache:
        """Make an empty cache for `batch_size` sequences of `length` tokens, or of the context length."""
        weight = self.wte.weight
        return KVCache(self.shape, batch_size, weight.device, weight.dtype, length)

    @torch.inference_mode()
    def predict(self, idx: Tensor, targets: bool = True) -> Tensor:
        """Logits without gradients or dropout.

        Args:
            idx: Token ids, (B, T); only the last block_size of them are used.
            targets: Whether to return the logits of every position, as a loss needs, or of the last only.

        Returns:
            (B, T, V), or (B, V).
        """
        training = self.training
        self.eval()
        try:
            logits = self(idx[:, -self.shape.block_size :], last_only=not targets)
        finally:
            self.train(training)
        return cast(Tensor, logits if targets else logits[:, -1])


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per token.

    Args:
        logits: (B, T, V).
        targets: Token ids, (B, T).
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def outline(shape: Shape) -> GPT:
    """Build a GPT with names, shapes and dtypes but no memory, to count or to load weights into.

    No initial weights are drawn: on the meta device torch draws through its compiler, whose import alone
    takes longer than building the model.
    """
    with torch.device("meta"), _Undrawn():
        return GPT(shape)


class _Undrawn(TorchFunctionMode):
    """Makes initialisers leave tensors unchanged."""

    _DRAWS = frozenset({Tensor.normal_, Tensor.uniform_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._DRAWS or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else next(iter(kwargs.values()))
        return func(*args, **(kwargs or {}))


def n_params(shape: Shape) -> int:
    """Count parameters without allocating any.

    All layers are alike, so models of one and two layers give the count for any depth.
    """

    def count(n_layer: int) -> int:
        layers = outline(replace(shape, n_layer=n_layer))
        return sum(p.numel() for p in layers.parameters())

    if shape.n_layer <= 1:
        return count(shape.n_layer)
    one, two = count(1), count(2)
    return one + (shape.n_layer - 1) * (two - one)
