"""Safetensors files: tensors read back equal, disk faults are reported, and lying headers are refused."""

from __future__ import annotations

import errno
import json
import os
import time
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quill import fsio
from quill.checkpoint.weights import read_tensors, save_tensors, stream_tensors
from quill.errors import CorruptError, QuillError, ResourceError
from quill.registry.files import OpenFile
from quill.registry.tensors import ITEM_BYTES, MAX_HEADER_BYTES, read_layout

VALUES = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c.half": torch.ones(3, dtype=torch.float16),
    "step": torch.tensor(7),
    "rng": torch.arange(5, dtype=torch.uint8),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "double": torch.tensor([[1.0]], dtype=torch.float64),
    "strided": torch.arange(12.0).reshape(3, 4).t(),
    "expanded": torch.tensor([2.5]).expand(4),
}


def read(path: Path, listed: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    with OpenFile(path, listed) as file:
        return read_tensors(file, read_layout(path))


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value)


def raw(header: Any, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_read_back_equal(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", VALUES)
    assert_equal(read(tmp_path / "x"), VALUES)
    listed = {"bytes": (tmp_path / "x").stat().st_size, "sha256": fsio.sha256(tmp_path / "x")}
    assert_equal(read(tmp_path / "x", listed), VALUES)


def test_no_tensors_read_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {})
    assert read(tmp_path / "x") == {}


def test_the_layout_says_where_each_tensor_is(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", VALUES)
    layout, content = read_layout(tmp_path / "x"), (tmp_path / "x").read_bytes()
    assert list(layout) == sorted(layout, key=lambda n: layout[n].start)
    assert max(t.end for t in layout.values()) == len(content)
    for name, value in VALUES.items():
        start, end = layout[name].start, layout[name].end
        assert layout[name].shape == tuple(value.shape)
        assert start % ITEM_BYTES[layout[name].dtype] == 0
        flat = value.contiguous().reshape(-1).view(torch.uint8)
        assert content[start:end] == flat.numpy().tobytes()


def test_files_of_the_library_itself_are_read(tmp_path: Path) -> None:
    plain = {name: value.contiguous() for name, value in VALUES.items()}
    safetensors.torch.save_file(plain, tmp_path / "x")
    assert_equal(read(tmp_path / "x"), VALUES)
    save_tensors(tmp_path / "y", VALUES)
    assert_equal(safetensors.torch.load_file(tmp_path / "y"), VALUES)


def test_streamed_weights_are_the_file_that_the_library_writes(tmp_path: Path) -> None:
    weights = {
        "wte.weight": torch.randn(5, 3),
        "ü": torch.randn(7).bfloat16(),
        "b": torch.randn(3, 2, 2).half(),
        "a": torch.randn(4, 6).t(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
    }
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in weights.items()}
    stream_tensors(tmp_path / "streamed", layout, weights)
    plain = {name: t.contiguous() for name, t in weights.items()}
    safetensors.torch.save_file(plain, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "library").read_bytes()


def test_streaming_reads_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Lazy(dict[str, Any]):
        def __getitem__(self, name: str) -> torch.Tensor:
            nonlocal most
            most = max(most, sum(r() is not None for r in alive))
            made = torch.zeros(1000)
            alive.append(weakref.ref(made))
            return made

    names = [f"h.{i}" for i in range(20)]
    layout = dict.fromkeys(names, (torch.float32, (1000,)))
    stream_tensors(tmp_path / "streamed", layout, Lazy(dict.fromkeys(names)))
    assert len(alive) == 20
    assert most <= 1


def test_tensors_that_share_memory_are_saved_each_for_itself(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    shared = {"all": base, "again": base, "start": base[:6], "end": base[6:], "view": base.view(3, 4)}
    save_tensors(tmp_path / "x", shared)
    assert_equal(read(tmp_path / "x"), shared)
    assert base.tolist() == list(range(12))


def test_a_file_whose_tensors_are_not_aligned_is_read(tmp_path: Path) -> None:
    header = {"odd": entry("U8", (1,), (0, 1)), "w": entry("F32", (2,), (1, 9))}
    (tmp_path / "x").write_bytes(raw(header, b"\x01" + torch.tensor([1.5, 2.5]).numpy().tobytes()))
    assert read(tmp_path / "x")["w"].tolist() == [1.5, 2.5]


def test_f3_any_flipped_bit_is_found(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"w": torch.ones(3)})
    content = (tmp_path / "x").read_bytes()
    listed = {"bytes": len(content), "sha256": fsio.sha256(tmp_path / "x")}
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(CorruptError):
            read(tmp_path / "x", listed)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_f26_f27_errors_of_the_disk_are_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        message = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
        raise safetensors.SafetensorError(message)

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(ResourceError) as caught, fsio.stage(tmp_path / "x") as place:
        save_tensors(place, VALUES)
    assert caught.value.why == fsio.failures.REASONS[number][0]
    assert os.listdir(tmp_path) == []


def test_f26_a_full_disk_is_noticed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(100, 95, 5))
    with pytest.raises(ResourceError, match="not enough disk"):
        save_tensors(tmp_path / "x", VALUES)
    assert os.listdir(tmp_path) == []


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.ones(1000), "b": torch.ones(1000)})
    layout = read_layout(tmp_path / "x")
    with OpenFile(tmp_path / "x", None) as file:
        os.truncate(tmp_path / "x", 3000)
        with pytest.raises(CorruptError, match=r"changed while it was being read|damaged"):
            read_tensors(file, layout)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
GOOD = raw({"a": entry()}, bytes(8))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (GOOD[:7], "7 bytes"),
        (GOOD[:20], "header"),
        (GOOD[:-1], "cut short"),
        (GOOD + b"x", "appended to"),
        (bytes(1000), "only zeros"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n <HTML><body>", "web page"),
        (LFS, "Git LFS pointer"),
        (b'{"error": "not found"}', "not a safetensors file"),
        (raw(b"[1, 2]"), "not a valid safetensors file"),
        (raw(b"{nonsense"), "invalid JSON"),
        (raw(b'{"a":' + b"[" * 50000), "recursion limit"),
        (raw(b'{"a": "\xff"}'), "invalid UTF-8"),
    ],
)
def test_f1_each_kind_of_wrong_file_has_its_reason(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        read_layout(path)
    assert why in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_f1_an_lfs_pointer_has_a_hint(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(LFS)
    with pytest.raises(CorruptError) as caught:
        read_layout(tmp_path / "x")
    assert "lfs pull" in caught.value.hint


BIG = 2**62
DUPLICATE = json.dumps({"a": entry()})[:-1] + f', "a": {json.dumps(entry(offsets=(8, 16)))}}}'
HOSTILE = {
    "header of 2^63": ((2**63).to_bytes(8, "little") + b"{}" * 50, "header would take"),
    "header of 2^64-1": (b"\xff" * 8 + b"{}" * 50, "header would take"),
    "header above 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}" * 50, "header would take"),
    "header above the limit": (raw(b"{" + b" " * MAX_HEADER_BYTES + b"}"), "header would take"),
    "header beyond the file": ((500).to_bytes(8, "little") + b"{}" * 50, "header"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "offset"),
    "same place twice": (raw({"a": entry(), "b": entry()}, bytes(8)), "offset"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "offset"),
    "hole at the start": (raw({"a": entry(offsets=(4, 12))}, bytes(12)), "offset"),
    "shape overflow": (raw({"a": entry(shape=(BIG, 4, BIG))}, bytes(8)), "overflow"),
    "shape that wraps around": (raw({"a": entry(shape=(2**63 - 1, 2**63 - 1, 2))}, bytes(8)), "overflow"),
    "shape beyond 64 bits": (raw({"a": entry(shape=(2**64 + 2,))}, bytes(8)), "expected usize"),
    "shape of another size": (raw({"a": entry(shape=(3,))}, bytes(8)), "invalid shape"),
    "many dimensions": (raw({"a": entry(shape=(1,) * 100000)}, bytes(8)), "invalid shape"),
    "many dimensions that fit": (raw({"a": entry(shape=(1,) * 100000 + (2,))}, bytes(8)), "100,001 dim"),
    "negative shape": (raw({"a": entry(shape=(-2,))}, bytes(8)), "expected usize"),
    "shape of a float": (raw({"a": entry(shape=(2.0,))}, bytes(8)), "expected usize"),
    "shape of a bool": (raw({"a": entry(shape=(True, 2))}, bytes(8)), "expected usize"),
    "offsets backwards": (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "offset"),
    "offsets negative": (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "expected usize"),
    "offsets huge": (raw({"a": entry(shape=(BIG,), offsets=(0, BIG * 4))}, bytes(8)), "expected usize"),
    "beyond the file": (raw({"a": entry(shape=(BIG // 64,), offsets=(0, BIG // 16))}, bytes(8)), "cut short"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "invalid length 3"),
    "bad dtype": (raw({"a": entry("F31")}, bytes(8)), "`F31`"),
    "dtype that quill does not read": (raw({"a": entry("F8_E4M3", (8,))}, bytes(8)), "dtype F8_E4M3"),
    "dtype of another kind": (raw({"a": entry(["F32"])}, bytes(8)), "invalid type"),
    "entry that is none": (raw({"a": [1, 2]}, bytes(8)), "invalid type"),
    "entry with less": (raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "missing field"),
    "the same name twice": (raw(DUPLICATE.encode(), bytes(16)), "offset"),
    "metadata that is none": (raw({"__metadata__": 3, "a": entry()}, bytes(8)), "expected a map"),
    "a name that never ends": (raw({"a" * 3_000_000: entry(offsets=(4, 12))}, bytes(12)), "offset"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_f2_a_header_that_lies_is_refused_at_once(tmp_path: Path, name: str) -> None:
    content, why = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(CorruptError) as caught:
        read_layout(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert caught.value.exit_code == 5
    assert seconds < 1
    assert peak < 50e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak of memory from")
def test_f2_the_largest_header_that_is_read_costs_little_memory(tmp_path: Path) -> None:
    """Of the whole process, since the library allocates past Python."""
    import subprocess
    import sys

    count = MAX_HEADER_BYTES // 80
    header = {f"{i:08}": entry(offsets=(8 * i, 8 * i + 8)) for i in range(count)}
    header[f"{count:08}"] = entry(offsets=(0, 8))
    content = raw(header, bytes(8 * count))
    assert 0.8 * MAX_HEADER_BYTES < len(content) - 8 * count < MAX_HEADER_BYTES
    (tmp_path / "x").write_bytes(content)
    code = (
        "import re, sys; from pathlib import Path; import safetensors, numpy;"
        "from quill.errors import CorruptError; from quill.registry.tensors import read_layout;"
        "gauge = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]);"
        "before = gauge()\n"
        "try: read_layout(Path(sys.argv[1]))\n"
        "except CorruptError as e: print(gauge() - before, e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True
    )
    assert 1000 * int(done.stdout.split()[0]) < 50e6, done.stdout


@given(position=st.integers(0, 100), value=st.integers(0, 255), cut=st.integers(0, 120))
@hypothesis_settings(max_examples=200, deadline=None)
def test_no_bytes_make_it_stumble(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    content = bytearray(GOOD[: len(GOOD) - cut % len(GOOD)])
    content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    try:
        layout = read_layout(path)
    except QuillError as e:
        assert isinstance(e, CorruptError)
        return
    assert all(t.end <= len(content) for t in layout.values())
    read(path)
