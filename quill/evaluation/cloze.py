"""Fill in the end of a text: the accuracy of a model on a file of questions.

A question is a JSON line, `{"text": ..., "answer": ..., "choices": [...]}`. With choices the model answers
with the likeliest of them. Without, it is right if each token of the answer is its likeliest. Without an
answer, the answer is the last word of the text (LAMBADA, Paperno et al. 2016, arXiv:1606.06031). The figures
are those of lm-evaluation-harness (EleutherAI): acc, acc_norm, acc_stderr and perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quill import strictjson
from quill.errors import DivergedError, InputError, NotFoundError, ResourceError, shorten
from quill.evaluation import scoring
from quill.model.gpt import GPT
from quill.tokenizers.base import Tokenizer, Unknown

# These bound memory; real questions are far shorter and fewer.
LONGEST_LINE = 1 << 20
MOST_BYTES = 1 << 27
MOST_CHOICES = 100
# Questions that are scored together.
_GROUP = 64

_FIELDS = ("text", "answer", "choices")


@dataclass(frozen=True)
class Question:
    """A text that a model completes.

    Attributes:
        line: Its line in the file, from 1.
        text: The text before the answer.
        answer: What follows it.
        choices: The possible answers; empty without.
    """

    line: int
    text: str
    answer: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Cloze:
    """A model's figures on a file of questions.

    Attributes:
        questions: Number of questions.
        accuracy: Share of questions that it answers right.
        standard_error: Standard error of the accuracy; None for a single question.
        accuracy_by_length: With choices, the accuracy if each choice's log-likelihood is divided by its
            length in characters; None without.
        chance: With choices, the accuracy of a random answer; None without.
        perplexity: exp of the mean cross entropy of an answer, all its tokens together; infinity if that
            overflows.
        loss: Mean cross entropy of the answers in nats per token.
    """

    questions: int
    accuracy: float
    standard_error: float | None
    accuracy_by_length: float | None
    chance: float | None
    perplexity: float
    loss: float


def read(path: Path) -> list[Question]:
    """Read a file of questions.

    Args:
        path: The file, JSON lines in UTF-8.

    Raises:
        InputError: A line is not a question, with its number; or some have choices and some have none.
        NotFoundError: There is no such file.
        ResourceError: It cannot be read.
    """
    found: list[Question] = []
    for number, raw in _lines(path):
        origin = f"{path}:{number}"
        question = _question(number, origin, strictjson.parse(raw, origin=origin))
        if found and bool(question.choices) != bool(found[0].choices):
            has, first = ("", "none") if question.choices else ("no ", "some")
            raise InputError(
                f"'{origin}' has {has}choices",
                why=f"line {found[0].line} has {first}, and the accuracy of both together means nothing",
                hint="write two files",
            )
        found.append(question)
    if not found:
        raise InputError(f"'{path}' is empty", why="a file of questions has one on each line")
    return found


def measure(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    unknown: Unknown = "error",
    report: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Cloze:
    """Measure how many questions a model answers right.

    Args:
        model: Any model; its mode does not change.
        tokenizer: The model's own.
        questions: At least one, as `read` returns them.
        unknown: What to do with characters that have no token.
        report: Called with the stage, how much of it is done, and the total.

    Raises:
        InputError: A character has no token, or an answer does not fit in the context.
        DivergedError: A loss is not finite.
    """
    right = right_by_length = tokens = 0
    nats = 0.0
    for first in range(0, len(questions), _GROUP):
        report("answering", first, len(questions))
        group = questions[first : first + _GROUP]
        pairs = [_pair(q, one, model, tokenizer, unknown) for q in group for one in q.choices or (q.answer,)]
        scores = iter(zip(pairs, scoring.score(model, pairs), strict=True))
        for q in group:
            answers = [next(scores) for _ in q.choices or (q.answer,)]
            at = q.choices.index(q.answer) if q.choices else 0
            costs = [score.nats for _, score in answers]
            nats, tokens = nats + costs[at], tokens + len(answers[at][0][1])
            if q.choices:
                by_length = [cost / len(one) for cost, one in zip(costs, q.choices, strict=True)]
                right += costs.index(min(costs)) == at
                right_by_length += by_length.index(min(by_length)) == at
            else:
                right += answers[at][1].greedy
    if not math.isfinite(nats):
        raise DivergedError(
            "the loss is NaN or infinite",
            why="the model's weights are too, or are so large that numbers overflow",
            hint="quill list --all-versions",
        )
    n, has_choices = len(questions), bool(questions[0].choices)
    accuracy = right / n
    return Cloze(
        questions=n,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else None,
        accuracy_by_length=right_by_length / n if has_choices else None,
        chance=sum(1 / len(q.choices) for q in questions) / n if has_choices else None,
        perplexity=math.exp(nats / n) if nats / n < 700 else math.inf,
        loss=nats / tokens,
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    try:
        with open(path, "rb") as file:
            number = size = 0
            while line := file.readline(LONGEST_LINE + 1):
                number, size = number + 1, size + len(line)
                if len(line) > LONGEST_LINE:
                    raise InputError(f"'{path}:{number}' is too long", why="a line has at most 1 MiB")
                if size > MOST_BYTES:
                    raise InputError(f"'{path}' is too large", why=f"at most {MOST_BYTES >> 20} MiB are read")
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise NotFoundError(f"no file '{path}'", hint="check the path") from None
    except OSError as e:
        raise ResourceError(f"cannot read '{path}'", why=e.strerror or str(e)) from e


def _question(number: int, origin: str, found: Any) -> Question:
    def refuse(why: str) -> InputError:
        return InputError(f"'{origin}' is not a question", why=why, hint="quill help measures")

    if not isinstance(found, dict):
        raise refuse("it is not a JSON object")
    for name in found:
        if name not in _FIELDS:
            raise refuse(f"it has a field {shorten(name, 60)}; the fields are {', '.join(_FIELDS)}")
    text, answer, choices = found.get("text"), found.get("answer"), found.get("choices", [])
    if not isinstance(text, str) or not text.strip():
        raise refuse("'text' must be a text that is not empty")
    if "choices" in found and not (isinstance(choices, list) and 2 <= len(choices) <= MOST_CHOICES):
        raise refuse(f"'choices' must be a list of 2 to {MOST_CHOICES} texts")
    if not all(isinstance(one, str) and one for one in choices) or len(set(choices)) < len(choices):
        raise refuse("each of 'choices' must be a text that is not empty, and no two may be equal")
    if "answer" not in found and not choices:
        before, _, word = text.rpartition(" ")
        if not before.strip() or not word:
            raise refuse("without an 'answer', the answer is the last word of 'text', after a space")
        return Question(number, before, f" {word}", ())
    if not isinstance(answer, str) or not answer:
        raise refuse("'answer' must be a text that is not empty")
    if choices and answer not in choices:
        raise refuse(f"'answer' {shorten(answer, 60)} is not one of 'choices'")
    return Question(number, text, answer, tuple(choices))


def _pair(
    question: Question, answer: str, model: GPT, tokenizer: Tokenizer, unknown: Unknown
) -> scoring.Pair:
    try:
        before, after = scoring.split(tokenizer, question.text, answer, unknown)
    except InputError as e:
        raise InputError(f"line {question.line}: {e.what}", why=e.why, hint=e.hint) from None
    size = model.shape.block_size
    if not before or not 0 < len(after) <= size:
        what = "'text' has" if not before else f"answer {shorten(answer, 40)} has"
        count = f"{len(after):,}" if before and after else "no"
        why = f"1 to {size:,} tokens of an answer fit in the context" if before else "at least 1 is needed"
        raise InputError(f"line {question.line}: {what} {count} tokens", why=why)
    return before, after
