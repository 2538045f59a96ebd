"""Datasets on disk: what is read back, what is refused as damaged, and how they are listed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quill import fsio
from quill.data import batches, store
from quill.data.dataset import Dataset, record_of
from quill.data.prepare import prepare
from quill.data.resolve import ensure
from quill.data.shards import Shard
from quill.errors import CorruptError, InputError, NotFoundError, QuillError

Write = Callable[..., Path]
Config = Callable[..., Any]
FILES = ["train.bin", "val.bin", "tokenizer.json"]


@pytest.fixture
def dataset(data: Path, write: Write, config: Config) -> Dataset:
    return prepare(config(write("sea.txt")), data)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read from start to end."""
    names: list[str] = []
    sha256 = Shard.sha256

    def counted(self: Shard, *arguments: Any) -> str:
        names.append(self._name)
        return sha256(self, *arguments)

    monkeypatch.setattr(Shard, "sha256", counted)
    return names


def flip(path: Path, at: int | None = None, bit: int = 1) -> None:
    """Flip a bit, by default in the middle, and restore the file's modification time."""
    times = path.stat()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if at is None else at] ^= bit
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def rewrite(dataset: Dataset, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest."""
    file = dataset.path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


# Reading


def test_what_was_prepared_is_read_back(dataset: Dataset, text: str) -> None:
    again = Dataset.open(dataset.path)
    assert again.name == "sea"
    assert again.key == dataset.key
    ids = [*again.train[:].tolist(), *again.val[:].tolist()]
    assert again.tokenizer.decode(ids) == text
    assert again.split("val") is again.val
    assert again.count("train") == len(again.train)
    assert again.count("train", "bytes") + again.count("val", "bytes") == len(text.encode())
    assert again.size == sum((again.path / name).stat().st_size for name in FILES)
    again.verify()


def test_the_shards_are_nanogpts(dataset: Dataset, text: str) -> None:
    ids = np.fromfile(dataset.path / "train.bin", dtype=np.uint16)
    characters = sorted(set(text))
    assert ids.tolist() == [characters.index(c) for c in text[: int(len(text) * 0.9)]]


def test_rows_and_ranges_are_those_of_the_array(dataset: Dataset) -> None:
    ids = np.fromfile(dataset.path / "train.bin", dtype="<u2")
    n = len(ids)
    for where in (
        slice(None),
        slice(5, 9),
        slice(n - 3, n + 9),
        slice(9, 5),
        slice(-4, None),
        slice(n, None),
    ):
        assert dataset.train[where].tolist() == ids[where].tolist()
    assert dataset.train.rows([0, 7, n - 5], 5).tolist() == [
        ids[at : at + 5].tolist() for at in (0, 7, n - 5)
    ]
    assert np.array_equal(np.asarray(dataset.train), ids)
    with pytest.raises(ValueError, match="in order"):
        dataset.train[::2]


@pytest.mark.parametrize("has_pread", [True, False])
def test_short_reads_are_continued(dataset: Dataset, monkeypatch: Any, has_pread: bool) -> None:
    ids = np.fromfile(dataset.path / "train.bin", dtype="<u2").tolist()
    read, pread = os.read, os.pread
    if has_pread:
        monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 1000), offset))
    else:
        monkeypatch.delattr(os, "pread")
        monkeypatch.setattr(os, "read", lambda fd, size: read(fd, min(size, 1000)))
    assert dataset.train[:].tolist() == ids
    assert dataset.train.sha256() == dataset.manifest["files"]["train.bin"]["sha256"]


def test_batches_and_windows_are_those_of_the_array(dataset: Dataset) -> None:
    ids = np.fromfile(dataset.path / "train.bin", dtype="<u2")
    for step in range(3):
        ours, theirs = (
            batches.batch(t, seed=1, step=step, batch_size=4, block_size=16) for t in (dataset.train, ids)
        )
        assert [t.tolist() for t in ours] == [t.tolist() for t in theirs]
    ours, theirs = (list(batches.windows(t, block_size=16, batch_size=4)) for t in (dataset.train, ids))
    assert [[t.tolist() for t in pair] for pair in ours] == [[t.tolist() for t in pair] for pair in theirs]


def test_the_head_is_the_start_of_the_text(dataset: Dataset, text: str) -> None:
    assert dataset.head(50) == text[:50]
    assert dataset.head(10**6) == text[: int(len(text) * 0.9)]


def test_a_dataset_can_be_moved(dataset: Dataset, tmp_path: Path, text: str) -> None:
    moved = Dataset.open(Path(shutil.move(dataset.path, tmp_path / "elsewhere")))
    assert moved.name == "elsewhere"
    assert moved.tokenizer.decode(moved.train[:].tolist()) == text[: int(len(text) * 0.9)]


def test_a_missing_dataset_is_not_found(data: Path, write: Write) -> None:
    for path in (data / "nonesuch", write("file.txt")):
        with pytest.raises(NotFoundError):
            Dataset.open(path)


# Damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_f1_a_file_of_another_size_is_damage(dataset: Dataset, name: str, damage: str, write: Write) -> None:
    file = dataset.path / name
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "shorter" else file.read_bytes() + b"\0")
    with pytest.raises(CorruptError, match="sea") as e:
        Dataset.open(dataset.path)
    assert name in e.value.why
    assert e.value.hint == f"quill prepare {dataset.path.parent.parent}/sea.txt --name sea --force"


@pytest.mark.parametrize("name", FILES)
def test_f3_a_flipped_bit_is_refused_wherever_the_dataset_is_used(
    dataset: Dataset, name: str, settled: None, data: Path, config: Config
) -> None:
    Dataset.open(dataset.path).verify()
    flip(dataset.path / name)
    uses: dict[str, Callable[[Dataset], object]] = {
        "train.bin": lambda d: d.train,
        "val.bin": lambda d: d.val,
        "tokenizer.json": lambda d: d.tokenizer,
    }
    for use in (uses[name], Dataset.verify, lambda d: ensure(config("sea"), data)):
        with pytest.raises(CorruptError, match="damaged") as e:
            use(Dataset.open(dataset.path))
        assert name in e.value.why


@pytest.mark.parametrize("at", range(50))
def test_f3_no_flipped_bit_trains(dataset: Dataset, at: int, data: Path, config: Config) -> None:
    size = (dataset.path / "train.bin").stat().st_size
    flip(dataset.path / "train.bin", at * size // 50, 1 << at % 8)
    with pytest.raises(CorruptError):
        ensure(config("sea"), data)


def test_f3_zeroed_ids_do_not_train(dataset: Dataset, data: Path, config: Config) -> None:
    file = dataset.path / "train.bin"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CorruptError, match="damaged"):
        ensure(config("sea"), data)


def test_f3_preparing_again_repairs_a_flipped_bit(dataset: Dataset, data: Path, config: Config) -> None:
    flip(dataset.path / "train.bin")
    source = config(dataset.manifest["source"]["given"])
    for settings in ({"name": "sea"}, {}):
        prepare(source, data, **settings).verify()
        flip(dataset.path / "train.bin")


def test_f3_a_damaged_dataset_is_not_linked(dataset: Dataset, data: Path, config: Config) -> None:
    flip(dataset.path / "train.bin")
    prepare(config(dataset.manifest["source"]["given"]), data, name="other").verify()


def test_f4_an_id_outside_the_vocabulary_is_refused(dataset: Dataset) -> None:
    file = dataset.path / "train.bin"
    ids = np.fromfile(file, "<u2")
    ids[7] = dataset.vocab_size
    ids.tofile(file)
    sha256 = fsio.sha256(file)
    rewrite(dataset, lambda m: m["files"]["train.bin"].update(sha256=sha256))
    with pytest.raises(CorruptError) as e:
        _ = Dataset.open(dataset.path).train
    assert f"the id {dataset.vocab_size}" in e.value.why


def test_f4_an_id_that_changes_in_use_is_refused(dataset: Dataset) -> None:
    train = dataset.train
    ids = np.fromfile(dataset.path / "train.bin", "<u2")
    ids[7] = 60_000
    with open(dataset.path / "train.bin", "r+b") as file:
        file.write(ids.tobytes())
    with pytest.raises(CorruptError, match="damaged"):
        train.rows([0], 16)


def test_f4_a_tokenizer_of_another_size_is_refused(dataset: Dataset) -> None:
    rewrite(dataset, lambda m: m["tokenizer"].update(vocab_size=9999))
    with pytest.raises(CorruptError, match="damaged"):
        _ = Dataset.open(dataset.path).tokenizer


def test_a_file_that_shrinks_in_use_is_an_error(dataset: Dataset) -> None:
    train = dataset.train
    os.truncate(dataset.path / "train.bin", 100)
    with pytest.raises(CorruptError) as e:
        batches.batch(train, seed=0, step=0, batch_size=64, block_size=32)
    assert e.value.exit_code == 5
    assert "shorter" in e.value.why


def test_a_removed_dataset_stays_readable_while_open(dataset: Dataset) -> None:
    train = dataset.train
    shutil.rmtree(dataset.path)
    assert len(train[:]) == len(train)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "link", "folder"])
def test_f14_only_regular_files_are_opened(dataset: Dataset, name: str, kind: str, tmp_path: Path) -> None:
    file = dataset.path / name
    moved = file.rename(tmp_path / name)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else moved)
    failures: list[QuillError] = []

    def use() -> None:
        try:
            Dataset.open(dataset.path).verify()
        except QuillError as e:
            failures.append(e)

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    assert [e.exit_code for e in failures] == [5]


# Verifying once


def test_files_are_read_once_per_state(dataset: Dataset, settled: None, read: list[str]) -> None:
    for _ in range(3):
        again = Dataset.open(dataset.path)
        again.verify(again=False)
        assert len(again.train) + len(again.val) > 0
    assert read == ["train.bin", "val.bin"]
    again.verify()
    assert read == ["train.bin", "val.bin"] * 2
    os.utime(dataset.path / "train.bin", ns=(1, 1))
    Dataset.open(dataset.path).verify(again=False)
    assert read[4:] == ["train.bin"]


def test_files_that_have_not_settled_are_read_each_time(dataset: Dataset, read: list[str]) -> None:
    for _ in range(2):
        _ = Dataset.open(dataset.path).train
    assert read == ["train.bin"] * 2


@pytest.mark.parametrize("record", [b"", b"[]", b"{", b'{"train.bin": 1}', b"\xff"])
def test_a_damaged_record_is_ignored(dataset: Dataset, settled: None, read: list[str], record: bytes) -> None:
    dataset.verify()
    file = record_of(dataset.path)
    assert file.is_file()
    file.write_bytes(record)
    Dataset.open(dataset.path).verify(again=False)
    assert read == ["train.bin", "val.bin"] * 2


def test_a_record_of_other_bytes_does_not_count(dataset: Dataset, settled: None, read: list[str]) -> None:
    dataset.verify()
    rewrite(dataset, lambda m: m["files"]["val.bin"].update(sha256="0" * 64))
    with pytest.raises(CorruptError, match="damaged"):
        Dataset.open(dataset.path).verify(again=False)


def test_verifying_needs_no_writable_folder(dataset: Dataset, settled: None, monkeypatch: Any) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    dataset.verify()
    assert not record_of(dataset.path).exists()


def test_verifying_reports_its_progress(dataset: Dataset) -> None:
    told: list[tuple[str, int, int | None]] = []
    dataset.verify(lambda *event: told.append(event))
    assert told[-1] == ("verifying", dataset.size, dataset.size)
    assert [n for _, n, _ in told] == sorted(n for _, n, _ in told)


# The manifest


def test_f9_a_malformed_manifest_is_corrupt(dataset: Dataset) -> None:
    file = dataset.path / "manifest.json"
    good = json.loads(file.read_text())
    bad: list[Any] = [[], {}, 1, {**good, "dtype": "float32"}, {**good, "files": {}}]
    bad += [
        {k: v for k, v in good.items() if k != gone}
        for gone in ("schema", "key", "splits", "tokenizer", "source", "settings")
    ]
    bad += [{**good, "splits": {**good["splits"], "val": {"tokens": 1, "bytes": 1, "characters": 1}}}]
    bad += [{**good, "files": {**good["files"], "..": {"bytes": 1, "sha256": ""}}}]
    bad += [{**good, "source": {**good["source"], "given": given}} for given in ([1], "sea.txt", None)]
    bad += [{**good, "source": {**good["source"], "bytes": n}} for n in ({}, -1, None)]
    bad += [{**good, "settings": {}}]
    for value in bad:
        file.write_text(json.dumps(value))
        with pytest.raises(CorruptError):
            Dataset.open(dataset.path)
    for raw in (b"", b"{", b"\xff\xfe{}"):
        file.write_bytes(raw)
        with pytest.raises(CorruptError):
            Dataset.open(dataset.path)


def test_f12_a_newer_schema_needs_a_newer_quill(dataset: Dataset) -> None:
    rewrite(dataset, lambda m: m.update(schema=3))
    with pytest.raises(InputError, match="schema 3") as e:
        Dataset.open(dataset.path)
    assert e.value.hint == "pip install --upgrade quill-gpt"


# Names


def test_one_damaged_dataset_does_not_hide_the_others(
    dataset: Dataset, data: Path, write: Write, config: Config
) -> None:
    other = prepare(config(write("land.txt", "no water here, none at all. " * 20)), data)
    (data / "stray.txt").write_text("not a dataset")
    (data / "folder").mkdir()
    assert [d.name for d in store.datasets(data)] == ["land", "sea"]
    (other.path / "train.bin").write_bytes(b"")
    assert [d.name for d in store.datasets(data)] == ["sea"]
    land, sea = store.entries(data)
    assert (land.name, land.dataset) == ("land", None)
    assert "train.bin has 0 bytes" in land.damage
    assert (sea.name, sea.damage) == ("sea", "")
    assert store.entries(data / "nonesuch") == []


def test_a_dataset_is_found_by_name(dataset: Dataset, data: Path) -> None:
    assert store.find(data, "sea").key == dataset.key
    with pytest.raises(NotFoundError, match="'see'") as e:
        store.find(data, "see")
    assert e.value.close == ("data:sea",)
    with pytest.raises(InputError):
        store.find(data, "../data/sea")


@pytest.mark.parametrize("name", ["", ".", "../x", "/etc", "a/b", "-x", "a\0", "A", "a" * 65, "con"])
def test_f13_a_bad_name_is_refused_and_nothing_is_created(
    name: str, data: Path, write: Write, config: Config
) -> None:
    with pytest.raises(InputError):
        prepare(config(write("sea.txt")), data, name=name)
    assert not data.exists() or not any(data.iterdir())


# Links


def test_f14_nothing_is_written_through_a_linked_folder(
    dataset: Dataset, data: Path, write: Write, config: Config, tmp_path: Path, settled: None
) -> None:
    outside = Path(shutil.move(dataset.path, tmp_path / "outside"))
    (data / "sea").symlink_to(outside)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in outside.iterdir()}
    text = Path(dataset.manifest["source"]["given"][0])
    assert ensure(config("sea"), data).path == data / "sea"
    os.utime(text, ns=(1, 1))
    prepare(config(text), data, name="sea")
    prepare(config(text), data, name="sea", force=True)
    text.write_text("Quite another text.\n" * 30)
    prepare(config(text), data, name="sea")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in outside.iterdir()} == before


def test_the_sha256_of_a_split_is_that_of_its_file(dataset: Dataset) -> None:
    raw = (dataset.path / "val.bin").read_bytes()
    assert dataset.val.sha256() == hashlib.sha256(raw).hexdigest()
