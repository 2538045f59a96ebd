"""Convert the flat configs of older projects to sections.

QuillGPT, AkashDataScience/nanogpt and "GPT from Scratch" share one set of keys and one model: learned
positions, ReLU, query, key and value without biases, an untied head with a bias, AdamW at a constant
learning rate. What their configs leave out is filled in as their code has it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quill.errors import InputError, shorten

_MODEL = ("block_size", "n_embd", "n_head", "n_layer", "dropout", "vocab_size")
_TRAIN = ("batch_size", "max_iters", "eval_interval", "learning_rate", "eval_iters")
_TABLES = ("encode", "decode")
# QuillGPT's published config names a device, but its code picks one at run time, as quill does.
_IGNORED = ("device",)
KEYS = frozenset((*_MODEL, *_TRAIN, *_TABLES, *_IGNORED, "data_path"))

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
    """Whether a document has its settings at the top level instead of in sections."""
    return bool(set(document) & (KEYS - {"data_path"})) and not set(document) & {"data", "model", "train"}


def to_sections(document: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Return the same run in quill's sections.

    Unknown keys are passed on, for validation to report.

    Args:
        document: The flat config.
        folder: Folder that its `data_path` is relative to, if it is not relative to the working directory.

    Raises:
        InputError: The `encode` and `decode` tables do not describe one vocabulary.
    """
    unknown = sorted(set(document) - KEYS - {"$schema", "name"})
    model = {**_BLOCK, **{k: document[k] for k in _MODEL if k in document}}
    width, heads = model.get("n_embd"), model.get("n_head")
    if type(width) is int and type(heads) is int and heads > 0 and width % heads:
        # QuillGPT rounds down: 1024 over 12 heads is 85 each.
        model["head_size"] = width // heads
    data: dict[str, Any] = {}
    if "data_path" in document:
        data["source"] = _locate(document["data_path"], folder)
    table = _vocabulary(document)
    if table is not None:
        data |= {"tokenizer": "char", "vocabulary": table}
        if document.get("vocab_size", len(table)) != len(table):
            raise InputError(
                f"'vocab_size' = {shorten(document['vocab_size'])} does not match 'encode' and 'decode'",
                why=f"they have {len(table)} characters",
            )
    if unknown:
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
            "'encode' or 'decode' is not a table",
            why='use {"a": 0, ...} for encode, {"0": "a", ...} for decode',
        ) from None
    table = pairs or back
    if sorted(table) != list(range(len(table))) or table != back:
        raise InputError(
            "'encode' and 'decode' disagree",
            why="each must map one character to every id from 0 up, and one must be the inverse of the other",
        )
    return [table[i] for i in range(len(table))]
