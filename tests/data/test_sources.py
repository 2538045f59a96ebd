"""Reading text in all its forms, and refusing what is not text with line or offset."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quill.data import documents, sources
from quill.errors import CorruptError, InputError, NotFoundError, QuillError, ResourceError

Write = Callable[..., Path]


def read(source: Any, root: Path, **settings: Any) -> list[str]:
    """Return the documents of a source."""
    with sources.find(str(source) if isinstance(source, Path) else source, root, **settings) as text:
        found = [""]
        for chunk in text.chunks("reading"):
            assert chunk.utf8() == "\n".join(chunk).encode()
            found[-1] += chunk[0]
            found += chunk[1:]
    return found


def refusal(source: Any, root: Path, error: type[QuillError] = InputError, **settings: Any) -> QuillError:
    with pytest.raises(error) as e:
        read(source, root, **settings)
    return e.value


# Finding text


def test_a_file_is_one_document(write: Write, data: Path, text: str) -> None:
    assert read(write("a.txt"), data) == [text]
    assert read(write("no-suffix"), data) == [text]


def test_a_folder_is_its_text_files_sorted_by_path(write: Write, data: Path, tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.txt.gz", "image.png", ".hidden.txt", ".git/x.txt", "c.jsonl"):
        content: Any = name
        if name.endswith(".gz"):
            content = gzip.compress(name.encode())
        if name.endswith(".jsonl"):
            content = '{"text": "c.jsonl"}\n'
        write(f"corpus/{name}", content)
    assert read(tmp_path / "corpus", data) == ["a/y.txt.gz", "a/z.md", "b.txt", "c.jsonl"]


def test_f17_a_folder_without_text_is_refused(write: Write, data: Path, tmp_path: Path) -> None:
    write("pictures/image.png")
    assert ".txt" in refusal(tmp_path / "pictures", data).why


def test_a_glob_is_its_files_sorted_by_name(write: Write, data: Path, tmp_path: Path) -> None:
    for name in ("g/2.txt", "g/1.txt", "g/deep/3.txt", "g/4.log"):
        write(name, name)
    assert read(f"{tmp_path}/g/*.txt", data) == ["g/1.txt", "g/2.txt"]
    assert read(f"{tmp_path}/g/**/*.txt", data) == ["g/1.txt", "g/2.txt", "g/deep/3.txt"]
    assert refusal(f"{tmp_path}/g/*.nonesuch", data, NotFoundError).exit_code == 3


def test_an_existing_file_is_never_taken_for_a_glob(write: Write, data: Path) -> None:
    assert read(write("what[1].txt", "itself"), data) == ["itself"]


def test_an_existing_folder_is_never_taken_for_a_glob(write: Write, data: Path, tmp_path: Path) -> None:
    write("d[1]/a.txt", "in d[1]")
    write("d1/a.txt", "in d1")
    for source in ("d[1]", "d[1]/*.txt", "d[1]/**/*.txt"):
        assert read(f"{tmp_path}/{source}", data) == ["in d[1]"]
    assert read(f"{tmp_path}/d[0-9]/*.txt", data) == ["in d1"]


def test_files_with_brackets_have_names_of_their_own(write: Write) -> None:
    labels = [sources._label(str(write(f"notes[{n}].txt"))) for n in (1, 2)]
    assert labels == ["notes-1", "notes-2"]


def test_several_sources_keep_their_order(write: Write, data: Path) -> None:
    assert read([str(write("b.txt", "bee")), str(write("a.txt", "ay"))], data) == ["bee", "ay"]


def test_f17_a_missing_file_is_not_found(data: Path, tmp_path: Path) -> None:
    error = refusal(tmp_path / "nonesuch.txt", data, NotFoundError)
    assert error.exit_code == 3
    assert "nonesuch.txt" in error.what


def test_f17_an_unreadable_path_is_refused(data: Path, tmp_path: Path) -> None:
    refusal("a\0b", data)
    refusal("a" * 5000, data, ResourceError)


def test_f17_a_device_is_refused(data: Path) -> None:
    assert "device" in refusal("/dev/zero", data).why


def test_standard_input_is_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("piped: é\r\n".encode())))
    with sources.find("-", data) as text:
        assert [list(text.chunks("reading")) for _ in range(2)] == [[["piped: é\n"]]] * 2
        assert text.label == "stdin"
        assert text.stamp() is None
    assert os.listdir(data) == []


def test_errors_name_standard_input(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "'standard input' is not UTF-8: byte 3 is 0xe9" in refusal("-", data).what


def test_f36_closed_standard_input_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "closed" in refusal("-", data).what


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_f17_a_fifo_is_copied_and_can_be_read_twice(data: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(b"through the pipe",))
    writer.start()
    with sources.find(str(fifo), data) as text:
        assert [list(text.chunks("reading")) for _ in range(2)] == [[["through the pipe"]]] * 2
    writer.join()


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("-", "stdin"),
        ("shakespeare", "shakespeare"),
        ("dir/My Novel.txt", "my-novel"),
        ("dir/web.jsonl.gz", "web"),
        ("dir/a..b.txt", "a.b"),
        ("corpus/*.txt", "corpus"),
        ("corpus/**/part-*/*.md", "corpus"),
        ("corpus/", "corpus"),
        ("你好.txt", "text"),
        ("x" * 100 + ".txt", "x" * 48),
        ("v1.5.txt", "v1.5"),
    ],
)
def test_a_dataset_is_named_after_its_source(source: str, label: str) -> None:
    assert sources._label(source) == label


# Text files


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_f17_line_ends_become_newlines(write: Write, data: Path, ends: str) -> None:
    assert read(write("a.txt", f"one{ends}{ends}two{ends}"), data) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_f10_a_byte_order_mark_is_dropped(write: Write, data: Path, encoding: str) -> None:
    raw = "\ufeffwörd\ufeff".encode(encoding.removesuffix("-sig"))
    assert read(write("a.txt", raw), data, encoding=encoding) == ["wörd\ufeff"]


@pytest.mark.parametrize(
    "encoding", ["cp1252", "latin-1", "shift_jis", "gb18030", "utf-16", "utf-7", "koi8-r"]
)
def test_other_encodings_are_read_when_named(write: Write, data: Path, encoding: str) -> None:
    text = {"shift_jis": "日本語", "gb18030": "你好😀", "koi8-r": "Привет"}.get(encoding, "café") * 3
    assert read(write("a.txt", text.encode(encoding)), data, encoding=encoding) == [text]


@pytest.mark.parametrize("encoding", ["nonesuch", "rot13", "base64", "hex", ""])
def test_an_unknown_encoding_is_refused(write: Write, data: Path, encoding: str) -> None:
    assert "utf-8" in refusal(write("a.txt"), data, encoding=encoding).hint


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"ok\xff", "byte 2 is 0xff"),
        (b"caf\xe9 au lait", "byte 3 is 0xe9"),
        ("é".encode() + b"\x80", "byte 2 is 0x80"),
        (b"cut \xe4\xbd", "byte 4 is 0xe4"),
        (b"surrogate \xed\xa0\x80", "byte 10 is 0xed"),
        (b"\xef\xbb\xbfmark \xff", "byte 8 is 0xff"),
        (b"nul\0", "byte 3 is a NUL"),
        (b"\xef\xbb\xbfmark \0", "byte 8 is a NUL"),
        ("é\r\n\0".encode(), "byte 4 is a NUL"),
    ],
)
def test_f17_text_that_is_not_utf8_is_refused_with_the_offset(
    write: Write, data: Path, raw: bytes, place: str
) -> None:
    error = refusal(write("a.txt", raw), data)
    assert error.exit_code == 2
    assert place in error.what
    assert "data.encoding" in error.hint


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 4097, 9000])
def test_f17_the_offset_is_right_across_buffers(
    write: Write, data: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BUFFER", 4096)
    good = ("é" * 10_000).encode()
    at -= at % 2
    for bad, said in ((b"\xff", "0xff"), (b"\0", "a NUL")):
        path = write("a.txt", good[:at] + bad + good[at:])
        assert f"byte {at:,} is {said}" in refusal(path, data).what


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("buffer", [4, 4096])
def test_offsets_count_the_byte_order_mark(
    write: Write, data: Path, encoding: str, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BUFFER", buffer)
    path = write("a.txt", "abcdefgh\0x".encode(encoding))
    error = refusal(path, data, encoding=encoding)
    assert f"byte {len('abcdefgh'.encode(encoding))} is a NUL" in error.what
    assert error.hint == ("set data.encoding=utf-16" if encoding == "utf-32" else "")


def test_json_lines_count_the_byte_order_mark(write: Write, data: Path) -> None:
    mark = codecs.BOM_UTF8
    first = mark + b'{"text": "caf\xe9 and more"}\n{"text": "plain"}\n'
    assert "line 1 is not UTF-8: byte 16 is 0xe9" in refusal(write("a.jsonl", first), data).what
    second = mark + b'{"text": "plain"}\n{"text": "caf\xe9"}\n'
    assert "line 2 is not UTF-8: byte 34 is 0xe9" in refusal(write("b.jsonl", second), data).what


def test_f17_utf16_is_recognised(write: Write, data: Path) -> None:
    error = refusal(write("a.txt", "text".encode("utf-16")), data)
    assert error.hint == "set data.encoding=utf-16"
    assert "utf-16" in refusal(write("b.txt", "text".encode("utf-16-le")), data).hint


def test_f17_a_nul_in_utf16_has_the_right_offset(write: Write, data: Path) -> None:
    assert "byte 4 is a NUL" in refusal(write("a.txt", "a\0b".encode("utf-16")), data, encoding="utf-16").what


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60),
        st.text(alphabet="\r\né\ufeffa", max_size=30),
    ),
    buffer=st.integers(1, 9),
)
def test_the_buffer_size_does_not_change_the_text(text: str, buffer: int, write: Write, data: Path) -> None:
    """The text is what Python's text mode reads, for any buffer size."""
    path = write("a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BUFFER", buffer)
        patch.setattr(sources.Text.chunks, "__defaults__", (buffer,))
        found = "".join(read(path, data))
    with open(path, encoding="utf-8-sig") as file:
        assert found == file.read()


# Compression


def zst(raw: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(raw)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".zst", zst), (".xz", lzma.compress), (".bz2", bz2.compress)],
)
class TestCompressed:
    def test_it_is_read(
        self, suffix: str, compress: Callable[[bytes], bytes], write: Write, data: Path
    ) -> None:
        text = "".join(f"{i} lines, " for i in range(300_000))
        raw = compress(text[:70_000].encode()) + compress(text[70_000:].encode())
        for name in ("a.txt", "a.md", "a"):
            assert read(write(name + suffix, raw), data) == [text]

    def test_json_lines_in_it_are_read(
        self, suffix: str, compress: Callable[[bytes], bytes], write: Write, data: Path
    ) -> None:
        raw = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(1000)).encode()
        assert read(write(f"a.jsonl{suffix}", compress(raw)), data) == [f"line {i}" for i in range(1000)]

    def test_damage_is_detected(
        self, suffix: str, compress: Callable[[bytes], bytes], write: Write, data: Path
    ) -> None:
        raw = compress(os.urandom(50_000).hex().encode())
        flipped = bytearray(raw)
        flipped[1000] ^= 0xFF
        for damaged in (
            raw[:-1],
            raw[:1000],
            raw[:3],
            b"not compressed at all",
            raw + raw[:2000],
            bytes(flipped),
        ):
            error = refusal(write(f"a.txt{suffix}", damaged), data, QuillError)
            assert isinstance(error, CorruptError | InputError)
            assert "a.txt" in error.what

    def test_a_bomb_is_read_in_bounded_memory(
        self, suffix: str, compress: Callable[[bytes], bytes], write: Write, data: Path
    ) -> None:
        path = write(f"a.txt{suffix}", compress(b" " * 100_000_000))
        with sources.find(str(path), data) as text:
            longest = max(len(chunk[0]) for chunk in text.chunks("reading"))
        assert longest <= 2 * documents.BUFFER


def test_without_zstandard_the_hint_installs_it(
    write: Write, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert refusal(write("a.txt.zst", b""), data).hint == "pip install 'quill-gpt[zst]'"


# JSON lines


def test_a_json_line_is_a_document(write: Write, data: Path) -> None:
    lines = '{"text": "one\\r\\ntwo", "id": 1}\n\n{"id": 2, "text": "é 😀 \\u00e9\\u0000"}\n{"text": ""}\n'
    assert read(write("a.jsonl", lines), data) == ["one\ntwo", "é 😀 é\0"]
    assert read(write("b.jsonl", lines.rstrip("\n")), data) == ["one\ntwo", "é 😀 é\0"]
    assert read(write("c.jsonl", "\ufeff" + lines.replace("\n", "\r\n")), data) == ["one\ntwo", "é 😀 é\0"]


def test_the_text_field_can_be_named(write: Write, data: Path) -> None:
    assert read(write("a.jsonl", '{"content": "here"}\n'), data, text_field="content") == ["here"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 2 has a number that is too long"),
        (b'"text"', "line 2 is not a JSON object"),
        (b'{"body": "x"}', "line 2 has no field 'text'"),
        (b'{"text": 7}', "line 2: the field 'text' is not a string"),
        (b'{"text": "caf\xe9"}', "line 2 is not UTF-8: byte 30 is 0xe9"),
        (b'{"text": "\\ud800"}', "line 2: the field 'text' contains U+D800"),
    ],
)
def test_f17_a_bad_json_line_is_refused_with_its_number(
    write: Write, data: Path, line: bytes, said: str
) -> None:
    error = refusal(write("a.jsonl", b'{"text": "fine"}\n' + line + b"\n"), data)
    assert said in error.what


@pytest.mark.parametrize(
    "record",
    [
        {f"key{i}": i for i in range(300_000)},
        {"k" * 300_000: 1},
        {"text": {"a": "x" * 300_000}},
        {"text": list(range(300_000))},
        {"text": 10**4000},
        {"text": None, "k" * 100: "x" * 300_000},
    ],
)
def test_messages_about_a_huge_json_line_are_short(write: Write, data: Path, record: Any) -> None:
    error = refusal(write("a.jsonl", json.dumps(record)), data)
    assert max(len(error.why), len(error.hint), len(error.what) - len(str(data))) < 250


def test_the_hint_names_a_field_with_text(write: Write, data: Path) -> None:
    error = refusal(write("a.jsonl", '{"id": 1, "body": "here"}\n'), data)
    assert error.hint == "set data.text_field=body"


def test_an_endless_json_line_is_refused(write: Write, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_LINE", 1000)
    assert "line 1 is longer" in refusal(write("a.jsonl", '{"text": "' + "a" * 5000), data).what


# Progress and change


def test_progress_goes_up_to_the_size(write: Write, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BUFFER", 1000)
    files = [str(write(f"{i}.txt", "word " * 900)) for i in range(3)]
    seen: list[tuple[str, int, int | None]] = []
    with sources.find(files, data, on_bytes=lambda *told: seen.append(told)) as text:
        assert sum(1 for _ in text.chunks("reading", size=1000)) > 3
    done = [n for _, n, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == ("reading", 13_500, 13_500)


def test_a_redirected_file_has_a_known_size(
    write: Write, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.txt", "word " * 900)
    seen: list[tuple[str, int, int | None]] = []
    with open(path) as file:
        monkeypatch.setattr(sys, "stdin", file)
        with sources.find("-", data, on_bytes=lambda *told: seen.append(told)):
            assert seen == [("receiving", 4500, 4500)]


def test_f18_a_file_that_changes_while_being_read_is_refused(write: Write, data: Path) -> None:
    path = write("a.txt")
    with sources.find(str(path), data) as text:
        path.write_text("another text")
        with pytest.raises(InputError, match=r"a\.txt' changed while reading"):
            list(text.chunks("reading"))
        path.unlink()
        with pytest.raises(QuillError):
            list(text.chunks("reading"))


def test_a_stamp_is_trusted_only_once_the_file_has_settled(
    write: Write, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.txt")
    with sources.find(str(path), data) as text:
        assert text.stamp() is None
        now = sources.time.time()
        monkeypatch.setattr(sources.time, "time", lambda: now + 60)
        before = text.stamp()
    assert before is not None
    path.write_text("another text")
    with sources.find(str(path), data) as text:
        assert text.stamp() not in (None, before)


def test_each_codec_has_one_name() -> None:
    assert documents.codec("UTF8") == documents.codec("utf-8-sig") == "utf-8"
    assert codecs.lookup(documents.codec("Windows-1252")).name == "cp1252"
