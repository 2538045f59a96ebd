"""GGUF, for llama.cpp, Ollama and programs built on them: one file with the weights and the tokenizer.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only the comparison with llama.cpp requires
a package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from quill.config import reading
from quill.config.settings import ModelConfig, SampleConfig
from quill.errors import CorruptError
from quill.formats import base
from quill.formats.gguf import model, runtime
from quill.formats.gguf import tokenizer as tokenizers
from quill.formats.gguf.file import MAGIC, File, Value, write

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.config.shape import Shape
    from quill.tokenizers.base import Tokenizer

# The format's number for the type that most weights have.
_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7}
_QUANTIZATION_VERSION = 2
# llama.cpp treats a model with this in its name as Phi-3, and then misses some token.
_MISLEADING = ("phi-3", "phi3")


class Gguf(base.Format):
    """A file for llama.cpp."""

    suffix: ClassVar[str] = ".gguf"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16", "q8_0")
    extra: ClassVar[str] = "gguf"
    runtime: ClassVar[str] = "llama.cpp"
    streams: ClassVar[bool] = True
    log_probabilities: ClassVar[bool] = True
    tolerance: ClassVar[Mapping[str, float]] = {"float32": 5e-3, "float16": 1e-2, "q8_0": 0.15}

    def refusal(self, shape: Shape, tokenizer: Tokenizer) -> str | None:
        """Why llama.cpp cannot run a model, as a clause; None if it can."""
        return model.refusal(shape) or tokenizers.refusal(tokenizer)

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write a model and its tokenizer."""
        tokenizer = checkpoint.tokenizer
        vocabulary = tokenizers.write(tokenizer)
        shape, weights, done = model.fitted(checkpoint.model.shape, checkpoint.weights, dtype)
        stored = list(model.tensors(shape, weights, tokenizer.vocab_size, vocabulary.added, dtype))
        write(path, {**_general(shape, checkpoint.version.name, dtype), **vocabulary.metadata}, stored)
        notes = [*done, *vocabulary.notes]
        if shape.activation == "gelu":
            notes.append("llama.cpp approximates GELU by tanh, while this model uses exact GELU")
        odd = sum(len(t.shape) > 1 and t.dtype == "float16" for t in stored) if dtype == "q8_0" else 0
        if odd:
            notes.append(f"{odd} tensors stay in float16, as their rows are not a multiple of 32")
        return tuple(notes)

    def logits(self, path: Path, idx: Tensor) -> Mapping[int, Tensor]:
        """llama.cpp's log probabilities at some positions, with keys and values in float32."""
        return runtime.log_probabilities(path, idx[0].tolist())

    def modelfile(self, name: str, checkpoint: Checkpoint) -> str:
        """The Modelfile for `ollama create`.

        Ollama's defaults are for large chat models: a penalty on repeated tokens ruins a character model, and
        a model without an end-of-text token would never stop.
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
        """Whether a file begins like GGUF."""
        try:
            # Opening a FIFO would block until something writes to it.
            if not path.is_file():
                return False
            with open(path, "rb") as file:
                return file.read(len(MAGIC)) == MAGIC
        except OSError:
            return False

    def read(self, path: Path, supplied: base.Supplied) -> base.Incoming:
        """Read a model with the architecture gpt2 or qwen3, and its tokenizer."""
        file = File(path)
        settings = model.read(file)
        if supplied.tokenizer is not None:
            from quill.formats import vocabulary

            tokenizer = vocabulary.given(supplied.tokenizer, settings["vocab_size"])
        else:
            tokenizer = tokenizers.read(file)
            if tokenizers.KIND in file and tokenizer.eot_id is None:
                settings["vocab_size"] = min(settings["vocab_size"], tokenizer.vocab_size)
        config = reading.check(ModelConfig, settings, origin=str(path), error=CorruptError)
        weights = model.weights(file, config.shape())
        quantized = sum(entry.dtype == "q8_0" for entry in file.tensors.values())
        notes = [f"{quantized} tensors are quantized to 8 bits"] if quantized else []
        if any(file.get(f"tokenizer.ggml.add_{end}_token", bool, False) for end in ("bos", "eos")):
            notes.append("its tokenizer adds special tokens around a text; quill adds none")
        return base.Incoming(config, weights, tokenizer, notes=tuple(notes))


def _general(shape: Shape, name: str, dtype: str) -> dict[str, Value]:
    keys = {
        "general.architecture": Value("string", model.architecture(shape)),
        "general.type": Value("string", "model"),
        "general.name": Value("string", name),
        "general.file_type": Value("uint32", _FILE_TYPES[dtype]),
    }
    if any(part in name.lower() for part in _MISLEADING):
        del keys["general.name"]
    if dtype == "q8_0":
        keys["general.quantization_version"] = Value("uint32", _QUANTIZATION_VERSION)
    return keys | model.metadata(shape)
