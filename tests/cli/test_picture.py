"""Loss curves as picture files."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from quill.cli import _picture
from quill.evaluation.curves import Curves, Point


@pytest.mark.parametrize("form", ["svg", "png"])
def test_a_picture_is_the_same_twice(form):
    pytest.importorskip("matplotlib")
    found = Curves(tuple(Point(i, 2.0 + math.sin(i)) for i in range(200)), (Point(100, 2.0),))
    drawn = _picture.draw(found, "x:v1", form)
    assert drawn == _picture.draw(found, "x:v1", form)
    assert drawn.startswith(b"\x89PNG" if form == "png" else b"<?xml")


@pytest.mark.parametrize("title", ["<script>alert(1)</script>", "$x^{", "--> <b>", "\x1b[2J", "a_b:v1", ""])
def test_f15_a_title_is_text_in_a_picture(title):
    pytest.importorskip("matplotlib")
    drawn = _picture.draw(Curves((Point(1, 2.0), Point(2, 1.0)), ()), title, "svg")
    assert b"<script" not in drawn
    assert b"\x1b" not in drawn
    tree = ET.fromstring(drawn)
    assert {e.tag.rpartition("}")[2] for e in tree.iter()} <= {
        "svg", "g", "path", "use", "defs", "clipPath", "rect", "style", "metadata", "RDF", "Work", "type",
        "format", "creator", "Agent", "title", "date", "text",
    }  # fmt: skip


def test_a_picture_needs_no_validation_and_one_point_is_enough():
    pytest.importorskip("matplotlib")
    for found in (Curves((Point(0, 1.0),), ()), Curves((), (Point(3, 1.0),))):
        assert _picture.draw(found, "x", "png")
