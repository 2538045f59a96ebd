"""A stream into ids: cut, split and threaded, it is the ids of the whole text; and it stays a stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill.data import documents, encode, sources
from quill.data.sources import Block
from quill.tokenizers.char import CharTokenizer
from quill.tokenizers.word import WordTokenizer

pieces = st.lists(st.text(alphabet="ab \n。é", max_size=12), min_size=1, max_size=4)
blocks = st.lists(pieces.map(Block), max_size=8)


def joined(stream: list[Block]) -> str:
    """The text of a stream with a newline between documents."""
    return "".join("\n".join(block) for block in stream)


class Words(WordTokenizer):
    """Words with a token between documents."""

    eot_id = 1_000_000

    @property
    def vocab_size(self) -> int:
        return 1_000_001


TEXT = "ab aab abba b a\n\nab。é aé " * 40
WORDS = WordTokenizer.train([TEXT])
PARTED = Words(list("ab \n。é"), ["aab", "abba", "ab", "\n\n"])


@given(stream=blocks, size=st.integers(1, 20))
def test_units_are_the_stream_cut_at_boundaries(stream: list[Block], size: int) -> None:
    for tokenizer in (WORDS, CharTokenizer.train([TEXT])):
        units = list(encode.units(iter(stream), tokenizer.boundary, joined=True, size=size))
        ids = [i for unit in units for part in unit if part is not None for i in tokenizer.encode(part)]
        assert ids == tokenizer.encode(joined(stream))
        assert not any(part is None for unit in units for part in unit)


@given(stream=blocks, size=st.integers(1, 20), workers=st.integers(1, 3))
def test_documents_are_parted_by_the_end_of_text_token(stream: list[Block], size: int, workers: int) -> None:
    found = encode.encode(iter(stream), PARTED, workers=workers, size=size)
    ids = [int(i) for array in found for i in array]
    wanted: list[int] = []
    document = ""
    for block in stream:
        document += block[0]
        for piece in block[1:]:
            wanted += [*PARTED.encode(document), PARTED.eot_id]
            document = piece
    assert ids == wanted + PARTED.encode(document)


@given(size=st.integers(10, 200))
def test_a_text_without_a_boundary_is_cut_all_the_same(size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "LONGEST", 400)
        units = list(encode.units(iter([Block(["a" * 999])] * 2), WORDS.boundary, joined=True, size=size))
    assert "".join(part or "" for unit in units for part in unit) == "a" * 1998
    assert max(len(part or "") for unit in units for part in unit) <= 400 + size


@given(stream=blocks, at=st.integers(0, 100))
def test_a_reading_is_dealt_out_at_the_character(stream: list[Block], at: int, tmp_path_factory: Any) -> None:
    class Given(sources.Text):
        def blocks(self, stage: str, size: int = documents.BUFFER) -> Iterator[Block]:
            yield from stream

    whole = joined(stream)
    at = min(at, len(whole))
    reading = encode.Reading(Given("x", ("x",), (), ()), at, "encoding")
    first, second = joined(list(reading.first())), joined(list(reading.second()))
    assert (first, second) == (whole[:at], whole[at:])
    assert reading.bytes == [len(first.encode()), len(second.encode())]
    assert reading.sha256 == encode.hashlib.sha256(whole.encode()).hexdigest()


def test_a_stream_is_never_held_whole() -> None:
    pulled = 0

    def endless() -> Iterator[Block]:
        nonlocal pulled
        while True:
            pulled += 1
            yield Block([TEXT])

    stream = encode.encode(endless(), WORDS, workers=2, size=100)
    for _ in range(20):
        next(stream)
    # Twenty units and those in the threads' hands, some ten of them to a block.
    assert pulled < 10
    stream.close()


def test_an_error_in_a_thread_comes_out(text: str) -> None:
    tokenizer = CharTokenizer.train([text])
    with pytest.raises(Exception, match="unknown character"):
        list(encode.encode(iter([Block([text + "é"])]), tokenizer, workers=2, size=64))
    assert not [t for t in threading.enumerate() if t.name.startswith("encode")]


def test_workers_do_not_change_ids(text: str) -> None:
    def ids(workers: int, size: int) -> list[int]:
        stream = encode.encode(iter([Block([text])] * 2), WORDS, workers=workers, size=size)
        return [int(i) for array in stream for i in array]

    assert ids(1, 50) == ids(4, 50) == ids(2, 10_000)


def test_processors_are_those_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert encode.processors() == 3
    monkeypatch.delattr(encode.os, "sched_getaffinity")
    monkeypatch.setattr(encode.os, "cpu_count", lambda: 7)
    assert encode.processors() == 7


def test_memory_does_not_grow_with_the_text(tmp_path: Path, write: Callable[..., Path]) -> None:
    resource = pytest.importorskip("resource")
    import subprocess
    import sys

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
