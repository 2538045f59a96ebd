"""ONNX, for ONNX Runtime and what else runs it: on servers, phones and in browsers.

A folder with two graphs over one file of weights. `model.onnx` takes token ids and gives the logits of
every position; `model_with_past.onnx` also takes the keys and values of earlier tokens, none at first,
and gives them back with those of the new ones, so that each token is computed once. Old and new tokens
together fit the context. Inputs and outputs are called as Optimum and Transformers.js call them, which
run the second graph as it is. Format: https://onnx.ai/onnx/repo-docs/IR.html
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
    from quill.config.settings import ModelConfig
    from quill.tokenizers.base import Tokenizer

# The graphs' files, and whether each takes what was seen before.
GRAPHS = {"model.onnx": False, "model_with_past.onnx": True}
WEIGHTS, CONFIG, TOKENIZER = "model.onnx_data", "config.json", "quill_tokenizer.json"
_BLOCKS = ("gpt2", "modern")


class Onnx(base.Format):
    """A folder of ONNX graphs."""

    suffix: ClassVar[str] = "-onnx"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16")
    extra: ClassVar[str] = "onnx"
    runtime: ClassVar[str] = "onnxruntime"
    tolerance: ClassVar[Mapping[str, float]] = {"float32": 1e-4, "float16": 1e-2}

    def refusal(self, config: ModelConfig, tokenizer: Tokenizer) -> str | None:
        """Every shape of the blocks it knows."""
        if config.n_layer and config.block not in _BLOCKS:
            return f"it knows the blocks {' and '.join(_BLOCKS)}, not {config.block}"
        return None

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write both graphs, their weights, the tokenizer, and what a program needs to know of them."""
        try:
            from quill.formats.onnx import model as _onnx_model
        except ImportError as e:
            if e.name != "onnx":
                raise
            raise base.needs("onnx", self.extra) from None
        import torch

        import quill
        from quill.formats.onnx.graph import WeightsFile

        model = checkpoint.model
        refuse_overflow(model.state_dict(), dtype)
        weights = WeightsFile(WEIGHTS)
        kept: torch.dtype = getattr(torch, dtype)
        graphs = {
            name: _onnx_model.GraphOfGPT(model, weights, kept, cached=cached).build(quill.__version__)
            for name, cached in GRAPHS.items()
        }
        fsio.make_dir(path)
        fsio.require_space(path, weights.size, f"'{WEIGHTS}'")
        fsio.write_chunks(path / WEIGHTS, weights.chunks(), durable=False)
        for name, graph in graphs.items():
            fsio.write_bytes(path / name, graph.SerializeToString(), durable=False)
        files, notes = _tokenizer_files(checkpoint.tokenizer, checkpoint.config.model.block_size)
        for name, document in {CONFIG: _config(checkpoint, dtype), **files}.items():
            fsio.write_json(path / name, document, durable=False)
        if dtype == "float16":
            notes += ("weights are kept in float16; the graphs compute in float32",)
        return notes

    def logits(self, path: Path, idx: Tensor) -> Tensor:
        """What ONNX Runtime makes of token ids, with the graph that takes them alone."""
        try:
            import onnxruntime  # type: ignore[import-untyped, import-not-found, unused-ignore]
        except ImportError:
            raise base.needs("onnxruntime", self.extra) from None
        import torch

        options = onnxruntime.SessionOptions()
        # Errors alone: a library does not print.
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(
                path / "model.onnx", options, providers=["CPUExecutionProvider"]
            )
            (logits,) = session.run(["logits"], {"input_ids": idx.numpy()})
        except Exception as e:
            # Its exceptions have no base of their own.
            reason = str(e).strip().splitlines()[0][:300]
            raise CorruptError(f"ONNX Runtime cannot run '{path}'", why=reason) from e
        return torch.from_numpy(logits)


def _config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """What a program needs to know to run the graphs, named as configs of transformers name it."""
    c, tokenizer = checkpoint.config.model, checkpoint.tokenizer
    K, D = c.n_kv_head or c.n_head, c.head_size
    ids = {"dtype": "int64", "shape": ["batch", "length"]}
    logits = {"dtype": "float32", "shape": ["batch", "length", c.vocab_size]}
    past = {"dtype": "float32", "shape": ["batch", K, "past", D]}
    present = {"dtype": "float32", "shape": ["batch", K, "past + length", D]}
    graphs: dict[str, Any] = {}
    for name, cached in GRAPHS.items():
        inputs: dict[str, Any] = {"input_ids": ids}
        outputs: dict[str, Any] = {"logits": logits}
        if cached and c.n_layer:
            for kind in ("key", "value"):
                inputs[f"past_key_values.{{i}}.{kind}"] = past
                outputs[f"present.{{i}}.{kind}"] = present
        graphs[name] = {"inputs": inputs, "outputs": outputs}
    # GPT-2's readers take its width over its heads for the size of one.
    gpt2 = c.block == "gpt2" and c.n_head * (c.head_size or 0) == c.n_embd
    config = {
        "format": "quill-onnx",
        "schema": 1,
        "model": checkpoint.version.reference,
        "dtype": dtype,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.block_size,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": K,
        "head_dim": D,
        "hidden_size": c.n_embd,
        "bos_token_id": tokenizer.eot_id,
        "eos_token_id": tokenizer.eot_id,
        # By this Optimum and Transformers.js choose where to look for the sizes of keys and values.
        "model_type": "gpt2" if gpt2 else "qwen3",
        "graphs": graphs,
    }
    if gpt2:
        config |= {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size}
    return config


def _tokenizer_files(tokenizer: Tokenizer, context: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The tokenizer as quill has it and, where it can, as the tokenizers library has it; and notes."""
    files: dict[str, Any] = {TOKENIZER: tokenizer.to_dict()}
    if why := tokenizer_json.refusal(tokenizer):
        return files, (f"there is no tokenizer.json for the tokenizers library: {why}",)
    settings = tokenizer_json.settings(tokenizer, context)
    files |= {"tokenizer.json": tokenizer_json.write(tokenizer), "tokenizer_config.json": settings}
    return files, ()
