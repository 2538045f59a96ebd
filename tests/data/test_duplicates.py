"""Documents that repeat an earlier one are dropped: the same ones whatever the workers, shards and kills."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quill.data import duplicates, merge, prepare, sources, unfinished
from quill.data.dataset import Dataset
from quill.data.prepare import Notice, Progress
from quill.errors import InputError

Write = Callable[..., Path]
Config = Callable[..., Any]

WORDS = [
    f"{a}{b}"
    for a in ("sal", "mer", "rok", "tid", "un")
    for b in ("t", "en", "ade", "or", "ish", "ul", "ing")
]


def documents(n: int, words: int = 200, seed: int = 1) -> list[str]:
    """Return texts without any run of words in common, or hardly any."""
    luck = random.Random(seed)
    return [" ".join(luck.choices(WORDS, k=words)) for _ in range(n)]


def changed(text: str, every: int) -> str:
    """Change every nth word."""
    return " ".join(f"x{i}" if i % every == every // 2 else word for i, word in enumerate(text.split(" ")))


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def dropped(path: Path, root: Path, how: duplicates.How, workers: int | None = None) -> list[int]:
    with (
        sources.find(str(path), root) as text,
        duplicates.found(text, root, how, workers, lambda *told: None) as found,
    ):
        numbers = [n for n in range(found.documents) if n in found]
        assert len(numbers) == found.exact + found.near
        return numbers


@pytest.fixture
def need_rensa() -> None:
    pytest.importorskip("rensa")


def test_exact_duplicates_are_equal_but_for_case_and_spaces(write: Write, data: Path) -> None:
    texts = ["The sea. É", "the\n\nSEA.  é", "The sea, É", "The sea.", "x", "x ", "The sea. É and", "X"]
    assert dropped(write("a.jsonl", jsonl(texts)), data, "exact") == [1, 5, 7]


@pytest.mark.usefixtures("need_rensa")
def test_near_duplicates_differ_in_few_words(write: Write, data: Path) -> None:
    base = documents(40)
    few = [changed(text, 100) for text in base]
    many = [changed(text, 4) for text in base]
    half = [
        " ".join(text.split()[100:]) + " " + other
        for text, other in zip(base, documents(40, 300, 2), strict=True)
    ]
    numbers = dropped(write("a.jsonl", jsonl([*base, *few, *many, *half, base[3].upper()])), data, "near")
    assert numbers == [*range(40, 80), 160]


@pytest.mark.usefixtures("need_rensa")
@pytest.mark.parametrize("every", [100, 50, 33, 20, 12])
def test_the_chance_is_that_of_the_manual(write: Write, data: Path, every: int) -> None:
    """Next to the share of five-word runs in common, counted; 1 - (1 - s^8)^14, within three deviations."""
    base = documents(300)
    other = [changed(text, every) for text in base]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    pairs = [(runs(a), runs(b)) for a, b in zip(base, other, strict=True)]
    expected = [1 - (1 - (len(a & b) / len(a | b)) ** 8) ** 14 for a, b in pairs]
    spread = 3 * sum(p * (1 - p) for p in expected) ** 0.5
    found = dropped(write("a.jsonl", jsonl([*base, *other])), data, "near")
    assert all(n >= 300 for n in found)
    assert abs(len(found) - sum(expected)) <= spread + 1


@pytest.mark.usefixtures("need_rensa")
def test_scripts_without_spaces_are_compared_by_characters(write: Write, data: Path) -> None:
    luck = random.Random(3)
    signs = "海上明月共潮生灩隨波千萬里何處春江無流宛轉繞芳甸照花林皆似霰空裏霜不覺飛"
    texts = ["".join(luck.choices(signs, k=300)) for _ in range(10)]
    near = [text[:150] + "雪" + text[151:] for text in texts]
    assert dropped(write("a.jsonl", jsonl([*texts, *near])), data, "near") == [*range(10, 20)]


@pytest.mark.usefixtures("need_rensa")
def test_documents_of_fewer_than_five_words_are_compared_as_a_whole(write: Write, data: Path) -> None:
    texts = ["one two three four", "one two three for", "a b", "", "c", "one two  three four"]
    assert dropped(write("a.jsonl", jsonl(texts)), data, "near") == [4]


@pytest.mark.usefixtures("need_rensa")
@pytest.mark.parametrize("how", ["exact", "near"])
def test_neither_workers_nor_sizes_change_what_is_dropped(
    write: Write, data: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    base = documents(60, 90)
    path = write("a.jsonl", jsonl([*base, *(changed(text, 45) for text in base), *base[:9]]))
    expected = dropped(path, data, how, 1)
    assert len(expected) > 5
    assert dropped(path, data, how, 3) == expected
    monkeypatch.setattr(duplicates, "_BATCH", 700)
    monkeypatch.setattr(duplicates, "_KEYS", 100)
    monkeypatch.setattr(duplicates, "_FILE_BYTES", 500)
    assert dropped(path, data, how, 3) == expected


@pytest.mark.usefixtures("need_rensa")
def test_a_document_longer_than_a_piece_is_one_document(
    write: Write, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_PIECE", 4000)
    monkeypatch.setattr(duplicates, "_BATCH", 6000)
    long, other = documents(2, 5000)
    files = [write(f"{i}.txt", t) for i, t in enumerate([long, other, f" {long}\n", changed(long, 200)])]
    assert dropped(files[0].parent, data, "exact") == [2]
    assert dropped(files[0].parent, data, "near") == [2, 3]


def test_other_passes_leave_them_out(write: Write, data: Path, tmp_path: Path, config: Config) -> None:
    texts = [f"{i % 7} bells, and all is well in watch {i % 7}" for i in range(50)]
    told: list[Any] = []
    made = prepare.prepare(
        config(write("a.jsonl", jsonl(texts)), dedup="exact"), data, name="sea", observer=told.append
    )
    kept = prepare.prepare(config(write("b.jsonl", jsonl(texts[:7]))), tmp_path / "kept", name="sea")
    assert contents(made) == contents(kept)
    assert made.key == kept.key
    source = made.manifest["source"]
    assert source["duplicates"] == {"documents": 50, "exact": 43, "near": 0}
    assert (source["documents"], source["sha256"]) == (7, kept.manifest["source"]["sha256"])
    assert made.settings["dedup"] == "exact" and "dedup" not in kept.settings
    assert made.prepare_command().endswith("--name sea --dedup exact --split end")
    assert list(dict.fromkeys(e.stage for e in told if isinstance(e, Progress))) == [
        "comparing",
        "reading",
        "encoding",
    ]
    assert list(data.glob(".tmp-*")) == []


def contents(dataset: Dataset) -> dict[str, bytes]:
    return {name: (dataset.path / name).read_bytes() for name in dataset.manifest["files"]}


def test_what_is_up_to_date_is_not_compared_again(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch, settled: None
) -> None:
    source = config(write("a.jsonl", jsonl(["a tide and a bell"] * 3 + ["more"])), dedup="exact")
    made = prepare.prepare(source, data, name="sea")
    monkeypatch.setattr(duplicates, "found", lambda *a: pytest.fail("compared again"))
    assert prepare.prepare(source, data, name="sea").key == made.key
    assert prepare.prepare(source, data, name="also").duplicates == made.duplicates


def test_a_dataset_of_all_documents_is_another_one(write: Write, data: Path, config: Config) -> None:
    path = write("a.jsonl", jsonl(["a tide and a bell"] * 3 + ["more"]))
    whole = prepare.prepare(config(path), data)
    made = prepare.prepare(config(path, dedup="exact"), data)
    assert (whole.name, made.name) == ("a", "a-char")
    assert not whole.duplicates
    none = prepare.prepare(config(write("b.jsonl", jsonl(["a tide and a bell", "more"]))), data, name="b")
    assert none.key == made.key and not none.duplicates


def test_one_document_has_no_duplicates(write: Write, data: Path, config: Config) -> None:
    told: list[Any] = []
    made = prepare.prepare(config(write("sea.txt"), dedup="exact"), data, observer=told.append)
    [notice] = [e for e in told if isinstance(e, Notice)]
    assert "one document" in notice.message
    assert made.duplicates == {"documents": 1, "exact": 0, "near": 0}


def test_shards_leave_out_the_duplicates_of_the_whole_text(
    write: Write, data: Path, tmp_path: Path, config: Config
) -> None:
    texts = documents(30, 20)
    source = config(write("a.jsonl", jsonl([*texts, *texts])), dedup="exact")
    whole = prepare.prepare(source, tmp_path / "whole", name="sea")
    for number in (2, 1):
        prepare.prepare(source, data, name="sea", shard=(number, 2))
    merged = merge.merge("sea", data)
    assert contents(merged) == contents(whole)
    assert merged.duplicates == whole.duplicates == {"documents": 60, "exact": 30, "near": 0}


@pytest.mark.usefixtures("need_rensa")
@pytest.mark.parametrize(("how", "width"), [("exact", 1), ("near", 15)])
def test_keys_that_were_written_are_not_computed_again(
    write: Write,
    data: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    settled: None,
    tmp_path: Path,
    how: Any,
    width: int,
) -> None:
    texts = documents(60, 30)
    source = config(write("a.jsonl", jsonl([*texts, *texts[:20]])), dedup=how)
    monkeypatch.setattr(duplicates, "_BATCH", 500)
    monkeypatch.setattr(duplicates, "_FILE_BYTES", 8 * width * 10)
    note, noted = unfinished.Unfinished.note, []

    def killed(self: unfinished.Unfinished, split: str, *more: Any) -> None:
        note(self, split, *more)
        noted.append(split)
        if len(noted) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(unfinished.Unfinished, "note", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(source, data, workers=1)
    [left] = data.glob(".tmp-0-*")
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in left.glob("*.bin"):
        os.link(path, kept / path.name)
    mark, compared = duplicates._mark, []

    def marking(bits: Any, files: list[Path], *more: Any) -> int:
        compared.append([(kept / f.name).exists() and f.samefile(kept / f.name) for f in files])
        return mark(bits, files, *more)

    monkeypatch.setattr(duplicates, "_mark", marking)
    made = prepare.prepare(source, data)
    assert made.duplicates == {"documents": 80, "exact": 20, "near": 0}
    assert compared[0] == [True] * 3 + [False] * 5
    assert list(data.glob(".tmp-*")) == []


def test_near_needs_a_package_and_says_which(
    write: Write, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(InputError) as e:
        prepare.prepare(config(write("a.jsonl", jsonl(["a", "b"])), dedup="near"), data)
    assert e.value.hint == "pip install 'quill-gpt[dedup]'"
