"""How much of a text stands in another: cases worked out by hand, and brute force on small strings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import quill
from quill.errors import InputError
from quill.evaluation import overlap
from quill.evaluation.texts import Training
from quill.generation.generator import Generator
from quill.registry.store import Registry


def matches(training: str, *texts: str) -> list[list[int]]:
    return [m.tolist() for m in overlap.longest_matches(training, texts)]


def test_the_longest_match_at_each_position_by_hand() -> None:
    assert matches("the tide is in", "the sea is in", "tidy", "") == [
        # "the ", "s" and "e" alone, no "a", and " is in".
        [4, 3, 2, 1, 1, 1, 0, 6, 5, 4, 3, 2, 1],
        [3, 2, 1, 0],
        [],
    ]
    assert matches("", "abc") == [[0, 0, 0]]
    assert matches("abab", "ababab") == [[4, 3, 4, 3, 2, 1]]
    assert matches("😀 é\n", "é\n😀 é\n") == [[2, 1, 4, 3, 2, 1]]


_SMALL = st.text(alphabet="ab\n\ud800é", max_size=30)


@given(_SMALL, st.lists(_SMALL, max_size=4), st.integers(1, 40))
def test_matches_are_those_of_brute_force_for_any_chunk(training: str, texts: list[str], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_CHUNK", chunk)
        found = matches(training, *texts)
    assert found == [
        [max(n for n in range(len(t) - i + 1) if t[i : i + n] in training) for i in range(len(t))]
        for t in texts
    ]


def test_the_summary_by_hand() -> None:
    training = "0123456789abcdefghij"
    texts = [
        "0123456789",  # a run of 10: all 3 runs of 8
        "x" * 9,  # no run: none of 2
        "56789abcdefghijx",  # a run of 15: 8 of 9 runs of 8, and not the one of 16
        "short",
    ]
    found = overlap.summarize(texts, overlap.longest_matches(training, texts))
    assert (found.texts, found.characters) == (4, 40)
    # The runs are 10, 0, 15 and 1 ("h").
    assert (found.median, found.p95, found.longest, found.run) == (1, 15, 15, "56789abcdefghij")
    assert found.shares == {8: 11 / 14, 16: 0.0, 32: None}


def test_windows_are_as_long_as_the_samples_and_spread_evenly() -> None:
    text = "".join(map(chr, range(100, 200)))
    assert overlap.windows(text, [10, 10, 8]) == [text[:10], text[45:55], text[90:98]]
    assert len(overlap.windows(text, [30] * 50)) == 3, "they do not overlap"
    assert overlap.windows(text, [101]) == overlap.windows(text, []) == overlap.windows(text, [0]) == []


class Parrot:
    """Recites its text from different places."""

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, list[Any]()
        self.tokenizer = self

    def encode(self, text: str, unknown: str) -> list[str]:
        return list(text)

    def generate(self, prompt: str, config: Any) -> list[str]:
        self.asked.append((config.seed, config.num_samples, config.max_new_tokens, config.temperature))
        return [self.text[7 * i :][: config.max_new_tokens] for i in range(config.num_samples)]


def test_a_model_that_recites_overlaps_wholly_and_its_validation_text_does_not() -> None:
    training = "".join(chr(0x4E00 + i) for i in range(3000))
    parrot, stages = Parrot(training), list[tuple[str, int, int]]()
    held_out = training[500:650] + "x" * 1050
    found = overlap.measure(
        parrot,  # type: ignore[arg-type]
        Training("t", training, held_out),
        120,
        lambda *stage: stages.append(stage),
    )
    assert parrot.asked == [(1, 50, 300, 1.0), (2, 50, 300, 1.0), (3, 20, 300, 1.0)]
    assert (found.samples.texts, found.samples.median, found.samples.longest) == (120, 300, 300)
    assert found.samples.shares == {8: 1.0, 16: 1.0, 32: 1.0}
    assert found.validation is not None
    assert (found.validation.texts, found.validation.longest, found.validation.median) == (4, 150, 0)
    assert found.validation.shares[32] == pytest.approx((150 - 31) / (4 * (300 - 31)))
    assert stages == [
        ("sampling", 0, 120),
        ("sampling", 50, 120),
        ("sampling", 100, 120),
        ("comparing", 0, 3000),
    ]


def test_the_overlap_of_a_model_from_python(tiny_registry: Registry, tiny_text: str) -> None:
    found = quill.overlap("tiny", 3, registry=tiny_registry.root, device="cpu")
    assert (found.samples.texts, found.samples.characters) == (3, 900)
    assert found.validation is not None
    assert found.validation.longest > found.samples.longest, "the bells go on, the model has learnt little"
    model = quill.load("tiny", registry=tiny_registry.root, device="cpu")
    assert isinstance(model, Generator)
    texts = model.generate(num_samples=3, max_new_tokens=300, temperature=1.0, seed=1)
    train = tiny_text[: int(0.9 * len(tiny_text))]
    longest = max(n for t in texts for i in range(300) for n in range(300 - i + 1) if t[i : i + n] in train)
    assert found.samples.longest == longest
    assert found.samples.run in train
    with pytest.raises(InputError, match="at least 1"):
        quill.overlap("tiny", 0, registry=tiny_registry.root)


def test_repeats_by_hand() -> None:
    # Of 9 runs of 8 characters 1 is there twice, in the first text alone; texts do not repeat each other.
    texts = ["abcdefghabcdefgh", "abcdefgh", "short"]
    found = overlap.summarize(texts, overlap.longest_matches("", texts))
    assert found.repeats == {8: pytest.approx(1 / 10), 16: 0.0, 32: None}
    whole = overlap.summarize(["a" * 40], overlap.longest_matches("", ["a" * 40]))
    assert whole.repeats == {8: pytest.approx(32 / 33), 16: pytest.approx(24 / 25), 32: pytest.approx(8 / 9)}
