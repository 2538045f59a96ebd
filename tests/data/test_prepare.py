"""Preparing datasets: exact counts, no repeated work, and nothing half done."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quill import fsio
from quill.data import encode, named_sources, prepare, resolve, shards, store, survey
from quill.data.dataset import Dataset
from quill.data.prepare import Notice, Progress
from quill.errors import CorruptError, InputError, NotFoundError, RefusedError, ResourceError

Write = Callable[..., Path]
Config = Callable[..., Any]


def ids(dataset: Dataset) -> list[int]:
    return [*dataset.train[:].tolist(), *dataset.val[:].tolist()]


def decoded(dataset: Dataset) -> str:
    return dataset.tokenizer.decode(dataset.train[:].tolist()) + dataset.tokenizer.decode(
        dataset.val[:].tolist()
    )


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one each time a text is encoded."""
    done: list[str] = []
    write = shards.write

    def counted(folder: Path, target: Path, split: str, *more: Any) -> dict[str, shards.Written]:
        done.extend(["text"] * (split == "train"))
        return write(folder, target, split, *more)

    monkeypatch.setattr(shards, "write", counted)
    return done


# Exactness


def test_tiny_shakespeare_by_character_has_nanogpts_ids(
    shakespeare_file: Path, data: Path, config: Config
) -> None:
    dataset = prepare.prepare(config(shakespeare_file, tokenizer="char"), data, name="shakespeare")
    assert dataset.tokenizer.vocab_size == 65
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    assert (dataset.path / "train.bin").stat().st_size == 2 * 1_003_854
    assert decoded(dataset) == shakespeare_file.read_text()
    manifest = dataset.manifest
    assert manifest["source"]["sha256"] == named_sources.NAMED["shakespeare"].sha256
    assert manifest["source"]["bytes"] == manifest["splits"]["train"]["bytes"] + 111_540 == 1_115_394


def test_tiny_shakespeare_in_gpt2_has_nanogpts_ids(
    shakespeare_file: Path, ranks: Path, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    dataset = prepare.prepare(config(shakespeare_file, tokenizer="gpt2"), data)
    assert (len(dataset.train), len(dataset.val)) == (301_966, 36_059)
    text = shakespeare_file.read_text()
    at = int(len(text) * 0.9)
    theirs = tiktoken.get_encoding("gpt2")
    assert np.array_equal(dataset.train, theirs.encode_to_numpy(text[:at]))
    assert np.array_equal(dataset.val, theirs.encode_to_numpy(text[at:]))

    # Once stored, the ranks need neither cache nor network.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(data / "empty"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    other = data / "other.txt"
    other.write_text("Another text altogether. " * 20)
    assert prepare.prepare(config(other, tokenizer="gpt2"), data).tokenizer.vocab_size == 50257


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5])
def test_the_split_is_by_characters(
    write: Write, data: Path, config: Config, text: str, fraction: float
) -> None:
    dataset = prepare.prepare(config(write("é.txt", text.replace("e", "é")), val_fraction=fraction), data)
    assert len(dataset.train) == int(len(text) * (1 - fraction))
    assert len(dataset.train) + len(dataset.val) == len(text)
    assert dataset.count("val", "bytes") == len(decoded(dataset)[len(dataset.train) :].encode())


@pytest.mark.parametrize(("kind", "settings"), [("char", {}), ("word", {}), ("bpe", {"vocab_size": 300})])
def test_documents_are_joined(write: Write, data: Path, config: Config, kind: str, settings: Any) -> None:
    if kind == "bpe":
        pytest.importorskip("rustbpe")
    texts = ["first document here", "the second one", "and a third document, the last"]
    lines = write("d.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))
    dataset = prepare.prepare(config(lines, tokenizer=kind, val_fraction=0.0, **settings), data)
    tokenizer = dataset.tokenizer
    if tokenizer.eot_id is None:
        assert decoded(dataset) == "\n".join(texts)
    else:
        wanted = [i for t in texts for i in (*tokenizer.encode(t), tokenizer.eot_id)][:-1]
        assert ids(dataset) == wanted
    assert dataset.manifest["source"]["documents"] == 3


def test_wide_vocabularies_take_32_bits(write: Write, data: Path, config: Config) -> None:
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x12000)])) * 2
    dataset = prepare.prepare(config(write("wide.txt", text)), data)
    assert dataset.manifest["dtype"] == "uint32"
    assert dataset.tokenizer.vocab_size > 65536
    assert decoded(dataset) == text


def test_a_given_vocabulary_fixes_the_ids(write: Write, data: Path, config: Config) -> None:
    vocabulary = list("zyxwvutsrqponmlkjihgfedcba \n,.")
    dataset = prepare.prepare(config(write("v.txt", "ab yz\n" * 50), vocabulary=vocabulary), data)
    assert dataset.train[:5].tolist() == [25, 24, 26, 1, 0]
    with pytest.raises(InputError, match=r"U\+0041"):
        prepare.prepare(config(write("w.txt", "ABBA ab\n" * 50), vocabulary=vocabulary), data)


# No repeated work


def test_repeating_is_a_no_op(
    write: Write, data: Path, config: Config, encoded: list[str], settled: None
) -> None:
    source = config(write("sea.txt"))
    first = prepare.prepare(source, data, name="sea")

    def states(dataset: Dataset) -> dict[str, tuple[int, int]]:
        return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in dataset.path.iterdir()}

    before = states(first)
    second = prepare.prepare(source, data, name="sea")
    assert second.key == first.key
    assert encoded == ["text"]
    assert states(second) == before


def test_a_settled_text_is_not_read_again(
    write: Write, data: Path, config: Config, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = config(write("sea.txt"))
    key = prepare.prepare(source, data).key
    monkeypatch.setattr(survey, "survey", lambda *a, **k: pytest.fail("it was read"))
    assert prepare.prepare(source, data).key == key
    assert prepare.prepare(source, data, name="again").key == key


def test_a_touched_text_is_read_once_more_but_not_encoded(
    write: Write,
    data: Path,
    config: Config,
    settled: None,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write("sea.txt")
    prepare.prepare(config(path), data)
    os.utime(path, ns=(1, 1))
    prepare.prepare(config(path), data)
    assert encoded == ["text"]
    monkeypatch.setattr(survey, "survey", lambda *a, **k: pytest.fail("it was read"))
    prepare.prepare(config(path), data)


def test_another_name_shares_the_files(write: Write, data: Path, config: Config, encoded: list[str]) -> None:
    path = write("sea.txt")
    one = prepare.prepare(config(path), data, name="one")
    two = prepare.prepare(config(path), data, name="two")
    assert (one.name, two.name) == ("one", "two")
    assert encoded == ["text"]
    assert os.path.samefile(one.path / "train.bin", two.path / "train.bin")
    two.verify()
    before = (two.path / "manifest.json").stat()
    assert prepare.prepare(config(path), data, name="two").name == "two"
    assert (two.path / "manifest.json").stat() == before


def test_files_are_copied_where_they_cannot_be_linked(
    write: Write, data: Path, config: Config, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError("no links here")

    path = write("sea.txt")
    one = prepare.prepare(config(path), data, name="one")
    monkeypatch.setattr(os, "link", refuse)
    two = prepare.prepare(config(path), data, name="two")
    assert encoded == ["text"]
    assert not os.path.samefile(one.path / "train.bin", two.path / "train.bin")
    two.verify()


def test_the_same_text_from_elsewhere_is_recognised(
    write: Write, data: Path, config: Config, encoded: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.prepare(config(write("a.txt")), data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-16"))))
    assert prepare.prepare(config("-", encoding="utf-16"), data).name == "a"
    assert prepare.prepare(config(write("b.txt", text.replace("\n", "\r\n"))), data).name == "a"
    assert encoded == ["text"]


def test_other_settings_are_another_dataset(write: Write, data: Path, config: Config) -> None:
    path = write("sea.txt")
    made = [prepare.prepare(config(path, **s), data).name for s in (
        {}, {"tokenizer": "word"}, {"tokenizer": "word", "vocab_size": 60}, {"val_fraction": 0.2},
    )]  # fmt: skip
    assert made[:2] == ["sea", "sea-word"]
    assert made[2].startswith("sea-word-")
    assert made[3] == "sea-char"
    assert len(set(made)) == 4


# Names


def test_a_changed_text_replaces_its_dataset(write: Write, data: Path, config: Config) -> None:
    first = prepare.prepare(config(write("sea.txt")), data, name="sea")
    second = prepare.prepare(config(write("sea.txt", "Quite another text.\n" * 30)), data, name="sea")
    assert second.key != first.key
    assert decoded(Dataset.open(data / "sea")) == "Quite another text.\n" * 30
    assert sorted(os.listdir(data)) == ["sea"]


def test_another_text_does_not_take_a_name(write: Write, data: Path, config: Config, text: str) -> None:
    prepare.prepare(config(write("sea.txt")), data, name="sea")
    other = config(write("land.txt", "No water here, none at all.\n" * 30))
    with pytest.raises(RefusedError, match="sea") as e:
        prepare.prepare(other, data, name="sea")
    assert e.value.exit_code == 4
    assert e.value.hint == "force=True"
    assert decoded(Dataset.open(data / "sea")) == text
    assert decoded(prepare.prepare(other, data, name="sea", force=True)).startswith("No water")


def test_other_settings_do_not_take_a_name(write: Write, data: Path, config: Config) -> None:
    path = write("sea.txt")
    prepare.prepare(config(path), data, name="sea")
    with pytest.raises(RefusedError) as e:
        prepare.prepare(config(path, tokenizer="word"), data, name="sea")
    assert "tokenizer is char, not word" in e.value.why


def test_force_prepares_it_again(write: Write, data: Path, config: Config, encoded: list[str]) -> None:
    source = config(write("sea.txt"))
    prepare.prepare(source, data, name="sea")
    (data / "sea" / "train.bin").write_bytes(b"")
    prepare.prepare(source, data, name="sea", force=True).verify()
    assert encoded == ["text"] * 2
    assert prepare.prepare(source, data, force=True).name == "sea"
    assert encoded == ["text"] * 3


def test_a_damaged_dataset_is_prepared_again(write: Write, data: Path, config: Config) -> None:
    source = config(write("sea.txt"))
    prepare.prepare(source, data, name="sea")
    (data / "sea" / "train.bin").write_bytes(b"")
    prepare.prepare(source, data, name="sea").verify()


def test_a_folder_that_is_not_a_dataset_is_never_replaced(write: Write, data: Path, config: Config) -> None:
    (data / "photos").mkdir(parents=True)
    (data / "photos" / "cat.jpg").write_bytes(b"a cat")
    with pytest.raises(RefusedError, match="not a dataset"):
        prepare.prepare(config(write("sea.txt")), data, name="photos", force=True)
    assert (data / "photos" / "cat.jpg").read_bytes() == b"a cat"


def test_a_default_name_avoids_other_folders(write: Write, data: Path, config: Config) -> None:
    (data / "sea").mkdir(parents=True)
    assert prepare.prepare(config(write("sea.txt")), data).name == "sea-char"


@pytest.mark.parametrize("name", ["../x", "A", "", "a/b"])
def test_f13_a_bad_name_makes_nothing(write: Write, data: Path, config: Config, name: str) -> None:
    with pytest.raises(InputError):
        prepare.prepare(config(write("sea.txt")), data, name=name)
    assert not data.exists()


def test_the_data_root_is_next_to_the_registry_or_in_quill_data(tmp_path: Path) -> None:
    assert store.locate(tmp_path / "weights", {}) == tmp_path / "data"
    assert store.locate(tmp_path / "weights", {"QUILL_DATA": "/elsewhere"}) == Path("/elsewhere")
    assert store.locate(tmp_path / "weights", {"QUILL_DATA": ""}) == tmp_path / "data"


# Refusals


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty: 0 characters"),
        ("\ufeff", "is empty: 0 characters"),
        (" \n\t \n", "is blank: 5 characters"),
        ("a" * 1000, "repeats one character: 1,000 characters"),
        ("ab", "leaves nothing to train on: 2 characters"),
    ],
)
def test_f16_a_text_without_variety_is_refused(
    write: Write, data: Path, config: Config, content: str, said: str
) -> None:
    with pytest.raises(InputError) as e:
        prepare.prepare(config(write("e.txt", content), val_fraction=0.6), data)
    assert e.value.exit_code == 2
    assert said in e.value.what
    assert [p.name for p in data.glob("*") if not p.name.startswith(".")] == []


def test_f16_blank_files_next_to_a_text_are_accepted(
    write: Write, data: Path, config: Config, text: str
) -> None:
    files = [str(write("empty.txt", "")), str(write("sea.txt")), str(write("blank.txt", " "))]
    assert decoded(prepare.prepare(config(files), data)) == text + "\n "


@pytest.mark.parametrize("changed", ["Tide", "tidé", "t\0de", "a much longer tide"])
@pytest.mark.parametrize("moment", ["while it is read", "between two readings"])
def test_f18_a_text_that_changes_is_refused(
    write: Write,
    data: Path,
    config: Config,
    text: str,
    changed: str,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write("sea.txt")
    original = survey.survey

    def meddle(event: object = None) -> None:
        stat = path.stat()
        path.write_text(text.replace("tide", changed))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def meddled(*arguments: Any, **settings: Any) -> survey.Survey:
        found = original(*arguments, **settings)
        meddle()
        return found

    if moment == "between two readings":
        monkeypatch.setattr(survey, "survey", meddled)
    observer = meddle if moment == "while it is read" else None
    with pytest.raises(InputError, match="changed while reading") as e:
        prepare.prepare(config(path), data, observer=observer)
    assert e.value.exit_code == 2
    assert not (data / "sea").exists()
    assert list(data.glob(".*")) == []


def test_f18_a_change_that_the_times_hide_is_refused(
    write: Write, data: Path, config: Config, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("sea.txt")
    original = survey.survey

    def meddled(found: Any, **settings: Any) -> Any:
        result = original(found, **settings)
        path.write_text(text.replace("tide", "dite"))
        monkeypatch.setattr(found, "_seen", found._stat())
        return result

    monkeypatch.setattr(survey, "survey", meddled)
    with pytest.raises(InputError, match="changed while reading"):
        prepare.prepare(config(path), data)


def test_f26_a_full_disk_is_reported_before_the_work(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, needed_bytes: int, what: str) -> None:
        assert needed_bytes >= 1000
        raise ResourceError("not enough disk")

    monkeypatch.setattr(fsio, "require_space", full)
    with pytest.raises(ResourceError):
        prepare.prepare(config(write("sea.txt")), data)
    assert not (data / "sea").exists()


def test_f27_a_write_that_fails_leaves_the_old_dataset(
    write: Write, data: Path, config: Config, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare.prepare(config(write("sea.txt")), data)
    write("sea.txt", "Quite another text.\n" * 30)

    def broken(*arguments: Any, **settings: Any) -> str:
        raise ResourceError("the disk is full")

    for module, step in ((fsio, "create"), (fsio.writing, "settle"), (fsio.syncing, "sync_dir")):
        with monkeypatch.context() as patch:
            patch.setattr(module, step, broken)
            with pytest.raises(ResourceError):
                prepare.prepare(config(data.parent / "sea.txt"), data)
        assert decoded(Dataset.open(data / "sea")) == text
        assert [p.name for p in data.iterdir()] == ["sea"]


def test_f31_concurrent_preparations_make_one_dataset(write: Write, data: Path, config: Config) -> None:
    source = config(write("sea.txt"))
    made: list[Dataset] = []
    threads = [
        threading.Thread(target=lambda: made.append(prepare.prepare(source, data, name="sea")))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({d.key for d in made}) == 1
    assert len(made) == 6
    Dataset.open(data / "sea").verify()


def test_f21_a_size_that_the_text_cannot_fill_gives_a_notice(
    write: Write, data: Path, config: Config
) -> None:
    pytest.importorskip("rustbpe")
    told: list[Any] = []
    dataset = prepare.prepare(
        config(write("sea.txt"), tokenizer="bpe", vocab_size=50_000), data, observer=told.append
    )
    [notice] = [e for e in told if isinstance(e, Notice)]
    assert f"{dataset.tokenizer.vocab_size:,} tokens instead of 50,000" in notice.message


def test_progress_names_the_stages(write: Write, data: Path, config: Config, text: str) -> None:
    told: list[Any] = []
    prepare.prepare(config(write("sea.txt"), tokenizer="word"), data, observer=told.append)
    stages = list(dict.fromkeys(e.stage for e in told))
    assert stages == ["reading", "learning", "encoding"]
    assert told[-1] == Progress("encoding", len(text), len(text))


def test_a_tokenizer_learns_from_an_even_share_of_a_long_text(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    kind = prepare.base.load("word")
    monkeypatch.setattr(kind, "learn_chars", 3 * encode.TASK)
    original = kind.train

    def train(texts: Any, **settings: Any) -> Any:
        seen.extend(texts)
        return original(seen, **settings)

    monkeypatch.setattr(kind, "train", train)
    prepare.prepare(
        config(write("long.txt", "The tide comes in and goes out.\n" * 50_000), tokenizer="word"), data
    )
    assert 2 * encode.TASK < sum(map(len, seen)) < 4 * encode.TASK
    assert len(seen) >= 3


# The dataset of a run's settings


@pytest.fixture
def harpoon(write: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A named source."""
    path = write("packaged.txt")
    monkeypatch.setitem(named_sources.NAMED, "harpoon", named_sources.Named("a text", file=path))
    return path


def test_a_named_source_is_prepared_on_first_use(
    harpoon: Path, data: Path, config: Config, encoded: list[str]
) -> None:
    first = resolve.ensure(config("harpoon"), data)
    assert (first.name, first.manifest["tokenizer"]["kind"]) == ("harpoon", "char")
    assert resolve.ensure(config("harpoon"), data).path == first.path
    assert encoded == ["text"]


def test_a_named_source_with_another_tokenizer_has_another_name(
    harpoon: Path, data: Path, config: Config, encoded: list[str]
) -> None:
    resolve.ensure(config("harpoon"), data)
    for _ in range(2):
        assert resolve.ensure(config("harpoon", tokenizer="word"), data).name == "harpoon-word"
        assert resolve.ensure(config("harpoon"), data).name == "harpoon"
    assert encoded == ["text"] * 2


def test_a_damaged_named_source_is_prepared_again(harpoon: Path, data: Path, config: Config) -> None:
    resolve.ensure(config("harpoon"), data)
    (data / "harpoon" / "val.bin").unlink()
    resolve.ensure(config("harpoon"), data).verify()


def test_a_damaged_dataset_of_a_file_is_reported(write: Write, data: Path, config: Config) -> None:
    prepare.prepare(config(write("t.txt")), data, name="sea")
    (data / "sea" / "val.bin").unlink()
    with pytest.raises(CorruptError, match="sea") as e:
        resolve.ensure(config("sea"), data)
    assert e.value.hint == f"quill prepare {data.parent}/t.txt --name sea --force"


def test_a_prepared_dataset_takes_precedence_over_a_named_source(
    harpoon: Path, write: Write, data: Path, config: Config
) -> None:
    mine = prepare.prepare(config(write("mine.txt", "My own text of that name. " * 30)), data, name="harpoon")
    assert resolve.ensure(config("harpoon"), data).key == mine.key
    theirs = resolve.ensure(config("harpoon", tokenizer="word"), data)
    assert theirs.name == "harpoon-word"
    assert "bells" in decoded(theirs)


def test_a_prepared_dataset_is_found_by_name_alone(write: Write, data: Path, config: Config) -> None:
    made = prepare.prepare(
        config(write("t.txt"), tokenizer="word", vocab_size=80, val_fraction=0.2), data, name="sea"
    )
    for settings in ({}, {"tokenizer": "word"}, {"vocab_size": 80}, {"val_fraction": 0.2}):
        assert resolve.ensure(config("sea", **settings), data).key == made.key
        assert resolve.ensure(config(["sea"], **settings), data).key == made.key


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer": "word"}, "tokenizer is char, not word"),
        ({"vocab_size": 999}, "vocab_size is"),
        ({"vocabulary": ["a", "b"]}, "vocabulary is"),
        ({"val_fraction": 0.3}, "val_fraction is 0.1, not 0.3"),
    ],
)
def test_a_dataset_with_other_settings_is_refused_with_the_difference(
    write: Write, data: Path, config: Config, settings: dict[str, Any], said: str
) -> None:
    prepare.prepare(config(write("t.txt")), data, name="sea")
    with pytest.raises(InputError, match="'sea' was prepared with other settings") as e:
        resolve.ensure(config("sea", **settings), data)
    assert said in e.value.why
    assert e.value.hint.startswith(f"quill prepare {data.parent}/t.txt --name sea-")


def test_the_datasets_own_vocabulary_matches(write: Write, data: Path, config: Config, text: str) -> None:
    made = prepare.prepare(config(write("t.txt")), data, name="sea")
    assert resolve.ensure(config("sea", vocabulary=sorted(set(text))), data).key == made.key


def test_files_are_prepared_on_first_use(
    write: Write, data: Path, config: Config, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("sea.txt")
    assert resolve.ensure(config(path), data).name == "sea"
    monkeypatch.chdir(path.parent)
    assert resolve.ensure(config("sea.txt"), data).name == "sea"
    assert resolve.ensure(config(["sea.txt"]), data).name == "sea"
    assert encoded == ["text"]


def test_a_pattern_without_a_folder_is_prepared(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write("sea.txt").parent)
    assert resolve.ensure(config("*.txt"), data).manifest["source"]["documents"] == 1


def test_a_file_whose_name_is_taken_gets_another(write: Write, data: Path, config: Config) -> None:
    one = resolve.ensure(config(write("a/sea.txt")), data)
    two = resolve.ensure(config(write("b/sea.txt", "Another sea altogether. " * 40)), data)
    three = resolve.ensure(config(write("c/sea.txt", "And a third sea. " * 40)), data)
    assert [one.name, two.name] == ["sea", "sea-char"]
    assert three.name.startswith("sea-char-")
    assert resolve.ensure(config(data.parent / "c" / "sea.txt"), data).name == three.name


def test_an_unknown_name_is_not_found(write: Write, data: Path, config: Config) -> None:
    prepare.prepare(config(write("t.txt")), data, name="sea")
    with pytest.raises(NotFoundError, match="'see'") as e:
        resolve.ensure(config("see"), data)
    assert e.value.exit_code == 3
    assert "sea" in e.value.why
    assert "shakespeare" in e.value.why


def test_f50_a_prepared_name_needs_no_network(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named_sources, "_download", lambda *a: pytest.fail("it went to the network"))
    made = prepare.prepare(config(write("input.txt")), data, name="shakespeare")
    assert resolve.ensure(config("shakespeare", tokenizer="char"), data).key == made.key
