"""The figures and the document that people and pages read."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import quill
from quill.config.settings import SampleConfig
from quill.errors import DivergedError, InputError
from quill.explanation.explanation import MOST_TOKENS, Explanation
from quill.generation.generator import Generator
from quill.generation.sampling import Sampler

FAMILIES = [{"block": "gpt2"}, {"block": "modern", "n_kv_head": 2, "tie_embeddings": False}]
PROMPT = "a tide <b>\n"


@pytest.fixture(params=FAMILIES, ids=lambda s: s["block"])
def explained(request, make_generator) -> Explanation:
    return Explanation(make_generator(**request.param), PROMPT)


def test_the_last_layer_of_the_lens_is_the_model(explained: Explanation) -> None:
    expected = explained.model.predict(torch.tensor([explained.ids]))[0].softmax(-1)
    torch.testing.assert_close(explained.lens[-1], expected, rtol=0, atol=1e-5)
    assert len(explained.lens) == 1 + explained.model.shape.n_layer
    for p in explained.lens:
        torch.testing.assert_close(p.sum(-1), torch.ones(len(PROMPT)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.6}, {"top_k": 1}],
    ids=str,
)
def test_the_table_has_the_probabilities_that_tokens_are_drawn_with(make_generator, settings) -> None:
    config = SampleConfig(**settings, seed=3)
    explained = Explanation(make_generator(), PROMPT, config)
    rows = 4000
    sampler = Sampler(config, range(rows), torch.tensor([explained.ids]), 29)
    drawn = sampler(explained.logits.expand(rows, -1)).flatten().bincount(minlength=29) / rows
    for row in explained.next_tokens(29):
        p = row["sampled"]
        assert drawn[row["id"]] == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / rows) + 1e-9)


def test_the_document_is_complete_and_consistent(explained: Explanation) -> None:
    document = json.loads(json.dumps(explained.to_dict(), allow_nan=False))
    T, shape = len(PROMPT), explained.model.shape
    assert [t["text"] for t in document["tokens"]] == list(PROMPT)
    for layer, traced in zip(document["layers"], explained.trace.layers, strict=True):
        assert [len(head) for head in layer["weights"]] == [T] * 4
        for h, head in enumerate(layer["weights"]):
            for t, row in enumerate(head):
                assert sum(row) == pytest.approx(1, abs=T * 1e-5)
                e = [math.exp(s - max(layer["scores"][h][t])) for s in layer["scores"][h][t]]
                assert row == pytest.approx([x / sum(e) for x in e], abs=2e-4)
        assert layer["heads"][3]["group"] == 3 * shape.n_kv_head // 4
        assert layer["stream_norm"][-1] == pytest.approx(float(traced.after[-1].norm()), rel=1e-3)
    [likeliest, *_] = document["next"]["likeliest"]
    text, probability = document["lens"][-1]["top"][-1][0]
    assert (text, probability) == (likeliest["text"], pytest.approx(likeliest["probability"], rel=1e-3))
    assert document["lens"][-1]["rank"] == [1] * T
    assert len(document["next"]["logits"]) == 29
    logp = explained.model.predict(torch.tensor([explained.ids]))[0].log_softmax(-1)
    assert document["tokens"][0]["surprise"] is None
    assert document["tokens"][4]["surprise"] == pytest.approx(-float(logp[3, explained.ids[4]]), rel=1e-3)
    shares = document["contributions"]
    assert shares["total"][0] == pytest.approx(likeliest["logit"] - float(explained.logits.mean()), abs=1e-2)


def test_logits_of_a_large_vocabulary_are_summed_up(make_generator) -> None:
    explained = Explanation(make_generator(), PROMPT)
    explained.tokenizer = type("Many", (), {"vocab_size": 50_000, "spelled": lambda self, i: str(i)})()
    logits = 3 * torch.randn(len(PROMPT), 50_000, generator=torch.Generator().manual_seed(1))
    explained.trace = dataclasses.replace(explained.trace, logits=logits)
    found = explained._next()
    assert sum(n for _, n in found["rest"]) + len(found["logits"]) == 50_000
    for temperature in (0.5, 1.0, 2.0):
        listed = sum(math.exp(v / temperature) for _, _, v in found["logits"])
        rest = sum(n * math.exp(v / temperature) for v, n in found["rest"])
        exact = float((logits[-1].double() / temperature).exp().sum())
        assert listed + rest == pytest.approx(exact, rel=1e-3)


def test_long_prompts_are_cut_and_empty_ones_begin_a_text(make_generator) -> None:
    generator = make_generator()
    explained = Explanation(generator, "abcdefgh", last=3)
    assert (explained.ids, explained.left_out) == (generator.tokenizer.encode("fgh"), 5)
    assert len(Explanation(generator, "a" * 40).ids) == 16
    assert Explanation(generator, "").ids == generator.tokenizer.encode("\n")
    for last in (0, MOST_TOKENS + 1):
        with pytest.raises(InputError, match=f"last={last} is out of range"):
            Explanation(generator, "a", last=last)


def test_a_table_is_explained_without_layers(make_generator) -> None:
    explained = Explanation(make_generator(n_layer=0), "ab")
    document = explained.to_dict()
    assert (document["layers"], document["embedding"], document["contributions"]) == ([], None, None)
    assert [row["after"] for row in document["lens"]] == ["table"]
    assert set(document["texts"]) == {"model", "tokens", "sampling", "training"}


def test_broken_weights_are_refused(make_generator) -> None:
    generator = make_generator()
    generator.model.wte.weight.data[3] = torch.nan
    with pytest.raises(DivergedError):
        Explanation(generator, "a")


def test_texts_are_about_the_model_at_hand(make_generator) -> None:
    def said(topic: str, **settings) -> str:
        text = Explanation(make_generator(**settings), "a").to_dict()["texts"][topic]
        return " ".join([text["body"], *text["sources"]])

    assert "16 positions" in said("embedding", block="gpt2")
    assert "rotates" in said("embedding", block="modern")
    assert "standard deviation" in said("residual", block="gpt2")
    assert "root mean square" in said("residual", block="modern")
    assert "GQA" in said("attention", block="modern", n_kv_head=2)
    assert "GQA" not in said("attention", block="modern")
    assert "gate" in said("mlp", block="modern", activation="swiglu")
    assert "gate" not in said("mlp", block="modern", activation="relu2")
    assert "reuses the embedding" in said("model", tie_embeddings=True)
    assert "matrix of its own" in said("model", tie_embeddings=False)


def test_the_python_function_takes_models_and_references(tiny_registry, tiny) -> None:
    by_name = quill.explain("tiny", "3 bells", registry=tiny_registry.root, temperature=0, device="cpu")
    assert by_name.next_tokens(1)[0]["sampled"] == 1
    assert repr(by_name).startswith("<tiny:v1 after 7 tokens: ")
    loaded: Generator = quill.load(tiny, device="cpu")
    for same in (quill.explain(tiny, "3 bells", device="cpu"), quill.explain(loaded, "3 bells")):
        assert torch.equal(same.logits, by_name.logits)
    with pytest.raises(InputError, match="temperature"):
        quill.explain(loaded, "3 bells", temperature=-1)
