"""Encoding a stream: cut, split and threaded, it gives the ids of the whole text in constant memory."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill.data import documents, encode, sources
from quill.data.sources import Chunk
from quill.tokenizers.char import CharTokenizer
from quill.tokenizers.word import WordTokenizer

fragments = st.lists(st.text(alphabet="ab \n。é", max_size=12), min_size=1, max_size=4)
streams = st.lists(fragments.map(Chunk), max_size=8)


def joined(stream: list[Chunk]) -> str:
    """Return the text of a stream, with a newline between documents."""
    return "".join(chunk.joined() for chunk in stream)


class WordsWithEnd(WordTokenizer):
    """A word tokenizer with a token between documents."""

    eot_id = 1_000_000

    @property
    def vocab_size(self) -> int:
        return 1_000_001


TEXT = "ab aab abba b a\n\nab。é aé " * 40
WORDS = WordTokenizer.train([TEXT])
WITH_END = WordsWithEnd(list("ab \n。é"), ["aab", "abba", "ab", "\n\n"])


@given(stream=streams, size=st.integers(1, 20))
def test_tasks_are_the_stream_cut_at_boundaries(stream: list[Chunk], size: int) -> None:
    for tokenizer in (WORDS, CharTokenizer.train([TEXT])):
        tasks = list(encode.tasks(iter(stream), tokenizer.boundary, joined=True, size=size))
        assert not any(text is None for task in tasks for text in task)
        ids = [i for task in tasks for text in task for i in tokenizer.encode(text or "")]
        assert ids == tokenizer.encode(joined(stream))


@given(stream=streams, size=st.integers(1, 20), workers=st.integers(1, 3))
def test_the_end_of_text_token_separates_documents(stream: list[Chunk], size: int, workers: int) -> None:
    found = encode.encode(iter(stream), WITH_END, workers=workers, size=size)
    ids = [int(i) for array in found for i in array]
    expected: list[int] = []
    document = ""
    for chunk in stream:
        document += chunk[0]
        for fragment in chunk[1:]:
            expected += [*WITH_END.encode(document), WITH_END.eot_id]
            document = fragment
    assert ids == expected + WITH_END.encode(document)


@given(size=st.integers(10, 200))
def test_text_without_a_boundary_is_cut_anyway(size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "LONGEST", 400)
        chunks = iter([Chunk(["a" * 999])] * 2)
        texts = [
            text or ""
            for task in encode.tasks(chunks, WORDS.boundary, joined=True, size=size)
            for text in task
        ]
    assert "".join(texts) == "a" * 1998
    assert max(map(len, texts)) <= 400 + size


@given(stream=streams, at=st.integers(0, 100))
def test_a_reading_is_split_at_the_character(stream: list[Chunk], at: int) -> None:
    class Given(sources.Text):
        def chunks(self, stage: str, size: int = documents.BUFFER) -> Iterator[Chunk]:
            yield from stream

    whole = joined(stream)
    at = min(at, len(whole))
    reading = encode.Reading(Given("x", ("x",), (), ()), at, "encoding")
    first, second = joined(list(reading.first())), joined(list(reading.second()))
    assert (first, second) == (whole[:at], whole[at:])
    assert reading.sha256 == hashlib.sha256(whole.encode()).hexdigest()


def test_a_stream_is_read_only_as_far_as_needed() -> None:
    pulled = 0

    def endless() -> Iterator[Chunk]:
        nonlocal pulled
        while True:
            pulled += 1
            yield Chunk([TEXT])

    stream = encode.encode(endless(), WORDS, workers=2, size=100)
    for _ in range(20):
        next(stream)
    # Twenty tasks and those that threads work on, about ten to a chunk.
    assert pulled < 10
    stream.close()


def test_an_error_in_a_thread_is_raised(text: str) -> None:
    tokenizer = CharTokenizer.train([text])
    with pytest.raises(Exception, match="unknown character"):
        list(encode.encode(iter([Chunk([text + "é"])]), tokenizer, workers=2, size=64))
    assert not [t for t in threading.enumerate() if t.name.startswith("encode")]


def test_ids_do_not_depend_on_workers_and_size(text: str) -> None:
    def ids(workers: int, size: int) -> list[int]:
        stream = encode.encode(iter([Chunk([text])] * 2), WORDS, workers=workers, size=size)
        return [int(i) for array in stream for i in array]

    assert ids(1, 50) == ids(4, 50) == ids(2, 10_000)


def test_processors_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert encode.processors() == 3
    monkeypatch.delattr(encode.os, "sched_getaffinity")
    monkeypatch.setattr(encode.os, "cpu_count", lambda: 7)
    assert encode.processors() == 7


def test_memory_does_not_grow_with_the_text(tmp_path: Path, write: Callable[..., Path]) -> None:
    resource: Any = pytest.importorskip("resource")
    import subprocess

    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from quill.config.settings import DataConfig\n"
        "from quill.data.prepare import prepare\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "small, large, root = sys.argv[1:]\n"
        "prepare(DataConfig(source=small), Path(root)); before = peak()\n"
        "prepare(DataConfig(source=large), Path(root)); print(peak() - before)\n"
    )
    small = write("small.txt", "Ein größerer Text, Zeile um Zeile.\n" * 250_000)
    large = write("large.txt", "Ein noch größerer Text, Zeile um Zeile.\n" * 800_000)
    assert resource
    done = subprocess.run(
        [sys.executable, "-c", code, str(small), str(large), str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=True,
    )
    # Kilobytes, or bytes on a Mac; 9 MB of text against 34 MB.
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 20_000_000
