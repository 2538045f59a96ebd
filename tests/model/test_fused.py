"""The parts of a block that training on a CPU uses equal the plain formulas, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from quill.config.settings import ModelConfig
from quill.model import fused
from quill.model.blocks.modern.block import RMSNorm
from quill.model.gpt import GPT, loss
from quill.model.rope import Rope


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_rms_norm_equals_pytorchs():
    x, weight = double(3, 5, 8), double(8)
    ours, theirs = fused.rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    g = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), g), torch.autograd.grad(theirs, (x, weight), g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_norm_under_autocast_is_in_its_precision_and_its_input_gets_a_gradient_in_its_own():
    norm, x = RMSNorm(16, eps=1e-6), torch.randn(4, 7, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    (g,) = torch.autograd.grad(y.float().square().sum(), x)
    assert g.dtype == torch.float32
    exact = F.rms_norm(x, (16,), None, 1e-6)
    torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-2)


def test_a_rotation_equals_the_plain_one():
    rope, x = Rope.table(6, 8, 10000.0, torch.device("cpu")), torch.randn(2, 6, 3, 8, requires_grad=True)
    for y in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        ours = rope(y)
        with torch.no_grad():
            torch.testing.assert_close(ours, rope(y))
    assert torch.autograd.gradcheck(rope, double(2, 3, 6, 8))


def test_joined_projections_equal_single_ones():
    x, weights = double(2, 3, 4), (double(5, 4), double(1, 4), double(2, 4))
    for y, w in zip(fused.linear(x, weights), weights, strict=True):
        torch.testing.assert_close(y, F.linear(x, w))


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_a_model_has_the_gradients_of_the_plain_formulas(activation, n_kv_head, monkeypatch):
    config = ModelConfig(
        n_layer=2,
        n_head=4,
        n_kv_head=n_kv_head,
        n_embd=32,
        block_size=12,
        vocab_size=11,
        activation=activation,
    )
    model, tokens = GPT(config.shape(), 3), torch.randint(11, (3, 13))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)

    def gradients():
        model.zero_grad()
        value = loss(model(tokens[:, :-1]), tokens[:, 1:])
        value.backward()
        return [value.detach(), *(p.grad.clone() for p in model.parameters())]

    ours = gradients()
    monkeypatch.setattr(fused, "suits", lambda x: False)
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
