"""Builds an ONNX graph, and the file of weights that several graphs share.

Format: https://onnx.ai/onnx/repo-docs/IR.html, weights in their own file:
https://onnx.ai/onnx/repo-docs/ExternalData.html. A protobuf is limited to 2 GB, and both graphs share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

# Gelu is an operator since 20. Later operators, such as Attention, are known to fewer runtimes.
OPSET = 20
# The version that opset 20 came with.
IR_VERSION = 9

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}

# Large tensors start at a page, so that any system can map them into memory; others are aligned.
_LARGE, _PAGE, _ALIGNMENT = 1 << 20, 1 << 16, 64


class _Place(NamedTuple):
    values: Tensor
    dtype: torch.dtype
    start: int
    size: int


class WeightsFile:
    """A file of tensors that graphs point to; `chunks` copies one tensor at a time.

    Args:
        location: The file's name, in the folder of the graphs.

    Attributes:
        size: The file's size in bytes so far.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._places: dict[str, _Place] = {}
        self.size = 0

    def place(self, name: str, values: Tensor, dtype: torch.dtype) -> TensorProto:
        """Place a tensor in the file, unless it has a place already.

        Args:
            name: The tensor's name. The same name means the same values.
            values: The tensor, or a view.
            dtype: The stored dtype, float32 or float16.

        Returns:
            The graph's entry that points there.
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
        """The file's bytes, one tensor at a time."""
        at = 0
        for place in self._places.values():
            yield bytes(place.start - at)
            # ONNX is always little-endian.
            array = place.values.detach().to(place.dtype).contiguous().numpy()
            yield array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
            at = place.start + place.size


class Graph:
    """Operators in the order they run, and their constants. A value is its name in the graph.

    Args:
        file: The file for the weights.
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
            inputs: Its input values.
            output: The name of its output; empty for any.
            attributes: Its attributes.
        """
        return self._add(kind, inputs, [output or f"{kind}_{len(self._nodes)}"], attributes)[0]

    def split(self, x: str, parts: int) -> list[str]:
        """Split a value into equal parts along its last axis."""
        names = [f"Split_{len(self._nodes)}_{i}" for i in range(parts)]
        return self._add("Split", (x,), names, {"axis": -1, "num_outputs": parts})

    def integer(self, value: int) -> str:
        """An integer scalar."""
        return self._constant(np.array(value, np.int64))

    def integers(self, *values: int) -> str:
        """A vector of integers, such as a shape."""
        return self._constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self._constant(np.array(value, np.float32))

    def weight(self, name: str, values: Tensor, dtype: torch.dtype = torch.float32) -> str:
        """A tensor from the file of weights, cast to float32.

        Args:
            name: Its name.
            values: The tensor, or a view.
            dtype: The stored dtype.
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
        """Finish the graph as a model.

        Args:
            name: The graph's name.
            inputs: The model's inputs.
            outputs: The model's outputs, each an operator's.
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
