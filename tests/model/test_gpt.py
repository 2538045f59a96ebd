from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from quill import discovery
from quill.config import blocks, reading
from quill.config.settings import ModelConfig
from quill.errors import InputError
from quill.model.gpt import GPT, loss, n_params

MakeModel = Callable[..., GPT]
BLOCKS = discovery.names("model.blocks")
CHUNKS = [(12,), (5, 7), (5, 1, 1, 4, 1), (1,) * 12]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_cached_logits_equal_full_forward(make_model: MakeModel, block: str, chunks: tuple[int, ...]) -> None:
    model = make_model(block=block)
    idx = torch.randint(0, 29, (3, sum(chunks)))
    cache = model.new_cache(3)
    with torch.inference_mode():
        parts = torch.cat([model(part, cache) for part in idx.split(chunks, 1)], 1)
    torch.testing.assert_close(parts, model.predict(idx), rtol=0, atol=1e-5)
    assert cache.length == 12


@pytest.mark.parametrize("chunks", CHUNKS)
def test_grouped_heads_of_another_size_are_cached_alike(
    make_model: MakeModel, chunks: tuple[int, ...]
) -> None:
    model = make_model(block="modern", n_kv_head=2, head_size=10)
    idx = torch.randint(0, 29, (2, 12))
    cache = model.new_cache(2)
    with torch.inference_mode():
        parts = torch.cat([model(part, cache) for part in idx.split(chunks, 1)], 1)
    torch.testing.assert_close(parts, model.predict(idx), rtol=0, atol=1e-5)
    assert cache.layers[0].keys.shape == (2, 2, 16, 10)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_repeated_cache_continues_each_sequence(make_model: MakeModel, block: str) -> None:
    model = make_model(block=block)
    idx = torch.randint(0, 29, (1, 5))
    following = torch.randint(0, 29, (3, 2))
    cache = model.new_cache()
    with torch.inference_mode():
        model(idx, cache)
        together = model(following, cache.repeat(3))
    whole = torch.cat((idx.expand(3, -1), following), 1)
    torch.testing.assert_close(together, model.predict(whole)[:, 5:], rtol=0, atol=1e-5)
    assert cache.length == 5


@pytest.mark.parametrize("block", BLOCKS)
def test_a_cleared_cache_is_an_empty_one(make_model: MakeModel, block: str) -> None:
    model = make_model(block=block)
    idx = torch.randint(0, 29, (1, 16))
    cache = model.new_cache()
    with torch.inference_mode():
        model(torch.randint(0, 29, (1, 16)), cache)
        cache.clear()
        again = model(idx, cache)
    torch.testing.assert_close(again, model.predict(idx), rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("t", [1, 7, 15])
def test_a_token_does_not_change_logits_before_it(make_model: MakeModel, block: str, t: int) -> None:
    model = make_model(block=block)
    idx = torch.randint(0, 29, (2, 16))
    other = idx.clone()
    other[:, t] = (other[:, t] + 1) % 29
    a, b = model.predict(idx), model.predict(other)
    torch.testing.assert_close(a[:, :t], b[:, :t], rtol=0, atol=1e-6)
    assert (a[:, t:] - b[:, t:]).abs().amin(dim=(0, 1)).max() > 1e-4


@pytest.mark.parametrize("block", BLOCKS)
def test_positions_matter(make_model: MakeModel, block: str) -> None:
    model = make_model(block=block)
    ab = model.predict(torch.tensor([[1, 2, 3]]), targets=False)
    ba = model.predict(torch.tensor([[2, 1, 3]]), targets=False)
    assert (ab - ba).abs().max() > 1e-3


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tied", [True, False])
def test_last_only_is_the_last_position(make_model: MakeModel, block: str, tied: bool) -> None:
    model = make_model(block=block, tie_embeddings=tied)
    idx = torch.randint(0, 29, (2, 9))
    with torch.inference_mode():
        assert model(idx, last_only=True).shape == (2, 1, 29)
        torch.testing.assert_close(model(idx, last_only=True)[:, 0], model(idx)[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_predict_takes_the_last_tokens_that_fit_and_no_dropout(make_model: MakeModel, block: str) -> None:
    model = make_model(block=block, dropout=0.5)
    idx = torch.randint(0, 29, (2, 40))
    wanted = model.predict(idx[:, -16:])
    model.train()
    torch.testing.assert_close(model.predict(idx), wanted, rtol=0, atol=0)
    torch.testing.assert_close(model.predict(idx, targets=False), wanted[:, -1], rtol=0, atol=1e-5)
    assert model.training


@pytest.mark.parametrize("block", BLOCKS)
def test_dropout_applies_only_in_training(make_model: MakeModel, block: str) -> None:
    model = make_model(block=block, dropout=0.5)
    idx = torch.randint(0, 29, (2, 16))
    with torch.no_grad():
        assert torch.equal(model(idx), model(idx))
        model.train()
        assert not torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("block", BLOCKS)
def test_training_continues_after_a_prediction(make_model: MakeModel, block: str) -> None:
    model = make_model(block=block).train()
    idx = torch.randint(0, 29, (2, 9))
    model.predict(idx)
    loss(model(idx[:, :-1]), idx[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("block", BLOCKS)
def test_a_model_overfits_one_batch(block: str) -> None:
    config = ModelConfig(block=block, n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=29)
    model = GPT(config.shape())
    torch.manual_seed(0)
    idx = torch.randint(0, 29, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = loss(model(idx[:, :-1]), idx[:, 1:]).item()
    for _ in range(80):
        optimizer.zero_grad()
        value = loss(model(idx[:, :-1]), idx[:, 1:])
        value.backward()
        optimizer.step()
    assert 3 < first < 4
    assert value.item() < 0.1


def by_definition(activation: str, x: torch.Tensor) -> torch.Tensor:
    match activation:
        case "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        case "gelu_tanh":
            return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "relu":
            return x.clamp(min=0)
        case _:
            return x.clamp(min=0) ** 2


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("T", [1, 5])
def test_activations_match_their_definitions(make_model: MakeModel, activation: str, T: int) -> None:
    x = torch.randn(2, T, 32)
    for block, first, last in (("gpt2", "c_fc", "c_proj"), ("modern", "up_proj", "down_proj")):
        mlp = make_model(block=block, activation=activation).h[0].mlp
        inside = by_definition(activation, x @ getattr(mlp, first).weight.t())
        wanted = inside @ getattr(mlp, last).weight.t()
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(mlp(x), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("block", "activation"), [(b, a) for b in BLOCKS for a in blocks.facts(b).activations]
)
def test_every_declared_activation_builds_and_differs(
    make_model: MakeModel, block: str, activation: str
) -> None:
    idx = torch.randint(0, 29, (2, 5))
    logits = make_model(block=block, activation=activation).predict(idx)
    for other in set(blocks.facts(block).activations) - {activation}:
        different = make_model(block=block, activation=other).predict(idx)
        assert not torch.allclose(logits, different, atol=1e-4), other


def test_hidden_and_head_are_forward(make_model: MakeModel) -> None:
    model = make_model(block="gpt2", bias=True, tie_embeddings=False, head_bias=True)
    idx = torch.randint(0, 29, (2, 5))
    with torch.inference_mode():
        assert torch.equal(model.head(model.hidden(idx)), model(idx))


def test_without_layers_a_model_is_a_bigram_table(make_model: MakeModel) -> None:
    model = make_model(n_layer=0)
    idx = torch.tensor([[3, 1, 3]])
    table = model.state_dict()
    assert {n: tuple(t.shape) for n, t in table.items()} == {"wte.weight": (29, 29)}
    assert torch.equal(model.predict(idx)[0], table["wte.weight"][idx[0]])
    assert torch.equal(model.predict(idx, targets=False)[0], table["wte.weight"][3])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_the_weights_and_nothing_else(make_model: MakeModel, block: str, tied: bool) -> None:
    model = make_model(block=block, tie_embeddings=tied)
    state = model.state_dict()
    assert set(state) == {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in state) is not tied


def test_a_shape_requires_a_vocabulary() -> None:
    with pytest.raises(InputError, match="vocab_size") as e:
        GPT(ModelConfig().shape())
    assert e.value.exit_code == 2


FLAT = {"batch_size": 32, "block_size": 256, "dropout": 0.3}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        # QuillGPT's two models, as its flat configs describe them.
        ({**FLAT, "n_embd": 384, "n_head": 6, "n_layer": 6, "vocab_size": 65}, 10_788_929),
        ({**FLAT, "n_embd": 1024, "n_head": 12, "n_layer": 18, "vocab_size": 135}, 226_922_631),
        # nanoGPT's shakespeare_char: no biases, tied head.
        (
            {
                "model": {
                    "block": "gpt2",
                    "n_layer": 6,
                    "n_head": 6,
                    "n_embd": 384,
                    "block_size": 256,
                    "vocab_size": 65,
                }
            },
            10_745_088,
        ),
        # GPT-2's smallest.
        (
            {
                "model": {
                    "block": "gpt2",
                    "n_layer": 12,
                    "n_head": 12,
                    "n_embd": 768,
                    "block_size": 1024,
                    "vocab_size": 50257,
                    "bias": True,
                }
            },
            124_439_808,
        ),
        ({"model": {"n_layer": 0, "vocab_size": 65}}, 65 * 65),
    ],
)
def test_parameter_counts_of_published_models(settings: dict[str, object], count: int) -> None:
    assert n_params(reading.parse(settings).model.shape()) == count


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n_layer", [0, 1, 2, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_n_params_is_the_real_count(make_model: MakeModel, block: str, n_layer: int, tied: bool) -> None:
    model = make_model(block=block, n_layer=n_layer, tie_embeddings=tied)
    assert n_params(model.shape) == sum(p.numel() for p in model.parameters())
