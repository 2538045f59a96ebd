"""How much of a text stands verbatim in a training text: runs of characters, found with a suffix array.

The suffixes of the training text and of the other texts are sorted together by prefix doubling (Manber and
Myers 1993, doi:10.1137/0222058). The longest match of a suffix is then with the nearest suffix of the
training text above or below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quill.config.settings import SampleConfig

if TYPE_CHECKING:
    from quill.evaluation.texts import Training
    from quill.generation.generator import Generator

# Lengths of the runs that are counted, in characters.
GRAMS = (8, 16, 32)
# Length of a sample, in characters.
CHARACTERS = 300
# Samples generated at a time, and characters of the training text sorted at a time.
_GROUP = 50
_CHUNK = 1 << 21
# Characters from which the tokens of a sample are estimated, and how many more of them are generated.
_HEAD, _SPARE = 10_000, 1.3

_Ints = NDArray[np.int64]
Report = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """No-op report."""


@dataclass(frozen=True)
class Overlap:
    """How much of some texts stands verbatim in a training text.

    Attributes:
        texts: Number of texts.
        characters: Their length together.
        median: The longest run of a text that stands in the training text, in characters: its median.
        p95: Its 95th percentile.
        longest: Its maximum.
        run: The longest run of all.
        shares: The share of runs of 8, 16 and 32 characters that stand in the training text; None if no text
            is so long.
        repeats: The share of these runs that occurred before in the same text (seq-rep-n of Welleck et al.
            2020, arXiv:1908.04319).
    """

    texts: int
    characters: int
    median: int
    p95: int
    longest: int
    run: str
    shares: dict[int, float | None]
    repeats: dict[int, float | None]


class Overlaps(NamedTuple):
    """The overlap of samples with the training text, and of the validation text for comparison.

    Attributes:
        samples: That of the samples.
        validation: That of windows of the validation text, as long as the samples; None without one.
    """

    samples: Overlap
    validation: Overlap | None


def measure(generator: Generator, training: Training, samples: int, report: Report = _silent) -> Overlaps:
    """Generate samples and measure how much of them stands in the training text.

    They are of CHARACTERS characters at temperature 1, in groups with the seeds 1, 2, ...

    Args:
        generator: The model.
        training: The text that it was trained on.
        samples: Number of samples, at least 1.
        report: Called with the stage, how much of it is done, and the total.

    Raises:
        DivergedError: The model's weights contain NaN or infinity.
    """
    head = training.train[:_HEAD]
    rate = len(generator.tokenizer.encode(head, unknown="skip")) / max(len(head), 1)
    tokens = math.ceil(CHARACTERS * (1.0 if rate == 1.0 else _SPARE * rate))
    texts: list[str] = []
    while len(texts) < samples:
        report("sampling", len(texts), samples)
        config = SampleConfig(
            num_samples=min(_GROUP, samples - len(texts)),
            max_new_tokens=tokens,
            temperature=1.0,
            seed=len(texts) // _GROUP + 1,
        )
        texts += [text[:CHARACTERS] for text in generator.generate("", config)]
    held_out = windows(training.val, [len(text) for text in texts])
    matches = longest_matches(training.train, [*texts, *held_out], report)
    return Overlaps(
        summarize(texts, matches[:samples]),
        summarize(held_out, matches[samples:]) if held_out else None,
    )


def summarize(texts: Sequence[str], matches: Sequence[_Ints]) -> Overlap:
    """Summarize the matches of at least one text, as `longest_matches` returns them."""
    longest = [int(m.max(initial=0)) for m in matches]
    most = max(range(len(texts)), key=lambda i: longest[i])
    at = int(matches[most].argmax()) if longest[most] else 0
    shares: dict[int, float | None] = {}
    repeats: dict[int, float | None] = {}
    for n in GRAMS:
        # A run of n cannot begin at the last n - 1 characters.
        begun = [m[: len(m) - n + 1] for m in matches if len(m) >= n]
        total = sum(map(len, begun))
        shares[n] = sum(int((b >= n).sum()) for b in begun) / total if total else None
        distinct = sum(len({t[i : i + n] for i in range(len(t) - n + 1)}) for t in texts)
        repeats[n] = 1 - distinct / total if total else None
    return Overlap(
        texts=len(texts),
        characters=sum(map(len, texts)),
        median=_quantile(longest, 0.5),
        p95=_quantile(longest, 0.95),
        longest=longest[most],
        run=texts[most][at : at + longest[most]],
        shares=shares,
        repeats=repeats,
    )


def longest_matches(training: str, texts: Sequence[str], report: Report = _silent) -> list[_Ints]:
    """Find the longest run at every position of each text that stands in the training text.

    Args:
        training: The training text.
        texts: The texts.
        report: As for `measure`.

    Returns:
        For each text, the length of the longest run that begins at each of its characters.
    """
    lengths = [len(text) for text in texts]
    longest = max(lengths, default=0)
    # Code points are moved up by 2: 0 ends the training text, 1 each of the others. No match crosses an end.
    queries = np.concatenate([np.append(_codes(text), 1) for text in texts] or [np.empty(0, np.int64)])
    found = np.zeros(len(queries), np.int64)
    corpus = _codes(training)
    for start in range(0, len(corpus), _CHUNK):
        report("comparing", start, len(corpus))
        chunk = corpus[start : start + _CHUNK + longest]
        np.maximum(found, _matches(np.append(chunk, 0), queries, longest), out=found)
    ends = np.cumsum([n + 1 for n in lengths])
    return [found[end - n - 1 : end - 1] for end, n in zip(ends, lengths, strict=True)]


def windows(text: str, lengths: Sequence[int]) -> list[str]:
    """Cut windows of these lengths out of a text, evenly spread; fewer if they would overlap.

    Args:
        text: The text.
        lengths: The lengths of the windows.
    """
    size = max(lengths, default=0)
    count = min(len(lengths), len(text) // size) if size else 0
    starts = [round(i * (len(text) - size) / max(count - 1, 1)) for i in range(count)]
    return [text[at : at + n] for at, n in zip(starts, lengths, strict=False)]


def _codes(text: str) -> _Ints:
    raw = text.encode("utf-32-le", "surrogatepass")
    return np.frombuffer(raw, "<u4").astype(np.int64) + 2


def _matches(corpus: _Ints, queries: _Ints, longest: int) -> _Ints:
    """The longest match of each suffix of the queries with one of the corpus."""
    whole = np.concatenate((corpus, queries))
    n, n_corpus = len(whole), len(corpus)
    # ranks[k] orders the suffixes by their first 2 ** k characters.
    ranks = [np.unique(whole, return_inverse=True)[1]]
    while 1 << len(ranks) - 1 <= longest:
        rank, width = ranks[-1], 1 << len(ranks) - 1
        following = np.zeros(n, np.int64)
        following[:-width] = rank[width:] + 1
        ranks.append(np.unique(rank * (n + 1) + following, return_inverse=True)[1])
    order = np.argsort(ranks[-1], kind="stable")
    from_corpus = order < n_corpus
    places = np.arange(n)
    above = np.maximum.accumulate(np.where(from_corpus, places, -1))
    below = np.minimum.accumulate(np.where(from_corpus, places, n)[::-1])[::-1]
    found = np.zeros(len(queries), np.int64)
    mine = ~from_corpus
    suffixes = order[mine]
    for neighbours in (above[mine], below[mine]):
        there = (neighbours >= 0) & (neighbours < n)
        i, j = suffixes[there], order[neighbours[there]]
        common = np.zeros(len(i), np.int64)
        for k in reversed(range(len(ranks))):
            common += (ranks[k][i + common] == ranks[k][j + common]).astype(np.int64) << k
        found[i - n_corpus] = np.maximum(found[i - n_corpus], common)
    return found


def _quantile(values: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]
