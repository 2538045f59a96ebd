"""Fixtures for whole runs of the command line: prepared text, and an uninterrupted run to compare with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trainings
from together import Here

from quill.registry.store import MARKER


class Place(NamedTuple):
    """A folder where trainings run.

    Attributes:
        folder: With the dataset `tiny`, and a registry.
        whole: The result of an uninterrupted run.
        seconds: How long that took.
    """

    folder: Path
    whole: dict[str, Any]
    seconds: float

    @property
    def weights(self) -> Path:
        """The registry's folder."""
        return self.folder / "weights"

    def arguments(self, name: str, *more: str) -> list[str]:
        """The command line of the training, under a name."""
        place = ["--data=tiny", f"--name={name}", f"--registry={self.weights}", "--json"]
        return ["train", *place, *trainings.SETTINGS, *more]


@pytest.fixture(scope="session")
def prepared(tiny_registry, tmp_path_factory) -> Place:
    """The dataset `tiny`, an empty registry, and the run that all others are compared with."""
    import time

    folder = tmp_path_factory.mktemp("trainings")
    shutil.copytree(tiny_registry.root.parent / "data", folder / "data")
    place = Place(folder, {}, 0.0)
    for _ in range(2):
        # The first one also starts the process that the others are forks of.
        began = time.monotonic()
        child = trainings.start(place.arguments("whole"), folder, folder / "whole")
        assert trainings.finish(child) == 0, (folder / "whole.err").read_text()
        seconds = time.monotonic() - began
        whole = trainings.result(place.weights / "whole" / "v1")
        shutil.rmtree(place.weights / "whole")
    assert 0 < whole["best_step"] < whole["steps"], "the best weights were meant to be others than the last"
    return Place(folder, whole, seconds)


@pytest.fixture
def place(prepared: Place, tmp_path: Path) -> Place:
    """The same, with a registry of the test's own that has no models yet."""
    shutil.copytree(prepared.folder / "data", tmp_path / "data")
    (tmp_path / "weights").mkdir()
    shutil.copy(prepared.weights / MARKER, tmp_path / "weights" / MARKER)
    return Place(tmp_path, prepared.whole, prepared.seconds)


@pytest.fixture
def here(tiny_registry, tmp_path) -> Here:
    """A folder with the dataset `tiny`, where processes share runs."""
    shutil.copytree(tiny_registry.root.parent / "data", tmp_path / "data")
    return Here(tmp_path)
