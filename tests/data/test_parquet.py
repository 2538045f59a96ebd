"""Reading Parquet files, and refusing those without text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quill.data import documents, parquet, sources
from quill.errors import CorruptError, InputError, QuillError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write a table: `table("a.parquet", text=[...])`."""

    def table(name: str, /, row_group_size: int | None = None, **columns: Any) -> Path:
        path = tmp_path / name
        pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
        return path

    return table


def read(path: Path, root: Path, **settings: Any) -> list[str]:
    with sources.find(str(path), root, **settings) as text:
        return [document for chunk in text.chunks("reading", size=1) for document in chunk]


def refusal(path: Path, root: Path, error: type[QuillError] = InputError, **settings: Any) -> QuillError:
    with pytest.raises(error) as e:
        read(path, root, **settings)
    return e.value


def test_a_row_is_a_document(table: Callable[..., Path], data: Path) -> None:
    texts = ["one\r\ntwo", None, "", "é 😀 \0", *(f"document {i}" for i in range(1000))]
    path = table("a.parquet", id=range(1004), text=texts, row_group_size=300)
    with sources.find(str(path), data) as text:
        found = "\n".join(chunk.joined() for chunk in text.chunks("reading"))
        assert text.label == "a"
    assert found == "\n".join(["one\ntwo", "é 😀 \0", *texts[4:]])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_of_any_type_is_read(table: Callable[..., Path], data: Path, kind: Any) -> None:
    path = table("a.parquet", words=pa.array(["sea", "salt", "sea"]).cast(kind))
    with sources.find(str(path), data, text_field="words") as text:
        assert [list(chunk) for chunk in text.chunks("reading")] == [["sea", "salt", "sea"]]


def test_a_folder_of_parquet_files_is_read(table: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for n in (2, 1):
        table(f"corpus/{n}.parquet", text=[f"file {n}"])
    with sources.find(str(tmp_path / "corpus"), data) as text:
        assert [list(chunk) for chunk in text.chunks("reading")] == [["file 1", "file 2"]]


def test_a_missing_column_is_refused_with_those_there_are(table: Callable[..., Path], data: Path) -> None:
    error = refusal(table("a.parquet", id=[1], content=["x"]), data)
    assert error.what.endswith("a.parquet' has no column 'text'")
    assert error.why == "its columns are 'id', 'content'"
    assert error.hint == "set data.text_field=content"


def test_many_columns_are_counted(table: Callable[..., Path], data: Path) -> None:
    error = refusal(table("a.parquet", **{f"c{i}": [i] for i in range(10)}), data)
    assert error.why.endswith("'c7' and 2 more")
    assert error.hint == ""


def test_a_column_of_another_type_is_refused(table: Callable[..., Path], data: Path) -> None:
    error = refusal(table("a.parquet", text=[1, 2], body=["x", "y"]), data)
    assert error.what.endswith("the column 'text' is not text")
    assert "int64" in error.why
    assert error.hint == "set data.text_field=body"


def test_text_that_is_not_utf8_is_refused_with_its_row(table: Callable[..., Path], data: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    assert "row 2 is not UTF-8: byte 3" in refusal(table("a.parquet", text=raw), data).what


def test_damage_is_detected(table: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    raw = table("a.parquet", text=[f"{i * i}" * 20 for i in range(2000)]).read_bytes()
    for damaged in (raw[:-1], raw[:1000], b"", b"PAR1", b"text, not a table" * 10):
        path = tmp_path / "b.parquet"
        path.write_bytes(damaged)
        assert "b.parquet' is damaged" in refusal(path, data, CorruptError).what


def test_f17_a_flipped_byte_is_no_traceback(table: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    raw = table("a.parquet", text=[f"{i * i}" * 20 for i in range(2000)]).read_bytes()
    for at in range(4, len(raw), len(raw) // 60):
        flipped = bytearray(raw)
        flipped[at] ^= 0xFF
        path = tmp_path / "b.parquet"
        path.write_bytes(flipped)
        try:
            read(path, data)
        except QuillError as e:
            assert "b.parquet" in e.what


def test_compressed_parquet_is_refused(table: Callable[..., Path], data: Path) -> None:
    path = table("a.parquet", text=["x"])
    assert "while it is compressed" in refusal(path.rename(path.with_name("a.parquet.gz")), data).what


def test_without_pyarrow_the_hint_installs_it(
    table: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table("a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refusal(path, data).hint == "pip install 'quill-gpt[parquet]'"


def test_few_rows_are_decoded_at_once(table: Callable[..., Path]) -> None:
    # Equal texts would be stored once, and the size in the metadata is that of what is stored.
    path = table("a.parquet", text=[f"{i} " * 50_000 for i in range(200)], row_group_size=200)
    assert 1 <= parquet._rows(pq.read_metadata(path).row_group(0)) <= parquet._BATCH // 100_000


def test_each_row_group_has_its_own_number_of_rows(
    table: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows sorted by their length must not be decoded as if all had the mean length."""
    texts = [*(f"{i}" for i in range(20_000)), *(f"{i} " * 50_000 for i in range(40))]
    path = table("a.parquet", text=texts, row_group_size=10_000)
    most, rows = [], parquet._rows
    monkeypatch.setattr(parquet, "_rows", lambda group: most.append(rows(group)) or most[-1])
    assert list(filter(None, read(path, data))) == texts
    assert most[0] == most[1] == 256
    assert most[2] <= parquet._BATCH // 100_000


def test_the_position_in_the_file_grows(table: Callable[..., Path]) -> None:
    path = table("a.parquet", text=[f"{i * 7919}" * 200 for i in range(40_000)])
    seen = [f.position() for f in documents.read(path, name="a", encoding="utf-8", text_field="text")]
    assert seen[0] < path.stat().st_size / 2 < seen[-1] <= path.stat().st_size
