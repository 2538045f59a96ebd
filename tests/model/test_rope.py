from __future__ import annotations

import torch

from quill.model.rope import Rope


def test_scores_depend_on_distance_alone() -> None:
    table = Rope.table(32, 8, 10000.0, torch.device("cpu"))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(at_q: int, at_k: int) -> float:
        return float((table.span(at_q, 1)(q) * table.span(at_k, 1)(k)).sum())

    assert abs(score(5, 2) - score(31, 28)) < 1e-5
    assert abs(score(5, 2) - score(5, 3)) > 1e-4


def test_position_0_is_left_alone_and_lengths_are_kept() -> None:
    x = torch.randn(2, 3, 16, 8)
    turned = Rope.table(16, 8, 10000.0, torch.device("cpu"))(x)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert (turned[:, :, 1:] - x[:, :, 1:]).abs().max() > 0.1
