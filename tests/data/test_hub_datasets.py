"""Datasets of the Hugging Face Hub: found, streamed to disk, recorded, and refused in plain words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from quill import fsio
from quill.config.settings import DataConfig
from quill.data import encode, hub, merge, resolve, sources
from quill.data.prepare import prepare
from quill.errors import InputError, NotFoundError, QuillError, ResourceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECORDS: list[dict[str, Any]] = [
    {"id": i, "text": f"{i} bells and the tide is in.\r\n", "none": None} for i in range(200)
]

Config = Callable[..., DataConfig]


class Stream:
    """The records of a Hub in memory, as the datasets package streams them."""

    def __init__(self, server: Hub) -> None:
        self.server = server
        self.at = 0
        self.info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=len(server.records))})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.at < len(self.server.records):
            if self.at == self.server.breaks_at:
                raise ConnectionError("reset")
            self.server.given += 1
            self.at += 1
            yield self.server.records[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Hub:
    """A Hub in memory: what is asked of it, and what it answers."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = RECORDS
        self.asked: list[tuple[str, str | None]] = []
        self.loaded: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.breaks_at = -1
        self.given = 0

    def dataset_info(self, name: str, revision: str | None = None) -> SimpleNamespace:
        self.asked.append((name, revision))
        if self.failure:
            raise self.failure
        return SimpleNamespace(sha=COMMIT)

    def load_dataset(self, path: str, **settings: Any) -> Stream:
        self.loaded.append({"path": path, **settings})
        return Stream(self)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub in place of the packages that reach the real one."""
    server = Hub()
    datasets, package = ModuleType("datasets"), ModuleType("huggingface_hub")
    datasets.__dict__.update(
        load_dataset=server.load_dataset,
        are_progress_bars_disabled=lambda: True,
    )
    package.__dict__.update(HfApi=lambda: server)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    return server


def read(source: str, root: Path, **settings: Any) -> list[str]:
    with sources.find(source, root, **settings) as text:
        return [document for chunk in text.chunks("reading", size=1) for document in chunk if document]


def refusal(source: str, root: Path, error: type[QuillError], **settings: Any) -> QuillError:
    with pytest.raises(error) as e:
        read(source, root, **settings)
    return e.value


@pytest.mark.parametrize(
    ("source", "path", "revision", "config", "split", "label"),
    [
        ("hf:org/Tides", "org/Tides", None, None, "train", "tides"),
        ("hf:wikitext:wikitext-2-raw-v1", "wikitext", None, "wikitext-2-raw-v1", "train", "wikitext"),
        ("hf:org/x@v1.0:small:test", "org/x", "v1.0", "small", "test", "x"),
        ("hf:org/x@refs/pr/1::test", "org/x", "refs/pr/1", None, "test", "x"),
        ("openwebtext", "Skylion007/openwebtext", None, None, "train", "openwebtext"),
    ],
)
def test_a_source_selects_revision_configuration_and_split(
    server: Hub,
    data: Path,
    source: str,
    path: str,
    revision: str | None,
    config: str | None,
    split: str,
    label: str,
) -> None:
    with sources.find(source, data) as text:
        assert text.label == label
        assert text.revisions == {source: COMMIT}
        assert server.loaded == []
        assert sum(len(chunk) for _ in range(2) for chunk in text.chunks("reading")) == 400
    assert server.asked == [(path, revision)]
    # It is streamed once, at the commit that the revision meant.
    assert server.loaded == [
        {"path": path, "name": config, "split": split, "revision": COMMIT, "streaming": True}
    ]
    assert list(data.iterdir()) == []


def test_the_manifest_records_the_revision_and_nothing_is_streamed_again(
    server: Hub, data: Path, config: Config
) -> None:
    first = prepare(config("hf:org/tides@main"), data)
    assert first.name == "tides"
    assert first.manifest["source"]["revisions"] == {"hf:org/tides@main": COMMIT}
    assert first.manifest["source"]["documents"] == 200
    assert "\r" not in first.head(1000)
    assert "hf:org/tides@main" in first.prepare_command()
    assert prepare(config("hf:org/tides@main"), data).path == first.path
    assert len(server.loaded) == 1
    assert resolve.ensure(config("hf:org/tides@main"), data).path == first.path


def test_a_dataset_without_an_owner_and_a_named_one_can_be_trained_on(
    server: Hub, data: Path, config: Config
) -> None:
    assert resolve.ensure(config("hf:tides"), data).name == "tides"
    assert resolve.ensure(config("openwebtext", tokenizer="word"), data).name == "openwebtext"


def test_shards_of_a_hub_dataset_merge_to_the_whole(server: Hub, data: Path, config: Config) -> None:
    source = config("hf:org/tides", tokenizer="word")
    whole = prepare(source, data, name="whole", workers=2)
    for number in (1, 2, 3):
        prepare(source, data, name="tides", shard=(number, 3), workers=number)
    merged = merge.merge("tides", data)
    assert merged.manifest["files"] == whole.manifest["files"]
    assert merged.manifest["source"]["revisions"] == {"hf:org/tides": COMMIT}
    assert merged.key == whole.key


def test_hub_and_files_can_be_mixed(server: Hub, data: Path, write: Callable[..., Path]) -> None:
    server.records = RECORDS[:2]
    with sources.find([str(write("a.txt", "first")), "hf:org/tides"], data) as text:
        assert "\n".join(chunk.joined() for chunk in text.chunks("reading")).startswith("first\n0 bells")
        assert text.origin


@pytest.mark.parametrize("source", ["hf:", "hf:a/b/c", "hf:a/../b", "hf:a/b@", "hf:a/b:c:d:e", "hf:-x"])
def test_f17_what_is_not_a_dataset_is_refused(server: Hub, data: Path, source: str) -> None:
    assert "hf:OWNER/NAME" in refusal(source, data, InputError).why


def test_a_folder_of_that_name_is_ambiguous(
    server: Hub, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "tides").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refusal("hf:org/tides", data, InputError).hint == "quill prepare hf:./org/tides"


def test_fields_are_named_if_the_text_is_elsewhere(server: Hub, data: Path) -> None:
    server.records = [{"id": 1, "content": "x", "none": None}]
    error = refusal("hf:org/tides", data, InputError)
    assert (error.why, error.hint) == ("it has 'id', 'content', 'none'", "set data.text_field=content")
    assert (
        "record 1: the field 'id' is not" in refusal("hf:org/tides", data, InputError, text_field="id").what
    )
    assert read("hf:org/tides", data, text_field="none") == []
    assert list(data.iterdir()) == []


def _error(name: str, base: type[Exception] = Exception) -> Exception:
    """An error of a class that a package declares, by its name."""
    error: Exception = type(name, (base,), {})("words of the package\nand more")
    return error


@pytest.mark.parametrize(
    ("failure", "expected", "code"),
    [
        (ConnectionError("offline mode is enabled"), ResourceError, 7),
        (TimeoutError(), ResourceError, 7),
        (_error("HfHubHTTPError"), ResourceError, 7),
        (_error("RepositoryNotFoundError", OSError), NotFoundError, 3),
        (_error("RevisionNotFoundError", OSError), NotFoundError, 3),
        (_error("GatedRepoError", OSError), NotFoundError, 3),
        (_error("DataFilesNotFoundError", FileNotFoundError), InputError, 2),
        (ValueError("BuilderConfig 'x' not found. Available: ['default']"), InputError, 2),
    ],
)
def test_failures_of_the_hub_are_plain(
    server: Hub, data: Path, failure: Exception, expected: type[QuillError], code: int
) -> None:
    server.failure = failure
    error = refusal("hf:org/tides", data, expected)
    assert error.exit_code == code
    assert "hf:org/tides" in error.what
    assert error.hint


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of files of two members of 100 characters."""
    monkeypatch.setattr(hub, "_MEMBER", 100)
    monkeypatch.setattr(hub, "_MEMBERS", 2)


@pytest.mark.usefixtures("small")
def test_a_download_that_breaks_is_resumed(server: Hub, data: Path, config: Config) -> None:
    whole = prepare(config("hf:org/tides"), data.parent / "whole")
    server.given = 0
    for server.breaks_at in (7, 60, 61, 150):
        with pytest.raises(ResourceError, match="reset"):
            prepare(config("hf:org/tides"), data)
        assert [p.name for p in data.iterdir() if not p.name.startswith(".")] == []
    server.breaks_at = -1
    dataset = prepare(config("hf:org/tides"), data)
    # What is complete is not streamed again: at most one file is, each time.
    assert 200 < server.given < 200 + 4 * 12
    assert dataset.manifest["files"] == whole.manifest["files"]
    assert list(data.glob(".tmp*")) == []


@pytest.mark.usefixtures("small")
def test_a_copy_that_is_complete_outlives_an_interruption(
    server: Hub, data: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config("hf:org/tides"), data)
    prepare(config("hf:org/tides"), data)
    assert (len(server.loaded), server.given) == (1, 200)


@pytest.mark.usefixtures("small")
def test_progress_estimates_the_total_by_the_number_of_records(server: Hub, data: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    def note(stage: str, done: int, total: int | None) -> None:
        if stage == "downloading":
            seen.append((done, total))

    with sources.find("hf:org/tides", data, on_bytes=note) as text:
        list(text.chunks("reading"))
    characters = sum(len(r["text"]) for r in RECORDS)
    assert seen[-1] == (characters, characters)
    assert all(total is not None and done <= total for done, total in seen)
    assert seen[0][1] == pytest.approx(characters, rel=0.1)


def test_without_the_package_the_hint_installs_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("hf:org/tides", data, InputError).hint == "pip install 'quill-gpt[hub]'"


@pytest.mark.usefixtures("small")
def test_the_real_package_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    repository = tmp_path / "tides"
    repository.mkdir()
    for number in range(3):
        lines = "".join(json.dumps(record) + "\n" for record in RECORDS[number::3])
        (repository / f"train-{number}.jsonl").write_text(lines)
    found = hub.find(f"hf:{repository}")
    folders = [tmp_path / "at-once", tmp_path / "resumed"]
    for folder in folders:
        folder.mkdir()
    found.copy(folders[0], "text", None)
    original = fsio.create
    for place in (3, 1, 2):
        calls = iter([*range(place), None])

        def create(path: Path, chunks: Any, calls: Any = calls) -> str:
            if next(calls) is None:
                raise KeyboardInterrupt
            return original(path, chunks)

        with monkeypatch.context() as patch:
            patch.setattr(fsio, "create", create)
            with pytest.raises(KeyboardInterrupt):
                found.copy(folders[1], "text", None)
    contents = [[path.read_bytes() for path in found.copy(f, "text", None)] for f in folders]
    assert contents[0] == contents[1]
    assert len(contents[0]) > 10


def test_the_real_package_streams_a_folder(data: Path, tmp_path: Path, config: Config) -> None:
    pytest.importorskip("datasets")
    repository = tmp_path / "tides"
    repository.mkdir()
    for split, records in (("train", RECORDS), ("test", RECORDS[:3])):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (repository / f"{split}.jsonl").write_text(lines)
    assert read(f"hf:{repository}::test", data) == [r["text"].replace("\r", "") for r in RECORDS[:3]]
    dataset = prepare(config(f"hf:{repository}"), data)
    assert dataset.manifest["source"]["documents"] == 200
    assert dataset.stamp is None
    assert list(data.glob(".tmp*")) == []
    assert "Available" in refusal(f"hf:{repository}::nonesuch", data, InputError).why
    assert "Available" in refusal(f"hf:{repository}:nonesuch", data, InputError).why
    assert refusal("hf:./nonesuch", data, NotFoundError).exit_code == 3
