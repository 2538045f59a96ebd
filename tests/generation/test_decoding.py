from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quill import discovery
from quill.generation import cpu
from quill.generation.cpu import for_decoding
from quill.generation.decoding import Decoder
from quill.model.gpt import GPT

MakeModel = Callable[..., GPT]
BLOCKS = discovery.names("model.blocks")
SHAPES: list[dict[str, Any]] = [
    *({"block": block} for block in BLOCKS),
    *({"block": block, "tie_embeddings": False} for block in BLOCKS),
    *({"block": block, "block_size": 1} for block in BLOCKS),
    {"block": "gpt2", "bias": True, "tie_embeddings": False, "head_bias": True, "head_size": 5},
    {"block": "modern", "n_kv_head": 2, "head_size": 10},
    {"n_layer": 0},
]


@pytest.mark.parametrize("settings", SHAPES, ids=str)
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("stride", [None, 1, 5, 15, 16])
def test_logits_are_those_of_the_uncached_window(
    make_model: MakeModel, settings: dict[str, Any], copied: bool, stride: int | None
) -> None:
    model = make_model(**settings)
    decoder = Decoder(for_decoding(model, copied), stride=stride)
    size = model.shape.block_size
    fed = torch.randint(0, 29, (1, 60))
    for part in fed.split((min(size, 7), *(1,) * (60 - min(size, 7))), 1):
        logits = decoder.feed(part)
        wanted = model.predict(decoder.window, targets=False)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [None, 1, 5, 16])
def test_the_window_is_the_last_tokens_and_never_short_of_context(
    make_model: MakeModel, stride: int | None
) -> None:
    decoder = Decoder(make_model(), stride=stride)
    fed = torch.randint(0, 29, (1, 100))
    shortest = max(1, 16 - (stride or 8))
    for n in range(1, 101):
        decoder.feed(fed[:, n - 1 : n])
        assert torch.equal(decoder.window, fed[:, n - decoder.length : n])
        assert min(n, shortest) <= decoder.length <= 16
        assert n > 16 or decoder.length == n


def test_a_first_text_beyond_the_context_fills_it(make_model: MakeModel) -> None:
    model = make_model()
    idx = torch.randint(0, 29, (1, 40))
    decoder = Decoder(model)
    torch.testing.assert_close(decoder.feed(idx), model.predict(idx, targets=False), rtol=0, atol=1e-5)
    assert torch.equal(decoder.window, idx[:, -16:])


@pytest.mark.parametrize("block", BLOCKS)
def test_forked_rows_decode_like_single_ones(make_model: MakeModel, block: str) -> None:
    model = for_decoding(make_model(block=block))
    prompt, following = torch.randint(0, 29, (1, 6)), torch.randint(0, 29, (3, 30))
    stem = Decoder(model)
    stem.feed(prompt)
    forked = stem.fork(3)
    alone = [Decoder(model) for _ in range(3)]
    for decoder in alone:
        decoder.feed(prompt)
    for t in range(30):
        logits = forked.feed(following[:, t : t + 1])
        for row, decoder in enumerate(alone):
            wanted = decoder.feed(following[row : row + 1, t : t + 1])
            torch.testing.assert_close(logits[row : row + 1], wanted, rtol=0, atol=1e-5)
    assert torch.equal(stem.window, prompt)


@pytest.mark.parametrize("copied", [True, False])
def test_the_original_model_is_unchanged(make_model: MakeModel, copied: bool) -> None:
    model = make_model(dropout=0.5).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = list(model.modules())
    decoder = Decoder(for_decoding(model, copied))
    decoder.feed(torch.randint(0, 29, (1, 5)))
    assert model.training
    assert list(model.modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.shape.tie_embeddings
    F.cross_entropy(model(torch.randint(0, 29, (1, 5)))[0], torch.randint(0, 29, (5,))).backward()


def test_large_weights_are_shared(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(cpu, "_MAX_COPIED_BYTES", 1000)
    monkeypatch.setattr(cpu, "_product", None)
    twin = for_decoding(model)
    mine, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert all(theirs[name] is p for name, p in mine.items())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 1, 24), (1, 3, 24)])
def test_product_is_a_linear_layer(shape: tuple[int, ...], biased: bool) -> None:
    weight, bias = torch.randn(10, 24), torch.randn(10) if biased else None
    x = torch.randn(shape)
    torch.testing.assert_close(cpu._product(weight, bias)(x), F.linear(x, weight, bias))


def test_decoding_leaves_the_process_as_it_was(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(threads: int) -> None:
        raise AssertionError("the number of threads belongs to the program")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "set_num_threads", refuse)
        decoder = Decoder(for_decoding(make_model()))
        decoder.feed(torch.randint(0, 29, (1, 5)))
        decoder.feed(torch.randint(0, 29, (1, 1)))
    assert not torch.is_inference_mode_enabled()


def test_one_thread_is_restored_afterwards() -> None:
    threads = torch.get_num_threads()
    with suppress(ZeroDivisionError), cpu.one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads
