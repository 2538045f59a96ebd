"""The flat configs of older projects, read as they are.

QuillGPT, AkashDataScience/nanogpt and "GPT from Scratch" share one set of keys and one model:
learned positions, ReLU, query/key/value without bias, an untied head with bias, AdamW at a constant
rate. What those projects left unsaid is filled in here as their code had it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quill.errors import InputError

_MODEL = ("block_size", "n_embd", "n_head", "n_layer", "dropout", "vocab_size")
_TRAIN = ("batch_size", "max_iters", "eval_interval", "learning_rate", "eval_iters")
_TABLES = ("encode", "decode")
# QuillGPT's published config names a device, and its code asks the machine instead; so does quill.
_IGNORED = ("device",)
KEYS = frozenset((*_MODEL, *_TRAIN, *_TABLES, *_IGNORED, "data_path"))

# Shared by every flat config; quill's own files in that lineage spell them out.
_BLOCK = {
    "block": "gpt2",
    "activation": "relu",
    "bias": True,
    "qkv_bias": False,
    "tie_embeddings": False,
    "head_bias": True,
}
_ADAMW = {
    "optimizer": "adamw",
    "schedule": "constant",
    "warmup_iters": 0,
    "weight_decay": 0.01,
    "beta2": 0.999,
    "grad_clip": 0.0,
}


def is_flat(document: dict[str, Any]) -> bool:
    """Whether a document is in the flat form: its settings stand at the top, not in sections."""
    return bool(set(document) & (KEYS - {"data_path"})) and not set(document) & {"data", "model", "train"}


def to_sections(document: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """The same run in quill's sections.

    Args:
        document: The flat config.
        folder: What its `data_path` is relative to when the file is not in the working directory.

    Raises:
        InputError: A key is unknown, or the `encode` and `decode` tables are not one permutation.
    """
    unknown = sorted(set(document) - KEYS - {"$schema", "name"})
    model = {**_BLOCK, **{k: document[k] for k in _MODEL if k in document}}
    width, heads = model.get("n_embd"), model.get("n_head")
    if type(width) is int and type(heads) is int and heads > 0 and width % heads:
        # QuillGPT divided and dropped the rest: 1024 over 12 heads is 85 each.
        model["head_size"] = width // heads
    data: dict[str, Any] = {}
    if "data_path" in document:
        data["source"] = _locate(document["data_path"], folder)
    table = _vocabulary(document)
    if table is not None:
        data |= {"tokenizer": "char", "vocabulary": table}
        if document.get("vocab_size", len(table)) != len(table):
            raise InputError(
                f"'vocab_size' = {document['vocab_size']!r} does not fit the tables",
                why=f"encode and decode hold {len(table)} characters",
            )
    if unknown:
        # Left where it stands, so that the settings' own check names it with a suggestion.
        model[unknown[0]] = document[unknown[0]]
    top: dict[str, Any] = {k: document[k] for k in ("$schema", "name") if k in document}
    train = {**_ADAMW, **{k: document[k] for k in _TRAIN if k in document}}
    return {**top, "data": data, "model": model, "train": train}


def _locate(path: Any, folder: Path | None) -> Any:
    if isinstance(path, str) and folder and not Path(path).exists() and (folder / path).exists():
        return str(folder / path)
    return path


def _vocabulary(document: dict[str, Any]) -> list[str] | None:
    encode, decode = document.get("encode"), document.get("decode")
    if encode is None and decode is None:
        return None
    try:
        pairs = {int(i): c for i, c in decode.items()} if decode is not None else {}
        back = {int(i): c for c, i in encode.items()} if encode is not None else pairs
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            "'encode' or 'decode' is not a table", why='encode is {"a": 0, ...}, decode is {"0": "a", ...}'
        ) from None
    table = pairs or back
    if sorted(table) != list(range(len(table))) or table != back:
        raise InputError(
            "'encode' and 'decode' disagree",
            why="each must give every id from 0 up to one character, and the two must mirror each other",
        )
    return [table[i] for i in range(len(table))]
