"""The process that reads an untrusted file on standard input and answers with JSON on standard output.

`sandbox` runs this file on its own, without site packages and without the rest of quill. A pickle is a
program, so three things stand between it and the computer. Its instructions are checked before any of them
runs, and only those that build plain values are allowed. The few names that a file of weights refers to
map to stand-ins that record what a tensor would be; no name is imported and nothing of torch is called.
And the process has given up memory, time, files and children by then.
`torch.load(weights_only=True)` allows more names, calls torch for each, and builds whatever tensor it is
told to, however large.

The protocol: after `READY` comes one JSON object, either {"value": ...}, with {"records": ...} next to it for
a torch file, or the reason not to read it: {"unsafe": why}, {"damaged": why}, or {"foreign": name} for a name
without a stand-in. In a value, a dict is {"map": [[key, value], ...]} and a tensor is
{"tensor": [dtype, key, numel, offset, shape, stride]}; records says for each key where its bytes are in the
file, as [start, bytes, crc32]. The parent trusts none of it.

Formats: https://docs.python.org/3/library/pickletools.html;
https://docs.pytorch.org/docs/stable/notes/serialization.html; a torch file is a zip archive whose records
are stored, not compressed, below one root folder.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from codecs import lookup
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

MOST_PICKLE_BYTES = 32 << 20
MOST_OPCODES = 2_000_000
# Of an answer, counting values and characters: a few bytes of pickle can name one list many times.
MOST_VALUES = 2_000_000
MOST_DEPTH = 32
MOST_DIRECTORY_BYTES = 16 << 20
MOST_RECORDS = 100_000
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 30
# Written before anything is read: without it the process itself failed, not the file.
READY = b"reading\n"

_PLAIN = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
))  # fmt: skip
_TORCH = _PLAIN | {
    "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_PUTS = frozenset(("BINPUT", "LONG_BINPUT"))

_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip

# Scalars of numpy by the names of their dtypes, as struct spells them.
_NUMPY_SCALARS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip

# The end of a zip archive, and a record's header up to its name (APPNOTE.TXT 4.3.16 and 4.3.7).
_END_BYTES = 22
_HEADER = struct.Struct("<26x2H")
_ENCRYPTED = 0x0041


class Refused(Exception):
    """Why a file is not read: it was made to do harm, or by some other program."""

    verdict = "unsafe"


class Damaged(Refused):
    """Why a file is not read: it is not as it was written."""

    verdict = "damaged"


class Foreign(Refused):
    """A name in a pickle that has no stand-in."""

    verdict = "foreign"


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _StandIn:
    """What a name in a pickle becomes: callable as the format calls it, and without state."""

    __slots__ = ()

    def __setstate__(self, state: object) -> NoReturn:
        raise Refused("it sets the state of a function")


class _RebuildTensor(_StandIn):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Tensor:
        if type(storage) is not _Storage or not _are_counts((offset,)) or len(rest) > 3:
            raise Refused("it makes a tensor from something that is not a storage")
        if not _are_counts(shape) or not _are_counts(stride) or len(shape) != len(stride):
            raise Refused("it makes a tensor of an invalid shape")
        return _Tensor(storage, offset, shape, stride)


class _RebuildParameter(_StandIn):
    __slots__ = ()

    def __call__(self, tensor: Any, *rest: Any) -> _Tensor:
        if type(tensor) is not _Tensor or len(rest) > 2:
            raise Refused("it makes a parameter from something that is not a tensor")
        return tensor


class _StorageType(_StandIn):
    __slots__ = ("dtype",)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class _OrderedDict(dict[Any, Any]):
    def __setstate__(self, state: object) -> None:
        """Ignore the module versions that a state dict carries."""


class _Namespace:
    """An argparse.Namespace or the like, which is read as a dict."""

    __slots__ = ("state",)

    state: dict[Any, Any]

    def __new__(cls) -> _Namespace:
        made = super().__new__(cls)
        made.state = {}
        return made

    def __setstate__(self, state: object) -> None:
        if type(state) is not dict:
            raise Refused("it sets the state of a namespace to something that is not a dict")
        self.state = state


class _EncodeLatin(_StandIn):
    """How pickles before protocol 3 write bytes."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != "latin1":
            raise Refused("it encodes something that is not text")
        return text.encode("latin1")


class _NumpyDtype:
    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or state[1:2] not in (("<",), ("|",)):
            raise Refused("it contains numpy values that are not little-endian")


class _MakeNumpyDtype(_StandIn):
    __slots__ = ()

    def __call__(self, name: Any, *rest: Any) -> _NumpyDtype:
        if type(name) is not str or name not in _NUMPY_SCALARS or len(rest) > 2:
            raise Refused("it contains numpy values that are not plain numbers")
        return _NumpyDtype(_NUMPY_SCALARS[name])


class _MakeNumpyScalar(_StandIn):
    __slots__ = ()

    def __call__(self, dtype: Any, raw: Any) -> Any:
        if type(dtype) is not _NumpyDtype or type(raw) is not bytes:
            raise Refused("it makes a numpy scalar from something that is not a number")
        return struct.unpack(f"<{dtype.code}", raw)[0]


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("argparse", "Namespace"): _Namespace,
    ("types", "SimpleNamespace"): _Namespace,
    ("_codecs", "encode"): _EncodeLatin(),
    ("numpy", "dtype"): _MakeNumpyDtype(),
    ("numpy.core.multiarray", "scalar"): _MakeNumpyScalar(),
    ("numpy._core.multiarray", "scalar"): _MakeNumpyScalar(),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", dtype): f"torch.{dtype}" for dtype in _STORAGES.values()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise Foreign(_shorten(f"{module}.{name}")) from None

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str(key), str(), int(numel)) if _are_counts((numel,)):
                return _Storage(kind.dtype, key, numel)
        raise Refused("it refers to something that is not a storage")


class _Answer:
    """A value as JSON, and the storages that its tensors refer to."""

    def __init__(self, value: Any) -> None:
        self.keys: set[str] = set()
        self._left = MOST_VALUES
        self.value = self._encode(value, 0)

    def _encode(self, value: Any, depth: int) -> Any:
        self._spend(1)
        if depth > MOST_DEPTH:
            raise Refused(f"it nests deeper than {MOST_DEPTH} levels")
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is str:
            self._spend(len(value))
            return value
        if type(value) is int:
            if not -(2**63) <= value < 2**63:
                raise Refused("it contains an integer of more than 64 bits")
            return value
        if type(value) is _Tensor:
            (dtype, key, numel), offset, shape, stride = value
            self._spend(len(key) + 2 * len(shape))
            self.keys.add(key)
            return {"tensor": [dtype, key, numel, offset, list(shape), list(stride)]}
        if type(value) in (list, tuple):
            return [self._encode(v, depth + 1) for v in value]
        if type(value) is _Namespace:
            value = value.state
        if isinstance(value, dict):
            if any(type(k) not in (str, int) for k in value):
                raise Refused("it contains a dict whose keys are neither strings nor integers")
            return {
                "map": [[self._encode(k, depth + 1), self._encode(v, depth + 1)] for k, v in value.items()]
            }
        raise Refused("it contains something that is neither a tensor nor a plain value")

    def _spend(self, n: int) -> None:
        self._left -= n
        if self._left < 0:
            raise Refused("it expands to more values than any file of weights has")


class _File(io.FileIO):
    """The untrusted file, as zipfile reads it."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Refuse a large directory, which zipfile reads in one call and unpacks to many times its size."""
        if size is not None and size > MOST_DIRECTORY_BYTES:
            most = f"at most {MOST_DIRECTORY_BYTES:,} are read"
            raise Refused(f"its directory takes {size:,} bytes; {most}")
        return super().read(size)

    def read_at(self, start: int, size: int) -> bytes:
        """Read exactly these bytes."""
        self.seek(start)
        raw = bytearray()
        while len(raw) < size:
            chunk = super().read(size - len(raw))
            if not chunk:
                raise Damaged(f"it ends at byte {start + len(raw):,}")
            raw += chunk
        return bytes(raw)


class _Archive:
    """The records of a torch file, every entry of the directory checked before any is used."""

    def __init__(self, file: _File) -> None:
        self._file = file
        size = file.seek(0, io.SEEK_END)
        # The end is where torch writes it; zipfile would search for it in whatever follows.
        if size < _END_BYTES or file.read_at(size - _END_BYTES, _END_BYTES)[:4] != b"PK\5\6":
            raise Damaged("it is cut off, or something was appended to it")
        try:
            self._zip = zipfile.ZipFile(file)
        except Refused:
            raise
        except Exception as e:
            raise Damaged(f"its directory cannot be parsed: {_shorten(str(e))}") from None
        entries = self._zip.infolist()
        if len(entries) > MOST_RECORDS:
            raise Refused(f"its directory lists {len(entries):,} records; at most {MOST_RECORDS:,} are read")
        self.records: dict[str, zipfile.ZipInfo] = {}
        self._root = entries[0].filename.partition("/")[0] if entries else ""
        for entry in entries:
            self._add(entry, size)
        # torch.serialization.set_crc32_options(False) leaves all checksums out.
        self._has_checksums = any(entry.CRC for entry in entries)
        self._refuse_overlap()

    def place(self, name: str) -> tuple[int, int, int | None]:
        """Where a record's bytes start, how many there are, and their CRC-32 if it was written."""
        if name not in self.records:
            raise Damaged(f"its record '{_shorten(name)}' is missing")
        entry = self.records[name]
        try:
            # Compares the record's own header with the directory.
            self._zip.open(entry).close()
        except Exception as e:
            raise Damaged(
                f"the header of its record '{_shorten(name)}' is wrong: {_shorten(str(e))}"
            ) from None
        header = self._file.read_at(entry.header_offset, _HEADER.size)
        start = entry.header_offset + _HEADER.size + sum(_HEADER.unpack(header))
        return start, entry.file_size, entry.CRC if self._has_checksums else None

    def read(self, name: str, most: int) -> bytes:
        """Read a small record and check its CRC-32."""
        start, size, crc = self.place(name)
        if size > most:
            raise Refused(f"its record '{name}' has {size:,} bytes; at most {most:,} are read")
        raw = self._file.read_at(start, size)
        if crc is not None and zlib.crc32(raw) != crc:
            raise Damaged(f"the checksum of its record '{name}' does not match")
        return raw

    def _add(self, entry: zipfile.ZipInfo, size: int) -> None:
        name, shown = entry.orig_filename, _shorten(entry.orig_filename)
        root, _, rest = name.partition("/")
        if not root or not rest or {"", ".", ".."} & set(name.split("/")) or {"\\", "\0", ":"} & set(name):
            raise Refused(f"it contains a record named '{shown}', which torch.save never writes")
        if root != self._root:
            raise Refused(f"it contains records in both '{_shorten(self._root)}' and '{_shorten(root)}'")
        if entry.flag_bits & _ENCRYPTED:
            raise Refused(f"its record '{shown}' is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refused(f"its record '{shown}' is compressed, and torch.save compresses nothing")
        if (
            entry.header_offset < 0
            or entry.header_offset + _HEADER.size + entry.file_size > size - _END_BYTES
        ):
            raise Damaged(
                f"its record '{shown}' should have {entry.file_size:,} bytes; the file is too short"
            )
        if rest in self.records:
            raise Refused(f"it contains the record '{shown}' twice")
        self.records[rest] = entry

    def _refuse_overlap(self) -> None:
        """Refuse records that share bytes: together they would be larger than the file."""
        end = 0
        for name, entry in sorted(self.records.items(), key=lambda item: item[1].header_offset):
            if entry.header_offset < end:
                raise Refused(f"its record '{_shorten(name)}' overlaps another")
            end = entry.header_offset + _HEADER.size + entry.file_size


def read_torch_file(file: _File) -> dict[str, Any]:
    """Read what torch.save wrote: weights and plain values.

    Raises:
        Refused: It is something else, or not safe to read.
    """
    archive = _Archive(file)
    records = archive.records
    if "data.pkl" not in records or "constants.pkl" in records:
        program = any(name.startswith("code/") for name in records)
        what = "it is a TorchScript program" if program else "it has no record data.pkl"
        raise Refused(f"{what}, so it is not a file of weights")
    if "byteorder" in records and archive.read("byteorder", 16) != b"little":
        raise Damaged("its numbers are not little-endian")
    answer = _Answer(_unpickle(archive.read("data.pkl", MOST_PICKLE_BYTES), _TORCH))
    return {"value": answer.value, "records": {key: archive.place(f"data/{key}") for key in answer.keys}}


def read_plain(file: _File) -> dict[str, Any]:
    """Read a pickle of dicts, lists, strings and integers.

    Raises:
        Refused: It contains something else.
    """
    size = file.seek(0, io.SEEK_END)
    if size > MOST_PICKLE_BYTES:
        raise Refused(f"it has {size:,} bytes; at most {MOST_PICKLE_BYTES:,} are read")
    return {"value": _Answer(_unpickle(file.read_at(0, size), _PLAIN)).value}


_READERS = {"torch": read_torch_file, "plain": read_plain}


def _unpickle(data: bytes, known: frozenset[str]) -> Any:
    try:
        _check_opcodes(data, known)
        return _Unpickler(io.BytesIO(data)).load()
    except (Refused, MemoryError):
        raise
    except Exception as e:
        # The standard library's reader fails in many ways on a broken pickle.
        raise Refused(f"it is not a valid pickle: {_shorten(str(e) or type(e).__name__)}") from None


def _check_opcodes(data: bytes, known: frozenset[str]) -> None:
    for done, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in known:
            raise Refused(f"it uses the pickle instruction {opcode.name}, which weights do not need")
        if done >= MOST_OPCODES:
            raise Refused(f"it has more than {MOST_OPCODES:,} pickle instructions")
        # The unpickler allocates memory for as many values as the highest number it is asked to remember.
        if opcode.name in _PUTS and int(argument or 0) > done:
            raise Refused("it stores a value under a number larger than the count of its values")


def _are_counts(values: Any) -> bool:
    return type(values) is tuple and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _shorten(text: str) -> str:
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _limit_resources() -> None:
    """Give up what a reader does not need; nothing gives it back to this process."""
    lookup("cp437")  # The codec of names in zip archives is a file, and none can be opened later.
    if sys.platform == "win32":
        return  # It has no such limits; those on instructions and on the time in the parent remain.
    import resource

    for name, limit in (
        ("RLIMIT_AS", MEMORY_BYTES),
        ("RLIMIT_CPU", CPU_SECONDS),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_NOFILE", 3),
    ):
        # Not every system has each of them, and macOS refuses some.
        with suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def main() -> None:
    """Read the file on standard input, as the kind that the only argument names."""
    _limit_resources()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    try:
        answer = json.dumps(_READERS[sys.argv[1]](_File(sys.stdin.fileno(), closefd=False)))
    except Refused as e:
        answer = json.dumps({e.verdict: str(e)})
    except MemoryError:
        answer = json.dumps({"unsafe": f"it needs more than {MEMORY_BYTES >> 20} MiB to be read"})
    sys.stdout.write(answer)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
