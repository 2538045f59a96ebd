"""An ONNX graph as it is put together, and the file of weights that several graphs share.

Format: https://onnx.ai/onnx/repo-docs/IR.html, weights beside the graph:
https://onnx.ai/onnx/repo-docs/ExternalData.html. They lie outside because a protobuf holds 2 GB at the
most, and because two graphs so need them only once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

# Gelu is an operator from 20 on. What came later, such as attention in one piece, fewer runtimes know.
OPSET = 20
# The one that opset 20 came with.
IR_VERSION = 9

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}

# Where a large tensor starts, so that any system can map it into memory; and where another does.
_LARGE, _PAGE, _ALIGNMENT = 1 << 20, 1 << 16, 64


class _Place(NamedTuple):
    values: Tensor
    dtype: torch.dtype
    start: int
    size: int


class WeightsFile:
    """Tensors one after another, pointed to by graphs; none is copied before `chunks` comes to it.

    Args:
        location: The file's name, in the folder of the graphs.

    Attributes:
        size: Of the file, in bytes, as far as it is laid out.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._places: dict[str, _Place] = {}
        self.size = 0

    def place(self, name: str, values: Tensor, dtype: torch.dtype) -> TensorProto:
        """Give a tensor its place, or find the one it has.

        Args:
            name: Of the same name are the same values.
            values: Them, or a view of them.
            dtype: How they are kept, float32 or float16.

        Returns:
            What a graph lists to point there.
        """
        place = self._places.get(name)
        if place is None:
            size = values.numel() * dtype.itemsize
            step = _PAGE if size >= _LARGE else _ALIGNMENT
            place = self._places[name] = _Place(values, dtype, -(-self.size // step) * step, size)
            self.size = place.start + size
        proto = TensorProto(name=name, data_type=_TYPES[dtype], dims=values.shape)
        proto.data_location = TensorProto.EXTERNAL
        where = {"location": self.location, "offset": str(place.start), "length": str(place.size)}
        for key, value in where.items():
            proto.external_data.add(key=key, value=value)
        return proto

    def chunks(self) -> Iterator[Any]:
        """The file's bytes, a tensor at a time."""
        at = 0
        for place in self._places.values():
            yield bytes(place.start - at)
            # ONNX is little-endian wherever it is written.
            array = place.values.detach().to(place.dtype).contiguous().numpy()
            yield array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
            at = place.start + place.size


class Graph:
    """Operators in the order they run, and the constants they use.

    A value is the name it has in the graph.

    Args:
        file: Where weights are placed.
    """

    def __init__(self, file: WeightsFile) -> None:
        self._file = file
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._widened: dict[str, str] = {}

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add an operator with one output.

        Args:
            kind: Its name in ONNX.
            inputs: Values it takes.
            output: What its output is called; made up where empty.
            attributes: Its own.
        """
        return self._add(kind, inputs, [output or f"{kind}_{len(self._nodes)}"], attributes)[0]

    def split(self, x: str, parts: int) -> list[str]:
        """Cut a value into equal parts along its last axis."""
        names = [f"Split_{len(self._nodes)}_{i}" for i in range(parts)]
        return self._add("Split", (x,), names, {"axis": -1, "num_outputs": parts})

    def integer(self, value: int) -> str:
        """A whole number without dimensions."""
        return self._constant(np.array(value, np.int64))

    def integers(self, *values: int) -> str:
        """A row of whole numbers, such as a shape."""
        return self._constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A float32 without dimensions."""
        return self._constant(np.array(value, np.float32))

    def weight(self, name: str, values: Tensor, dtype: torch.dtype = torch.float32) -> str:
        """A tensor from the file of weights, in float32 whatever it is kept in.

        Args:
            name: Its name.
            values: Them, or a view of them.
            dtype: How they are kept.
        """
        if name not in self._initializers:
            self._initializers[name] = self._file.place(name, values, dtype)
        if dtype == torch.float32:
            return name
        if name not in self._widened:
            self._widened[name] = self.op("Cast", name, to=FLOAT)
        return self._widened[name]

    def model(
        self, name: str, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto], producer: str
    ) -> ModelProto:
        """What has been put together, as a model.

        Args:
            name: The graph's.
            inputs: What it is given.
            outputs: What it gives; each is the output of an operator.
            producer: The version of quill.
        """
        graph = helper.make_graph(self._nodes, name, inputs, outputs, list(self._initializers.values()))
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="quill",
            producer_version=producer,
        )

    def _add(self, kind: str, inputs: Sequence[str], outputs: list[str], attributes: Any) -> list[str]:
        name = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs

    def _constant(self, array: Any) -> str:
        name = f"{array.dtype} {array.tolist()}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name
