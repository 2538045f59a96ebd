"""The table of faults is whole: every row has tests that carry its name, or says why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faults import ROWS, rows_of, written_tests


def test_rows_are_numbered_without_a_gap():
    for letter in "FH":
        rows = [name for name in ROWS if name.startswith(letter)]
        assert rows == [f"{letter}{n}" for n in range(1, len(rows) + 1)]


def test_every_row_has_a_test_or_a_reason():
    written = written_tests()
    assert not [name for name, row in ROWS.items() if not written.get(name) and not row.uncovered]
    assert not [name for name in written if name not in ROWS], "names of rows that do not exist"
    assert not [name for name, row in ROWS.items() if written.get(name) and row.uncovered], "it is covered"


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("test_f07_x", ["F7"]),
        ("test_f26_f27_x", ["F26", "F27"]),
        ("test_h3_x", ["H3"]),
        ("test_f1_f14", ["F1", "F14"]),
        ("test_f_x", []),
        ("test_float16_x", []),
        ("test_f16weights", []),
        ("test_of_f3", []),
    ],
)
def test_a_name_tells_its_rows(name, rows):
    assert rows_of(name) == rows


def test_every_row_of_the_design_is_in_the_table(shared: Path):
    text = (shared / "design" / "faults.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| ([FH]\d+) \|", text, re.MULTILINE)) <= set(ROWS)
