"""GGUF, for llama.cpp, Ollama and what else runs on them: one file that holds weights and tokenizer.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Writing and reading take no package; the
comparison with llama.cpp takes llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from quill.config import reading
from quill.config.settings import ModelConfig, SampleConfig
from quill.errors import CorruptError
from quill.formats import base
from quill.formats.gguf import model
from quill.formats.gguf import tokenizer as tokens
from quill.formats.gguf.file import MAGIC, File, Value, write

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.tokenizers.base import Tokenizer

# What the format calls the type that most weights have.
_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7}
_QUANTISATION_VERSION = 2
# llama.cpp reads these in a model's name as another model's habits, and then finds no such token.
_MISLEADING = ("phi-3", "phi3")


class Gguf(base.Format):
    """llama.cpp's file."""

    suffix: ClassVar[str] = ".gguf"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16", "q8_0")
    extra: ClassVar[str] = "gguf"
    runtime: ClassVar[str] = "llama-cpp-python"
    tolerance: ClassVar[Mapping[str, float]] = {"float32": 5e-3, "float16": 1e-2, "q8_0": 0.15}

    def refusal(self, config: ModelConfig, tokenizer: Tokenizer) -> str | None:
        """Why llama.cpp cannot run a model, as a clause."""
        return model.refusal(config) or tokens.refusal(tokenizer)

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write a model and its tokenizer."""
        tokenizer = checkpoint.tokenizer
        vocabulary = tokens.write(tokenizer)
        config, weights, done = model.fitted(checkpoint.config.model, checkpoint.model.state_dict(), dtype)
        stored = list(model.tensors(config, weights, tokenizer.vocab_size, vocabulary.added, dtype))
        write(path, {**_general(config, checkpoint.version.name, dtype), **vocabulary.metadata}, stored)
        notes = [*done, *vocabulary.notes]
        if config.activation == "gelu":
            notes.append(
                "llama.cpp computes GELU by its tanh approximation, this model by its definition: "
                "--verify tells the difference"
            )
        odd = sum(len(t.shape) > 1 and t.dtype == "float16" for t in stored) if dtype == "q8_0" else 0
        if odd:
            notes.append(f"{odd} tensors are kept in float16: their rows are no multiple of 32")
        return tuple(notes)

    def logits(self, path: Path, idx: Tensor) -> Tensor:
        """What llama.cpp makes of token ids, with keys and values kept in float32."""
        try:
            import llama_cpp  # type: ignore[import-untyped, import-not-found, unused-ignore]
        except ImportError:
            raise base.needs("llama-cpp-python", self.extra) from None
        import torch

        length = idx.shape[1]
        # It writes warnings to stderr, quiet or not.
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                loaded = llama_cpp.Llama(
                    str(path),
                    n_ctx=length,
                    n_batch=length,
                    n_ubatch=length,
                    logits_all=True,
                    type_k=llama_cpp.GGML_TYPE_F32,
                    type_v=llama_cpp.GGML_TYPE_F32,
                    verbose=False,
                )
            except (ValueError, RuntimeError) as e:
                why = (said.getvalue().strip().splitlines() or [str(e)])[-1]
                raise CorruptError(f"llama.cpp does not load '{path}'", why=why) from None
            try:
                loaded.eval(idx[0].tolist())
                return torch.from_numpy(loaded.scores[:length].copy())[None]
            finally:
                loaded.close()

    def modelfile(self, name: str, checkpoint: Checkpoint) -> str:
        """What `ollama create` makes a model of.

        Ollama's own defaults are for large chat models: a penalty on repeated tokens ruins a model of
        characters, and a model that never ends its text would go on for ever.
        """
        sampling = SampleConfig()
        parameters = {
            "num_ctx": checkpoint.config.model.block_size,
            "num_predict": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
            "min_p": sampling.min_p or 0.0,
            "repeat_penalty": sampling.repetition_penalty,
        }
        source = f'"./{name}"' if " " in name else f"./{name}"
        lines = [f"FROM {source}", 'TEMPLATE """{{ .Prompt }}"""']
        lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
        return "\n".join(lines) + "\n"

    def recognises(self, path: Path) -> bool:
        """Whether a file begins as GGUF does."""
        try:
            # Asked first, as a FIFO would not open until somebody wrote to it.
            if not path.is_file():
                return False
            with open(path, "rb") as file:
                return file.read(len(MAGIC)) == MAGIC
        except OSError:
            return False

    def read(self, path: Path, supplied: base.Supplied) -> base.Incoming:
        """Read a model of the architecture gpt2 or qwen3 and its tokenizer."""
        file = File(path)
        settings = model.read(file)
        if supplied.tokenizer is not None:
            from quill.formats import vocabulary as _vocabulary

            tokenizer = _vocabulary.given(supplied.tokenizer, settings["vocab_size"])
        else:
            tokenizer = tokens.read(file)
            if tokens.KIND in file and tokenizer.eot_id is None:
                settings["vocab_size"] = min(settings["vocab_size"], tokenizer.vocab_size)
        config = reading.check(ModelConfig, settings, origin=str(path), error=CorruptError)
        weights = model.Weights(file, config)
        quantised = sum(entry.dtype == "q8_0" for entry in file.tensors.values())
        notes = (f"{quantised} tensors were rounded to 8 bits",) if quantised else ()
        return base.Incoming(config, weights, tokenizer, notes=notes)


def _general(config: ModelConfig, name: str, dtype: str) -> dict[str, Value]:
    keys = {
        "general.architecture": Value("string", model.architecture(config)),
        "general.type": Value("string", "model"),
        "general.name": Value("string", name),
        "general.file_type": Value("uint32", _FILE_TYPES[dtype]),
    }
    if any(part in name.lower() for part in _MISLEADING):
        del keys["general.name"]
    if dtype == "q8_0":
        keys["general.quantization_version"] = Value("uint32", _QUANTISATION_VERSION)
    return keys | model.metadata(config)
