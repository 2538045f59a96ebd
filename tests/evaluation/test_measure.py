from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quill import discovery
from quill.config.settings import ModelConfig
from quill.errors import DivergedError, InputError
from quill.evaluation import measure, texts
from quill.evaluation.measure import Figures, evaluate
from quill.model.gpt import GPT, loss
from quill.tokenizers import base

BLOCKS = discovery.names("model.blocks")


def make_model(**settings: Any) -> GPT:
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 29}
    model = GPT(ModelConfig(**{**shape, **settings}).shape())
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def guessing(vocab_size: int) -> GPT:
    """A model to which all tokens are equally likely."""
    model = make_model(n_layer=0, vocab_size=vocab_size)
    torch.nn.init.zeros_(model.wte.weight)
    return model


def evaluate_text(
    model: GPT, tokenizer: base.Tokenizer, text: str, unknown: texts.Unknown = "error"
) -> Figures:
    tokens, n_bytes = texts.encode(tokenizer, text, unknown)
    return evaluate(model, tokens, n_bytes=n_bytes)


def some_tokens(n: int, vocab_size: int = 29) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.random.default_rng(0).integers(0, vocab_size, n).astype(np.uint16)


@pytest.mark.parametrize("block", [*BLOCKS, None])
@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("block_size", [None, 5, 999])
def test_every_token_but_the_first_is_a_target_once(
    block: str | None, n: int, block_size: int | None
) -> None:
    model = make_model(block=block) if block else make_model(n_layer=0)
    tokens = some_tokens(n)
    idx, T = torch.from_numpy(tokens.astype(np.int64)), min(block_size or 16, 16)
    nats = 0.0
    for first in range(0, n - 1, T):
        x, y = idx[first : min(first + T, n - 1)], idx[first + 1 : first + T + 1]
        nats += F.cross_entropy(model.predict(x[None])[0].double(), y, reduction="sum").item()
    got = evaluate(model, tokens, n_bytes=3 * (n - 1), block_size=block_size)
    assert got.tokens == n - 1
    assert got.bytes == 3 * (n - 1)
    assert got.loss == pytest.approx(nats / (n - 1), abs=1e-6)
    assert got.perplexity == pytest.approx(math.exp(nats / (n - 1)), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * (n - 1)), abs=1e-6)


def test_the_result_does_not_depend_on_the_batch() -> None:
    model, tokens = make_model(), some_tokens(500)
    one = evaluate(model, tokens, n_bytes=499, batch_size=1)
    assert evaluate(model, tokens, n_bytes=499, batch_size=7).loss == pytest.approx(one.loss, abs=1e-6)
    assert evaluate(model, tokens, n_bytes=499).loss == pytest.approx(one.loss, abs=1e-6)
    assert evaluate(model, tokens, n_bytes=499, batch_size=1) == one


@pytest.mark.parametrize(("vocab_size", "bytes_each", "bits"), [(4, 1, 2.0), (256, 1, 8.0), (256, 4, 2.0)])
def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary(
    vocab_size: int, bytes_each: int, bits: float
) -> None:
    tokens = some_tokens(40, vocab_size)
    got = evaluate(guessing(vocab_size), tokens, n_bytes=39 * bytes_each)
    assert got.loss == pytest.approx(math.log(vocab_size), abs=1e-6)
    assert got.perplexity == pytest.approx(vocab_size, rel=1e-5)
    assert got.bits_per_byte == pytest.approx(bits, abs=1e-5)


def test_an_estimate_is_repeatable_and_close() -> None:
    model, tokens = make_model(), some_tokens(3000)
    whole = evaluate(model, tokens, n_bytes=2999)
    a = evaluate(model, tokens, n_bytes=2999, iters=20, batch_size=4, seed=1)
    assert a == evaluate(model, tokens, n_bytes=2999, iters=20, batch_size=4, seed=1)
    assert a != evaluate(model, tokens, n_bytes=2999, iters=20, batch_size=4, seed=2)
    assert a.tokens == 20 * 4 * 16
    assert a.bytes == a.tokens
    assert a.loss == pytest.approx(whole.loss, rel=0.1)
    assert a.bits_per_byte == pytest.approx(a.loss / math.log(2), rel=1e-9)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_is_kept(block: str, training: bool) -> None:
    model, tokens = make_model(block=block, dropout=0.5), some_tokens(60)
    wanted = evaluate(model, tokens, n_bytes=59)
    model.train(training)
    assert evaluate(model, tokens, n_bytes=59) == wanted
    assert model.training is training
    idx = torch.randint(0, 29, (2, 9))
    loss(model(idx[:, :-1]), idx[:, 1:]).backward()


def test_the_mode_is_kept_when_measuring_fails() -> None:
    model = make_model().train()
    with pytest.raises(IndexError):
        evaluate(model, np.full(40, 29, np.uint16), n_bytes=39)
    assert model.training


def test_logits_of_a_large_vocabulary_are_computed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model(), some_tokens(200)
    wanted = evaluate(model, tokens, n_bytes=199)
    head, rows = model.head, []

    def spied(x: torch.Tensor, near: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(len(x))
        return head(x, near)

    monkeypatch.setattr(model, "head", spied)
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", 29 * 10)
    got = evaluate(model, tokens, n_bytes=199)
    assert max(rows) == 10
    assert sum(rows) == 199
    assert got.loss == pytest.approx(wanted.loss, abs=1e-6)


def test_an_overflowing_perplexity_is_infinite() -> None:
    model = guessing(2)
    with torch.no_grad():
        model.wte.weight[:, 0] = 5000.0
    got = evaluate(model, np.ones(9, np.uint16), n_bytes=8)
    assert got.loss == pytest.approx(5000)
    assert got.perplexity == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_f5_non_finite_weights_are_refused(bad: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.wte.weight[3] = bad
    with pytest.raises(DivergedError, match="loss is NaN or infinite") as e:
        evaluate(model, some_tokens(60), n_bytes=59)
    assert e.value.exit_code == 6


@pytest.mark.parametrize(("n", "iters"), [(0, None), (1, None), (16, 3)])
def test_f16_too_little_text_is_refused(n: int, iters: int | None) -> None:
    with pytest.raises(InputError, match=f"{n} token") as e:
        evaluate(make_model(), some_tokens(n), n_bytes=n, iters=iters)
    assert e.value.exit_code == 2


def test_text_is_measured_from_its_second_token() -> None:
    tokenizer = base.load("char").train(["aé€ \n"])
    text = "é€a\né"
    got = evaluate_text(guessing(5), tokenizer, text)
    assert (got.tokens, got.bytes) == (4, 3 + 1 + 1 + 2)
    assert got.bits_per_byte == pytest.approx(4 * math.log2(5) / 7, abs=1e-5)


def test_f22_text_with_unknown_characters_is_refused_or_skipped() -> None:
    tokenizer = base.load("char").train(["aé€ \n"])
    with pytest.raises(InputError, match="Z"):
        evaluate_text(guessing(5), tokenizer, "é€Za\né")
    skipped = evaluate_text(guessing(5), tokenizer, "é€Za\né", unknown="skip")
    assert skipped == evaluate_text(guessing(5), tokenizer, "é€a\né")


def test_f16_text_of_one_token_is_refused() -> None:
    tokenizer = base.load("char").train(["ab"])
    for text in ("", "a"):
        with pytest.raises(InputError, match="token"):
            evaluate_text(guessing(2), tokenizer, text)


def test_figures_are_plain_numbers() -> None:
    got = evaluate(make_model(), some_tokens(60), n_bytes=59)
    assert got.report is None and got.fitted is None
    numbers = [v for k, v in vars(got).items() if k not in ("report", "fitted")]
    assert [type(v) for v in numbers] == [float, float, float, int, int]
    assert isinstance(got, Figures)
