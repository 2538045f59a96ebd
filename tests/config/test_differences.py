"""In which settings two configs differ."""

from __future__ import annotations

from quill.config.differences import differences


def test_differences_are_by_dotted_path_and_skip_ignored_settings():
    one = {"name": "a", "$schema": "x", "train": {"lr": 1.0, "seed": None}, "data": {"source": ["a", "b"]}}
    other = {"name": "b", "train": {"lr": 1.0, "seed": 0}, "data": {"source": "a"}}
    found = differences(one, other, {"name", "$schema"})
    assert found == {"data.source": (["a", "b"], "a"), "train.seed": (None, 0)}
    assert differences(one, one) == {}
