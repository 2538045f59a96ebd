"""A pipeline of datatrove writes a shard of a dataset in each task, and merging joins them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quill.config.settings import DataConfig
from quill.data import merge, prepare, shards, store
from quill.data.dataset import SPLITS, Dataset
from quill.errors import InputError, RefusedError

TEXTS = [f"Watch {n}: {n % 4 + 1} bells, and the tide is {n * 7 % 12} feet.\nAll well.\n" for n in range(60)]


@pytest.fixture
def make(tmp_path: Path, ranks: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make the last step of a pipeline for the dataset `sea`."""
    pytest.importorskip("datatrove")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    from quill.data.datatrove import QuillWriter

    return lambda **settings: QuillWriter("sea", tmp_path / "weights", **settings)


def documents(texts: list[str]) -> Iterator[Any]:
    from datatrove.data import Document

    return (Document(text, str(n)) for n, text in enumerate(texts))


def reader(data: Any, rank: int, world_size: int) -> Iterator[Any]:
    """The first step of a pipeline: each task gets its share of the texts."""
    return documents(TEXTS[rank::world_size])


def ids(dataset: Dataset) -> dict[str, list[int]]:
    return {split: dataset.split(split)[:].tolist() for split in SPLITS}


def test_tasks_of_a_local_executor_write_one_dataset(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    from datatrove.executor import LocalPipelineExecutor

    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    logs = tmp_path / "logs"
    LocalPipelineExecutor([reader, make(val_fraction=0.2)], tasks=2, workers=1, logging_dir=str(logs)).run()
    [counted] = json.loads((logs / "stats.json").read_text())
    assert (counted["name"], counted["stats"]["total"]) == ("💽 - WRITER: quill", 60)
    made = [ids(dataset) for dataset in store.datasets(data)]
    alone = []
    for rank in range(2):
        path = tmp_path / f"{rank}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[rank::2]))
        config = DataConfig(source=str(path), tokenizer="gpt2", val_fraction=0.2)
        alone.append(ids(prepare.prepare(config, tmp_path / "alone")))
    assert made == alone
    merged = merge.merge("sea", data)
    merged.verify()
    assert [dataset.name for dataset in store.datasets(data)] == ["sea"]
    eot = merged.tokenizer.eot_id
    assert ids(merged) == {split: [*made[0][split], eot, *made[1][split]] for split in SPLITS}
    assert len(merged.files("train")) > 1
    source = merged.manifest["source"]
    assert (source["documents"], source["given"]) == (60, [])
    # Between two documents counts as a byte; the shards are joined in both splits.
    assert sum(merged.count(split, "bytes") for split in SPLITS) == len("\n".join(TEXTS)) + 1


def test_a_task_may_have_no_documents(make: Callable[..., Any], data: Path) -> None:
    for rank, texts in enumerate([[], TEXTS[:20], []]):
        assert list(make().run(documents(texts), rank, 3)) == []
    [empty, full, _] = store.datasets(data)
    assert (empty.count("train"), empty.count("val")) == (0, 0)
    expected = ids(full)
    del empty, full, _
    assert ids(merge.merge("sea", data)) == expected


def test_a_task_that_is_repeated_writes_the_same_shard(make: Callable[..., Any], data: Path) -> None:
    for _ in range(2):
        list(make().run(documents(TEXTS), 0, 1))
    assert list(data.glob(".tmp-*")) == []
    with pytest.raises(RefusedError, match="'sea-1-of-1' exists already"):
        list(make().run(documents(TEXTS[:5]), 0, 1))
    list(make(force=True).run(documents(TEXTS[:5]), 0, 1))
    assert merge.merge("sea", data).manifest["source"]["documents"] == 5


def test_merged_shards_of_other_documents_are_another_dataset(make: Callable[..., Any], data: Path) -> None:
    for texts in (TEXTS, TEXTS[:20]):
        for rank in range(2):
            list(make().run(documents(texts[rank::2]), rank, 2))
        if texts is TEXTS:
            first = merge.merge("sea", data).key
    with pytest.raises(RefusedError, match="'sea' exists already"):
        merge.merge("sea", data)
    assert merge.merge("sea", data, force=True).key != first


@pytest.mark.parametrize(
    ("settings", "what"), [({"tokenizer": "word"}, "learns"), ({"val_fraction": 2}, "val")]
)
def test_invalid_settings_are_refused_at_once(make: Callable[..., Any], settings: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        make(**settings)


def test_without_datatrove_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "quill.data.datatrove", raising=False)
    monkeypatch.setitem(sys.modules, "datatrove.pipeline", None)
    with pytest.raises(InputError) as e:
        importlib.import_module("quill.data.datatrove")
    assert e.value.hint == "pip install 'quill-gpt[datatrove]'"
