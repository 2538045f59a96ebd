"""A dataset on disk: what is read back, and what is refused as damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quill.data.prepare import prepare
from quill.data.store import Dataset, datasets
from quill.errors import CorruptError, InputError, NotFoundError


@pytest.fixture
def dataset(data: Path, write: Callable[..., Path], config: Callable[..., Any]) -> Dataset:
    return prepare(config(write("sea.txt")), data)


def test_it_reads_back_what_was_prepared(dataset: Dataset, text: str) -> None:
    again = Dataset.open(dataset.path)
    assert again.name == "sea"
    assert again.key == dataset.key
    assert again.tokenizer.decode(again.train.tolist()) + again.tokenizer.decode(again.val.tolist()) == text
    assert again.split("val").tolist() == again.val.tolist()
    assert again.count("train") == len(again.train)
    assert again.count("train", "bytes") + again.count("val", "bytes") == len(text.encode())
    again.verify()


def test_the_shards_are_nanogpts(dataset: Dataset, text: str) -> None:
    ids = np.fromfile(dataset.path / "train.bin", dtype=np.uint16)
    characters = sorted(set(text))
    assert ids.tolist() == [characters.index(c) for c in text[: int(len(text) * 0.9)]]


def test_tokens_are_mapped_and_cannot_be_written(dataset: Dataset) -> None:
    assert isinstance(dataset.train, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        dataset.train[0] = 1


def test_it_can_be_moved(dataset: Dataset, tmp_path: Path, text: str) -> None:
    moved = Dataset.open(Path(shutil.move(dataset.path, tmp_path / "elsewhere")))
    assert moved.name == "elsewhere"
    assert moved.tokenizer.decode(moved.train.tolist()) == text[: int(len(text) * 0.9)]


def test_nothing_there_is_not_found(data: Path) -> None:
    with pytest.raises(NotFoundError):
        Dataset.open(data / "nonesuch")


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_f1_a_file_of_another_length_is_damage(dataset: Dataset, name: str, damage: str) -> None:
    file = dataset.path / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "shorter" else file.read_bytes() + b"\0")
    with pytest.raises(CorruptError, match="sea") as e:
        Dataset.open(dataset.path)
    assert name in e.value.why
    assert "--force" in e.value.hint


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_f3_a_flipped_bit_is_found(dataset: Dataset, name: str) -> None:
    file = dataset.path / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    again = Dataset.open(dataset.path)
    with pytest.raises(CorruptError, match="damaged"):
        again.verify()
    if name == "tokenizer.json":
        with pytest.raises(CorruptError, match="damaged"):
            _ = again.tokenizer


def test_f9_a_manifest_that_is_none_is_corrupt(dataset: Dataset) -> None:
    file = dataset.path / "manifest.json"
    sound = json.loads(file.read_text())
    broken: list[Any] = [[], {}, 1, {**sound, "dtype": "float32"}, {**sound, "files": {}}]
    broken += [
        {k: v for k, v in sound.items() if k != gone} for gone in ("schema", "key", "splits", "tokenizer")
    ]
    broken += [{**sound, "splits": {**sound["splits"], "val": {"tokens": 1, "bytes": 1, "characters": 1}}}]
    for value in broken:
        file.write_text(json.dumps(value))
        with pytest.raises(CorruptError):
            Dataset.open(dataset.path)
    for raw in (b"", b"{", b"\xff\xfe{}"):
        file.write_bytes(raw)
        with pytest.raises(CorruptError):
            Dataset.open(dataset.path)


def test_f12_a_newer_schema_asks_for_a_newer_quill(dataset: Dataset) -> None:
    file = dataset.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 2}))
    with pytest.raises(InputError, match="schema 2"):
        Dataset.open(dataset.path)


def test_one_bad_dataset_does_not_hide_the_others(
    dataset: Dataset, data: Path, write: Callable[..., Path], config: Callable[..., Any]
) -> None:
    other = prepare(config(write("land.txt", "no water here, none at all. " * 20)), data)
    (data / "stray.txt").write_text("not a dataset")
    assert [d.name for d in datasets(data)] == ["land", "sea"]
    (other.path / "train.bin").write_bytes(b"")
    assert [d.name for d in datasets(data)] == ["sea"]
    assert datasets(data / "nonesuch") == []


@pytest.mark.parametrize("name", ["", ".", "../x", "/etc", "a/b", "-x", "a\0", "A", "a" * 65, "con"])
def test_f13_a_bad_name_is_refused_and_nothing_is_made(
    name: str, data: Path, write: Callable[..., Path], config: Callable[..., Any]
) -> None:
    with pytest.raises(InputError):
        prepare(config(write("sea.txt")), data, name=name)
    assert not data.exists() or not any(data.iterdir())
