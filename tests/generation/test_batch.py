"""Rows side by side: whoever joins or leaves, each row's logits are those of its own window."""

from __future__ import annotations

import random

import pytest
import torch

from quill.config.settings import SampleConfig
from quill.generation.batch import Batch
from quill.generation.cpu import for_batches, for_decoding
from quill.generation.decoding import Decoder
from quill.generation.sampling import Sampler, draw_together

SHAPES = [
    {"block": "gpt2"},
    {"block": "gpt2", "tie_embeddings": False, "n_embd": 48},
    {"block": "modern"},
    {"block": "modern", "n_kv_head": 2},
    {"n_layer": 0},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("copy_weights", [True, False])
def test_rows_that_join_and_leave_have_the_logits_of_rows_alone(make_model, shape, copy_weights):
    model = make_model(**shape)
    vocab_size = model.shape.vocab_size
    twin = for_decoding(model, copy_weights)
    batch, drawn = Batch(for_batches(model), 5), random.Random(1)
    pairs = {}
    for turn in range(120):
        if not batch.is_full and (not pairs or drawn.random() < 0.2):
            alone = Decoder(twin)
            if pairs and drawn.random() < 0.3:
                like = next(iter(pairs))
                alone.feed(pairs[like].window)
                pairs[batch.join(twin, like)] = alone
            else:
                prompt = torch.tensor([[drawn.randrange(vocab_size) for _ in range(drawn.randint(1, 16))]])
                row = batch.join(twin)
                assert torch.allclose(row.read(prompt), alone.feed(prompt), atol=1e-4)
                pairs[row] = alone
        rows = [row for row in pairs if drawn.random() < 0.8]
        if rows:
            tokens = torch.tensor([[drawn.randrange(vocab_size)] for _ in rows])
            found = batch.step(rows, tokens)
            wanted = torch.cat([pairs[r].feed(tokens[i : i + 1]) for i, r in enumerate(rows)])
            assert torch.allclose(found, wanted, atol=1e-4), turn
        if pairs and drawn.random() < 0.1:
            gone = drawn.choice(list(pairs))
            batch.leave(gone)
            del pairs[gone]


def test_a_slot_is_free_of_what_was_in_it(make_model):
    model = make_model()
    batch = Batch(model, 3)
    first, second = batch.join(model), batch.join(model)
    for row in (first, second):
        row.read(torch.tensor([[1, 2, 3]]))
    for layer in batch._cache.layers:
        layer.keys[first.slot].fill_(float("nan"))
        layer.values[first.slot].fill_(float("nan"))
    batch.leave(first, damaged=True)
    third = batch.join(model)
    third.read(torch.tensor([[4]]))
    tokens = torch.tensor([[5], [6]])
    assert torch.isfinite(batch.step([second, third], tokens)).all()


def test_a_row_alone_is_the_decoder_bit_for_bit(make_model):
    twin = for_decoding(make_model(block_size=16))
    batch, alone = Batch(twin, 4), Decoder(twin)
    batch.join(twin)
    row = batch.join(twin)
    token = torch.tensor([[3, 4, 5]])
    for step in range(40):
        found = row.read(token) if step == 0 else batch.step([row], token)
        wanted = alone.feed(token)
        assert torch.equal(found, wanted)
        token = found.argmax(-1, keepdim=True)


def test_samplers_draw_together_what_each_draws_alone():
    configs = [
        SampleConfig(seed=1, temperature=0.8),
        SampleConfig(seed=2, temperature=0.8),
        SampleConfig(seed=3, temperature=0.0),
        SampleConfig(seed=4, temperature=0.0),
        SampleConfig(seed=5, top_k=5, top_p=0.9, min_p=0.01),
        SampleConfig(seed=6, top_k=5, top_p=0.9, min_p=0.01),
        SampleConfig(seed=7, repetition_penalty=1.5),
        SampleConfig(seed=8, repetition_penalty=1.5),
    ]
    prompt = torch.tensor([[0, 1]])

    def samplers():
        return [Sampler(c, [i], prompt, 20) for i, c in enumerate(configs)]

    alone, together = samplers(), samplers()
    torch.manual_seed(0)
    for _ in range(100):
        logits = torch.randn(len(configs), 24)
        wanted = torch.cat([s(logits[i : i + 1]) for i, s in enumerate(alone)])
        assert torch.equal(draw_together(together, logits), wanted)
