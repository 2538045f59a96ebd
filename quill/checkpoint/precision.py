"""Whether weights fit a narrower dtype, asked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST_HALF = 65504.0
# GGUF's q8_0 keeps bytes up to 127, scaled by a float16. bfloat16 reaches as far as float32.
_LARGEST = {"float16": _LARGEST_HALF, "q8_0": 127 * _LARGEST_HALF}


def refuse_overflow(weights: Mapping[str, Tensor], dtype: str) -> None:
    """Refuse a dtype that cannot represent some finite weight.

    Args:
        weights: By name; float32.
        dtype: The dtype to store them in.

    Raises:
        InputError: A weight is too large.
    """
    if dtype not in _LARGEST:
        return
    for name in weights:
        largest = _magnitude(weights[name])
        if largest > _LARGEST[dtype]:
            raise InputError(
                f"the weights do not fit {dtype}",
                why=f"'{name}' has magnitudes up to {largest:,.0f}; {dtype} ends at {_LARGEST[dtype]:,.0f}",
                hint="choose float32 or bfloat16, whose range is wider",
            )


def _magnitude(values: Tensor) -> float:
    """The largest finite magnitude of weights, without a copy of the tensor where all of it is finite."""
    if not values.numel() or not values.is_floating_point():
        return 0.0
    low, high = values.aminmax()
    largest = max(-float(low), float(high))
    return largest if math.isfinite(largest) else _magnitude(values[values.isfinite()])
