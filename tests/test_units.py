"""Counts, sizes and durations in a form for people."""

from __future__ import annotations

import math

import pytest

from quill import units


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (61, "1m 01s"),
        (200, "3m 20s"),
        (7260, "2h 01m"),
        (200_000, "2d 7h"),
        (math.inf, ""),
        (None, ""),
    ],
)
def test_durations(seconds, shown):
    assert units.duration(seconds) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.0k"),
        (65_000, "65.0k"),
        (999_999, "1.0M"),
        (4_800_000, "4.8M"),
        (226_922_631, "227M"),
        (None, ""),
    ],
)
def test_counts(number, shown):
    assert units.count(number) == shown


@pytest.mark.parametrize(
    ("bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (12_345, "12 kB"),
        (999_600, "1.0 MB"),
        (9_749_000, "9.7 MB"),
        (9_960_000, "10 MB"),
        (43_000_000_000, "43 GB"),
        (5e15, "5000 TB"),
        (None, ""),
    ],
)
def test_sizes(bytes, shown):
    assert units.size(bytes) == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1000, "1,000 steps"), ("?", "? steps")],
)
def test_plurals(number, shown):
    assert units.plural(number, "step") == shown
