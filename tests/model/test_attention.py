"""Attention of one query in each row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from quill.model.attention import single
from quill.threads import one_thread


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_single_query_sees_what_the_fused_kernel_sees(
    heads: tuple[int, int], masked: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    H, K = heads
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 1, H, 8, generator=generator).transpose(1, 2)
    k, v = (torch.randn(3, K, 20, 8, generator=generator)[:, :, :11] for _ in range(2))
    mask = (torch.arange(11) <= torch.tensor([[0], [5], [10]]))[:, None, None] if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    # What a sum would start from is never read.
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", lambda t, n: t.new_full((n,), float("nan")))
        found = single(q, k, v, mask, scale)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_a_single_query_has_the_same_bits_on_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    for S in (17, 64, 100, 256):
        q, k, v = (torch.randn(2, 6, n, 64, generator=generator) for n in (1, S, S))
        with one_thread():
            wanted = single(q, k, v, None, None)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert torch.equal(single(q, k, v, None, None), wanted)
