"""The process that reads a foreign pickle: its bytes come in, plain JSON goes out, and it can do no more.

Run as a file of its own, without site packages and without the rest of quill, by `_pickles`. A pickle is a
program, so three things stand between it and the machine. Its instructions are looked through before
any is followed, and only those that build plain values are known here. The few names that a file of weights
refers to stand for functions of this module that only note down what a tensor would be; nothing of torch
is ever called, no name is ever imported. And the process has given up memory, time, files and children
by then. `torch.load(weights_only=True)` knows more names, calls torch for each, and builds whatever
tensor it is told to, however large.

Format: https://docs.python.org/3/library/pickletools.html; how torch uses it:
https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import sys
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

MOST_BYTES = 32 << 20
MOST_OPCODES = 2_000_000
# What the answer may hold, a value or a character each: a few bytes of pickle can name one list many times.
MOST_VALUES = 2_000_000
MOST_DEPTH = 32
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 30
# Sent before anything is read: without it the process itself failed, not the pickle.
READY = b"reading\n"

_PLAIN = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
))  # fmt: skip
_CHECKPOINT = _PLAIN | {
    "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
}  # fmt: skip
_KINDS = {"plain": _PLAIN, "checkpoint": _CHECKPOINT}
_PUTS = frozenset(("BINPUT", "LONG_BINPUT"))

_STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


class Refused(Exception):
    """Why a pickle is not read."""


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
    """What a pickle gets for a name: it can be called as the file format has it, and has no state."""

    __slots__ = ()

    def __setstate__(self, state: object) -> NoReturn:
        raise Refused("it gives a function a state")


class _RebuildTensor(_StandIn):
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Tensor:
        if type(storage) is not _Storage or not _counts((offset,)) or len(rest) > 3:
            raise Refused("it makes a tensor of something that is no storage")
        if not _counts(shape) or not _counts(stride) or len(shape) != len(stride):
            raise Refused("it makes a tensor of a shape that is none")
        return _Tensor(storage, offset, shape, stride)


class _RebuildParameter(_StandIn):
    __slots__ = ()

    def __call__(self, tensor: Any, *rest: Any) -> _Tensor:
        if type(tensor) is not _Tensor or len(rest) > 2:
            raise Refused("it makes a parameter of something that is no tensor")
        return tensor


class _Dtype(_StandIn):
    """A storage's class."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _OrderedDict(dict[Any, Any]):
    def __setstate__(self, state: object) -> None:
        """A state dict carries the versions of its modules; they say nothing about weights."""


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): _Dtype(dtype) for name, dtype in _STORAGES.items()},
    **{("torch", dtype): f"torch.{dtype}" for dtype in _STORAGES.values()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise Refused(f"it calls for {_short(f'{module}.{name}')}, which no weights need") from None

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _Dtype() as dtype, str() as key, str(), int() as numel) if _counts((numel,)):
                return _Storage(dtype.name, key, numel)
        raise Refused("it refers to something that is no storage")


def read(data: bytes, kind: str) -> Any:
    """Read a pickle into what JSON can say.

    Args:
        data: The pickle.
        kind: "plain" for dict, list, str and int alone, "checkpoint" for what torch.save writes of weights
            and plain values.

    Returns:
        Scalars and lists as they are; {"map": [[key, value], ...]} for a dict, and
        {"tensor": [dtype, key, numel, offset, shape, stride]} for a tensor.

    Raises:
        Refused: It is not a pickle of that kind.
    """
    _look_through(data, _KINDS[kind])
    value = _Unpickler(io.BytesIO(data)).load()
    return _Answer().encode(value, 0)


class _Answer:
    def __init__(self) -> None:
        self._left = MOST_VALUES

    def encode(self, value: Any, depth: int) -> Any:
        self._spend(1)
        if depth > MOST_DEPTH:
            raise Refused(f"it nests deeper than {MOST_DEPTH}")
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is str:
            self._spend(len(value))
            return value
        if type(value) is int:
            if not -(2**63) <= value < 2**63:
                raise Refused("it holds a number of more than 64 bits")
            return value
        if type(value) is _Tensor:
            (dtype, key, numel), offset, shape, stride = value
            self._spend(len(key) + 2 * len(shape))
            return {"tensor": [dtype, key, numel, offset, list(shape), list(stride)]}
        if type(value) in (list, tuple):
            return [self.encode(v, depth + 1) for v in value]
        if isinstance(value, dict):
            if any(type(k) not in (str, int) for k in value):
                raise Refused("it holds a dict whose keys are neither text nor whole numbers")
            depth += 1
            return {"map": [[self.encode(k, depth), self.encode(v, depth)] for k, v in value.items()]}
        raise Refused("it holds something that is neither a tensor nor a plain value")

    def _spend(self, n: int) -> None:
        self._left -= n
        if self._left < 0:
            raise Refused("it unfolds into more than any file of weights holds")


def _look_through(data: bytes, known: frozenset[str]) -> None:
    if len(data) > MOST_BYTES:
        raise Refused(f"it is larger than {MOST_BYTES >> 20} MiB")
    for done, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in known:
            raise Refused(f"it uses the pickle instruction {opcode.name}, which nothing here needs")
        if done >= MOST_OPCODES:
            raise Refused(f"it has more than {MOST_OPCODES:,} pickle instructions")
        # The unpickler makes room for as many values as the highest number it is asked to remember.
        if opcode.name in _PUTS and int(argument or 0) > done:
            raise Refused("it remembers a value under a number beyond those it has")


def _counts(values: Any) -> bool:
    return type(values) is tuple and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _short(text: str) -> str:
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _give_up_the_rest() -> None:
    """Take from this process what a reader has no need of; nothing gives it back."""
    if sys.platform == "win32":
        return  # It has no such limits; the instructions' own and the parent's clock hold there too.
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
    """Read the pickle on standard input and answer on standard output."""
    _give_up_the_rest()
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    try:
        answer = json.dumps({"value": read(sys.stdin.buffer.read(MOST_BYTES + 1), sys.argv[1])})
    except Refused as e:
        answer = json.dumps({"refused": str(e)})
    except MemoryError:
        answer = json.dumps({"refused": f"it needs more than {MEMORY_BYTES >> 20} MiB to be read"})
    except Exception as e:
        # Whatever a broken pickle does to the standard library's reader ends here.
        answer = json.dumps({"refused": f"it is no whole pickle: {_short(str(e) or type(e).__name__)}"})
    sys.stdout.write(answer)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
