"""The safetensors format: what is written reads back, elsewhere too, and what lies is refused at once."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quill import fsio
from quill.checkpoint import weights as tensors
from quill.errors import CorruptError

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
}


def read(path):
    with fsio.open_plain(path) as file:
        return tensors.read_layout(file, path.stat().st_size, path)


def read_values(path):
    return dict(tensors.views(read(path), bytearray(path.read_bytes())))


def raw(header, payload=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_is_written_reads_back(tmp_path):
    path = tmp_path / "x.safetensors"
    said = tensors.write(path, VALUES)
    assert said == {"bytes": path.stat().st_size, "sha256": fsio.sha256(path)}
    found = read_values(path)
    assert set(found) == set(VALUES)
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_the_formats_own_library_agrees_both_ways(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x.safetensors"
    tensors.write(path, VALUES)
    theirs = library.load_file(path)
    assert set(theirs) == set(VALUES)
    assert all(torch.equal(theirs[n], v) for n, v in VALUES.items())
    library.save_file({n: v.contiguous() for n, v in VALUES.items()}, path, metadata={"format": "pt"})
    ours = read_values(path)
    assert all(torch.equal(ours[n], v) for n, v in VALUES.items())


def test_tensors_start_at_a_multiple_of_their_width(tmp_path):
    tensors.write(tmp_path / "x", VALUES)
    assert all(t.start % tensors.SIZES[t.dtype] == 0 for t in read(tmp_path / "x").values())


def test_a_file_that_does_not_align_its_tensors_reads_as_well(tmp_path):
    header = {"odd": entry("U8", (1,), (0, 1)), "w": entry("F32", (2,), (1, 9))}
    (tmp_path / "x").write_bytes(raw(header, b"\x01" + torch.tensor([1.5, 2.5]).numpy().tobytes()))
    assert read_values(tmp_path / "x")["w"].tolist() == [1.5, 2.5]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
GOOD = raw({"a": entry()}, bytes(8))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (GOOD[:7], "7 bytes"),
        (GOOD[:20], "cut off in its header"),
        (GOOD[:-1], "cut off at"),
        (GOOD + b"x", "1 byte follow"),
        (bytes(1000), "only zeros"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"\n <HTML><body>", "web page"),
        (LFS, "Git LFS pointer"),
        (b'{"error": "not found"}', "no safetensors file"),
        (raw(b"[1, 2]"), "no JSON object"),
        (raw(b"{nonsense"), "not JSON"),
        (raw(b'{"a":' + b"[" * 50000), "nests too deep"),
        (raw(b'{"a": "\xff"}'), "not UTF-8"),
    ],
)
def test_f1_each_kind_of_wrong_file_has_its_reason(tmp_path, content, why):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        read(path)
    assert why in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_f1_an_lfs_pointer_has_a_hint(tmp_path):
    (tmp_path / "x").write_bytes(LFS)
    with pytest.raises(CorruptError) as caught:
        read(tmp_path / "x")
    assert "lfs pull" in caught.value.hint


BIG = 2**62
HOSTILE = {
    "header of 2^63": ((2**63).to_bytes(8, "little") + b"{}" * 50, "would be"),
    "header of 2^64-1": (b"\xff" * 8 + b"{}" * 50, "would be"),
    "header above 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}" * 50, "would be"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "overlaps"),
    "same place twice": (raw({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "hole"),
    "hole at the start": (raw({"a": entry(offsets=(4, 12))}, bytes(12)), "hole"),
    "shape overflow": (raw({"a": entry(shape=(BIG, 4, BIG))}, bytes(8)), "takes"),
    "shape that wraps around": (raw({"a": entry(shape=(2**63 - 1, 2**63 - 1, 2))}, bytes(8)), "takes"),
    "shape beyond 64 bits": (raw({"a": entry(shape=(2**64 + 2,))}, bytes(8)), "shape"),
    "many dimensions": (raw({"a": entry(shape=(1,) * 100000)}, bytes(8)), "shape"),
    "negative shape": (raw({"a": entry(shape=(-2,))}, bytes(8)), "shape"),
    "shape of a float": (raw({"a": entry(shape=(2.0,))}, bytes(8)), "shape"),
    "shape of a bool": (raw({"a": entry(shape=(True, 2))}, bytes(8)), "shape"),
    "offsets backwards": (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "lies at"),
    "offsets negative": (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "lies at"),
    "offsets huge": (raw({"a": entry(shape=(BIG,), offsets=(0, BIG * 4))}, bytes(8)), "lies at"),
    "beyond the file": (raw({"a": entry(shape=(BIG // 8,), offsets=(0, BIG // 2))}, bytes(8)), "cut off"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "lies at"),
    "bad dtype": (raw({"a": entry("F31")}, bytes(8)), "type 'F31'"),
    "dtype of another kind": (raw({"a": entry(["F32"])}, bytes(8)), "type"),
    "entry that is none": (raw({"a": [1, 2]}, bytes(8)), "dtype, shape and data_offsets"),
    "entry with more": (raw({"a": entry() | {"x": 1}}, bytes(8)), "dtype, shape and data_offsets"),
    "the same name twice": (raw(b'{"a": {}, "a": {}}'), "twice"),
    "metadata that is none": (raw({"__metadata__": 3, "a": entry()}, bytes(8)), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_f2_a_header_that_lies_is_refused_at_once(tmp_path, name):
    content, why = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CorruptError) as caught:
        read(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert why in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert caught.value.exit_code == 5
    assert seconds < 1
    assert peak < 50e6


@given(position=st.integers(0, 100), value=st.integers(0, 255), cut=st.integers(0, 120))
@hypothesis_settings(max_examples=200, deadline=None)
def test_no_bytes_make_it_stumble(tmp_path_factory, position, value, cut):
    content = bytearray(GOOD[: len(GOOD) - cut % len(GOOD)])
    content[position % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    try:
        layout = read(path)
    except CorruptError:
        return
    assert all(t.end <= len(content) for t in layout.values())
    dict(tensors.views(layout, content))
