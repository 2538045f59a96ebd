"""Torch files and pickles: reading one returns plain values or refuses it, and never runs anything."""

from __future__ import annotations

import argparse
import codecs
import io
import json
import os
import pickle
import random
import shlex
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quill.errors import CorruptError, ResourceError
from quill.formats.torch_files import child, sandbox
from quill.formats.torch_files.sandbox import read_plain
from quill.formats.torch_files.torch_file import Stored, TorchFile

REBUILD = torch._utils._rebuild_tensor_v2


class Storage:
    """A persistent id, as torch.save refers to a storage."""

    def __init__(self, numel: Any, key: Any = "0", kind: Any = torch.FloatStorage, tag: Any = "storage"):
        self.id = (tag, kind, key, "cpu", numel)


class Call:
    """Pickles as a function call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class _Pickler(pickle._Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, Storage) else None


def pickled(value: Any) -> bytes:
    out = io.BytesIO()
    _Pickler(out, 2).dump(value)
    return out.getvalue()


def zipped(path: Path, data: bytes | Any, records: dict[str, bytes] | None = None, **how: Any) -> Path:
    """A file with the layout of torch.save."""
    data = data if isinstance(data, bytes) else pickled(data)
    with zipfile.ZipFile(path, "w", how.get("method", zipfile.ZIP_STORED)) as out:
        for name, raw in {"data.pkl": data, "byteorder": b"little", **(records or {})}.items():
            out.writestr(f"archive/{name}", raw)
    return path


def tensor(shape: Any, stride: Any, numel: Any = 4, offset: Any = 0, **storage: Any) -> Call:
    return Call(REBUILD, Storage(numel, **storage), offset, shape, stride, False, OrderedDict())


def refused(path: Path) -> CorruptError:
    began = time.monotonic()
    with pytest.raises(CorruptError) as caught:
        TorchFile(path)
    assert caught.value.exit_code == 5
    assert time.monotonic() - began < 30
    return caught.value


def loaded(value: Any, checkpoint: TorchFile) -> Any:
    if isinstance(value, dict):
        return {k: loaded(v, checkpoint) for k, v in value.items()}
    if isinstance(value, list):
        return [loaded(v, checkpoint) for v in value]
    return checkpoint.tensor(value) if isinstance(value, Stored) else value


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and bool((ours == theirs).all())
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def everything() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Embedding(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model[0](torch.randn(2, 4)).sum().backward()
    optimizer.step()
    table = torch.randn(5, 7)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [table, table.t(), table[1:3, ::2], table[:, 3], table[2, 2], table.clone().half()],
        "types": [torch.arange(6).view(2, 3).to(t) for t in (torch.bfloat16, torch.int64, torch.bool)],
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
        "plain": [None, True, False, 0, -1, 2**40, -(2**63), 1.5, float("inf"), "ünd 😀", "", (1, "a")],
        3: {"lone": "\ud800"},
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_torch_file_reads_as_torch_reads_it(tmp_path, protocol):
    path, value = tmp_path / "a.pt", everything()
    torch.save(value, path, pickle_protocol=protocol)
    checkpoint = TorchFile(path)
    assert same(loaded(checkpoint.value, checkpoint), value)
    stored = checkpoint.value["views"]
    assert stored[0].record == stored[1].record != stored[5].record


NUMBERS = [
    kind(n)
    for kind in (
        np.float64,
        np.float32,
        np.float16,
        np.int64,
        np.int32,
        np.int16,
        np.int8,
        np.uint8,
        np.uint32,
    )
    for n in (0, 1, 100)
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_scalars_and_namespaces_are_read_as_plain_values(tmp_path, protocol):
    path = tmp_path / "a.pt"
    inner = types.SimpleNamespace(seed=np.int64(-3))
    value = {"numbers": NUMBERS, "flag": np.bool_(True), "args": argparse.Namespace(lr=0.5, inner=inner)}
    torch.save(value, path, pickle_protocol=protocol)
    found = TorchFile(path).value
    assert found["numbers"] == NUMBERS
    assert {type(n) for n in found["numbers"]} == {int, float}
    assert found["flag"] is True
    assert found["args"] == {"lr": 0.5, "inner": {"seed": -3}}


@pytest.mark.parametrize("value", [np.zeros(3), np.complex64(1), np.str_("x"), np.datetime64("2020-01-01")])
def test_other_numpy_values_are_refused(value, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": value}, path)
    assert "numpy" in refused(path).why


def test_the_hint_for_a_careless_checkpoint_loads_nothing(tmp_path):
    """A malicious file may name a harmless object first, so no command to load it is ever offered."""
    path = tmp_path / "it's mine.pt"
    torch.save({"w": torch.arange(3.0), "sizes": np.arange(3), "out": Path("out"), "n": 3}, path)
    error = refused(path)
    assert "pathlib" in error.why or "numpy" in error.why
    assert "torch.save(model.state_dict(), path)" in error.hint
    assert "load(" not in error.hint


def test_f44_no_hint_advises_to_load_a_malicious_file(tmp_path):
    for function in (os.system, eval, subprocess.Popen):
        assert not refused(zipped(tmp_path / "a.pt", Call(function, "true"))).hint


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(100)}, path)
    before = path.read_bytes()
    checkpoint = TorchFile(path)
    checkpoint.tensor(checkpoint.value["w"]).fill_(1)
    assert path.read_bytes() == before
    assert not checkpoint.tensor(checkpoint.value["w"]).any()


def test_an_unaligned_storage_is_read(tmp_path):
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    for odd in range(4):
        path = zipped(
            tmp_path / f"{odd}.pt", {"w": tensor((4,), (1,))}, {"x" * (odd + 1): b"", "data/0": numbers}
        )
        checkpoint = TorchFile(path)
        assert checkpoint.tensor(checkpoint.value["w"]).tolist() == [1, 2, 3, 4]


def test_a_flipped_bit_in_a_weight_is_damage(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.full((1000,), 7.25)}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(struct.pack("<f", 7.25)) + 400] ^= 1
    path.write_bytes(raw)
    checkpoint = TorchFile(path)
    with pytest.raises(CorruptError, match="damaged") as caught:
        checkpoint.verify(checkpoint.value)
    assert "checksum" in caught.value.why


def test_a_file_without_checksums_is_read(tmp_path):
    path, before = tmp_path / "a.pt", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(5.0)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    checkpoint = TorchFile(path)
    checkpoint.verify(checkpoint.value)
    assert checkpoint.tensor(checkpoint.value["w"]).tolist() == [0, 1, 2, 3, 4]


def test_a_file_that_shrinks_while_it_is_read_is_damaged(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(100_000)}, path)
    checkpoint = TorchFile(path)
    os.truncate(path, 5000)
    with pytest.raises(CorruptError, match="damaged"):
        checkpoint.verify(checkpoint.value)
    with pytest.raises(CorruptError, match="damaged"):
        checkpoint.tensor(checkpoint.value["w"])


# What a malicious file may try; each is called with the path of a file that must not be created.
CALLS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"open({mark!r}, 'w')"),
    "open": lambda mark: Call(open, mark, "w"),
    "subprocess": lambda mark: Call(subprocess.Popen, ["touch", mark]),
    "getattr": lambda mark: Call(getattr, Call(__import__, "os"), "system"),
    "torch.load": lambda mark: Call(torch.load, mark),
    "torch.storage from_file": lambda mark: Call(torch.FloatStorage, mark, True, 100),
    "a storage of a terabyte": lambda mark: Call(torch.FloatStorage, 2**38),
    "bytearray": lambda mark: Call(bytearray, 2**40),
    "a tensor without a storage": lambda mark: Call(REBUILD, mark, 0, (1,), (1,), False, OrderedDict()),
    "a negative shape": lambda mark: tensor((-1, 4), (1, 1)),
    "a negative stride": lambda mark: tensor((4,), (-1,)),
    "a negative offset": lambda mark: tensor((1,), (1,), offset=-1),
    "a shape of text": lambda mark: tensor(("4",), (1,)),
    "a shape of lists": lambda mark: tensor([4], [1]),
    "a shape and a longer stride": lambda mark: tensor((2, 2), (1,)),
    "a shape of booleans": lambda mark: tensor((True, True), (1, 1)),
    "backward hooks": lambda mark: Call(REBUILD, Storage(4), 0, (4,), (1,), False, OrderedDict(), {}, {}),
    "a parameter of nothing": lambda mark: Call(torch._utils._rebuild_parameter, mark, True, OrderedDict()),
    "a sparse tensor": lambda mark: Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, (1, 2)),
    "a module": lambda mark: Storage(4, tag="module"),
    "a storage of the wrong class": lambda mark: Storage(4, kind=OrderedDict),
    "a storage of negative size": lambda mark: tensor((1,), (1,), numel=-1),
    "a storage outside the archive": lambda mark: tensor((4,), (1,), key="../../etc/passwd"),
    "a call inside a dict": lambda mark: Call(OrderedDict, [[Call(os.system, f"touch {mark}"), 1]]),
    "a number of 3000 bits": lambda mark: 7**1000,
    "bytes": lambda mark: b"touch",
    "a namespace in a namespace's place": lambda mark: Call(argparse.Namespace, mark),
    "a numpy scalar of no dtype": lambda mark: Call(np.float64(1).__reduce__()[0], mark, b"12345678"),
    "a numpy scalar of too few bytes": lambda mark: Call(np.float64(1).__reduce__()[0], np.dtype("f8"), b"1"),
    "a numpy scalar of objects": lambda mark: Call(np.float64(1).__reduce__()[0], np.dtype("O"), b"12345678"),
    "an unusual encoding": lambda mark: Call(codecs.encode, "text", "idna"),
    "a set": lambda mark: {1, 2},
    "a dict with keys of tuples": lambda mark: {(1, 2): 3},
}


@pytest.mark.parametrize("name", CALLS)
def test_f44_a_pickle_cannot_call_anything(name, tmp_path):
    mark = tmp_path / "mark"
    path = zipped(tmp_path / "a.pt", {"w": CALLS[name](str(mark))}, {"data/0": bytes(16)})
    before = sorted(os.listdir(tmp_path))
    error = refused(path)
    assert error.why
    assert sorted(os.listdir(tmp_path)) == before


def test_f44_a_known_name_has_no_state_to_set(tmp_path):
    raw = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb."
    assert "state" in refused(zipped(tmp_path / "a.pt", raw)).why
    raw = b"\x80\x02ccollections\nOrderedDict\n}X\x03\x00\x00\x00popK\x01sb."
    refused(zipped(tmp_path / "b.pt", raw))


def test_f44_the_refusal_names_the_function(tmp_path):
    assert "posix.system" in refused(zipped(tmp_path / "a.pt", Call(os.system, "true"))).why
    hidden = b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."
    assert "os.system" in refused(zipped(tmp_path / "b.pt", hidden)).why


@pytest.mark.parametrize("protocol", range(6))
def test_f44_a_bare_pickle_is_refused(tmp_path, protocol):
    path, mark = tmp_path / "a.pt", tmp_path / "mark"
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {mark}"), protocol))
    assert "pickle" in refused(path).why
    assert not mark.exists()


def test_f44_the_format_before_2020_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    error = refused(path)
    assert "before 2020" in error.why
    subprocess.run([sys.executable, *shlex.split(error.hint)[1:]], check=True, timeout=60)
    assert TorchFile(tmp_path / "a-plain.pt").value["w"].shape == (3,)


def test_f44_a_torchscript_program_is_refused(tmp_path):
    path = zipped(tmp_path / "a.pt", {}, {"code/__torch__.py": b"", "constants.pkl": b""})
    assert "TorchScript" in refused(path).why


LIMITED = """
import importlib.util, os, socket, sys
spec = importlib.util.spec_from_file_location("child", sys.argv[1])
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
child._limit_resources()
attempts = [
    lambda: open("/etc/passwd"), lambda: open("/tmp/quill-test", "w"), lambda: os.open("/", 0), os.pipe,
    socket.socket, lambda: bytearray(2 << 30),
]
for attempt in attempts:
    try:
        attempt()
    except (OSError, MemoryError):
        print("no")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="not every system has all of these limits")
def test_f44_the_reader_can_neither_open_files_nor_take_much_memory():
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LIMITED, child.__file__],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["no"] * 6, done.stderr


# Archives that torch.save does not write, and a word of the reason.
def _compressed(path: Path) -> Path:
    return zipped(path, {"w": tensor((4,), (1,))}, {"data/0": bytes(16)}, method=zipfile.ZIP_DEFLATED)


def _named(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        with zipfile.ZipFile(zipped(path, {}), "a") as out:
            out.writestr(zipfile.ZipInfo(name), b"x")
        return path

    return make


def _twice(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("archive/data.pkl", pickled({}))
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("archive/data.pkl", pickled({"other": 1}))
    return path


def _appended(path: Path, raw: bytes) -> Path:
    zipped(path, {})
    with open(path, "ab") as file:
        file.write(raw)
    return path


def _patched(change: Callable[[bytearray, int], None]) -> Callable[[Path], Path]:
    """A valid archive whose directory's first entry is changed."""

    def make(path: Path) -> Path:
        raw = bytearray(zipped(path, {"w": tensor((4,), (1,))}, {"data/0": bytes(16)}).read_bytes())
        change(raw, raw.index(b"PK\1\2"))
        path.write_bytes(raw)
        return path

    return make


def _put(offset: int, form: str, value: int) -> Callable[[bytearray, int], None]:
    return lambda raw, at: struct.pack_into(form, raw, at + offset, value)


def _local_name(raw: bytearray, at: int) -> None:
    raw[raw.index(b"archive/data.pkl")] ^= 1


def _overlapping(raw: bytearray, at: int) -> None:
    """Let the second entry start where the first does."""
    second = raw.index(b"PK\1\2", at + 4)
    raw[second + 42 : second + 46] = raw[at + 42 : at + 46]


ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "compressed": (_compressed, "compressed"),
    "up": (_named("archive/../../x"), "named"),
    "absolute": (_named("/etc/x"), "named"),
    "drive": (_named("archive/C:x"), "named"),
    "backslash": (_patched(lambda raw, at: raw.__setitem__(at + 46 + 7, 0x5C)), "named"),
    "folder": (_named("archive/data/"), "named"),
    "no root": (_named("x"), "named"),
    "two roots": (_named("other/x"), "in both"),
    "a NUL": (_patched(lambda raw, at: raw.__setitem__(at + 46 + 12, 0)), "named"),
    "twice": (_twice, "twice"),
    "encrypted": (_patched(_put(8, "<H", 1)), "encrypted"),
    "larger than the file": (_patched(_put(20, "<Q", 0x7F0000007F000000)), "too short"),
    "two sizes": (_patched(_put(24, "<I", 5)), "compressed"),
    "no ZIP64 size": (_patched(_put(24, "<I", 0xFFFFFFFF)), "compressed"),
    "no header": (_patched(_put(42, "<I", 3)), "header"),
    "another name in the header": (_patched(_local_name), "header"),
    "overlapping": (_patched(_overlapping), "overlaps another"),
    "another checksum": (_patched(_put(16, "<I", 1)), "checksum"),
    "a long name": (_patched(_put(28, "<H", 60000)), "named"),
    "appended bytes": (lambda path: _appended(path, b"x"), "appended"),
    "a second end": (lambda path: _appended(path, b"PK\5\6" + bytes(18)), "data.pkl"),
    "no pickle": (lambda path: zipped(path, b""), "pickle"),
    "big-endian": (lambda path: zipped(path, {}, {"byteorder": b"big"}), "endian"),
    "no data.pkl": (_patched(lambda raw, at: raw.__setitem__(at + 46 + 15, 0x6D)), "data.pkl"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_f45_an_archive_that_torch_does_not_write_is_refused(name, tmp_path):
    make, word = ARCHIVES[name]
    error = refused(make(tmp_path / "a.pt"))
    assert word in error.why
    assert os.listdir(tmp_path) == ["a.pt"]


def _directory_of(count: int, claimed: int, path: Path) -> Path:
    entry = (
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *([0] * 4), *([0] * 3), 9, *([0] * 4), 0, 0)
        + b"archive/x"
    )
    with open(path, "wb") as file:
        file.write(b"PK\3\4" + bytes(100))
        start = file.tell()
        for _ in range(0, count, 10_000):
            file.write(entry * 10_000)
        size = file.tell() - start
        end64 = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, claimed, claimed, size, start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end64, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *([0xFFFF] * 2), *([0xFFFFFFFF] * 2), 0))
    return path


@pytest.mark.parametrize("claimed", [1_000_000, 10, 2**63])
def test_f45_a_huge_directory_is_refused_before_it_is_parsed(tmp_path, claimed):
    path = _directory_of(1_000_000, claimed, tmp_path / "a.pt")
    began = time.monotonic()
    assert f"{child.MOST_DIRECTORY_BYTES:,}" in refused(path).why
    assert time.monotonic() - began < 0.5


def test_f45_a_directory_of_many_records_is_refused(tmp_path):
    path = _directory_of(child.MOST_DIRECTORY_BYTES // 64, 2**63, tmp_path / "a.pt")
    assert f"at most {child.MOST_RECORDS:,}" in refused(path).why


VIEWS: dict[str, Any] = {
    "expanded to a terabyte": tensor((2**19, 2**19), (0, 0), numel=1),
    "expanded": tensor((2,), (0,), numel=1),
    "beyond its storage": tensor((5,), (1,), numel=4),
    "strided beyond its storage": tensor((2, 2), (3, 1), numel=4),
    "from beyond its storage": tensor((1,), (1,), numel=4, offset=4),
    "of more dimensions than numbers": tensor((1,) * 64, (1,) * 64, numel=4),
    "of a size that overflows": tensor((2**40, 2**40), (1, 1), numel=4),
    "overlapping": tensor((3, 3), (1, 1), numel=4),
}


@pytest.mark.parametrize("name", VIEWS)
def test_f45_a_tensor_larger_than_its_bytes_is_refused(name, tmp_path):
    numel = VIEWS[name].call[1][0].id[4]
    error = refused(zipped(tmp_path / "a.pt", {"w": VIEWS[name]}, {"data/0": bytes(4 * numel)}))
    assert "tensor" in error.why


def test_f45_a_storage_of_another_size_than_its_record_is_refused(tmp_path):
    for numel in (0, 3, 5, 2**60):
        path = zipped(tmp_path / "a.pt", {"w": tensor((1,), (1,), numel=numel)}, {"data/0": bytes(16)})
        assert "its record has 16 bytes" in refused(path).why
    assert (
        "record 'data/1'"
        in refused(zipped(path, {"w": tensor((1,), (1,), key="1")}, {"data/0": bytes(16)})).why
    )


def test_f45_many_views_of_one_storage_are_counted(tmp_path):
    n = 1000
    views = [tensor((n - i,), (1,), numel=n, offset=i) for i in range(n)]
    error = refused(zipped(tmp_path / "a.pt", views, {"data/0": bytes(4 * n)}))
    assert "2,002,000 bytes" in error.why
    # The same view by many names is one: tied weights.
    tied = {f"w{i}": tensor((n,), (1,), numel=n) for i in range(n)}
    assert len(TorchFile(zipped(tmp_path / "b.pt", tied, {"data/0": bytes(4 * n)})).value) == n


def _nested_lists() -> bytes:
    """A few hundred bytes that expand to 10**30 values."""
    level = b"]" + b"K\x01a" * 10
    raw = b"\x80\x02" + level + b"q\x00"
    for i in range(1, 31):
        raw += b"](" + bytes([0x68, i - 1]) * 10 + b"eq" + bytes([i])
    return raw + b"."


BOMBS: dict[str, Callable[[], bytes]] = {
    "a memo of 2**32": lambda: b"\x80\x02Nr\xff\xff\xff\xff.",
    "a frame of 2**62": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a text of 2**62": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "bytes of 2**40": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "lists in lists": lambda: b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "tuples in tuples": lambda: b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "a key of tuples in tuples": lambda: b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "lists of the same lists": _nested_lists,
    "a text many times": lambda: b"\x80\x02](X\0\0\x10\0" + b"x" * (1 << 20) + b"q\0" + b"h\0" * 9999 + b"e.",
    "endless instructions": lambda: b"\x80\x02]" + b"](ea" * 520_000 + b".",
    "larger than any": lambda: b"\x80\x02X" + struct.pack("<I", 33 << 20) + bytes(33 << 20) + b".",
    "an extension": lambda: b"\x80\x02\x82\x01.",
    "nothing on the stack": lambda: b"\x80\x02R.",
    "a mark too few": lambda: b"\x80\x02e.",
    "no end": lambda: b"\x80\x02N",
    "a protocol of the future": lambda: b"\x80\xffN.",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["checkpoint", "plain"])
@pytest.mark.parametrize("name", BOMBS)
def test_f45_a_pickle_bomb_is_refused(name, kind, tmp_path):
    raw = BOMBS[name]()
    if kind == "checkpoint":
        refused(zipped(tmp_path / "a.pt", raw))
        return
    path = tmp_path / "meta.pkl"
    path.write_bytes(raw)
    with pytest.raises(CorruptError):
        read_plain(path)


MEASURE = """
import json, resource, sys
from pathlib import Path
from quill.errors import CorruptError
from quill.formats.torch_files.torch_file import TorchFile
def peak():
    # Unlike ru_maxrss, this does not begin with what the process that started this one had.
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
for name in sys.argv[1:]:
    try: TorchFile(Path(name))
    except CorruptError: continue
    sys.exit(name + " was read")
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([peak() - before, children, "torch" in sys.modules]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units elsewhere")
def test_f45_memory_and_time_stay_bounded_for_every_file(tmp_path):
    files = [zipped(tmp_path / f"bomb{i}.pt", make()) for i, make in enumerate(BOMBS.values())]
    files += [
        zipped(tmp_path / f"view{i}.pt", {"w": v}, {"data/0": bytes(4 * v.call[1][0].id[4])})
        for i, v in enumerate(VIEWS.values())
    ]
    for entries in (1_000_000, child.MOST_DIRECTORY_BYTES // 64):
        files.append(_directory_of(entries, entries, tmp_path / f"directory{entries}.pt"))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, files)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, childs, with_torch = json.loads(done.stdout)
    assert ours < 64 << 10, f"{ours:,} KiB more here"
    assert childs < 512 << 10, f"{childs:,} KiB there"
    assert not with_torch
    assert time.monotonic() - began < 120


def test_a_damaged_file_is_refused_or_reads_as_plain_values(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(8.0), "n": 3, "t": [1.5, "x"]}, path)
    whole, dice = path.read_bytes(), random.Random(5)
    ends = sorted({0, 1, 3, 21, 22, len(whole) - 1, len(whole) - 22, *dice.choices(range(len(whole)), k=12)})
    for end in ends:
        path.write_bytes(whole[:end])
        refused(path)
    for at in dice.sample(range(len(whole)), 25):
        raw = bytearray(whole)
        raw[at] ^= 1 << dice.randrange(8)
        path.write_bytes(raw)
        try:
            checkpoint = TorchFile(path)
            loaded(checkpoint.value, checkpoint)
        except CorruptError:
            continue
        assert len(raw) == len(whole)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "empty"),
        (bytes(4096), "zeros"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "LFS"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"PK\3\4", "cut off"),
        (b"PK\5\6" + bytes(18), "not a file of torch.save"),
        (b"a model, honestly", "not a file of torch.save"),
    ],
)
def test_f45_the_refusal_says_what_the_file_is(raw, word, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(raw)
    assert word in refused(path).why


def test_a_pickle_of_random_damage_is_refused_or_reads_as_plain_values(tmp_path):
    """The zip archive around it is valid, so that damage reaches the unpickler."""
    dice, valid = (
        random.Random(6),
        pickled({"w": tensor((4,), (1,)), "n": [1, 2.5, "x"], "args": {"lr": 0.1}}),
    )
    for _ in range(40):
        raw = bytearray(valid)
        for at in dice.choices(range(len(raw)), k=dice.choice((1, 3))):
            raw[at] = dice.choice((dice.randrange(256), dice.randrange(0x28, 0x98)))
        path = zipped(tmp_path / "a.pt", bytes(raw), {"data/0": bytes(16)})
        try:
            file = TorchFile(path)
            loaded(file.value, file)
        except CorruptError as e:
            assert e.why


def test_devices_and_folders_are_refused_and_links_are_followed(tmp_path):
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "folder.pt").mkdir()
    for path in (tmp_path / "fifo.pt", tmp_path / "folder.pt", Path("/dev/zero"), tmp_path / "missing.pt"):
        refused(path)
    torch.save({"n": 1}, tmp_path / "a.pt")
    (tmp_path / "link.pt").symlink_to("a.pt")
    assert TorchFile(tmp_path / "link.pt").value == {"n": 1}


META = {"vocab_size": 2, "itos": {0: "\n", 1: "ß"}, "stoi": {"\n": 0, "ß": 1}}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_read_as_they_were_written(tmp_path, protocol):
    path = tmp_path / "meta.pkl"
    for value in (META, {}, [1, [2, "x"], {"a": [-5]}], 7, "text"):
        path.write_bytes(pickle.dumps(value, protocol))
        assert read_plain(path) == value


@pytest.mark.parametrize(
    "value",
    [None, True, 1.5, (1, 2), {1, 2}, b"x", {"a": None}, OrderedDict(a=1), print, 2**64, {(1,): 2}],
    ids=repr,
)
def test_f44_anything_else_in_a_plain_pickle_is_refused(value, tmp_path):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(value, 4))
    with pytest.raises(CorruptError, match="not safe"):
        read_plain(path)


@pytest.mark.parametrize("name", ["os.system", "eval", "open", "subprocess"])
def test_f44_a_plain_pickle_cannot_call_anything(name, tmp_path):
    path, mark = tmp_path / "meta.pkl", tmp_path / "mark"
    for protocol in range(6):
        path.write_bytes(pickle.dumps({"itos": CALLS[name](str(mark))}, protocol))
        with pytest.raises(CorruptError):
            read_plain(path)
    assert os.listdir(tmp_path) == ["meta.pkl"]


def test_a_reader_that_cannot_start_is_not_the_fault_of_the_file(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.pt", {})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ResourceError, match="cannot read"):
        TorchFile(path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ResourceError) as caught:
        TorchFile(path)
    assert "before reading" in caught.value.why


def test_a_reader_that_takes_too_long_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 0.001)
    assert "seconds" in refused(zipped(tmp_path / "a.pt", {})).why


def test_the_reader_ignores_the_environment_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "json.py"))
    monkeypatch.chdir(tmp_path)
    assert TorchFile(zipped(tmp_path / "a.pt", {"n": 1})).value == {"n": 1}
    assert not (tmp_path / "mark").exists()
