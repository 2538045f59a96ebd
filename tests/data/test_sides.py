"""Documents that are held out by their content."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from quill.config.settings import DataConfig
from quill.data import merge, resolve, sides, sources, survey
from quill.data.dataset import Dataset, Split
from quill.data.prepare import Progress, prepare
from quill.errors import InputError, RefusedError

DOCUMENTS = [f"{i} bells, and the tide is {i * 7 % 12} feet." for i in range(400)]
HELD_OUT = [d for d in DOCUMENTS if sides.is_held_out(d, 0.1)]
KEPT = [d for d in DOCUMENTS if not sides.is_held_out(d, 0.1)]

Config = Callable[..., DataConfig]
Write = Callable[..., Path]


def lines(texts: Iterable[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def text_of(dataset: Dataset, split: Split) -> str:
    return dataset.tokenizer.decode(dataset.split(split)[:].tolist())


def test_about_the_share_is_held_out_and_a_larger_share_adds_to_it() -> None:
    assert 20 < len(HELD_OUT) < 60
    assert set(HELD_OUT) < {d for d in DOCUMENTS if sides.is_held_out(d, 0.3)}
    assert not any(sides.is_held_out(d, 0.0) for d in DOCUMENTS)
    # No change of quill may move the documents of an existing corpus.
    assert [d for d in DOCUMENTS if sides.is_held_out(d, 0.01)] == [DOCUMENTS[n] for n in (59, 73, 254)]


@pytest.mark.parametrize("size", [1, 37, 1 << 18])
def test_each_side_has_its_documents_however_the_text_is_read(write: Write, data: Path, size: int) -> None:
    # A file that is longer than what is read at once, on each side.
    repeated = (d * 20_000 for d in DOCUMENTS[:40])
    long = sorted(repeated, key=lambda d: sides.is_held_out(d, 0.1))[::39]
    assert [sides.is_held_out(d, 0.1) for d in long] == [False, True]
    for n, document in enumerate(long):
        write(f"texts/{n}.txt", document)
    write("texts/lines.jsonl", lines(DOCUMENTS))
    with sources.find(str(write("texts/one.md", DOCUMENTS[0]).parent), data) as text:
        every = [*long, *DOCUMENTS, DOCUMENTS[0]]
        counted = survey.survey(text, alphabet=False, share=0.1)
        for side, characters in ((False, counted.kept_characters), (True, counted.held_out_characters)):
            chunks = list(sides.select(text.chunks("reading", size=size), 0.1, held_out=side))
            found = "".join(("\n" if i else "") + part for c in chunks for i, part in enumerate(c))
            assert found == "\n".join(d for d in every if sides.is_held_out(d, 0.1) == side)
            assert len(found) == characters
        assert counted.held_out == sum(sides.is_held_out(d, 0.1) for d in every)


@pytest.mark.parametrize("tokenizer", ["char", "word"])
def test_many_documents_are_split_by_their_content(
    write: Write, data: Path, config: Config, tokenizer: str
) -> None:
    path = write("a.jsonl", lines(DOCUMENTS))
    events: list[Any] = []
    dataset = prepare(config(path, tokenizer=tokenizer), data, observer=events.append)
    for split, wanted in (("train", KEPT), ("val", HELD_OUT)):
        assert text_of(dataset, split) == "\n".join(wanted)  # type: ignore[arg-type]
        assert dataset.count(split, "characters") == len("\n".join(wanted))  # type: ignore[arg-type]
    assert dataset.settings["split"] == "documents"
    assert dataset.manifest["source"]["documents"] == 400
    assert prepare(config(path, tokenizer=tokenizer), data).path == dataset.path
    assert prepare(config(path, tokenizer=tokenizer, split="documents"), data).path == dataset.path
    assert "--split documents" in dataset.prepare_command()
    # Both readings are one stage, whose progress never falls.
    done = [e.done_bytes for e in events if isinstance(e, Progress) and e.stage == "encoding"]
    assert done == sorted(done)
    assert done[-1] == path.stat().st_size


def test_documents_stay_on_their_side_in_any_order_and_any_form(
    write: Write, data: Path, config: Config
) -> None:
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    for n, text in enumerate(DOCUMENTS[:200]):
        write(f"folder/{n}.txt", text)
    folder = write("folder/rest.jsonl", lines([*DOCUMENTS[200:], "more"])).parent
    for source in (write("a.jsonl", lines(shuffled)), folder):
        held_out = text_of(prepare(config(source), data), "val").split("\n")
        assert sorted(set(held_out) - {"more"}) == sorted(HELD_OUT)


def test_shards_are_of_each_side(write: Write, data: Path, config: Config) -> None:
    source = config(write("a.jsonl", lines(DOCUMENTS)), tokenizer="word")
    whole = prepare(source, data, name="whole")
    for number in (1, 2, 3):
        prepare(source, data, name="a", shard=(number, 3))
    merged = merge.merge("a", data)
    assert (merged.key, merged.manifest["files"]) == (whole.key, whole.manifest["files"])


def test_few_documents_and_one_text_are_split_at_the_end(write: Write, data: Path, config: Config) -> None:
    for source in (write("few.jsonl", lines(DOCUMENTS[:99])), write("one.txt", "\n".join(DOCUMENTS))):
        dataset = prepare(config(source), data)
        assert "split" not in dataset.settings
        text = text_of(dataset, "train") + text_of(dataset, "val")
        assert "\n".join(DOCUMENTS).startswith(text)
        assert dataset.count("train", "characters") == int(len(text) * 0.9)


def test_the_end_can_be_set_and_has_the_key_that_it_always_had(
    write: Write, data: Path, config: Config
) -> None:
    path = write("a.jsonl", lines(DOCUMENTS))
    dataset = prepare(config(path, split="end"), data)
    assert "split" not in dataset.settings
    assert dataset.key.startswith("03544ea63674f2a7")
    assert text_of(dataset, "train") + text_of(dataset, "val") == "\n".join(DOCUMENTS)
    assert "--split end" in dataset.prepare_command()


def test_a_dataset_that_exists_keeps_its_split(
    write: Write, data: Path, config: Config, settled: None
) -> None:
    path = write("a.jsonl", lines(DOCUMENTS))
    ended = prepare(config(path, split="end"), data)
    assert prepare(config(path), data).manifest == ended.manifest
    path.touch()
    assert prepare(config(path), data).key == ended.key
    linked = prepare(config(path), data, name="b")
    assert (linked.key, linked.settings) == (ended.key, ended.settings)
    with pytest.raises(RefusedError) as e:
        prepare(config(path, split="documents"), data, name="a")
    assert e.value.why == "its split is end, not documents"
    # A text that has changed is a new one.
    path.write_text(lines([*DOCUMENTS, "more"]))
    again = prepare(config(path), data)
    assert (again.name, again.settings["split"]) == ("a", "documents")


def test_a_dataset_of_another_split_is_refused(write: Write, data: Path, config: Config) -> None:
    path = write("a.jsonl", lines(DOCUMENTS))
    prepare(config(path), data)
    assert resolve.ensure(config("a"), data).name == "a"
    assert resolve.ensure(config("a", split="documents"), data).name == "a"
    with pytest.raises(InputError, match="other settings") as e:
        resolve.ensure(config("a", split="end"), data)
    assert e.value.why == "its split is documents, not end"
    assert e.value.hint.endswith("--split end")


def test_one_document_cannot_be_split(write: Write, data: Path, config: Config) -> None:
    with pytest.raises(InputError, match="no document to hold out") as e:
        prepare(config(write("a.txt", KEPT[0]), split="documents"), data)
    assert e.value.hint == "set data.split=end"
    with pytest.raises(InputError, match="nothing to train on"):
        prepare(config(write("a.txt", HELD_OUT[0]), split="documents"), data)
    assert prepare(config(write("a.txt", KEPT[0]), split="documents", val_fraction=0), data).count("val") == 0


def test_f18_a_text_that_changes_between_the_readings_is_refused(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.jsonl", lines(DOCUMENTS))
    original = sides.select

    def select(chunks: Any, share: float, *, held_out: bool) -> Any:
        if held_out:
            path.write_text(lines(DOCUMENTS).replace("tide", "edit"))
            monkeypatch.setattr(sources.Text, "require_unchanged", lambda self: None)
        return original(chunks, share, held_out=held_out)

    monkeypatch.setattr(sides, "select", select)
    with pytest.raises(InputError, match="changed while reading"):
        prepare(config(path), data)
    assert not (data / "a").exists()
