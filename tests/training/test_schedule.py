"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest

from quill.config.settings import TrainConfig
from quill.training.schedule import Budget, rate

CONFIG = TrainConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, max_iters=110)


def test_warmup_rises_evenly_and_never_starts_at_zero() -> None:
    rises = [rate(step, CONFIG) for step in range(11)]
    assert rises[0] == pytest.approx(1 / 11)
    assert rises[10] == pytest.approx(1.0)
    assert rises == sorted(rises)


def test_cosine_is_halfway_in_the_middle_and_ends_at_min_lr() -> None:
    assert rate(60, CONFIG) == pytest.approx((1 + 0.1) / 2)
    assert rate(110, CONFIG) == pytest.approx(0.1)
    assert rate(10_000, CONFIG) == pytest.approx(0.1)


def test_linear_falls_by_equal_steps() -> None:
    linear = CONFIG.model_copy(update={"schedule": "linear"})
    falls = [rate(step, linear) - rate(step + 1, linear) for step in range(10, 109)]
    assert max(falls) - min(falls) < 1e-12


TRAPEZOIDAL = CONFIG.model_copy(update={"schedule": "trapezoidal", "max_iters": 100})


def test_trapezoidal_is_constant_until_the_warmdown_and_then_falls_by_equal_steps() -> None:
    assert {rate(step, TRAPEZOIDAL) for step in range(10, 81)} == {1.0}
    falls = [rate(step, TRAPEZOIDAL) - rate(step + 1, TRAPEZOIDAL) for step in range(80, 100)]
    assert falls == pytest.approx([0.9 / 20] * 20)
    assert rate(100, TRAPEZOIDAL) == rate(1000, TRAPEZOIDAL) == pytest.approx(0.1)


def test_the_warmdown_is_a_share_of_the_decay_and_begins_after_the_warmup() -> None:
    half = TRAPEZOIDAL.model_copy(update={"warmdown_ratio": 0.5, "lr_decay_iters": 60})
    assert rate(30, half) == 1.0
    assert rate(45, half) == pytest.approx(0.1 + 0.9 * 0.5)
    whole = TRAPEZOIDAL.model_copy(update={"warmdown_ratio": 1.0})
    linear = TRAPEZOIDAL.model_copy(update={"schedule": "linear"})
    assert [rate(s, whole) for s in range(110)] == pytest.approx([rate(s, linear) for s in range(110)])


def test_a_time_limit_and_a_longer_run_move_the_warmdown() -> None:
    assert rate(39, TRAPEZOIDAL, horizon=50) == 1.0
    assert rate(45, TRAPEZOIDAL, horizon=50) == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate(50, TRAPEZOIDAL, horizon=50) == pytest.approx(0.1)
    longer = TRAPEZOIDAL.model_copy(update={"max_iters": 200})
    assert rate(100, longer, first=100) == pytest.approx(1 / 11)
    assert rate(150, longer, first=100) == 1.0


def test_constant_stays_at_the_peak() -> None:
    constant = CONFIG.model_copy(update={"schedule": "constant"})
    assert {rate(step, constant) for step in range(10, 500)} == {1.0}


def test_the_decay_can_end_before_the_run() -> None:
    early = CONFIG.model_copy(update={"lr_decay_iters": 60})
    assert rate(35, early) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rate(60, early) == rate(110, early) == pytest.approx(0.1)


def test_a_warmup_longer_than_the_run_does_not_divide_by_zero() -> None:
    assert rate(5, CONFIG.model_copy(update={"max_iters": 5, "warmup_iters": 5})) == pytest.approx(0.1)


def test_a_time_limit_compresses_the_schedule() -> None:
    assert rate(35, CONFIG, horizon=60) == pytest.approx(0.55)
    assert rate(60, CONFIG, horizon=60) == pytest.approx(0.1)
    assert rate(4, CONFIG, horizon=20) == pytest.approx(1.0), "warmup takes a fifth of what is left at most"


def test_an_unreached_time_limit_changes_nothing() -> None:
    for step in range(0, 120, 7):
        assert rate(step, CONFIG, horizon=110) == rate(step, CONFIG) == rate(step, CONFIG, horizon=5000)


def test_a_lengthened_run_warms_up_again_and_joins_the_longer_schedule() -> None:
    longer = CONFIG.model_copy(update={"max_iters": 220})
    assert rate(110, longer, first=110) == pytest.approx(rate(110, longer) / 11)
    assert [rate(s, longer, first=110) for s in (121, 200)] == [rate(s, longer) for s in (121, 200)]


def test_the_horizon_follows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("quill.training.schedule.time.monotonic", lambda: now[0])
    budget = Budget(100.0, 100.0, eval_interval=10, evaluation_steps=5.0, final_evaluations=1.0)
    assert budget.horizon(0) is None
    now[0] = 110.0
    budget.stepped(10.0)
    assert budget.horizon(1) is None, "the first step is slow and does not count"
    now[0] = 111.0
    budget.stepped(1.0)
    # An evaluation is estimated at 5 s: one at the end, and half a second for each step.
    assert budget.left == pytest.approx(89.0 - 5.0 - 2.0)
    assert budget.horizon(2) == 2 + int(82.0 / 1.5)
    budget.evaluated(0.0)
    assert budget.horizon(2) == 2 + 87
    budget.stepped(3.0)
    assert budget.horizon(3) == 3 + int(87.0 / 2.0), "a slower pace brings it nearer"
    budget.sampled(2.0)
    assert budget.horizon(3) == 3 + int(87.0 / 3.0), "samples take their share"
    budget.evaluated(1000.0)
    assert budget.left == pytest.approx(89.0 - 30.0), "the end may take three tenths of the time"
