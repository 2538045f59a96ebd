"""What is recorded equals what the papers' formulas give, for every family and every option of theirs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quill.errors import InputError
from quill.explanation.contributions import contributions
from quill.explanation.parts import parts
from quill.explanation.trace import Trace, trace
from quill.model.gpt import GPT

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"block": "gpt2", "bias": True, "qkv_bias": True},
    "gpt2, untied, no biases": {
        "block": "gpt2", "bias": False, "qkv_bias": False, "tie_embeddings": False, "activation": "relu",
    },
    "gpt2, biased head, odd heads": {
        "block": "gpt2", "qkv_bias": False, "tie_embeddings": False, "head_bias": True, "head_size": 7,
        "attention_scale": 0.2,
    },
    "modern": {"block": "modern"},
    "modern, shared keys, untied": {"block": "modern", "n_kv_head": 2, "tie_embeddings": False},
    "modern, one key head, plain MLP": {
        "block": "modern", "n_kv_head": 1, "activation": "relu2", "head_size": 6,
    },
}  # fmt: skip
IDS = torch.tensor([3, 7, 7, 1, 28, 0, 5, 9, 2])


@pytest.fixture(params=MODELS, ids=str)
def model(request, make_generator) -> GPT:
    return make_generator(**MODELS[request.param]).model


@pytest.fixture
def traced(model: GPT) -> Trace:
    return trace(model, IDS)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotate pairs (j, j + D/2) of each position's vector, (H, T, D)."""
    T, D = x.shape[1:]
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def queries_and_keys(model: GPT, block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(H, T, D) each, written out for both families."""
    c, T = model.shape, len(x)
    if c.block == "gpt2":
        y = F.layer_norm(x, (c.n_embd,), block.ln_1.weight, block.ln_1.bias, c.norm_eps)
        q, k, _ = F.linear(y, block.attn.c_attn.weight, block.attn.c_attn.bias).chunk(3, -1)
        return q.view(T, c.n_head, -1).transpose(0, 1), k.view(T, c.n_head, -1).transpose(0, 1)
    y = rms(x, block.input_layernorm.weight, c.norm_eps)
    a = block.self_attn
    q = rms((y @ a.q_proj.weight.T).view(T, c.n_head, -1), a.q_norm.weight, c.norm_eps).transpose(0, 1)
    k = rms((y @ a.k_proj.weight.T).view(T, c.n_kv_head, -1), a.k_norm.weight, c.norm_eps).transpose(0, 1)
    k = torch.stack([k[h * c.n_kv_head // c.n_head] for h in range(c.n_head)])
    return rotated(q, c.rope_theta), rotated(k, c.rope_theta)


@torch.no_grad()
def test_attention_is_that_of_the_formula(model: GPT, traced: Trace) -> None:
    for block, layer in zip(model.h, traced.layers, strict=True):
        q, k = queries_and_keys(model, block, layer.before)
        scale = 0.2 if model.shape.head_size == 7 else model.shape.head_size**-0.5
        scores = torch.einsum("htd,hsd->hts", q, k) * scale
        future = torch.ones(len(IDS), len(IDS), dtype=torch.bool).triu(1)
        torch.testing.assert_close(layer.products * scale, scores, rtol=1e-5, atol=1e-5)
        expected = scores.masked_fill(future, -torch.inf).softmax(-1)
        torch.testing.assert_close(layer.weights, expected, rtol=0, atol=1e-5)


def test_rows_of_attention_sum_to_one_and_see_no_later_token(traced: Trace) -> None:
    for layer in traced.layers:
        torch.testing.assert_close(layer.weights.sum(-1), torch.ones(4, len(IDS)), rtol=0, atol=1e-6)
        assert layer.weights.triu(1).count_nonzero() == 0


def test_the_stream_ends_in_the_logits(model: GPT, traced: Trace) -> None:
    expected = model.predict(IDS[None])[0]
    torch.testing.assert_close(traced.logits, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.head(traced.stream[-1]), expected, rtol=0, atol=1e-5)
    x = traced.embedding if traced.positions is None else traced.embedding + traced.positions
    for layer in traced.layers:
        torch.testing.assert_close(layer.before, x)
        x = x + layer.attention + layer.mlp
        torch.testing.assert_close(layer.after, x, rtol=1e-4, atol=1e-4)
    assert (traced.positions is None) == (model.shape.block == "modern")


@torch.no_grad()
def test_heads_and_bias_are_what_attention_adds(model: GPT, traced: Trace) -> None:
    for block, layer in zip(model.h, traced.layers, strict=True):
        bias = block.writers()["attention"].bias
        added = layer.by_head.sum(0) + (0 if bias is None else bias)
        torch.testing.assert_close(added, layer.attention, rtol=1e-4, atol=1e-4)


def test_a_logit_is_the_sum_of_its_contributions(model: GPT, traced: Trace) -> None:
    tokens = [0, 5, 28]
    found = contributions(model, traced, tokens, 29)
    last = traced.logits[-1]
    torch.testing.assert_close(found.total(), last[tokens] - last.mean(), rtol=1e-4, atol=1e-3)
    assert found.heads.shape == (2, 4, 3)


def test_parts_have_all_parameters_once(model: GPT) -> None:
    found = parts(model)
    assert sum(p.parameters for p in found) == sum(p.numel() for p in model.parameters())
    assert [p.kind for p in found if p.layer == 1] == ["norm", "attention", "norm", "mlp"]
    assert (found[-1].kind == "head") != model.shape.tie_embeddings


def test_one_token_and_a_full_context(model: GPT) -> None:
    for ids in (IDS[:1], torch.arange(16)):
        found = trace(model, ids)
        torch.testing.assert_close(found.logits, model.predict(ids[None])[0], rtol=0, atol=1e-5)
        assert found.layers[0].weights.shape == (4, len(ids), len(ids))


def test_tracing_leaves_the_model_alone(model: GPT) -> None:
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    trace(model, IDS)
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_model_without_layers_has_its_table(make_generator) -> None:
    model = make_generator(n_layer=0).model
    found = trace(model, IDS)
    assert found.layers == ()
    assert torch.equal(found.logits, model.wte.weight[IDS])
    assert [p.kind for p in parts(model)] == ["table"]


def test_a_block_that_does_more_is_refused(make_generator) -> None:
    """Each of these runs, and would be explained wrongly."""

    def explained(change: Any) -> str:
        generator = make_generator(block="gpt2", n_layer=1)
        model = generator.model
        kind = type(model.h[0])
        model.h[0].__class__ = type("Block", (kind,), change)
        with pytest.raises(InputError) as caught:
            trace(model, IDS)
        assert caught.value.what == "models with the block 'gpt2' cannot be explained"
        return caught.value.why

    def more(self: Any, x: Tensor, rope: Any, cache: Any) -> Tensor:
        return type(self).__mro__[1].forward(self, x, rope, cache) + 1

    def no_attention(self: Any, x: Tensor, rope: Any, cache: Any) -> Tensor:
        return x + self.mlp(self.ln_2(x))

    def doubled(self: Any, x: Tensor, rope: Any, cache: Any) -> Tensor:
        x = x + self.attn.c_proj(2 * self.seen(x, cache))
        return x + self.mlp(self.ln_2(x))

    def seen(self: Any, x: Tensor, cache: Any) -> Tensor:
        kept: list[Tensor] = []
        hook = self.attn.c_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        self.attn(self.ln_1(x), cache)
        hook.remove()
        return kept[0]

    assert "no method 'writers'" in explained({"writers": None})
    assert "adds more than" in explained({"forward": more})
    assert "quill.model.attention.attend" in explained({"forward": no_attention})
    assert "do not mix values" in explained({"forward": doubled, "seen": seen})


def test_a_scale_of_the_shape_is_used(make_generator) -> None:
    model = make_generator(block="gpt2", attention_scale=0.5).model
    plain = GPT(dataclasses.replace(model.shape, attention_scale=model.shape.head_size**-0.5))
    plain.load_state_dict(model.state_dict())
    assert trace(model, IDS).layers[0].scale == 0.5
    assert not torch.allclose(trace(model, IDS).layers[0].weights, trace(plain, IDS).layers[0].weights)
