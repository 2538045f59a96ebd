"""The rule that makes a config from a text and the tokens that a run reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quill.config import reading
from quill.training.recipe import MOST_EVALUATIONS, NGRAM_TOKENS, WIDTHS, Recipe

SHAKESPEARE = Recipe(192, 676_000, 1_003_854, 111_540, 65)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("read", [1.0, 1e6, 1e9])
def test_every_recipe_is_a_config(width, read):
    recipe = replace(SHAKESPEARE, width=width, read=read)
    run = reading.parse({"model": recipe.model(), "train": recipe.train(1000)})
    assert run.model.n_embd == width
    assert run.train.max_iters == 1000
    assert run.train.eval_interval * MOST_EVALUATIONS == 1000
    assert run.model.head_size in (32, 48, 64)


@pytest.mark.parametrize(("read", "tokens"), [(676_000, 2048), (14_700_000, 8192), (32_800_000, 16384)])
def test_steps_are_as_long_as_those_of_the_configs_it_comes_from(read, tokens):
    assert replace(SHAKESPEARE, read=read).tokens_per_step == pytest.approx(tokens, rel=0.25)


def test_the_weights_remember_one_reading_of_the_text():
    """A step shrinks them by rate x decay, of which 1 / (rate x decay) steps are left."""
    recipe = replace(SHAKESPEARE, read=10 * SHAKESPEARE.train_tokens)
    steps = 1000
    assert 1 / (0.02 * recipe.weight_decay(steps)) == pytest.approx(steps / 10, rel=0.05)
    often = replace(SHAKESPEARE, read=100 * SHAKESPEARE.train_tokens)
    assert 1 / (0.02 * often.weight_decay(steps)) == pytest.approx(0.04 * steps, rel=0.05)


def test_a_text_that_is_read_once_needs_no_regularization():
    recipe = replace(SHAKESPEARE, read=SHAKESPEARE.train_tokens)
    assert recipe.dropout == recipe.weight_decay(1000) == 0
    drops = [replace(recipe, read=n * recipe.train_tokens).dropout for n in (1, 3, 12, 33)]
    assert drops == sorted(set(drops))


def test_short_texts_have_short_contexts():
    assert SHAKESPEARE.block_size == 256
    assert replace(SHAKESPEARE, train_tokens=900, val_tokens=100).block_size == 32
    assert replace(SHAKESPEARE, train_tokens=90, val_tokens=0).block_size == 32
    assert replace(SHAKESPEARE, train_tokens=20, val_tokens=3).block_size == 8


def test_counts_are_for_small_vocabularies_and_short_runs():
    assert SHAKESPEARE.ngram == 5
    assert replace(SHAKESPEARE, vocab_size=50_257).ngram == 0
    assert replace(SHAKESPEARE, read=NGRAM_TOKENS + 1.0).ngram == 0
    assert replace(SHAKESPEARE, train_tokens=5).ngram == 3
