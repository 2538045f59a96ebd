"""Dropout: its rate, its scale, its masks and what the compiler makes of them."""

import pytest
import torch

from quill.model.dropout import dropout


@pytest.mark.parametrize("p", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drops_at_its_rate_and_keeps_the_mean(p, dtype):
    torch.manual_seed(1)
    y = dropout(torch.ones(1_000_003, dtype=dtype), p)
    zeros = (y == 0).double().mean().item()
    assert y.dtype == dtype
    assert zeros == pytest.approx(p, abs=4 * (p * (1 - p) / 1e6) ** 0.5 + 2**-16)
    assert y[y != 0].unique().tolist() == pytest.approx([1 / (1 - p)], rel=5e-3)


def test_each_element_is_drawn_on_its_own():
    torch.manual_seed(2)
    kept = (dropout(torch.ones(400_000), 0.3) != 0).double() - 0.7
    for lag in (1, 2, 3, 4, 5, 8, 64, 256):
        correlation = (kept[lag:] * kept[:-lag]).mean() / 0.21
        assert abs(correlation) < 4 / 400_000**0.5, lag


def test_masks_follow_the_generator():
    x = torch.randn(3, 5, 7)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_a_gradient_passes_where_the_value_did():
    x = torch.randn(50, 40, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 1 / 0.75))


def test_no_dropout_returns_the_input():
    x = torch.randn(4)
    assert dropout(x, 0.0) is x


@pytest.mark.slow
def test_compiled_masks_are_those_of_the_eager_model():
    def twice(x):
        return dropout(torch.relu(dropout(x, 0.5)), 0.5)

    x = torch.randn(64, 33, requires_grad=True)
    torch.manual_seed(4)
    eager = twice(x)
    (grad,) = torch.autograd.grad(eager.sum(), x)
    torch.manual_seed(4)
    compiled = torch.compile(twice)(x)
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.autograd.grad(compiled.sum(), x)[0], grad)
