"""A run's losses as points and as text."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quill.errors import CorruptError
from quill.evaluation import chart, curves
from quill.evaluation.curves import Curves, Point
from quill.registry.folder import Folder

BRAILLE = range(0x2801, 0x2900)
points = st.lists(
    st.tuples(st.integers(0, 2**52), st.floats(-1e29, 1e29, allow_nan=False)),
    max_size=40,
    unique_by=lambda p: p[0],
).map(lambda ps: tuple(Point(*p) for p in sorted(ps)))


def stored(**series: list[tuple[int, float]]) -> list[bytes]:
    found = [{"step": step, key: loss} for key, points in series.items() for step, loss in points]
    return [f"{json.dumps(line)}\n".encode() for line in found]


def noisy(n: int = 1000, sigma: float = 0.2) -> tuple[Point, ...]:
    chance = random.Random(7)
    return tuple(Point(i, 2.0 + chance.gauss(0, sigma)) for i in range(n))


def plot_of(text: str) -> list[str]:
    """The rows between the axes, without their labels."""
    return [re.split("[│┤]", line, maxsplit=1)[1] for line in text.splitlines() if re.search("[│┤]", line)]


def test_torn_lines_and_values_that_are_not_losses_are_skipped():
    raw = (
        b'{"step": 2, "loss": 2.5}',
        b'{"step": 1, "loss": 3.0, "learning_rate": 0.1}',
        b'{"step": 3, "loss": NaN}',
        b'{"step": 4, "loss": 1e999}',
        b'{"step": 5, "val_loss": 2.75}',
        b'{"step": -1, "loss": 1}',
        b'{"step": true, "loss": 1}',
        b'{"step": 6, "loss": "1"}',
        b'{"step": 7, "loss": true}',
        b"[]",
        b'{"loss": 1}',
        b"\xff",
        b'{"step": 8, "lo',
    )
    found = curves.read([b"\n".join(raw)])
    assert found == Curves((Point(1, 3.0), Point(2, 2.5)), (Point(5, 2.75),))
    assert not curves.read([b"[" * 100_000])


def test_the_later_of_two_lines_for_a_step_counts():
    found = curves.read(stored(loss=[(1, 3.0), (2, 2.0), (1, 4.0)]))
    assert found.train == (Point(1, 4.0), Point(2, 2.0))


def test_f14_metrics_are_not_read_through_a_link(tmp_path):
    (tmp_path / "secret").write_text('{"step": 1, "loss": 2}')
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptError):
        curves.read(Folder("a", 1, tmp_path).metrics())
    (tmp_path / "metrics.jsonl").unlink()
    assert not curves.read(Folder("a", 1, tmp_path).metrics())


def test_the_best_is_the_first_of_the_lowest():
    found = curves.read(stored(val_loss=[(10, 2.0), (20, 1.5), (30, 1.5)], loss=[(1, 0.5)]))
    assert found.best == Point(20, 1.5)
    assert curves.read(stored(loss=[(1, 0.5)])).best is None


def test_smoothing_removes_noise_and_keeps_the_trend_and_the_ends():
    found = Curves(noisy(), ())
    smooth = [p.loss for p in found.smooth()[50:-50]]
    assert max(abs(loss - 2.0) for loss in smooth) < 0.2
    straight = tuple(Point(i, 3 - i / 1000) for i in range(1000))
    assert Curves(straight, ()).smooth() == straight
    few = noisy(49)
    assert Curves(few, ()).smooth() == few
    slope = tuple(Point(p.step, p.loss + 2 - p.step / 500) for p in noisy())
    ends = Curves(slope, ()).smooth()
    assert (ends[0].loss, ends[-1].loss) == pytest.approx((slope[0].loss, slope[-1].loss))


def test_a_single_spike_does_not_lift_the_curve():
    spike = (*noisy()[:500], Point(500, 1e9), *noisy()[501:])
    assert max(p.loss for p in Curves(spike, ()).smooth()) < 2.5


def test_a_steep_beginning_does_not_flatten_the_rest():
    fall = tuple(Point(i, 3 + 8 * 0.9**i) for i in range(1000))
    low, high = curves.span(fall)
    assert low == min(p.loss for p in fall)
    assert high < 5
    text = chart.draw(Curves(fall, ()))
    beyond = sum(p.loss > high for p in fall)
    assert f"{beyond} losses above {high:.4g} not drawn" in text
    # Where they take less than half of the axis they are drawn.
    assert curves.span(tuple(Point(i, 3 - i / 400) for i in range(400))) == pytest.approx((2.0025, 3.0))


@given(points, points, st.integers(0, 120), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_points_are_drawn_within_the_width(train, val, width, plain):
    found = Curves(train, val)
    text = chart.draw(found, width, plain=plain)
    if not found:
        assert text == ""
        return
    assert text == chart.draw(found, width, plain=plain)
    assert max(map(len, text.splitlines())) <= max(width, 20)
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\x1b" not in text
    assert text.isascii() or not plain
    assert ("*" in text) is bool(val)


@pytest.mark.parametrize("width", [20, 40, 72, 100])
@pytest.mark.parametrize("plain", [False, True])
def test_a_curve_has_no_gaps(width, plain):
    fall = tuple(Point(i * 10, 1 + 3 * 0.98**i) for i in range(300))
    text = chart.draw(Curves(fall, ()), width, plain=plain)
    rows = [
        re.split(r"[│┤|+]", line, maxsplit=1)[1]
        for line in text.splitlines()[1:]
        if re.match(r"[ .\d]*[│┤|+]", line)
    ]
    rows = [row for row in rows if not re.match("[-┬+]", row)]
    columns = max(map(len, rows))
    drawn = {x for row in rows for x, c in enumerate(row) if c == "." or ord(c) in BRAILLE}
    assert drawn == set(range(columns))
    # It falls: further right is never higher.
    tops = [min(y for y, row in enumerate(rows) if x < len(row) and row[x] != " ") for x in range(columns)]
    assert tops == sorted(tops)


def test_the_best_step_is_marked_in_its_place():
    val = [(step, 1.5 + abs(step - 600) / 1000) for step in range(100, 1100, 100)]
    text = chart.draw(curves.read(stored(loss=[(1, 3.0), (1000, 1.0)], val_loss=val)), 72)
    rows = plot_of(text)
    (place,) = [(y, row.index("*")) for y, row in enumerate(rows) if "*" in row]
    columns = 72 - 4
    assert place == (int(1.5 / 2.0 * len(rows)), int(600 / 1000 * columns))
    assert "* best: 1.5000 at step 600" in text
    assert "o validation: 1.9000 at step 1,000" in text
    assert "training: 1.0000 at step 1,000" in text


def test_numbers_on_the_axes_are_round_and_in_order():
    text = chart.draw(Curves(noisy(), ()), 72)
    numbers = [float(n) for n in re.findall(r"^ *([\d.]+)┤", text, re.MULTILINE)]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) >= 3
    steps = [int(n.replace(",", "")) for n in text.splitlines()[-3].split()]
    assert steps[0] == 0
    assert len({b - a for a, b in pairwise(steps)}) == 1


def test_many_evaluations_can_be_told_apart():
    val = tuple(Point(i, 3 - i / 1000) for i in range(1000))
    assert "oo" not in chart.draw(Curves((), val))


def test_paint_colours_the_curves_without_changing_a_character():
    found = Curves(noisy(), (Point(100, 2.0), Point(500, 1.9)))
    roles = set()

    def paint(text: str, role: chart.Role) -> str:
        roles.add(role)
        return f"<{text}>"

    assert chart.draw(found, paint=paint).replace("<", "").replace(">", "") == chart.draw(found)
    assert roles == {"train", "val", "best"}


def test_a_hundred_thousand_lines_are_drawn_in_seconds():
    raw = b"".join(b'{"step": %d, "loss": 2.5}\n' % i for i in range(100_000))
    start = time.perf_counter()
    chart.draw(curves.read([raw]))
    assert time.perf_counter() - start < 5


def test_reading_and_drawing_load_no_torch_and_no_matplotlib():
    code = (
        "import sys\nfrom quill.evaluation import chart, curves\n"
        f"chart.draw(curves.read({stored(loss=[(1, 2.0), (2, 1.0)])}))\n"
        "print(*{'torch', 'numpy', 'matplotlib', 'pydantic', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
