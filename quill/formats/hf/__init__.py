"""Hugging Face: a folder that transformers loads without custom code.

Format: `config.json` and `model.safetensors` (https://huggingface.co/docs/transformers/main_classes/model),
`tokenizer.json` (https://huggingface.co/docs/tokenizers). Downloads require huggingface_hub, and the
comparison requires transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quill import fsio, strictjson
from quill.checkpoint.precision import refuse_overflow
from quill.errors import CorruptError, InputError, QuillError, shorten
from quill.formats import base, tokenizer_json
from quill.formats.hf import model as models
from quill.formats.hf.folder import Folder
from quill.formats.tokenizer_json import bpe, fields
from quill.tokenizers._ranks import END_OF_TEXT

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.config.shape import Shape
    from quill.tokenizers.base import Tokenizer

# The line of the card that says where the model is.
FOLDER_LINE = 'name = "."  # this folder'
_UNKNOWN_CHARACTERS = {
    "char": "The tokenizer drops characters that are not in its vocabulary; quill refuses them by default.",
    "word": "A character that is not in the vocabulary becomes `<unk>`.",
}
_CONFIG, _TOKENIZER, _TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"


class HuggingFace(base.Format):
    """A folder for transformers."""

    suffix: ClassVar[str] = "-hf"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16", "bfloat16")
    extra: ClassVar[str] = "hf"
    runtime: ClassVar[str] = "transformers"
    streams: ClassVar[bool] = True
    tolerance: ClassVar[Mapping[str, float]] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}

    def refusal(self, shape: Shape, tokenizer: Tokenizer) -> str | None:
        """Why transformers cannot load a model or its tokenizer, as a clause; None if it can."""
        return models.refusal(shape) or tokenizer_json.refusal(tokenizer)

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write a model and its tokenizer."""
        import torch

        from quill.checkpoint.weights import stream_tensors
        from quill.model.gpt import outline

        tokenizer = checkpoint.tokenizer
        shape, weights, smaller = base.without_unused_rows(
            checkpoint.model.shape, checkpoint.weights, tokenizer.vocab_size
        )
        outlines = models.write(shape, outline(shape).state_dict())[1]
        settings, weights, notes = models.write(shape, weights)
        notes = smaller + notes
        end = tokenizer.eot_id
        ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        fsio.make_dir(path)
        refuse_overflow(weights, dtype)
        kind: torch.dtype = getattr(torch, dtype)
        layout = {name: (kind, tuple(t.shape)) for name, t in outlines.items()}
        stored = base.LazyTensors.of(weights, lambda name, value: value.to(kind))
        stream_tensors(path / "model.safetensors", layout, stored)
        # Before version 5 transformers called the dtype torch_dtype.
        stated = {**settings, **ids, "dtype": dtype, "torch_dtype": dtype}
        documents = {
            _CONFIG: stated,
            "generation_config.json": generation_settings(tokenizer),
            _TOKENIZER: tokenizer_json.write(tokenizer),
            _TOKENIZER_CONFIG: tokenizer_json.settings(tokenizer, shape.block_size),
        }
        for name, document in documents.items():
            fsio.write_json(path / name, document, durable=False)
        card = _card(checkpoint, settings["architectures"][0], notes)
        fsio.write_bytes(path / "README.md", card.encode(), durable=False)
        return notes

    def logits(self, path: Path, idx: Tensor) -> Mapping[int, Tensor]:
        """transformers' logits, computed in float32."""
        try:
            transformers: Any = import_module("transformers")
        except ImportError:
            raise base.needs("transformers") from None
        import torch

        try:
            with _silent():
                model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                    path, local_files_only=True, trust_remote_code=False, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, KeyError) as e:
            raise CorruptError(f"transformers cannot load '{path}'", why=str(e)[:500]) from None
        if wrong := [f"{kind} {names}" for kind, names in loading.items() if names and kind.endswith("keys")]:
            raise CorruptError(f"transformers cannot load all of '{path}'", why="; ".join(wrong)[:500])
        with torch.inference_mode():
            return dict(enumerate(model.float().eval()(idx).logits[0]))

    def recognises(self, path: Path) -> bool:
        """Whether a folder, or that of a safetensors file, has a config.json of transformers."""
        if not path.is_dir() and path.suffix != ".safetensors":
            return False
        try:
            stated = Folder(path).json(_CONFIG)
        except (QuillError, OSError):
            return False
        return isinstance(stated, dict) and ("architectures" in stated or "model_type" in stated)

    def read(self, path: Path, supplied: base.Supplied) -> base.Incoming:
        """Read a folder, or one file of weights and the other files in its folder."""
        folder = Folder(path)
        origin = _CONFIG if supplied.config is None else str(supplied.config)
        stated = folder.json(_CONFIG) if supplied.config is None else strictjson.read(supplied.config)
        if stated is None:
            why = "the model's shape is unknown without it"
            raise InputError(f"'{folder.path}' has no {_CONFIG}", why=why, hint="set config=")
        if not isinstance(stated, dict):
            raise CorruptError(f"'{origin}' is damaged", why="it is not a JSON object")
        _refuse_code(stated, origin)
        config, weights, found = models.read(stated, folder.tensors(), origin)
        if supplied.tokenizer is None:
            tokenizer, notes = _tokenizer(folder, models.split_pattern(stated, origin))
        else:
            tokenizer, notes = _given(supplied.tokenizer, config.vocab_size or 0), ()
        return base.Incoming(config, weights, tokenizer, notes=found + notes + _end_notes(stated, tokenizer))


def generation_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Make the generation_config.json of a tokenizer."""
    end, unused = tokenizer.eot_id, base.unused_ids(tokenizer)
    made = {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return {**made, "suppress_tokens": unused} if unused else made


def _card(checkpoint: Checkpoint, architecture: str, notes: tuple[str, ...]) -> str:
    """The folder's README, with the metadata that the Hub reads."""
    tokenizer, config = checkpoint.tokenizer, checkpoint.config.model
    prompt = _opening(tokenizer, config.block_size)
    length = min(200, config.block_size + 1 - len(tokenizer.encode(prompt)))
    lines = [
        "---",
        "library_name: transformers",
        "license: unknown",
        "pipeline_tag: text-generation",
        "tags:",
        "- quill",
        f"- {architecture}",
        "---",
        "",
        f"# {checkpoint.version.name}",
        "",
        f"A language model exported from quill as transformers' {architecture}: {config.n_layer} layers, "
        f"context length {config.block_size:,}, {tokenizer.kind} tokenizer with {tokenizer.vocab_size:,} "
        "tokens.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        FOLDER_LINE,
        "model = AutoModelForCausalLM.from_pretrained(name)",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f'prompt = tokenizer({json.dumps(prompt)}, return_tensors="pt")',
        f"ids = model.generate(**prompt, do_sample=True, max_new_tokens={length})",
        "print(tokenizer.decode(ids[0]))",
        "```",
    ]
    if unknown := _UNKNOWN_CHARACTERS.get(tokenizer.kind):
        lines += ["", unknown]
    if tokenizer.eot_id is not None:
        end = tokenizer.token_bytes(tokenizer.eot_id).decode()
        lines += ["", f"`{end}` in a text is plain text, unless you pass `split_special_tokens=False`."]
    if notes:
        lines += ["", "How the model was converted:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _opening(tokenizer: Tokenizer, most: int) -> str:
    """A text that the tokenizer can encode, of at most so many tokens."""
    for text in ("The", "a", "\n"):
        try:
            if 0 < len(tokenizer.encode(text)) <= most:
                return text
        except InputError:
            continue
    return next(text for i in range(tokenizer.vocab_size) if tokenizer.encode(text := tokenizer.decode([i])))


def _refuse_code(stated: Mapping[str, Any], origin: str) -> None:
    if stated.get("auto_map"):
        raise CorruptError(
            f"'{origin}' requires custom code",
            why=f"auto_map is {shorten(stated['auto_map'], 120)}; quill never runs code from a model",
            hint="if the model is plain GPT-2 or Qwen3, remove auto_map from the file",
        )


def _tokenizer(folder: Folder, pattern: str) -> tuple[Tokenizer, tuple[str, ...]]:
    stated = folder.json(_TOKENIZER_CONFIG)
    stated = stated if isinstance(stated, dict) else {}
    _refuse_code(stated, _TOKENIZER_CONFIG)
    if stated.get("add_prefix_space"):
        # transformers lets this file or tokenizer.json decide, depending on the class and on its own version.
        why = f"{_TOKENIZER_CONFIG} puts a space before every text; quill encodes text as it is"
        raise InputError("quill does not support the folder's tokenizer", why=why, hint="tokenizer=gpt2")
    adds = [key for key in ("add_bos_token", "add_eos_token") if stated.get(key)]
    notes = ("its tokenizer adds special tokens around a text; quill adds none",) if adds else ()
    document = folder.json(_TOKENIZER)
    if document is not None:
        tokenizer, found = tokenizer_json.read(document, _TOKENIZER)
        return tokenizer, tuple(dict.fromkeys(found + notes))
    vocabulary, merges = folder.json("vocab.json"), folder.bytes("merges.txt")
    if vocabulary is None or merges is None:
        raise InputError(
            f"'{folder.path}' has no tokenizer",
            why=f"it has neither {_TOKENIZER} nor vocab.json with merges.txt",
            hint="tokenizer=gpt2",
        )
    special_map = folder.json("special_tokens_map.json")
    added = _added(vocabulary, folder.json("added_tokens.json"), stated, special_map)
    return bpe.read_files(vocabulary, merges, added, pattern, "vocab.json"), notes


def _added(vocabulary: Any, added: Any, stated: Mapping[str, Any], special_map: Any) -> fields.AddedTokens:
    """The added tokens of a folder without tokenizer.json, from every file that may list them."""
    entries: dict[int, dict[str, Any]] = {}
    if isinstance(vocabulary, dict) and type(vocabulary.get(END_OF_TEXT)) is int:
        entries[vocabulary[END_OF_TEXT]] = {"content": END_OF_TEXT, "special": True}
    special = {text for found in (stated, special_map) for text in _special_texts(found)}
    if isinstance(added, dict):
        entries |= {i: {"content": n, "special": n in special} for n, i in added.items() if type(i) is int}
    listed = stated.get("added_tokens_decoder")
    if isinstance(listed, dict):
        for key, entry in listed.items():
            if key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
                entries[int(key[:9])] = entry
    return fields.added_tokens([{**entry, "id": i} for i, entry in entries.items()], _TOKENIZER_CONFIG)


def _special_texts(found: Any) -> Iterator[str]:
    """The special tokens in a special_tokens_map.json or tokenizer_config.json."""
    for key, value in found.items() if isinstance(found, dict) else ():
        if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
            for token in value if isinstance(value, list) else [value]:
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str):
                    yield text


def _given(wanted: str, rows: int) -> Tokenizer:
    """The tokenizer that the caller names; a tokenizer.json may also be one of the tokenizers library."""
    path = fsio.expanded(wanted)
    if path.suffix == ".json" and path.is_file():
        document = strictjson.read(path, error=CorruptError)
        if isinstance(document, dict) and "model" in document:
            return tokenizer_json.read(document, wanted)[0]
    from quill.formats import vocabulary

    return vocabulary.given(wanted, rows)


def _end_notes(stated: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, ...]:
    ends = stated.get("eos_token_id")
    if type(ends) is not int or ends == tokenizer.eot_id or not 0 <= ends < tokenizer.vocab_size:
        return ()
    end = tokenizer.token_bytes(ends).decode("utf-8", "replace")
    return (f"its texts end with {end!a}; quill only knows {END_OF_TEXT} as the end",)


@contextmanager
def _silent() -> Iterator[None]:
    """Turn off the library's progress bars and advice."""
    logging: Any = import_module("transformers.utils.logging")
    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
