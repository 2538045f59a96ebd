"""A GPT as ONNX operators: each block, with and without keys and values of earlier tokens.

The graph is built operator by operator, not traced, so it is exactly what is written here, with quill's names
for the weights, for any batch and length, in float32 arithmetic.

Legend: B batch, T new tokens, S all tokens, C n_embd, H n_head, K n_kv_head, D head_size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from onnx import ModelProto, helper

from quill.formats.onnx.graph import FLOAT, INT64, Graph, WeightsFile
from quill.model.rope import Rope

if TYPE_CHECKING:
    from quill.config.shape import Shape


class GraphOfGPT:
    """The operators of one model.

    Args:
        shape: The model's shape.
        weights: By quill's names.
        file: The file for its weights, which graphs of the same model may share.
        dtype: The stored dtype of matrices; vectors, which are small, stay float32.
        cached: Whether the graph takes keys and values of earlier tokens, and returns them with the new ones.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Mapping[str, torch.Tensor],
        file: WeightsFile,
        dtype: torch.dtype,
        *,
        cached: bool,
    ) -> None:
        self.shape, self.weights = shape, weights
        self.dtype, self.cached = dtype, cached
        self.g = Graph(file)

    def build(self, producer: str) -> ModelProto:
        """Build the graph.

        Args:
            producer: The version of quill.
        """
        g, c = self.g, self.shape
        V, K, D = c.vocab_size, c.n_kv_head, c.head_size
        inputs = [helper.make_tensor_value_info("input_ids", INT64, ["batch", "length"])]
        outputs = [helper.make_tensor_value_info("logits", FLOAT, ["batch", "length", V])]
        for i in range(c.n_layer if self.cached else 0):
            for kind in ("key", "value"):
                past, present = f"past_key_values.{i}.{kind}", f"present.{i}.{kind}"
                inputs.append(helper.make_tensor_value_info(past, FLOAT, ["batch", K, "past", D]))
                outputs.append(helper.make_tensor_value_info(present, FLOAT, ["batch", K, "total", D]))
        if c.n_layer == 0:
            g.op("Gather", self._matrix("wte.weight"), "input_ids", output="logits")
        else:
            self._layers()
        return g.model("model_with_past" if self.cached else "model", inputs, outputs, producer)

    def _layers(self) -> None:
        g, c = self.g, self.shape
        self._position()
        x = g.op("Gather", self._matrix("wte.weight"), "input_ids")  # (B, T, C)
        if "wpe.weight" in self.weights:
            x = g.op("Add", x, g.op("Gather", self._matrix("wpe.weight"), self.positions))
        blocks = {
            "gpt2": (self._gpt2_block, self._layer_norm),
            "modern": (self._modern_block, self._rms_norm),
        }
        block, norm = blocks[c.block]
        for i in range(c.n_layer):
            x = block(x, i)
        x = norm(x, "ln_f")
        if not c.tie_embeddings:
            self._linear(x, "lm_head", output="logits")
            return
        # Gemm takes the embedding as it is stored, (V, C); MatMul would need a transposed copy.
        flat = g.op(
            "Gemm", g.op("Reshape", x, g.integers(-1, c.n_embd)), self._matrix("wte.weight"), transB=1
        )
        shape = g.op("Concat", g.op("Shape", "input_ids"), g.integers(c.vocab_size), axis=0)
        g.op("Reshape", flat, shape, output="logits")

    def _position(self) -> None:
        """What all layers share: positions of the new tokens, the causal mask, and rotations."""
        g, c = self.g, self.shape
        zero, one = g.integer(0), g.integer(1)
        total = g.op("Gather", g.op("Shape", "input_ids"), one)
        start = zero
        if self.cached:
            start = g.op("Gather", g.op("Shape", "past_key_values.0.key"), g.integer(2))
            total = g.op("Add", start, total)
        self.positions = g.op("Range", start, total, one)  # (T)
        keys = g.op("Range", zero, total, one) if self.cached else self.positions  # (S)
        seen = g.op("LessOrEqual", keys, g.op("Unsqueeze", self.positions, g.integers(1)))
        self.mask = g.op("Where", seen, g.number(0.0), g.number(-math.inf))  # (T, S)
        if "wpe.weight" not in self.weights:
            # Rows are looked up, not computed, so that a position beyond the context is an error.
            table = Rope.table(c.block_size, c.head_size, c.rope_theta, torch.device("cpu"))
            self.cos = g.op("Gather", g.weight("rope.cos", table.cos), self.positions)  # (T, D)
            self.sin = g.op("Gather", g.weight("rope.sin", table.sin), self.positions)

    def _gpt2_block(self, x: str, i: int) -> str:
        g, c, h = self.g, self.shape, f"h.{i}"
        qkv = self._linear(self._layer_norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
        q, k, v = (self._heads(part, c.n_head) for part in g.split(qkv, 3))
        q, k, v = (g.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, k, v))  # (B, H, T, D)
        y = self._attend(q, k, v, i)
        x = g.op("Add", x, self._linear(y, f"{h}.attn.c_proj"))
        y = self._activation(self._linear(self._layer_norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"))
        return g.op("Add", x, self._linear(y, f"{h}.mlp.c_proj"))

    def _modern_block(self, x: str, i: int) -> str:
        g, c, h = self.g, self.shape, f"h.{i}"
        y, attn = self._rms_norm(x, f"{h}.input_layernorm"), f"{h}.self_attn"
        K = c.n_kv_head
        q = self._rms_norm(self._heads(self._linear(y, f"{attn}.q_proj"), c.n_head), f"{attn}.q_norm")
        k = self._rms_norm(self._heads(self._linear(y, f"{attn}.k_proj"), K), f"{attn}.k_norm")
        v = self._heads(self._linear(y, f"{attn}.v_proj"), K)
        q, k, v = (g.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, k, v))  # (B, H or K, T, D)
        y = self._attend(self._rotate(q), self._rotate(k), v, i)
        x = g.op("Add", x, self._linear(y, f"{attn}.o_proj"))
        y, mlp = self._rms_norm(x, f"{h}.post_attention_layernorm"), f"{h}.mlp"
        up = self._linear(y, f"{mlp}.up_proj")
        if c.activation == "swiglu":
            gate = self._linear(y, f"{mlp}.gate_proj")
            up = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        else:
            up = self._activation(up)
        return g.op("Add", x, self._linear(up, f"{mlp}.down_proj"))

    def _attend(self, q: str, k: str, v: str, i: int) -> str:
        """Mix each position with those before it: q (B, H, T, D), k and v (B, K, T, D) to (B, T, HD)."""
        g, c = self.g, self.shape
        H, K, D = c.n_head, c.n_kv_head, c.head_size
        if self.cached:
            k = g.op("Concat", f"past_key_values.{i}.key", k, axis=2, output=f"present.{i}.key")
            v = g.op("Concat", f"past_key_values.{i}.value", v, axis=2, output=f"present.{i}.value")
        q = g.op("Mul", q, g.number(c.attention_scale))
        k = g.op("Transpose", k, perm=[0, 1, 3, 2])
        if H != K:
            # The heads of a group get their own axis, along which keys and values are broadcast.
            q = g.op("Reshape", q, g.integers(0, K, H // K, -1, D))
            k, v = (g.op("Unsqueeze", t, g.integers(2)) for t in (k, v))
        share = g.op("Softmax", g.op("Add", g.op("MatMul", q, k), self.mask), axis=-1)
        y = g.op("MatMul", share, v)
        if H != K:
            y = g.op("Reshape", y, g.integers(0, H, -1, D))
        return g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.integers(0, 0, H * D))

    def _heads(self, x: str, n: int) -> str:
        return self.g.op("Reshape", x, self.g.integers(0, 0, n, self.shape.head_size))

    def _rotate(self, x: str) -> str:
        g = self.g
        first, second = g.split(x, 2)
        swapped = g.op("Concat", second, first, axis=-1)
        return g.op("Add", g.op("Mul", x, self.cos), g.op("Mul", swapped, self.sin))

    def _layer_norm(self, x: str, name: str) -> str:
        weight = self.g.weight(f"{name}.weight", self.weights[f"{name}.weight"])
        bias = [self._bias(name)] if f"{name}.bias" in self.weights else []
        return self.g.op("LayerNormalization", x, weight, *bias, epsilon=self.shape.norm_eps)

    def _rms_norm(self, x: str, name: str) -> str:
        g = self.g
        weight = g.weight(f"{name}.weight", self.weights[f"{name}.weight"])
        mean = g.op("ReduceMean", g.op("Pow", x, g.number(2.0)), g.integers(-1))
        root = g.op("Sqrt", g.op("Add", mean, g.number(self.shape.norm_eps)))
        return g.op("Mul", g.op("Div", x, root), weight)

    def _activation(self, x: str) -> str:
        g = self.g
        match self.shape.activation:
            case "relu":
                return g.op("Relu", x)
            case "relu2":
                rectified = g.op("Relu", x)
                return g.op("Mul", rectified, rectified)
            case activation:
                return g.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")

    def _linear(self, x: str, name: str, output: str = "") -> str:
        biased = f"{name}.bias" in self.weights
        # Stored as (in, out), which every runtime and every tool for quantization handles best.
        values = self.weights[f"{name}.weight"].t()
        matrix = self.g.weight(f"{name}.weight.T", values, self.dtype)
        y = self.g.op("MatMul", x, matrix, output="" if biased else output)
        return self.g.op("Add", y, self._bias(name), output=output) if biased else y

    def _matrix(self, name: str) -> str:
        return self.g.weight(name, self.weights[name], self.dtype)

    def _bias(self, name: str) -> str:
        return self.g.weight(f"{name}.bias", self.weights[f"{name}.bias"])
