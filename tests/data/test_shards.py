"""Splits of several files: the same ids as one file, and the files left by a kill are not made again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quill.data import batches, encode, prepare, shards, unfinished
from quill.data.dataset import SPLITS, Dataset
from quill.errors import CorruptError, InputError, ResourceError
from quill.registry import gc
from quill.registry.store import Registry

Write = Callable[..., Path]
Config = Callable[..., Any]
MOST = 1000


@pytest.fixture
def whole(data: Path, write: Write, config: Config, tmp_path: Path) -> Dataset:
    """The dataset in one file for each split."""
    return prepare.prepare(config(write("sea.txt")), tmp_path / "whole", name="sea")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 1,000 bytes, and tasks of 100 characters."""
    monkeypatch.setattr(shards, "SHARD_BYTES", MOST)
    original = encode.encode
    monkeypatch.setattr(encode, "encode", lambda *a, **k: original(*a, **{"size": 100, **k}))


@pytest.fixture
def dataset(whole: Dataset, small: None, data: Path, write: Write, config: Config) -> Dataset:
    """The same in several."""
    return prepare.prepare(config(write("sea.txt")), data, name="sea")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """End each preparation at its nth task: `interrupted(n)` returns the tasks that are encoded; 0: never."""
    original = encode.Extent.select

    def interrupted(after: int) -> list[int]:
        done: list[int] = []

        def select(self: encode.Extent, tasks: Any) -> Iterator[tuple[int, encode.Task]]:
            for number, task in original(self, tasks):
                if len(done) == after > 0:
                    raise KeyboardInterrupt
                done.append(number)
                yield number, task

        monkeypatch.setattr(encode.Extent, "select", select)
        return done

    return interrupted


def contents(dataset: Dataset) -> dict[str, bytes]:
    """Return its files of ids, by name."""
    return {p.name: p.read_bytes() for p in sorted(dataset.path.glob("*.bin"))}


def test_a_split_is_cut_by_the_number_of_its_ids(dataset: Dataset, whole: Dataset) -> None:
    assert dataset.files("val") == ["val-00000.bin", "val-00001.bin"]
    n = len(dataset.files("train"))
    assert dataset.files("train") == [f"train-{i:05}.bin" for i in range(n)]
    found = contents(dataset)
    assert [len(found[name]) for name in dataset.files("train")[:-1]] == [MOST] * (n - 1)
    for split in ("train", "val"):
        joined = b"".join(found[name] for name in dataset.files(split))
        assert joined == (whole.path / f"{split}.bin").read_bytes()
    assert dataset.key == whole.key
    assert {**dataset.manifest["splits"]} == whole.manifest["splits"]
    dataset.verify()


def test_only_a_dataset_of_several_files_needs_this_release(dataset: Dataset, whole: Dataset) -> None:
    assert (whole.manifest["schema"], dataset.manifest["schema"]) == (1, 2)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_files_do_not_depend_on_the_workers(
    dataset: Dataset, tmp_path: Path, write: Write, config: Config, workers: int
) -> None:
    again = prepare.prepare(config(write("sea.txt")), tmp_path / "again", name="sea", workers=workers)
    assert contents(again) == contents(dataset)


def test_rows_reach_over_the_edge_of_a_file(dataset: Dataset, whole: Dataset) -> None:
    ids = np.fromfile(whole.path / "train.bin", "<u2")
    edge = MOST // 2
    starts = [0, edge - 1, edge, 3 * edge - 700, len(ids) - 1200]
    assert dataset.train.rows(starts, 1200).tolist() == [ids[at : at + 1200].tolist() for at in starts]
    assert np.array_equal(np.asarray(dataset.train), ids)
    part = dataset.train.part(edge - 10, edge + 10)
    assert part[:].tolist() == ids[edge - 10 : edge + 10].tolist()


def test_batches_and_windows_are_those_of_one_file(dataset: Dataset, whole: Dataset) -> None:
    for rank in range(2):
        settings = {"seed": 5, "step": 3, "batch_size": 8, "block_size": 64, "rank": rank, "world_size": 2}
        ours, theirs = (batches.batch(d.train, **settings) for d in (dataset, whole))
        assert [t.tolist() for t in ours] == [t.tolist() for t in theirs]
    ours, theirs = (list(batches.windows(d.val, block_size=48, batch_size=3)) for d in (dataset, whole))
    assert [[t.tolist() for t in pair] for pair in ours] == [[t.tolist() for t in pair] for pair in theirs]


def test_closing_closes_every_file(dataset: Dataset) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    shard = dataset.train
    part = shard.part(0, 10)
    shard.close()
    shard.close()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # The lock of the folder.
    with pytest.raises(ResourceError):
        part[:]


def test_a_file_that_shrinks_in_use_is_an_error(dataset: Dataset) -> None:
    train = dataset.train
    os.truncate(dataset.path / "train-00002.bin", 10)
    train.rows([0], 900)
    with pytest.raises(CorruptError) as e:
        train.rows([0], 1100)
    assert "one of train-00000.bin to train-" in e.value.why


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00003.bin", "val-00001.bin"])
def test_f51_damage_in_any_file_is_found(dataset: Dataset, name: str) -> None:
    file = dataset.path / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    for use in (Dataset.verify, lambda d: d.train if name.startswith("train") else d.val):
        with pytest.raises(CorruptError) as e:
            use(Dataset.open(dataset.path))
        assert name in e.value.why
    file.unlink()
    with pytest.raises(CorruptError) as e:
        Dataset.open(dataset.path)
    assert name in e.value.why


def test_another_name_shares_all_files(dataset: Dataset, data: Path, write: Write, config: Config) -> None:
    other = prepare.prepare(config(write("sea.txt")), data, name="other")
    for name in dataset.manifest["files"]:
        assert os.path.samefile(dataset.path / name, other.path / name)


# Resuming


def left_of(data: Path) -> list[Path]:
    """Return the folders that interrupted preparations left."""
    return sorted(data.glob(".tmp-*"))


@pytest.mark.parametrize("after", [9, 20, 66, 69])
def test_shards_that_are_complete_are_not_encoded_again(
    dataset: Dataset, tmp_path: Path, write: Write, config: Config, interrupted: Any, after: int
) -> None:
    source, again = config(write("sea.txt")), tmp_path / "again"
    tasks = sum(-(-dataset.count(split, "characters") // 100) for split in SPLITS)
    interrupted(after)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(source, again, name="sea", workers=1)
    [left] = left_of(again)
    complete = len(list(left.glob("*.bin")))
    assert complete > 1
    assert not (again / "sea").exists()
    encoded = interrupted(0)
    told: list[Any] = []
    made = prepare.prepare(source, again, name="sea", observer=told.append)
    assert contents(made) == contents(dataset)
    assert made.manifest["splits"] == dataset.manifest["splits"]
    # A file is five tasks, and the last one may be incomplete.
    assert len(encoded) <= tasks - 5 * (complete - 3)
    assert "verifying" in {e.stage for e in told}
    assert left_of(again) == []


def test_interrupted_ten_times_it_is_the_same(
    dataset: Dataset, tmp_path: Path, write: Write, config: Config, interrupted: Any
) -> None:
    source, again = config(write("sea.txt")), tmp_path / "again"
    for _ in range(10):
        interrupted(9)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(source, again, name="sea", workers=1)
    interrupted(0)
    assert contents(prepare.prepare(source, again, name="sea")) == contents(dataset)


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone", "record", "other record"])
def test_a_damaged_shard_is_made_again(
    dataset: Dataset, tmp_path: Path, write: Write, config: Config, interrupted: Any, damage: str
) -> None:
    source, again = config(write("sea.txt")), tmp_path / "again"
    interrupted(40)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(source, again, name="sea", workers=1)
    [left] = left_of(again)
    file = left / "train-00001.bin"
    raw = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif "record" in damage:
        (left / "shards.json").write_text(
            "{" if damage == "record" else '{"tokenizer": 1, "splits": {"train": 2}}'
        )
    else:
        file.write_bytes(raw[:-2] if damage == "shorter" else bytes([raw[0] ^ 1]) + raw[1:])
    interrupted(0)
    assert contents(prepare.prepare(source, again, name="sea")) == contents(dataset)


def test_what_is_left_of_another_text_or_other_settings_is_not_used(
    dataset: Dataset, tmp_path: Path, write: Write, config: Config, interrupted: Any, text: str
) -> None:
    again = tmp_path / "again"
    interrupted(40)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(config(write("sea.txt")), again, name="sea", workers=1)
    encoded = interrupted(0)
    prepare.prepare(config(write("sea.txt"), val_fraction=0.2), again, name="fifth", workers=1)
    assert encoded[0] == 0
    other = prepare.prepare(config(write("sea.txt", text.replace("tide", "dite"))), again, name="other")
    assert other.tokenizer.decode(other.train[:9].tolist()) == text[:9]
    assert len(left_of(again)) == 1
    registry = Registry(tmp_path / "weights")
    gc.plan(registry, again, older_than=0).execute()
    assert left_of(again) == []


def test_a_text_that_changes_takes_its_shards_along(
    small: None, data: Path, write: Write, config: Config, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = write("sea.txt")
    note = unfinished.Unfinished.note

    def meddling(self: Any, *arguments: Any) -> None:
        note(self, *arguments)
        path.write_text(text.upper())

    monkeypatch.setattr(unfinished.Unfinished, "note", meddling)
    with pytest.raises(InputError, match="changed while reading"):
        prepare.prepare(config(path), data, name="sea")
    assert left_of(data) == []


def test_two_preparations_of_one_text_do_not_meet(
    dataset: Dataset, tmp_path: Path, write: Write, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, again = config(write("sea.txt")), tmp_path / "again"
    begin = unfinished.Unfinished.begin
    made: list[Dataset] = []

    def meeting(self: Any, fingerprint: str) -> None:
        monkeypatch.setattr(unfinished.Unfinished, "begin", begin)
        made.append(prepare.prepare(source, again, name="other"))
        begin(self, fingerprint)

    monkeypatch.setattr(unfinished.Unfinished, "begin", meeting)
    made.append(prepare.prepare(source, again, name="sea"))
    assert [contents(d) for d in made] == [contents(dataset)] * 2
    assert left_of(again) == []
