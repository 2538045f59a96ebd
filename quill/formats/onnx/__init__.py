"""ONNX, for ONNX Runtime and other runtimes on servers, on phones and in browsers.

A folder with two graphs over one file of weights. `model.onnx` takes token ids and returns the logits of
every position. `model_with_past.onnx` also takes the keys and values of earlier tokens, at first empty, and
returns them with those of the new ones, so that each token is computed once. Old and new tokens together must
fit the context. Inputs and outputs have the names that Optimum and Transformers.js expect, and both run the
second graph.
Format: https://onnx.ai/onnx/repo-docs/IR.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quill import fsio
from quill.checkpoint.precision import refuse_overflow
from quill.errors import CorruptError
from quill.formats import base, tokenizer_json

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.config.shape import Shape
    from quill.tokenizers.base import Tokenizer

# The graphs' files, and whether each takes the keys and values of earlier tokens.
GRAPHS = {"model.onnx": False, "model_with_past.onnx": True}
WEIGHTS, CONFIG, TOKENIZER = "model.onnx_data", "config.json", "quill_tokenizer.json"
# The blocks that there are graphs for, with the model type whose settings Optimum and Transformers.js expect.
BLOCKS = {"gpt2": "gpt2", "modern": "qwen3"}


class Onnx(base.Format):
    """A folder of ONNX graphs."""

    suffix: ClassVar[str] = "-onnx"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16")
    extra: ClassVar[str] = "onnx"
    runtime: ClassVar[str] = "onnxruntime"
    tolerance: ClassVar[Mapping[str, float]] = {"float32": 1e-4, "float16": 1e-2}

    def refusal(self, shape: Shape, tokenizer: Tokenizer) -> str | None:
        """Why there is no graph for a model's block, as a clause; None if there is one."""
        if shape.n_layer and shape.block not in BLOCKS:
            return f"it has graphs for the blocks {' and '.join(BLOCKS)}, not for {shape.block}"
        return None

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write both graphs, their weights, the tokenizer, and a config for programs that run them."""
        try:
            from quill.formats.onnx.model import GraphOfGPT
        except ImportError as e:
            if e.name != "onnx":
                raise
            raise base.needs("onnx", self.extra) from None
        import torch

        import quill
        from quill.formats.onnx.graph import WeightsFile

        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        shape, tensors, notes = base.without_unused_rows(
            model.shape, model.state_dict(), tokenizer.vocab_size
        )
        refuse_overflow(tensors, dtype)
        weights = WeightsFile(WEIGHTS)
        stored: torch.dtype = getattr(torch, dtype)
        graphs = {
            name: GraphOfGPT(shape, tensors, weights, stored, cached=cached).build(quill.__version__)
            for name, cached in GRAPHS.items()
        }
        fsio.make_dir(path)
        fsio.require_space(path, weights.size, f"'{WEIGHTS}'")
        fsio.write_chunks(path / WEIGHTS, weights.chunks(), durable=False)
        for name, graph in graphs.items():
            fsio.write_bytes(path / name, graph.SerializeToString(), durable=False)
        files, more = _tokenizer_files(tokenizer, shape.block_size)
        notes += more
        for name, document in {CONFIG: _config(checkpoint, shape, dtype), **files}.items():
            fsio.write_json(path / name, document, durable=False)
        if dtype == "float16":
            notes += ("the weights are stored in float16; the graphs compute in float32",)
        return notes

    def logits(self, path: Path, idx: Tensor) -> Mapping[int, Tensor]:
        """ONNX Runtime's logits, by the graph without keys and values."""
        try:
            import onnxruntime  # type: ignore[import-untyped, import-not-found, unused-ignore]
        except ImportError:
            raise base.needs("onnxruntime", self.extra) from None
        import torch

        options = onnxruntime.SessionOptions()
        # Only errors: a library does not print.
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                path / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
            (logits,) = session.run(["logits"], {"input_ids": idx.numpy()})
        except Exception as e:
            # Its exceptions have no common base class.
            reason = str(e).strip().splitlines()[0][:300]
            raise CorruptError(f"ONNX Runtime cannot run '{path}'", why=reason) from e
        return dict(enumerate(torch.from_numpy(logits[0])))


def _config(checkpoint: Checkpoint, s: Shape, dtype: str) -> dict[str, Any]:
    """The settings that a program needs to run the graphs, with transformers' names."""
    tokenizer = checkpoint.tokenizer
    K, D = s.n_kv_head, s.head_size
    ids = {"dtype": "int64", "shape": ["batch", "length"]}
    logits = {"dtype": "float32", "shape": ["batch", "length", s.vocab_size]}
    past = {"dtype": "float32", "shape": ["batch", K, "past", D]}
    present = {"dtype": "float32", "shape": ["batch", K, "past + length", D]}
    graphs: dict[str, Any] = {}
    for name, cached in GRAPHS.items():
        inputs: dict[str, Any] = {"input_ids": ids}
        outputs: dict[str, Any] = {"logits": logits}
        if cached and s.n_layer:
            for kind in ("key", "value"):
                inputs[f"past_key_values.{{i}}.{kind}"] = past
                outputs[f"present.{{i}}.{kind}"] = present
        graphs[name] = {"inputs": inputs, "outputs": outputs}
    model_type = BLOCKS[s.block]
    if model_type == "gpt2" and s.n_head * s.head_size != s.n_embd:
        # Programs take the width of GPT-2 over its heads for the width of a head.
        model_type = "qwen3"
    config = {
        "format": "quill-onnx",
        "schema": 1,
        "model": checkpoint.version.reference,
        "dtype": dtype,
        "vocab_size": s.vocab_size,
        "max_position_embeddings": s.block_size,
        "num_hidden_layers": s.n_layer,
        "num_attention_heads": s.n_head,
        "num_key_value_heads": K,
        "head_dim": D,
        "hidden_size": s.n_embd,
        "bos_token_id": tokenizer.eot_id,
        "eos_token_id": tokenizer.eot_id,
        # It tells Optimum and Transformers.js where to find the sizes of keys and values.
        "model_type": model_type,
        "graphs": graphs,
    }
    if unused := base.unused_ids(tokenizer):
        config["suppress_tokens"] = unused
    if model_type == "gpt2":
        config |= {"n_layer": s.n_layer, "n_head": s.n_head, "n_embd": s.n_embd, "n_positions": s.block_size}
    return config


def _tokenizer_files(tokenizer: Tokenizer, context: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tokenizer's files, for quill and, if it can represent it, for the tokenizers library; and notes."""
    files: dict[str, Any] = {TOKENIZER: tokenizer.to_dict()}
    if why := tokenizer_json.refusal(tokenizer):
        return files, (f"no tokenizer.json was written for the tokenizers library: {why}",)
    settings = tokenizer_json.settings(tokenizer, context)
    files |= {"tokenizer.json": tokenizer_json.write(tokenizer), "tokenizer_config.json": settings}
    return files, ()
