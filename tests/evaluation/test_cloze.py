"""Scores and the accuracy of questions, against a computation token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quill import discovery
from quill.config.settings import ModelConfig
from quill.errors import DivergedError, InputError, NotFoundError
from quill.evaluation import cloze, scoring
from quill.model.gpt import GPT
from quill.tokenizers import base

TOKENIZER = base.load("char").train(["the tide is in, and out. \n"])


def make_model(**settings: Any) -> GPT:
    shape = {"n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": TOKENIZER.vocab_size}
    model = GPT(ModelConfig(**{**shape, **settings}).shape())
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model.eval()


def one_by_one(model: GPT, text: str, answer: str) -> tuple[float, bool]:
    """The answer's cross entropy in nats, a token and a forward pass at a time, and whether it is greedy.

    All tokens are predicted in one window, which ends with the answer.
    """
    ids = TOKENIZER.encode(text + answer)
    start = max(0, len(ids) - 1 - model.shape.block_size)
    nats, greedy = 0.0, True
    for at in range(len(ids) - len(answer), len(ids)):
        logits = model.predict(torch.tensor([ids[start:at]]), targets=False)[0].double()
        nats -= float(logits.log_softmax(-1)[ids[at]])
        greedy = greedy and int(logits.argmax()) == ids[at]
    return nats, greedy


CASES = [("the", " tide"), ("the tide is in, and the", " tide"), ("t", "h"), ("the tide ", "is in and out")]


@pytest.mark.parametrize("block", [*discovery.names("model.blocks"), None])
def test_scores_are_those_of_a_token_at_a_time(block: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(block=block) if block else make_model(n_layer=0)
    cases = [(text, answer[:12]) for text, answer in CASES]
    wanted = [one_by_one(model, *case) for case in cases]
    pairs = [(TOKENIZER.encode(t), TOKENIZER.encode(a)) for t, a in cases]
    for tokens, logits in ((2048, 1 << 23), (20, 100), (1, 1)):
        monkeypatch.setattr(scoring, "tokens_at_once", lambda device, n=tokens: n)
        monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", logits)
        found = scoring.score(model, pairs)
        assert [s.nats for s in found] == pytest.approx([nats for nats, _ in wanted], abs=1e-4)
        assert [s.greedy for s in found] == [greedy for _, greedy in wanted]


def test_counts_next_to_the_network_are_scored_too() -> None:
    model = make_model(ngram=3)
    model.ngram.count(TOKENIZER.encode_array("the tide is in, and the tide is out. " * 3))
    [found] = scoring.score(model, [(TOKENIZER.encode("the"), TOKENIZER.encode(" tide"))])
    assert found.nats == pytest.approx(one_by_one(model, "the", " tide")[0], abs=1e-4)


def test_the_end_of_a_text_is_scored_with_the_answer() -> None:
    pair = scoring.split(TOKENIZER, "the ", "tide")
    assert tuple(map(list, pair)) == (TOKENIZER.encode("the"), TOKENIZER.encode(" tide"))


def write(folder: Path, *questions: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(q if isinstance(q, str) else json.dumps(q) + "\n" for q in questions))
    return path


def test_the_figures_are_those_of_answers_one_by_one(tmp_path: Path) -> None:
    model = make_model()
    choices = [" tide", " in, and out", " is"]
    asked = [
        {"text": t, "answer": choices[i % 3], "choices": choices}
        for i, t in enumerate(["the", "and", "out", "in"])
    ]
    found = cloze.measure(model, TOKENIZER, cloze.read(write(tmp_path, *asked)))
    right = by_length = 0
    nats = []
    for q in asked:
        costs = {c: one_by_one(model, q["text"], c)[0] for c in choices}
        right += min(choices, key=lambda c: costs[c]) == q["answer"]
        by_length += min(choices, key=lambda c: costs[c] / len(c)) == q["answer"]
        nats.append(costs[q["answer"]])
    assert (found.questions, found.accuracy, found.accuracy_by_length) == (4, right / 4, by_length / 4)
    assert found.chance == pytest.approx(1 / 3)
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / 4), rel=1e-4)
    assert found.loss == pytest.approx(sum(nats) / sum(len(q["answer"]) for q in asked), abs=1e-5)
    share = right / 4
    assert found.standard_error == pytest.approx(
        math.sqrt(((1 - share) ** 2 * right + share**2 * (4 - right)) / 3) / 2
    )


def test_without_choices_every_token_must_be_the_likeliest(tmp_path: Path) -> None:
    model = make_model()
    ids = torch.tensor([TOKENIZER.encode("the")])
    for _ in range(4):
        ids = torch.cat([ids, model.predict(ids, targets=False).argmax(-1, keepdim=True)], 1)
    likeliest = TOKENIZER.decode(ids[0, 3:].tolist())
    wrong = likeliest[:3] + next(c for c in "tide" if c != likeliest[3])
    asked = [{"text": "the", "answer": likeliest}, {"text": "the", "answer": wrong}]
    found = cloze.measure(model, TOKENIZER, cloze.read(write(tmp_path, *asked)))
    assert (found.accuracy, found.chance, found.accuracy_by_length) == (0.5, None, None)
    [question] = cloze.read(write(tmp_path, {"text": "the tide is in"}))
    assert (question.text, question.answer) == ("the tide is", " in")
    assert cloze.measure(model, TOKENIZER, [question]).standard_error is None


GOOD = {"text": "the tide", "answer": " is", "choices": [" is", " in"]}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ('{"text": "a"\n', "is not JSON"),
        ("[1]\n", "not a JSON object"),
        ({**GOOD, "choises": []}, "choises"),
        ({**GOOD, "text": " "}, "'text' must be"),
        ({**GOOD, "text": 3}, "'text' must be"),
        ({**GOOD, "answer": " out"}, "is not one of"),
        ({**GOOD, "answer": None}, "'answer' must be"),
        ({**GOOD, "choices": [" is"]}, "2 to 100"),
        ({**GOOD, "choices": " is"}, "2 to 100"),
        ({**GOOD, "choices": [" is", " is"]}, "no two may be equal"),
        ({**GOOD, "choices": [" is", ""]}, "not empty"),
        ({"text": "word"}, "last word"),
        ({"text": "the tide "}, "last word"),
        ({"text": "the", "choices": [" is", " in"]}, "'answer' must be"),
        ({"text": "the", "answer": " is"}, "line 1 has some"),
        ('{"text": "the", "text": "the tide"}\n', "twice"),
        (f'{{"text": "{"a" * cloze.LONGEST_LINE}"}}\n', "too long"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(bad: Any, why: str, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, "\n", bad)
    with pytest.raises(InputError) as e:
        cloze.read(path)
    assert f"{path}:3" in e.value.what
    assert why in str(e.value)


def test_a_file_without_questions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="is empty"):
        cloze.read(write(tmp_path, "\n \n"))
    with pytest.raises(NotFoundError):
        cloze.read(tmp_path / "none.jsonl")
    monkeypatch.setattr(cloze, "MOST_BYTES", 10)
    with pytest.raises(InputError, match="too large"):
        cloze.read(write(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("question", "why"),
    [
        ({"text": "the", "answer": " 日"}, "U+65E5"),
        ({"text": "日", "answer": "the"}, "no tokens"),
        ({"text": "the", "answer": " tide is in and out"}, "1 to 12 tokens"),
    ],
)
def test_questions_that_do_not_suit_the_model_name_their_line(
    question: dict[str, str], why: str, tmp_path: Path
) -> None:
    questions = cloze.read(write(tmp_path, {"text": "the", "answer": " tide"}, question))
    with pytest.raises(InputError, match="line 2") as e:
        cloze.measure(make_model(), TOKENIZER, questions, unknown="skip" if why == "no tokens" else "error")
    assert why in str(e.value)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    model = make_model()
    torch.nn.init.constant_(model.ln_f.weight, math.nan)
    with pytest.raises(DivergedError):
        cloze.measure(model, TOKENIZER, cloze.read(write(tmp_path, GOOD)))
