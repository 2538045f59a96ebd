"""Attention on the CPU in training: values, gradients, dropout masks, compilation."""

import pytest
import torch
import torch.nn.functional as F

from quill.model import cpu_attention
from quill.model.attention import attend


def inputs(shape, n_kv_head=None, dtype=torch.float32):
    B, H, T, D = shape
    generator = torch.Generator().manual_seed(5)
    heads = (H, n_kv_head or H, n_kv_head or H)
    return [torch.randn(B, h, T, D, generator=generator).to(dtype).requires_grad_() for h in heads]


def explicit(q, k, v, scale):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.mT * scale).masked_fill(future, float("-inf")), -1) @ v


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
@pytest.mark.parametrize("scores", [1, 200, 2**20], ids=["one head", "some heads", "all heads"])
def test_values_and_gradients_are_those_of_the_definition(n_kv_head, scores, monkeypatch):
    monkeypatch.setattr(cpu_attention, "_SCORES", scores)
    q, k, v = inputs((3, 4, 7, 8), n_kv_head, torch.float64)
    y, expected = cpu_attention.attend(q, k, v, dropout=0.0, scale=0.3), explicit(q, k, v, 0.3)
    g = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_sixteen_bits_are_as_close_to_float32_as_the_fused_kernel():
    q, k, v = inputs((4, 4, 128, 64))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    g = torch.randn_like(exact)
    exact = [exact, *torch.autograd.grad(exact, (q, k, v), g)]

    def error(function):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(q, k, v)
        results = [y, *torch.autograd.grad(y, (q, k, v), g.to(y.dtype))]
        return [(a.float() - b).norm() / b.norm() for a, b in zip(results, exact, strict=True)]

    fused = error(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    for ours, theirs in zip(error(attend), fused, strict=True):
        assert ours < 2 * theirs + 1e-3


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    q, k, _ = inputs((8, 4, 64, 16))
    rows = torch.eye(64).expand(8, 4, 64, 64).contiguous().requires_grad_()
    plain = cpu_attention.attend(q, k, rows, dropout=0.0, scale=0.25).detach()
    torch.manual_seed(6)
    dropped = cpu_attention.attend(q, k, rows, dropout=0.2, scale=0.25).detach()
    past = plain > 0
    assert (dropped[past] == 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    survived = dropped > 0
    torch.testing.assert_close(dropped[survived], plain[survived] / 0.8, rtol=1e-4, atol=1e-6)


def test_the_backward_pass_has_the_masks_of_the_forward_pass():
    q, k, v = inputs((2, 2, 6, 4), dtype=torch.float64)

    def dropped(q, k, v):
        torch.manual_seed(7)
        return cpu_attention.attend(q, k, v, dropout=0.4, scale=0.5)

    assert torch.autograd.gradcheck(dropped, (q, k, v))


def test_masks_follow_the_generator():
    q, k, v = inputs((2, 2, 16, 4))

    def drawn(seed):
        torch.manual_seed(seed)
        first = attend(q, k, v, dropout=0.5)
        return first, attend(q, k, v, dropout=0.5)

    (a, b), (c, d) = drawn(8), drawn(8)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b)


def test_the_fused_kernel_serves_where_it_is_faster():
    q, *_ = inputs((1, 1, 4, 4))
    assert cpu_attention.suits(q, 0.1)
    assert not cpu_attention.suits(q, 0.0)
    assert cpu_attention.suits(q.bfloat16(), 0.0)
    assert not cpu_attention.suits(q.detach().bfloat16(), 0.0)
    with torch.no_grad():
        assert not cpu_attention.suits(q, 0.1)
    long = torch.zeros(1, 1, 513, 4, dtype=torch.bfloat16, requires_grad=True)
    assert not cpu_attention.suits(long, 0.0) and cpu_attention.suits(long, 0.1)


@pytest.mark.slow
def test_compiled_attention_is_that_of_the_eager_model():
    q, k, v = inputs((2, 2, 16, 8), dtype=torch.bfloat16)

    def both(q, k, v):
        return attend(attend(q, k, v, dropout=0.3), k, v, dropout=0.3).float().sum()

    def run(function):
        torch.manual_seed(9)
        y = function(q, k, v)
        return [y, *torch.autograd.grad(y, (q, k, v))]

    for ours, theirs in zip(run(torch.compile(both)), run(both), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
