"""A model fed token by token: weights laid out for it, a cache, and a window that slides.

A cache is exact only as long as nothing leaves the window: learned positions shift when it moves, and in
all but the first layer the keys of the tokens that stay have seen the ones that go. So when the window is
full it moves on by a stride at once: the tokens that stay are read again from position 0, and decoding
goes on cached until it is full again. At every step the logits are those of the uncached model over the
window's tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quill.model.gpt import GPT

# What the window moves on by, as a share of the context, which so is never shorter than the rest. Reading
# the rest again took, for 256 characters of context, half of all time at 1/8, a quarter at 1/4 and an
# eighth at 1/2, while the loss of a model of Shakespeare's was the same within 0.002 at each.
STRIDE = 0.5

# A copy of the weights pays for itself after about so many tokens.
FEW_TOKENS = 32

# A copy of larger weights would cost more memory, and more time before the first word, than it is worth.
_COPIED_AT_MOST = 1 << 28


def for_decoding(model: GPT, copied: bool = True) -> GPT:
    """The same model in eval mode, made ready to read one token at a time.

    One token at a time is matrices times vectors, bound by how fast weights stream from memory, and small
    operations, bound by how fast Python calls them. So, on a CPU where that is faster, matrices are kept
    by columns (see `_product`), and parts are called as plain functions. The model given is left as it
    is, in its own mode.

    Args:
        model: Any model.
        copied: Whether weights may be copied; for a few tokens it takes longer than it saves.

    Returns:
        A model of its own. Small weights on a CPU are copied, as they are now; others are shared.
    """
    shared = {id(x): x for x in (model.shape, *model.parameters())}
    # What the memo holds is taken from there: only the modules are made anew.
    twin = copy.deepcopy(model, dict(shared)).eval()
    size = sum(p.nbytes for p in model.parameters())
    copied &= model.wte.weight.device.type == "cpu" and model.wte.weight.dtype == torch.float32
    copied &= torch.backends.cpu.get_cpu_capability().startswith("AVX") and size <= _COPIED_AT_MOST
    _call_directly(twin, copied)
    if copied and model.shape.n_layer and model.shape.tie_embeddings:
        # Rows for reading tokens, columns for the head.
        twin.shape = replace(model.shape, tie_embeddings=False)
        vars(twin)["lm_head"] = _product(model.wte.weight, None)
    return twin


def _call_directly(module: nn.Module, copied: bool) -> None:
    """Let every module within find plain functions where it looks for its parts.

    Calling a part as a module looks it up in a second place and then looks for hooks, of which a twin
    made here has none; for one token that costs a tenth of all time.
    """
    for name, part in module.named_children():
        _call_directly(part, copied)
        if isinstance(part, nn.ModuleList):
            vars(module)[name] = [p.forward for p in part]
        elif isinstance(part, nn.Linear) and copied:
            vars(module)[name] = _product(part.weight, part.bias)
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm):
            vars(module)[name] = _norm(part)
        elif not isinstance(part, nn.Embedding):
            vars(module)[name] = part.forward


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer that takes a single row as fast as its weights can be read.

    The row's product is the sum of the matrix's columns weighted by the row, which is what an embedding
    bag computes; its kernel on x86 reads the columns in one stream, twice as fast as a matrix product
    reads them. The columns are copied.

    Args:
        weight: (out, in).
        bias: (out), or None.

    Returns:
        A function of x, (B, T, in), that gives (B, T, out).
    """
    columns = weight.detach().t().contiguous()  # (in, out)
    weight, (n_in, n_out) = columns.t(), columns.shape
    every, first = torch.arange(n_in, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    bag = torch.embedding_bag

    def product(x: Tensor) -> Tensor:
        if x.numel() != n_in:
            return F.linear(x, weight, bias)
        # Arguments 4 to 6: no scaling by frequency, the sum of the bag, no sparse gradient.
        y = bag(columns, every, first, False, 0, False, x.view(n_in))[0]
        return (y if bias is None else y + bias).view(1, 1, n_out)

    return product


def _norm(part: nn.LayerNorm | nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    shape, weight = list(part.normalized_shape), part.weight
    if isinstance(part, nn.RMSNorm):
        root_eps = part.eps
        return lambda x: torch.rms_norm(x, shape, weight, root_eps)
    bias, eps = part.bias, part.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


class Decoder:
    """Reads tokens and tells what follows, over the last ones that fit the context.

    Args:
        model: In eval mode, such as `for_decoding` gives.
        rows: Sequences side by side, B.
        stride: Tokens that leave a full window at once; half the context where None.

    Attributes:
        length: Tokens in the window.
    """

    def __init__(self, model: GPT, rows: int = 1, stride: int | None = None) -> None:
        size = model.shape.block_size
        if stride is None:
            stride = int(size * STRIDE)
        self.model = model
        self._kept = max(1, size - max(1, stride))
        self._cache = model.new_cache(rows)
        self._read: list[Tensor] = []
        self.length = 0

    @property
    def window(self) -> Tensor:
        """The tokens that the last logits come from, (B, length)."""
        return torch.cat(self._read, 1)

    def feed(self, idx: Tensor) -> Tensor:
        """Read tokens.

        Args:
            idx: Token ids, (B, T), T at least 1.

        Returns:
            Logits of the token after the last, (B, V).
        """
        size = self.model.shape.block_size
        if self.length + idx.shape[1] > size:
            # At first nothing needs to make room for what comes later.
            kept = self._kept if self.length else size
            idx = torch.cat((*self._read, idx), 1)[:, -kept:]
            self._read, self.length = [], 0
            self._cache.clear()
        self._read.append(idx)
        self.length += idx.shape[1]
        if idx.numel() > 1 or idx.device.type != "cpu":
            return self._logits(idx)
        # One row through a small model is memory-bound work in dozens of pieces of microseconds: handing
        # parts of them to other threads gains little when those are idle, and stalls when they are not.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._logits(idx)
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def _logits(self, idx: Tensor) -> Tensor:
        logits: Tensor = self.model(idx, self._cache, last_only=True)
        return logits[:, -1]

    def fork(self, rows: int) -> Decoder:
        """Several decoders side by side, each having read what this one has.

        Args:
            rows: How many, B; this one is a single row.
        """
        twin = copy.copy(self)
        twin._read = [t.expand(rows, -1) for t in self._read]
        with torch.inference_mode():
            twin._cache = self._cache.repeat(rows)
        return twin
