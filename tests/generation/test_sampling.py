from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quill.config.reading import check
from quill.config.settings import SampleConfig
from quill.errors import DivergedError, InputError
from quill.generation import sampling
from quill.generation.sampling import Sampler

INF = math.inf
# Probabilities 0.5, 0.3, 0.15 and 0.05, not in their order.
LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()
PROMPT = torch.zeros(1, 1, dtype=torch.long)


def kept(logits: Tensor) -> list[list[int]]:
    return [[i for i, x in enumerate(row) if x > -INF] for row in logits.tolist()]


def u(*numbers: float) -> Tensor:
    return torch.tensor([[n] for n in numbers], dtype=torch.float64)


@pytest.mark.parametrize(("k", "ids"), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3])])
def test_top_k_keeps_the_k_largest_as_they_are(k: int, ids: list[int]) -> None:
    out = sampling.keep_top_k(LOGITS, k)
    assert kept(out) == [ids]
    assert torch.equal(out[0, ids], LOGITS[0, ids])


def test_f24_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert torch.equal(sampling.keep_top_k(LOGITS, 10**9), LOGITS)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_keeps_exactly_k_of_equal_ones(k: int) -> None:
    assert [len(row) for row in kept(sampling.keep_top_k(torch.zeros(2, 4), k))] == [k, k]


@pytest.mark.parametrize(
    ("p", "ids"),
    [
        (1e-9, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.79, [1, 3]),
        (0.81, [0, 1, 3]),
        (0.96, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, ids: list[int]) -> None:
    out = sampling.keep_top_p(LOGITS, p)
    assert kept(out) == [ids]
    assert torch.equal(out[0, ids], LOGITS[0, ids])


@pytest.mark.parametrize("n", [3, 4, 7, 10, 100, 600])
def test_top_p_that_equal_logits_meet_exactly_keeps_no_more(n: int) -> None:
    for size in range(1, min(n, 50)):
        assert len(kept(sampling.keep_top_p(torch.zeros(1, n).double(), size / n))[0]) == size


def test_top_p_treats_rows_independently() -> None:
    rows = torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.3, 0.4]]).log()
    assert [len(row) for row in kept(sampling.keep_top_p(rows, 0.8))] == [1, 3]


def test_top_p_looks_beyond_the_likeliest_tokens_if_necessary() -> None:
    few = sampling._NUCLEUS
    flat, peaked = torch.zeros(8 * few), torch.zeros(8 * few)
    peaked[5] = 100.0
    assert [len(row) for row in kept(sampling.keep_top_p(torch.stack((flat, peaked)), 0.4999))] == [
        4 * few,
        1,
    ]


@pytest.mark.parametrize(
    ("p", "ids"), [(0.0, [0, 1, 2, 3]), (0.2, [0, 1, 3]), (0.5, [1, 3]), (0.7, [1]), (1.0, [1])]
)
def test_min_p_excludes_tokens_far_below_the_likeliest(p: float, ids: list[int]) -> None:
    assert kept(sampling.keep_min_p(LOGITS, p)) == [ids]


def test_the_repetition_penalty_lowers_positive_and_negative_logits() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert sampling.penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]
    assert sampling.penalize_repetition(logits, seen, 0.5).tolist() == [[4.0, -1.0, 3.0, -3.0]]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
def test_temperature_divides_the_differences(temperature: float) -> None:
    out = sampling.apply_temperature(LOGITS, temperature)
    wanted = (LOGITS[0, 0] - LOGITS[0, 1]) / temperature
    assert (out[0, 0] - out[0, 1]).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_f24_the_smallest_temperatures_leave_only_the_largest(temperature: float) -> None:
    logits = torch.tensor([[1e4, 9e3, 1e4, -3e38]], dtype=torch.float64)
    probabilities = sampling.apply_temperature(logits, temperature).softmax(-1)
    assert probabilities.tolist() == [[0.5, 0.0, 0.5, 0.0]]


def test_the_smallest_penalty_repeats_the_likeliest_of_what_was_seen() -> None:
    config = SampleConfig(repetition_penalty=5e-324, temperature=5e-324, seed=1)
    sampler = sampling.Sampler(config, [0], torch.tensor([[0, 2]]), 4)
    assert sampler(torch.tensor([[1e4, 3e38, 2e4, 3e38]])).tolist() == [[2]]


def test_filters_apply_in_order() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two that top-k leaves the first has 0.57 of what is left: top-p counts what is left.
    assert kept(sampling.restrict(logits, SampleConfig(temperature=1.0, top_k=2, top_p=0.5))) == [[0]]
    assert kept(sampling.restrict(logits, SampleConfig(temperature=1.0, top_p=0.5))) == [[0, 1]]
    # Flattened first, the second is 0.87 times as likely as the first, not 0.75.
    assert kept(sampling.restrict(logits, SampleConfig(temperature=1.0, min_p=0.8))) == [[0]]
    assert kept(sampling.restrict(logits, SampleConfig(temperature=2.0, min_p=0.8))) == [[0, 1]]
    assert kept(sampling.restrict(logits, SampleConfig(temperature=0.1, top_p=0.9))) == [[0]]


def test_a_draw_inverts_the_distribution() -> None:
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0]).log()
    numbers = ((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)[:, None]
    ids = sampling.draw(logits.expand(1000, -1), numbers)
    assert ids.flatten().bincount(minlength=5).tolist() == [250, 0, 500, 250, 0]


@given(
    st.lists(st.one_of(st.just(-INF), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=40).filter(
        lambda row: max(row) > -INF
    ),
    st.one_of(st.just(0.0), st.just(1 - 2**-53), st.floats(0, 1, exclude_max=True)),
)
@settings(max_examples=200, deadline=None)
def test_excluded_tokens_are_never_drawn(row: list[float], number: float) -> None:
    chosen = int(sampling.draw(torch.tensor([row]), u(number)))
    assert row[chosen] > -INF


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_f5_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 9)
    logits[1, 4] = bad
    with pytest.raises(DivergedError, match="NaN or infinity") as e:
        Sampler(SampleConfig(temperature=temperature, top_k=3), [0, 1], PROMPT, 9)(logits)
    assert e.value.exit_code == 6
    assert "weights" in e.value.why


def test_huge_but_finite_logits_are_drawn_from() -> None:
    logits = torch.tensor([[3e38, 3e38, -3e38]])
    assert int(Sampler(SampleConfig(), [0], PROMPT, 3)(logits)) in (0, 1)


def sequence(config: SampleConfig, rows: list[int], n: int = 60) -> list[list[int]]:
    sampler = Sampler(config, rows, PROMPT, 50)
    return torch.cat([sampler(torch.zeros(len(rows), 50)) for _ in range(n)], 1).tolist()


def test_a_seed_repeats_and_each_sample_has_its_own_numbers() -> None:
    config = SampleConfig(seed=7, temperature=1.0)
    five = sequence(config, [0, 1, 2, 3, 4])
    assert sequence(config, [0, 1, 2, 3, 4]) == five
    assert sequence(config, [3]) == [five[3]]
    assert len({tuple(row) for row in five}) == 5
    # Seed 8 is not seed 7 moved on by one sample.
    assert not {tuple(row) for row in sequence(SampleConfig(seed=8, temperature=1.0), [0, 1, 2])} & {
        tuple(row) for row in five
    }


def test_without_a_seed_every_draw_differs() -> None:
    config = SampleConfig(temperature=1.0)
    assert sequence(config, [0]) != sequence(config, [0])


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1, "temperature": 5.0}])
def test_f24_temperature_0_and_top_k_1_are_greedy(settings: dict[str, Any]) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        sampler = Sampler(SampleConfig(seed=seed, **settings), [0, 1, 2], PROMPT, 40)
        assert torch.equal(sampler(logits), logits.argmax(-1, keepdim=True))


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    logits = torch.zeros(1, 64)
    logits[:, 10:] = 1e4
    sampler = Sampler(SampleConfig(temperature=1.0, seed=1), [0], PROMPT, 10)
    assert {int(sampler(logits)) for _ in range(200)} == set(range(10))


def test_repetition_counts_the_prompt_and_the_new_tokens() -> None:
    logits = torch.tensor([[4.0, 3.9, 3.8, 3.7]])
    config = SampleConfig(temperature=0.0, repetition_penalty=1.5)
    sampler = Sampler(config, [0], torch.tensor([[0, 0, 2]]), 4)
    assert [int(sampler(logits)) for _ in range(3)] == [1, 3, 0]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": INF},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": -1},
    ],
)
def test_f24_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError) as e:
        check(SampleConfig, settings, origin="flags")
    assert e.value.exit_code == 2
    assert next(iter(settings)) in str(e.value)
