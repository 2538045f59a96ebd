"""A twin of a model that reads one token at a time as fast as a CPU can.

One token at a time means matrices times vectors, bound by how fast weights stream from memory, and many
small operations, bound by how fast Python calls them. The twin therefore has products for a few rows (see
`_sliced`, `_bagged` and `_packed`) and calls the parts of the model as plain functions. Its logits equal the
model's up to rounding, and those of a single token do not depend on the number of threads.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quill import threads
from quill.model.gpt import GPT

# Generating fewer tokens than this takes less time than copying the weights.
FEW_TOKENS = 32

# Larger weights are not copied: the memory and the delay before the first token cost more than they gain.
MAX_COPIED_BYTES = 1 << 28

# Parts of a matrix that threads may share. The number is fixed, so that rounding is the same on any machine.
_PARTS = 8

# The most rows for which products in parts are about as fast as one product: single tokens, and positions.
_FEW_ROWS = 12
_FEW_POSITIONS = 32
# The same for rows and a copy of the weights.
_COPIED_ROWS = 64

_Product = Callable[[Tensor], Tensor]


def for_decoding(model: GPT, copy_weights: bool = True) -> GPT:
    """A twin of the model in eval mode; the model itself stays as it is.

    Args:
        model: Any model, on any device.
        copy_weights: Whether copies of the weights pay off, where there is no fast product without them.

    Returns:
        The twin. It shares the weights; on some processors it has its own copy of small ones.
    """
    return _twin(model, _product_for(model, copy_weights))


def for_batches(model: GPT) -> GPT:
    """A twin for several rows, each of which reads one token at a time; small weights are copied.

    Its logits equal the model's up to rounding.

    Args:
        model: Any model, on any device.
    """
    if _has_fast_products(model) and _is_small(model):
        return _twin(model, _packed if _packs() else partial(_sliced, copied=True))
    return _twin(model, _product_for(model, copy_weights=False))


def _twin(model: GPT, product: Callable[[Tensor, Tensor | None], _Product] | None) -> GPT:
    twin = model.twin()
    _call_directly(twin, product)
    if product is not None and model.shape.n_layer and model.shape.tie_embeddings:
        # The head gets a product of its own.
        twin.shape = replace(model.shape, tie_embeddings=False)
        vars(twin)["lm_head"] = product(model.wte.weight, None)
    return twin


def at_best_threads(chunks: Iterator[str], clock: Callable[[], float] = perf_counter) -> Iterator[str]:
    """Generate a sample with one thread or with all of them, whichever is faster at the moment.

    All threads read the weights faster while the other cores are idle, and wait for each other while they are
    busy. Trials of a few tokens decide. The text is the same. The number of threads is a setting of the whole
    process, so a program opts in.

    Args:
        chunks: From `Generator.stream`.
        clock: Seconds.

    Yields:
        The chunks.
    """
    # Elsewhere the last bits of a product depend on the number of threads.
    if not _has_avx():
        with threads.one_thread():
            yield from chunks
        return
    with threads.best_number(clock) as pace:
        while True:
            with pace.piece():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


def _product_for(model: GPT, copy_weights: bool) -> Callable[[Tensor, Tensor | None], _Product] | None:
    """What makes the fastest linear layer for a few rows; None if it is PyTorch's own."""
    if not _has_fast_products(model):
        return None
    return _bagged if copy_weights and _is_small(model) and not _is_intel() else _sliced


def _has_fast_products(model: GPT) -> bool:
    weight = model.wte.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and _has_avx()


def _is_small(model: GPT) -> bool:
    return sum(p.nbytes for p in model.parameters()) <= MAX_COPIED_BYTES


def _has_avx() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


@cache
def _is_intel() -> bool:
    """Whether this processor is one that MKL's kernels were written for."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "GenuineIntel" in file.read(4096)
    except OSError:
        return "GenuineIntel" in platform.processor()


@cache
def _packs() -> bool:
    """Whether oneDNN's products of several rows are the fastest: where MKL's are not at their best.

    Their names in torch are private and may change, so they are tried.
    """
    if _is_intel():
        return False
    weight, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]])
    try:
        return torch.equal(_packed(weight, None)(x), F.linear(x, weight))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _call_directly(module: nn.Module, product: Callable[[Tensor, Tensor | None], _Product] | None) -> None:
    """Put plain functions where each module looks for its parts.

    Calling a part as a module adds a lookup and a search for hooks, which the twin does not have; for one
    token that takes a tenth of the time.
    """
    for name, part in module.named_children():
        _call_directly(part, product)
        if isinstance(part, nn.ModuleList):
            vars(module)[name] = [p.forward for p in part]
        elif isinstance(part, nn.Linear) and product is not None:
            vars(module)[name] = product(part.weight, part.bias)
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm):
            vars(module)[name] = _norm(part)
        elif not isinstance(part, nn.Embedding):
            vars(module)[name] = part.forward


def _sliced(weight: Tensor, bias: Tensor | None, *, copied: bool = False) -> _Product:
    """A linear layer that multiplies a few rows as fast as its weights can be read.

    The matrix is multiplied in parts, a batch of products, each of which MKL leaves to one thread.

    Args:
        weight: (out, in).
        bias: (out), or None.
        copied: Whether it has a copy of the weights in the order in which products of several rows read them.

    Returns:
        A function of x, (B, T, in), that returns (B, T, out).
    """
    weight = weight.detach()
    n_out, n_in = weight.shape
    even = n_out // _PARTS * _PARTS
    parts = weight[:even].view(_PARTS, even // _PARTS, n_in).mT  # (parts, in, out / parts)
    parts, most = (parts.contiguous(), _COPIED_ROWS) if copied else (parts, _FEW_ROWS)
    shift = None if bias is None else bias.detach()[:even].view(_PARTS, 1, even // _PARTS)
    rest = _few(weight[even:], bias) if even < n_out else None

    def product(x: Tensor) -> Tensor:
        B, T, _ = x.shape
        rows = B * T
        if rows > (most if T == 1 else _FEW_POSITIONS):
            return F.linear(x, weight, bias)
        every = x.reshape(1, rows, n_in).expand(_PARTS, rows, n_in)
        y = torch.bmm(every, parts) if shift is None else torch.baddbmm(shift, every, parts)
        y = (y if rows == 1 else y.transpose(0, 1)).reshape(B, T, even)
        return y if rest is None else torch.cat((y, rest(x)), -1)

    return product


def _few(weight: Tensor, bias: Tensor | None) -> _Product:
    """As `_sliced`, for the last rows of a matrix, fewer than there are parts."""
    shift = None if bias is None else bias.detach()[-len(weight) :]

    def product(x: Tensor) -> Tensor:
        y = (x[..., None, :] * weight).sum(-1)
        return y if shift is None else y + shift

    return product


def _bagged(weight: Tensor, bias: Tensor | None) -> _Product:
    """As `_sliced`, for a single row and with a copy of the weights.

    The product with a row is the sum of the matrix's columns weighted by the row, which is what an
    embedding bag computes; its x86 kernel streams the columns twice as fast as a matrix product does.
    """
    weight = weight.detach()
    n_out, n_in = weight.shape
    width = -(-n_out // _PARTS)
    # Each part of a column is a row of the table, (parts * in, out / parts).
    table = F.pad(weight, (0, 0, 0, _PARTS * width - n_out)).view(_PARTS, width, n_in).mT.reshape(-1, width)
    every = torch.arange(_PARTS * n_in, dtype=torch.int32)
    first = torch.arange(0, _PARTS * n_in, n_in, dtype=torch.int32)
    bag, several = torch.embedding_bag, _sliced(weight, bias)

    def product(x: Tensor) -> Tensor:
        if x.numel() != n_in:
            return several(x)
        repeated = x.view(1, n_in).expand(_PARTS, n_in).reshape(-1)
        # Arguments 4 to 6: no scaling by frequency, the sum of the bag, no sparse gradient.
        y = bag(table, every, first, False, 0, False, repeated)[0].view(1, 1, -1).narrow(-1, 0, n_out)
        return y if bias is None else y + bias

    return product


def _packed(weight: Tensor, bias: Tensor | None) -> _Product:
    """As `_sliced`, for any number of rows and with a copy of the weights in the order of oneDNN's kernels.

    On an AMD EPYC it took a third to a half of the time of MKL's products, for 2 to 128 rows.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _COPIED_ROWS)
    shift, linear = None if bias is None else bias.detach(), torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor) -> Tensor:
        # No function is applied to the product.
        y: Tensor = linear(x, packed, shift, "none", [], "")
        return y

    return product


def _norm(part: nn.LayerNorm | nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, eps = list(part.normalized_shape), part.weight, part.eps
    if isinstance(part, nn.LayerNorm):
        bias = part.bias
        return lambda x: torch.layer_norm(x, shape, weight, bias, part.eps)
    if eps is None or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    small, share = torch.tensor(eps), 1 / shape[-1]

    def norm(x: Tensor) -> Tensor:
        # Half of the operations that PyTorch takes on a CPU.
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(small, length, length, value=share).rsqrt_() * weight

    return norm
