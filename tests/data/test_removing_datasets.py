"""Removing datasets: whole, damaged or linked, and never while a process uses them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quill.data import locks, remove, store
from quill.data.dataset import Dataset, record_of
from quill.data.prepare import prepare
from quill.errors import InputError, LockedError, NotFoundError

Write = Callable[..., Path]
Config = Callable[..., Any]


@pytest.fixture
def dataset(data: Path, write: Write, config: Config) -> Dataset:
    return prepare(config(write("sea.txt")), data)


@contextmanager
def another_process(code: str, *arguments: str) -> Iterator[None]:
    """Run code in another process for the length of the context."""
    code += "\nprint('ready', flush=True)\nsys.stdin.read()\n"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield


def test_a_dataset_is_removed(dataset: Dataset, data: Path, settled: None) -> None:
    dataset.verify()
    plan = remove.plan(data, ["sea", "sea"])
    [removal] = plan.removals
    assert removal.what == "data:sea"
    assert removal.bytes >= dataset.size
    assert plan.execute() == [removal]
    assert not dataset.path.exists()
    assert not record_of(dataset.path).exists()
    assert os.listdir(data / ".trash") == []
    assert plan.execute() == []


def test_a_missing_dataset_may_be_skipped(dataset: Dataset, data: Path) -> None:
    with pytest.raises(NotFoundError, match="'see'") as e:
        remove.plan(data, ["sea", "see"])
    assert e.value.close == ("data:sea",)
    plan = remove.plan(data, ["sea", "see"], missing_ok=True)
    assert plan.missing == ["data:see"]
    assert len(plan.removals) == 1


def test_a_damaged_dataset_is_removed(dataset: Dataset, data: Path) -> None:
    (dataset.path / "train.bin").unlink()
    (dataset.path / "manifest.json").write_text("{")
    assert remove.plan(data, ["sea"]).execute()
    assert not dataset.path.exists()


def test_other_folders_are_not_found(data: Path) -> None:
    (data / "photos").mkdir(parents=True)
    for name in ("photos", "nonesuch", ".trash"):
        with pytest.raises((NotFoundError, InputError)):
            remove.plan(data, [name])


def test_a_link_is_removed_but_not_followed(dataset: Dataset, data: Path, tmp_path: Path) -> None:
    outside = Path(shutil.move(dataset.path, tmp_path / "outside"))
    (data / "sea").symlink_to(outside)
    plan = remove.plan(data, ["sea"])
    assert plan.removals[0].bytes == 0
    plan.execute()
    assert not (data / "sea").is_symlink()
    Dataset.open(outside).verify()


def test_shared_files_stay_with_the_other_dataset(dataset: Dataset, data: Path, config: Config) -> None:
    other = prepare(config(dataset.manifest["source"]["given"]), data, name="other")
    plan = remove.plan(data, ["sea"])
    assert plan.removals[0].bytes < dataset.size
    plan.execute()
    other.verify()


@pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be removed there anyway")
class TestInUse:
    CODE = (
        "import sys\n"
        "from pathlib import Path\n"
        "from quill.data.dataset import Dataset\n"
        "dataset = Dataset.open(Path(sys.argv[1]))\n"
        "ids = dataset.train\n"
    )

    def test_nothing_is_removed_while_one_is_open_elsewhere(
        self, dataset: Dataset, data: Path, write: Write, config: Config
    ) -> None:
        prepare(config(write("land.txt", "no water here, none at all. " * 20)), data)
        plan = remove.plan(data, ["land", "sea"])
        with another_process(self.CODE, str(dataset.path)):
            with pytest.raises(LockedError, match="'sea' is in use") as e:
                plan.execute()
            assert e.value.exit_code == 75
            assert [d.name for d in store.datasets(data)] == ["land", "sea"]
        assert plan.execute() == plan.removals

    def test_a_dataset_that_is_prepared_again_is_in_use(
        self, dataset: Dataset, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused: list[LockedError] = []

        def observe(event: Any) -> None:
            try:
                remove.plan(data, ["sea"]).execute()
            except LockedError as e:
                refused.append(e)

        source = config(dataset.manifest["source"]["given"])
        prepare(source, data, name="sea", force=True, observer=observe).verify()
        assert refused

    def test_the_end_of_a_dataset_object_releases_it(self, dataset: Dataset, data: Path) -> None:
        opened = Dataset.open(dataset.path)
        assert len(opened.train)
        with pytest.raises(LockedError):
            remove.plan(data, ["sea"]).execute()
        del opened
        assert remove.plan(data, ["sea"]).execute()

    def test_a_missing_folder_has_no_lock(self, data: Path) -> None:
        with locks.shared(data / "nonesuch"), locks.alone(data / "nonesuch"):
            pass
