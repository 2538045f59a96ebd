"""N-gram counts: the smoothing, what leaving out a target changes, and how a model carries them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from quill.config import reading
from quill.generation.decoding import Decoder
from quill.model.gpt import GPT
from quill.model.kv_cache import last_tokens
from quill.model.ngram import NGram

V, K = 5, 3


def smoothed(grams: Counter[tuple[int, ...]], context: Sequence[int], token: int, discounts: Any) -> float:
    """Interpolated Kneser-Ney by the book, from the counts of the longest sequences."""
    counts = dict(grams)
    levels = [counts]
    for _ in range(K):
        counts = Counter(gram[1:] for gram in counts)
        levels.insert(0, counts)
    p = 1 / V
    for k, level in enumerate(levels):
        if len(context) < k:
            break
        near = tuple(context[len(context) - k :])
        follow = {t: level[(*near, t)] for t in range(V) if level.get((*near, t))}
        total = sum(follow.values())
        if not total:
            break
        cut = {t: discounts[k][min(c, 3)] for t, c in follow.items()}
        p = (follow.get(token, 0) - cut.get(token, 0.0) + p * sum(cut.values())) / total
    return p


@pytest.fixture(scope="module")
def text() -> np.ndarray[Any, np.dtype[np.uint16]]:
    rng = np.random.default_rng(3)
    steps = rng.choice([1, 1, 1, 2, 3], 400)
    return np.asarray(np.cumsum(steps) % V, np.uint16)


@pytest.fixture(scope="module")
def counted(text: Any) -> NGram:
    model = NGram(K, V)
    model.count(text)
    return model


def grams_of(text: Any) -> Counter[tuple[int, ...]]:
    ids = text.tolist()
    return Counter(tuple(ids[i : i + K + 1]) for i in range(len(ids) - K))


def discounts_of(model: NGram) -> list[list[float]]:
    return [order.discounts.tolist() for order in model._tables()]


def test_probabilities_are_interpolated_kneser_ney(counted: NGram, text: Any) -> None:
    contexts = [[], [2], [4, 0], [0, 1, 2], [3, 3, 3], [1, 3, 0], [4, 4, 1]]
    near = torch.tensor([[-1] * (K - len(c)) + c for c in contexts])
    got = counted.predict(near)[0].exp()
    grams, discounts = grams_of(text), discounts_of(counted)
    wanted = [[smoothed(grams, c, t, discounts) for t in range(V)] for c in contexts]
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=0, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(len(contexts)))


def test_a_target_is_left_out_of_the_counts_once(counted: NGram, text: Any) -> None:
    at = range(K, 60)
    near = torch.tensor([text[i - K : i].tolist() for i in at])
    targets = torch.tensor(text[K:60].astype(np.int64))
    got = counted.predict(near, targets)[0].exp()
    discounts = discounts_of(counted)
    for i, row in zip(at, got.tolist(), strict=True):
        grams = grams_of(text)
        grams[tuple(text[i - K : i + 1].tolist())] -= 1
        left = +grams
        wanted = [smoothed(left, text[i - K : i].tolist(), t, discounts) for t in range(V)]
        assert row == pytest.approx(wanted, abs=1e-6)


def test_left_out_targets_predict_as_an_unseen_text_does(shakespeare_text: str) -> None:
    characters = sorted(set(shakespeare_text[:300_000]))
    ids = np.array([characters.index(c) for c in shakespeare_text[:300_000]], np.uint16)
    model = NGram(4, len(characters))
    model.count(ids[:200_000])

    def loss(part: Any, *, seen: bool) -> float:
        x = torch.from_numpy(part[:-1].astype(np.int64))[None]
        y = torch.from_numpy(part[1:].astype(np.int64))
        p = model.predict(last_tokens(x, 4)[0], y if seen else None)[0]
        return -float(p.gather(1, y[:, None]).mean())

    unseen, left_out = loss(ids[200_000:210_000], seen=False), loss(ids[:10_000], seen=True)
    known = loss(ids[:10_000], seen=False)
    assert known < left_out - 0.3
    assert abs(left_out - unseen) < 0.15


def gpt(text: Any, **settings: Any) -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "ngram": K} | settings
    model = GPT(reading.parse({"model": shape}).model.shape(V))
    model.ngram.count(text)
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"block": "gpt2"}, {"n_layer": 0}, {"ngram": 1}])
def test_a_cache_gives_the_same_mixture(text: Any, settings: dict[str, Any]) -> None:
    model = gpt(text, **settings)
    idx = torch.from_numpy(text[:22].astype(np.int64)).view(2, 11)
    whole = model.predict(idx)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(2, 11))
    assert not torch.allclose(whole, model.network().predict(idx).log_softmax(-1), atol=1e-3)
    for chunks in ((11,), (3, 1, 1, 4, 2)):
        cache = model.new_cache(2)
        with torch.inference_mode():
            parts = torch.cat([model(part, cache) for part in idx.split(chunks, 1)], 1)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block_size", [12, 100])
def test_a_window_that_slides_gives_the_same_mixture(text: Any, block_size: int) -> None:
    model = gpt(text, block_size=block_size)
    decoder = Decoder(model)
    for i in range(block_size + 20):
        logits = decoder.feed(torch.from_numpy(text[None, i : i + 1].astype(np.int64)))
        torch.testing.assert_close(logits, model.predict(decoder.window)[:, -1], rtol=0, atol=1e-5)


def test_the_network_alone_is_the_model_without_counts(text: Any) -> None:
    model = gpt(text)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}
    plain = GPT(reading.parse({"model": shape}).model.shape(V))
    alone = model.network()
    assert {n: tuple(p.shape) for n, p in alone.state_dict().items()} == {
        n: tuple(p.shape) for n, p in plain.state_dict().items()
    }
    for name, p in plain.state_dict().items():
        assert torch.equal(p, alone.state_dict()[name]), name
    assert model.shape.ngram == K and alone.network() is alone and plain.network() is plain


def test_rows_of_different_lengths_have_their_own_tokens(text: Any) -> None:
    model, lengths = gpt(text), [2, 9, 5]
    idx = torch.from_numpy(text[:30].astype(np.int64)).view(3, 10)
    cache = model.new_cache(4)
    for layer in cache.layers:
        layer.keys.zero_()
        layer.values.zero_()
    with torch.inference_mode():
        for i, length in enumerate(lengths):
            model(idx[i : i + 1, :length], cache.row(i))
        cache.copy_row(1, 3, 9)
        rows = torch.cat([idx, idx[1:2]])
        lengths = [*lengths, 9]
        following = torch.stack([rows[i, n : n + 1] for i, n in enumerate(lengths)])
        together = model(following, cache.ragged(lengths), last_only=True)
    for i, length in enumerate(lengths):
        alone = model.predict(rows[i : i + 1, : length + 1], targets=False)
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("grams", "counts", "why"),
    [
        ([], [], "no n-gram counts"),
        ([1, 2], [1], "one for each"),
        ([1, 2], [1, 0], "positive"),
        ([-1, 2], [1, 1], "tokens that it does not have"),
        ([1, V ** (K + 1)], [1, 1], "tokens that it does not have"),
        ([2, 2], [1, 1], "ascending"),
        ([1, 2], [1, 3], None),
    ],
)
def test_counts_that_were_loaded_are_checked(grams: list[int], counts: list[int], why: str | None) -> None:
    model = NGram(K, V)
    model.grams, model.counts = (
        torch.tensor(grams, dtype=torch.int64),
        torch.tensor(counts, dtype=torch.int32),
    )
    found = model.why_invalid()
    assert found is None if why is None else found is not None and why in found
