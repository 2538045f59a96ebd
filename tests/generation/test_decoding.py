from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quill import discovery
from quill.config.settings import ModelConfig
from quill.generation import cpu
from quill.generation.cpu import for_decoding
from quill.generation.decoding import Decoder
from quill.model.gpt import GPT
from quill.threads import one_thread

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
PACKED = pytest.param(
    cpu._packed,
    marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"),
)


@pytest.fixture(params=["sliced", "bagged", "plain"])
def twin_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[GPT], GPT]:
    """`for_decoding` with each kind of product."""
    monkeypatch.setattr(cpu, "_has_avx", lambda: request.param != "plain")
    monkeypatch.setattr(cpu, "_is_intel", lambda: request.param == "sliced")
    return for_decoding


@pytest.fixture(scope="module")
def long_model() -> GPT:
    """A model whose window is long enough to be read ahead."""
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=200, vocab_size=29).shape())
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("settings", SHAPES, ids=str)
@pytest.mark.parametrize("stride", [None, 1, 5, 15, 16])
def test_logits_are_those_of_the_uncached_window(
    make_model: MakeModel, settings: dict[str, Any], twin_of: Callable[[GPT], GPT], stride: int | None
) -> None:
    model = make_model(**settings)
    decoder = Decoder(twin_of(model), stride=stride)
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


def test_the_original_model_is_unchanged(make_model: MakeModel, twin_of: Callable[[GPT], GPT]) -> None:
    model = make_model(dropout=0.5).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = list(model.modules())
    decoder = Decoder(twin_of(model))
    decoder.feed(torch.randint(0, 29, (1, 5)))
    assert model.training
    assert list(model.modules()) == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.shape.tie_embeddings
    F.cross_entropy(model(torch.randint(0, 29, (1, 5)))[0], torch.randint(0, 29, (5,))).backward()


def test_large_weights_are_shared(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(cpu, "_is_intel", lambda: False)
    monkeypatch.setattr(cpu, "MAX_COPIED_BYTES", 1000)
    monkeypatch.setattr(cpu, "_bagged", None)
    twin = for_decoding(model)
    mine, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert all(theirs[name] is p for name, p in mine.items())


@pytest.mark.parametrize(
    "product",
    [cpu._sliced, cpu._bagged, partial(cpu._sliced, copied=True), PACKED],
    ids=["sliced", "bagged", "copied", "packed"],
)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("n_out", [3, 16, 21])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 1, 24), (13, 1, 24), (65, 1, 24), (1, 3, 24), (2, 40, 24)])
def test_product_is_a_linear_layer(
    product: Callable[..., Any], n_out: int, shape: tuple[int, ...], biased: bool
) -> None:
    weight, bias = torch.randn(n_out, 24), torch.randn(n_out) if biased else None
    x = torch.randn(shape)
    torch.testing.assert_close(product(weight, bias)(x), F.linear(x, weight, bias))


def test_batches_have_other_products_where_torch_has_lost_those_of_onednn(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*arguments: Any) -> Any:
        raise AttributeError("_linear_pointwise")

    model, idx = make_model(), torch.randint(0, 29, (3, 9))
    monkeypatch.setattr(cpu, "_is_intel", lambda: False)
    monkeypatch.setattr(cpu, "_packed", lost)
    cpu._packs.cache_clear()
    try:
        found = cpu.for_batches(model).predict(idx, targets=False)
    finally:
        cpu._packs.cache_clear()
    torch.testing.assert_close(found, model.predict(idx, targets=False), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("product", "rows"),
    [
        (cpu._sliced, 1),
        (cpu._bagged, 1),
        pytest.param(
            cpu._packed,
            8,
            marks=pytest.mark.skipif(not cpu._packs(), reason="batches have other products here"),
        ),
    ],
)
def test_a_product_is_the_same_on_any_number_of_threads(product: Callable[..., Any], rows: int) -> None:
    for n_out, n_in in ((384, 1536), (1152, 384), (65, 384)):
        multiply, x = product(torch.randn(n_out, n_in), torch.randn(n_out)), torch.randn(rows, 1, n_in)
        with one_thread():
            wanted = multiply(x)
            for threads in (2, 3, 5):
                torch.set_num_threads(threads)
                assert torch.equal(multiply(x), wanted)


@pytest.mark.skipif(not cpu._has_avx(), reason="products are PyTorch's own without AVX")
def test_logits_are_the_same_bits_on_any_number_of_threads() -> None:
    # Wide enough for MKL to share products, and with prompts after which part of the window is read late.
    model = GPT(ModelConfig(n_layer=1, n_head=4, n_embd=256, block_size=150, vocab_size=65).shape())
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    twin = for_decoding(model)
    for prompt in (1, 140):
        fed = torch.randint(0, 65, (1, prompt + 100))
        with one_thread():
            pair = Decoder(twin), Decoder(twin)
            logits = [decoder.feed(fed[:, :prompt]) for decoder in pair]
            for n in range(prompt, prompt + 100):
                for threads, decoder in enumerate(pair, 1):
                    torch.set_num_threads(threads)
                    logits[threads - 1] = decoder.feed(fed[:, n : n + 1])
                assert torch.equal(*logits)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_next_window_is_read_ahead(long_model: GPT, rows: int) -> None:
    lengths: list[int] = []
    decoder = Decoder(long_model, rows=rows)

    def counting(idx: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        lengths.append(idx.shape[1])
        return long_model(idx, *args, **settings)

    decoder.model = copy.copy(long_model)
    vars(decoder.model)["forward"] = counting
    fed = torch.randint(0, 29, (rows, 450))
    for n in range(450):
        logits = decoder.feed(fed[:, n : n + 1])
        if decoder.length in (1, 100, 101, 180, 200):
            wanted = long_model.predict(decoder.window, targets=False)
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
        assert torch.equal(decoder.window, fed[:, n + 1 - decoder.length : n + 1])
    # For each window that moved: three parts while the one before filled, then the rest of its 100 tokens.
    assert [n for n in lengths if n > 1] == [32, 32, 32, 4] * 3


def test_reading_ahead_follows_forks_and_longer_texts(long_model: GPT) -> None:
    fed = torch.randint(0, 29, (1, 400))
    stem = Decoder(long_model)
    stem.feed(fed[:, :180])
    forked = stem.fork(2)
    for n in range(180, 260):
        pair = fed[:, n : n + 1].expand(2, 1)
        torch.testing.assert_close(forked.feed(pair)[1:], stem.feed(pair[:1]), rtol=0, atol=1e-4)
    for end in (300, 350, 400):
        logits = stem.feed(fed[:, end - 40 if end == 300 else end - 50 : end])
        wanted = long_model.predict(stem.window, targets=False)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
        assert torch.equal(stem.window, fed[:, end - stem.length : end])


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


@pytest.mark.skipif(not cpu._has_avx(), reason="one thread is used without AVX")
@pytest.mark.parametrize("faster", [1, 3])
def test_a_sample_takes_the_number_of_threads_that_is_faster(faster: int) -> None:
    used: list[int] = []

    def clock() -> float:
        # A chunk takes 1 s, or 3 s with the other number of threads.
        return sum(1 if threads == faster else 3 for threads in used)

    def chunks() -> Iterator[str]:
        for n in range(400):
            used.append(torch.get_num_threads())
            yield str(n)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert list(cpu.at_best_threads(chunks(), clock)) == [str(n) for n in range(400)]
        assert torch.get_num_threads() == 3
        assert used[0] == 1
        assert set(used) == {1, 3}
        assert used.count(faster) > 360
        half = cpu.at_best_threads(chunks(), clock)
        assert next(half) == "0"
        half.close()  # type: ignore[attr-defined]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_a_short_sample_is_whole_on_any_number_of_threads(number: int) -> None:
    chunks = [str(n) for n in range(number)]
    assert list(cpu.at_best_threads(iter(chunks))) == chunks
