"""Shards of a text prepared by jobs of their own: merged, they are the dataset that one job makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quill.data import encode, merge, prepare, shards, store
from quill.data.dataset import Dataset
from quill.errors import CorruptError, InputError, NotFoundError, RefusedError

Write = Callable[..., Path]
Config = Callable[..., Any]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 1,000 bytes, and tasks of 100 characters."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    original = encode.encode
    monkeypatch.setattr(encode, "encode", lambda *a, **k: original(*a, **{"size": 100, **k}))


def contents(dataset: Dataset) -> dict[str, bytes]:
    return {name: (dataset.path / name).read_bytes() for name in dataset.manifest["files"]}


def prepared(root: Path, config: Any, of: int, name: str = "sea", **settings: Any) -> list[Dataset]:
    return [prepare.prepare(config, root, name=name, shard=(i, of), **settings) for i in range(1, of + 1)]


@pytest.mark.parametrize(
    ("of", "settings", "documents"),
    [
        (1, {}, False),
        (9, {"val_fraction": 0.0}, False),
        (2, {"tokenizer": "word", "val_fraction": 0.3}, True),
        (3, {"tokenizer": "gpt2"}, True),
    ],
)
def test_merged_shards_are_the_whole(
    write: Write,
    data: Path,
    tmp_path: Path,
    config: Config,
    text: str,
    of: int,
    settings: Any,
    documents: bool,
    ranks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    lines = [json.dumps({"text": line * 3}) + "\n" for line in text.replace("feet", "füße").splitlines()]
    path = write("sea.jsonl", "".join(lines)) if documents else write("sea.txt")
    source = config(path, **settings)
    whole = prepare.prepare(source, tmp_path / "whole", name="sea")
    made = prepared(data, source, of)
    assert [d.name for d in made] == [f"sea-{i}-of-{of}" for i in range(1, of + 1)]
    for count in ("tokens", "bytes", "characters"):
        assert sum(d.count("train", count) for d in made) == whole.count("train", count)
    del made
    merged = merge.merge("sea", data)
    assert contents(merged) == contents(whole)
    ours, theirs = ({**d.manifest, "created": ""} for d in (merged, whole))
    assert {**ours, "source": {**ours["source"], "stamp": None}} == {
        **theirs,
        "source": {**theirs["source"], "stamp": None},
    }
    assert [d.name for d in store.datasets(data)] == ["sea"]
    assert prepare.prepare(source, data, name="sea").manifest["created"] == merged.manifest["created"]


def test_each_shard_encodes_its_share(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [d.count("train") for d in prepared(data, config(write("sea.txt")), 4)]
    assert max(counts) - min(counts) <= 100


def test_a_shard_that_is_there_is_not_prepared_again(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = config(write("sea.txt"))
    prepared(data, source, 2)
    monkeypatch.setattr(shards, "write", lambda *a: pytest.fail("it was prepared again"))
    assert [d.name for d in prepared(data, source, 2)] == ["sea-1-of-2", "sea-2-of-2"]
    assert prepare.prepare(source, data, shard=(1, 2)).name == "sea-1-of-2"


def test_missing_shards_are_named(write: Write, data: Path, config: Config) -> None:
    path = write("sea.txt")
    with pytest.raises(NotFoundError, match="no shards of 'sea'"):
        merge.merge("sea", data)
    for number in (1, 4):
        prepare.prepare(config(path), data, name="sea", shard=(number, 4))
    with pytest.raises(InputError, match="2 of the 4 shards of 'sea' are missing: 2, 3") as e:
        merge.merge("sea", data)
    assert e.value.hint == f"quill prepare {path} --name sea --shard 2/4"
    assert len(store.datasets(data)) == 2


@pytest.mark.parametrize("other", [{"tokenizer": "word"}, {"val_fraction": 0.2}, "text"])
def test_shards_that_differ_are_refused(write: Write, data: Path, config: Config, other: Any) -> None:
    prepare.prepare(config(write("sea.txt")), data, name="sea", shard=(1, 2))
    path = write("land.txt", "No water here. " * 99) if other == "text" else write("sea.txt")
    settings = {} if other == "text" else other
    prepare.prepare(config(path, **settings), data, name="sea", shard=(2, 2))
    with pytest.raises(InputError, match="do not belong together"):
        merge.merge("sea", data)
    assert len(store.datasets(data)) == 2


def test_shards_of_two_divisions_are_refused(write: Write, data: Path, config: Config) -> None:
    source = config(write("sea.txt"))
    prepared(data, source, 2)
    prepare.prepare(source, data, name="sea", shard=(1, 3))
    with pytest.raises(InputError, match="of 2 and of 3"):
        merge.merge("sea", data)


def test_a_shard_under_another_number_is_refused(write: Write, data: Path, config: Config) -> None:
    source = config(write("sea.txt"))
    prepared(data, source, 2)
    (data / "sea-1-of-2").rename(data / "x")
    (data / "sea-2-of-2").rename(data / "sea-1-of-2")
    (data / "x").rename(data / "sea-2-of-2")
    with pytest.raises(InputError, match="is not shard 1/2"):
        merge.merge("sea", data)


def test_f3_a_damaged_shard_is_not_merged(write: Write, data: Path, config: Config) -> None:
    prepared(data, config(write("sea.txt")), 2)
    file = data / "sea-2-of-2" / "val-00000.bin"
    file = file if file.exists() else data / "sea-2-of-2" / "val.bin"
    raw = bytearray(file.read_bytes())
    raw[7] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorruptError) as e:
        merge.merge("sea", data)
    assert e.value.hint.endswith("--name sea --shard 2/2 --force")
    assert not (data / "sea").exists()


def test_merging_does_not_take_a_name(write: Write, data: Path, config: Config) -> None:
    prepare.prepare(config(write("land.txt", "No water here. " * 99)), data, name="sea")
    prepared(data, config(write("sea.txt")), 2)
    with pytest.raises(RefusedError, match="'sea' exists already"):
        merge.merge("sea", data)
    merged = merge.merge("sea", data, force=True)
    assert merged.count("train", "characters") == 6230
    assert [d.name for d in store.datasets(data)] == ["sea"]


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (-1, -1), (1, 10**6)])
def test_a_shard_out_of_range_is_refused(write: Write, data: Path, config: Config, shard: Any) -> None:
    with pytest.raises(InputError, match="out of range"):
        prepare.prepare(config(write("sea.txt")), data, shard=shard)
    assert not data.exists()
