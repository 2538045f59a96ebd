"""Calibration and loss by context, against a computation token by token."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from quill.config.settings import ModelConfig
from quill.evaluation import measure
from quill.evaluation.measure import evaluate
from quill.evaluation.report import BINS, Collector, Report
from quill.model.gpt import GPT


def make_model(std: float = 0.8, **settings: Any) -> GPT:
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 11, "vocab_size": 29}
    model = GPT(ModelConfig(**{**shape, **settings}).shape())
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


TOKENS = np.random.default_rng(0).integers(0, 29, 400).astype(np.uint16)


def report_of(model: GPT, tokens: Any = TOKENS, **arguments: Any) -> Report:
    found = evaluate(model, tokens, n_bytes=len(tokens) - 1, report=True, **arguments).report
    assert found is not None
    return found


def predictions(model: GPT, tokens: Any) -> list[tuple[int, Any, int]]:
    """Context, probabilities and next token of every target, one window at a time."""
    found = []
    idx, T = tokens.astype(np.int64), model.shape.block_size
    for first in range(0, len(idx) - 1, T):
        x = torch.from_numpy(idx[first : min(first + T, len(idx) - 1)])
        p = np.exp(np.float64(torch.log_softmax(model.predict(x[None])[0].double(), -1)))
        found += [(t + 1, p[t], int(idx[first + t + 1])) for t in range(len(x))]
    return found


def test_the_report_is_that_of_a_computation_token_by_token() -> None:
    model = make_model()
    found, wanted = report_of(model), predictions(model, TOKENS)
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for _, p, following in wanted:
        sure = float(p.max())
        [at] = [i for i in range(BINS) if i / BINS < sure <= (i + 1) / BINS]
        bins[at].append((sure, int(p.argmax()) == following))
    gaps = [abs(sum(s - r for s, r in b)) for b in bins]
    got = found.calibration
    assert sum(map(bool, bins)) > 8, "the model must be sure and unsure"
    assert [b.tokens for b in got.bins] == [len(b) for b in bins]
    for mine, b in zip(got.bins, bins, strict=True):
        assert mine.confidence == (pytest.approx(sum(s for s, _ in b) / len(b), abs=1e-6) if b else None)
        assert mine.accuracy == (sum(r for _, r in b) / len(b) if b else None)
    assert got.expected_error == pytest.approx(sum(gaps) / len(wanted), abs=1e-6)
    assert got.largest_error == pytest.approx(
        max(gap / len(b) for gap, b in zip(gaps, bins, strict=True) if b), abs=1e-6
    )
    assert got.accuracy == sum(p.argmax() == y for _, p, y in wanted) / len(wanted)
    assert got.confidence == pytest.approx(sum(p.max() for _, p, _ in wanted) / len(wanted), abs=1e-6)
    entropy = sum(-sum(q * math.log(q) for q in p) for _, p, _ in wanted) / len(wanted)
    assert got.entropy == pytest.approx(entropy, abs=1e-5)


def test_the_loss_by_context_is_that_of_the_targets_with_it() -> None:
    model = make_model()
    found, wanted = report_of(model), predictions(model, TOKENS)
    assert [(c.first, c.last) for c in found.context] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 11)]
    for c in found.context:
        nats = [-math.log(p[y]) for n, p, y in wanted if c.first <= n <= c.last]
        assert c.tokens == len(nats)
        assert c.loss == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    for n, loss in enumerate(found.losses, 1):
        nats = [-math.log(p[y]) for length, p, y in wanted if length == n]
        assert loss == pytest.approx(sum(nats) / len(nats), abs=1e-5)


def test_the_figures_do_not_change_with_a_report() -> None:
    model = make_model()
    plain = evaluate(model, TOKENS, n_bytes=399)
    assert plain.report is None
    whole = evaluate(model, TOKENS, n_bytes=399, report=True)
    assert asdict(plain) == asdict(whole) | {"report": None, "fitted": None}
    assert "report" not in repr(whole)


def test_slices_of_a_large_vocabulary_give_the_same_report(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    whole = report_of(model)
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", 29 * 5)
    sliced = report_of(model)
    assert [b.tokens for b in sliced.calibration.bins] == [b.tokens for b in whole.calibration.bins]
    assert sliced.losses == pytest.approx(whole.losses, abs=1e-6)
    assert sliced.calibration.entropy == pytest.approx(whole.calibration.entropy, abs=1e-6)


def test_contexts_without_targets_have_no_loss() -> None:
    found = report_of(make_model(), TOKENS[:4])
    assert [(c.first, c.last, c.tokens) for c in found.context[:4]] == [
        (1, 1, 1),
        (2, 2, 1),
        (3, 4, 1),
        (5, 8, 0),
    ]
    assert found.context[3].loss is None
    assert found.losses[3:] == (None,) * 8
    estimated = report_of(make_model(), iters=3, batch_size=2)
    assert [c.tokens for c in estimated.context] == [6, 6, 12, 24, 18]


def test_calibration_by_hand() -> None:
    # Four predictions: 90% sure and right three times, sure of one token and wrong once.
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [1.0, 0.0]]).log()
    targets = torch.tensor([0, 0, 0, 1])
    collector = Collector(2)
    collector.add(logits, targets, torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([0, 1, 0, 1]))
    found = collector.report()
    assert found.calibration.expected_error == pytest.approx((3 * 0.1 + 1.0) / 4)
    assert found.calibration.largest_error == pytest.approx(1.0)
    assert found.calibration.accuracy == 0.75
    # Certainty has no entropy, even where a logit is minus infinity.
    assert found.calibration.entropy == pytest.approx(0.75 * -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    assert found.losses == (2.0, 4.0)
    assert [b.tokens for b in found.calibration.bins] == [0] * 13 + [3, 1]


def test_a_uniform_guess_is_as_sure_as_it_is_uncertain() -> None:
    model = make_model(n_layer=0)
    torch.nn.init.zeros_(model.wte.weight)
    found = report_of(model).calibration
    assert found.confidence == pytest.approx(1 / 29, abs=1e-6)
    assert found.entropy == pytest.approx(math.log(29), abs=1e-5)
