"""A twin of a model that reads one token at a time as fast as a CPU can.

One token at a time means matrices times vectors, bound by how fast weights stream from memory, and many
small operations, bound by how fast Python calls them. The twin therefore keeps matrices by columns (see
`_product`) and calls the parts of the model as plain functions. Its logits equal the model's up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quill.model.gpt import GPT

# Generating fewer tokens than this takes less time than copying the weights.
FEW_TOKENS = 32

# Larger weights are not copied: the memory and the delay before the first token cost more than they gain.
_MAX_COPIED_BYTES = 1 << 28


def for_decoding(model: GPT, copy_weights: bool = True) -> GPT:
    """A twin of the model in eval mode; the model itself stays as it is.

    Args:
        model: Any model, on any device.
        copy_weights: Whether copies of the weights pay off.

    Returns:
        The twin. It has its own copy of small float32 weights on a CPU with AVX, and shares all others.
    """
    twin = model.twin()
    weight = model.wte.weight
    copy_weights = (
        copy_weights
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and sum(p.nbytes for p in model.parameters()) <= _MAX_COPIED_BYTES
    )
    _call_directly(twin, copy_weights)
    if copy_weights and model.shape.n_layer and model.shape.tie_embeddings:
        # Rows to embed tokens, columns for the head.
        twin.shape = replace(model.shape, tie_embeddings=False)
        vars(twin)["lm_head"] = _product(weight, None)
    return twin


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread for PyTorch's operations; this affects the whole process, so a program opts in.

    The operations for a single token take microseconds: sharing them among threads gains little while the
    other cores are idle, and stalls decoding while they are busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _call_directly(module: nn.Module, copy_weights: bool) -> None:
    """Put plain functions where each module looks for its parts.

    Calling a part as a module adds a lookup and a search for hooks, which the twin does not have; for one
    token that takes a tenth of the time.
    """
    for name, part in module.named_children():
        _call_directly(part, copy_weights)
        if isinstance(part, nn.ModuleList):
            vars(module)[name] = [p.forward for p in part]
        elif isinstance(part, nn.Linear) and copy_weights:
            vars(module)[name] = _product(part.weight, part.bias)
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm):
            vars(module)[name] = _norm(part)
        elif not isinstance(part, nn.Embedding):
            vars(module)[name] = part.forward


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer that multiplies a single row as fast as its weights can be read.

    The product with a row is the sum of the matrix's columns weighted by the row, which is what an
    embedding bag computes; its x86 kernel streams the columns twice as fast as a matrix product does.

    Args:
        weight: (out, in); its columns are copied.
        bias: (out), or None.

    Returns:
        A function of x, (B, T, in), that returns (B, T, out).
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
