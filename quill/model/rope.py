"""Rotary positions, in the half-split layout of GPT-NeoX and Qwen.

Source: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quill.model import fused


class Rope:
    """Rotation of queries and keys for T absolute positions.

    Args:
        cos: Cosines of each position's angles, both halves alike, (T, D).
        sin: Sines, the first half negated, (T, D).
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    @classmethod
    def table(cls, length: int, head_size: int, theta: float, device: torch.device) -> Rope:
        """Rotations for positions 0 to length - 1.

        Args:
            length: Positions, T.
            head_size: Width of one head, D; even.
            theta: Base period.
            device: Device of the table.
        """
        steps = torch.arange(0, head_size, 2, dtype=torch.float32, device=device)
        frequency = theta ** (-steps / head_size)
        angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
        cos, sin = angle.cos(), angle.sin()
        # Negating here instead of in every call saves a pass over each query and key.
        return cls(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    def span(self, start: int, length: int) -> Rope:
        """The rotations of positions start to start + length - 1."""
        return Rope(self.cos.narrow(0, start, length), self.sin.narrow(0, start, length))

    def at(self, positions: Tensor) -> Rope:
        """The rotations of one position for each row.

        Args:
            positions: (B).
        """
        return Rope(self.cos[positions][:, None, None], self.sin[positions][:, None, None])

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate.

        Args:
            x: Queries or keys, (B, H, T, D).

        Returns:
            Same shape and dtype as x.
        """
        half = x.shape[-1] // 2
        if fused.suits(x):
            return fused.rotate(x, self.cos[:, :half], self.sin[:, half:])
        return (x * self.cos + x.roll(half, -1) * self.sin).to(x.dtype)
