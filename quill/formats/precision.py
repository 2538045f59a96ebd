"""Whether weights fit a narrower type, asked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def refuse_overflow(weights: Mapping[str, Tensor], dtype: str) -> None:
    """Refuse float16 for weights that it has no numbers for; every other type reaches as far as float32.

    Args:
        weights: By name; float32.
        dtype: What they shall be kept in.

    Raises:
        InputError: One of them is too large.
    """
    import torch

    if dtype != "float16":
        return
    most = torch.finfo(torch.float16).max
    for name, t in weights.items():
        finite = t[t.isfinite()] if not bool(t.isfinite().all()) else t
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        if largest > most:
            why = f"'{name}' goes up to {largest:,.0f}, float16 up to {most:,.0f}"
            raise InputError("the weights do not fit float16", why=why, hint="--dtype float32")
