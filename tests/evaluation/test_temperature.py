"""The temperature at which the loss is lowest, against a search by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quill.config.settings import ModelConfig
from quill.evaluation.measure import evaluate
from quill.evaluation.temperature import Fit
from quill.model.gpt import GPT

KINDS: list[dict[str, Any]] = [
    {"block": "gpt2"},
    {"block": "modern", "bias": False},
    {"block": "modern", "bias": False, "ngram": 3},
    {"block": "gpt2", "tie_embeddings": False, "head_bias": True},
    {"n_layer": 0, "n_embd": 29},
]
TEXT = np.random.default_rng(0).integers(0, 29, 600).astype(np.uint16)


def make(kind: dict[str, Any], seed: int = 0) -> GPT:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 29}
    model = GPT(ModelConfig(**{**shape, **kind}).shape())
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.6)
    if model.shape.ngram:
        model.ngram.count(TEXT)
    return model.eval()


def divided(model: GPT, temperature: float) -> GPT:
    other = GPT(model.shape)
    if model.shape.ngram:
        other.ngram.count(TEXT)
    other.load_state_dict(model.divided(temperature))
    return other.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_divided_by_a_temperature_divide_the_logits_of_the_network(kind: dict[str, Any]) -> None:
    model = make(kind)
    idx = torch.arange(16).view(2, 8)
    for temperature in (0.5, 1.0, 1.7):
        network, other = model.network(), divided(model, temperature).network()
        torch.testing.assert_close(other(idx), network(idx) / temperature, atol=1e-5, rtol=1e-5)
    same = model.divided(1.0)
    assert all(torch.equal(same[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_fitted_loss_is_that_of_the_model_at_the_fitted_temperature(kind: dict[str, Any]) -> None:
    model = make(kind)
    fitted = evaluate(model, TEXT, n_bytes=599, fit=True).fitted
    assert fitted is not None
    loss = evaluate(divided(model, fitted.temperature), TEXT, n_bytes=599).loss
    assert loss == pytest.approx(fitted.loss, abs=2e-3)
    assert fitted.loss <= evaluate(model, TEXT, n_bytes=599).loss


@pytest.mark.parametrize("truth", [0.8, 1.0, 1.3, 1.9])
def test_the_temperature_is_the_best_one(truth: float) -> None:
    """Targets drawn from the logits divided by the truth; the best of 2,000 temperatures is close."""
    torch.manual_seed(1)
    logits = 3 * torch.randn(4000, 12)
    targets = (logits / truth).softmax(-1).multinomial(1)[:, 0]
    fit, model = Fit(), make({})
    for part in (slice(0, 1500), slice(1500, 4000)):
        fit.add(model, logits[part], None, targets[part])
    found = fit.best()
    losses = {t: F.cross_entropy(logits / t, targets).item() for t in np.linspace(0.7, 2.0, 2000).tolist()}
    best = min(losses, key=losses.__getitem__)
    assert found.temperature == pytest.approx(best, rel=0.01)
    assert found.loss == pytest.approx(losses[best], abs=2e-4)
    assert found.temperature == pytest.approx(truth, rel=0.05)


def test_beyond_the_range_the_end_of_it_is_taken() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2000, 12)
    sure = logits.argmax(-1)
    for targets, end in ((sure, 0.7), (torch.randint(0, 12, (2000,)), 0.7 * 1.1**11)):
        fit = Fit()
        fit.add(make({}), logits, None, targets)
        assert fit.best().temperature == pytest.approx(end)


def test_a_report_says_the_temperature_and_a_plain_measurement_does_not() -> None:
    model = make({})
    assert evaluate(model, TEXT, n_bytes=599).fitted is None
    reported = evaluate(model, TEXT, n_bytes=599, report=True)
    assert reported.fitted == evaluate(model, TEXT, n_bytes=599, fit=True).fitted
