"""The config of a checkpoint of QuillGPT: given, or found beside it by the shape that it has.

The file of weights tells everything but what its tokens mean. The config that does lies beside it, or in the
project's folder of configs, where those of other models lie too.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio, strictjson
from quill.config import flat
from quill.errors import InputError, NotFoundError, QuillError, ResourceError
from quill.formats import vocabulary

if TYPE_CHECKING:
    from quill.formats.base import Supplied
    from quill.tokenizers.base import Tokenizer

CONFIG = "config.json"
_MOST_BYTES = 32 << 20
_MOST_CONFIGS = 200
# What a config must say of a model for it to be that model's.
_SHAPE = ("vocab_size", "block_size", "n_embd", "n_head", "n_layer")


def find_vocabulary(
    path: Path, shape: Mapping[str, Any], supplied: Supplied, mask: str
) -> tuple[Tokenizer, float | None, list[str]]:
    """The characters and the dropout: from the config, which is given or found, or from a text.

    Args:
        path: The file of weights.
        shape: What its tensors tell, by quill's names.
        supplied: What was given with it.
        mask: What its causal masks are called.

    Returns:
        The tokenizer, the dropout where a config tells it, and what a person should know.

    Raises:
        InputError: There is no config, or it is another model's.
        NotFoundError: What was given is not there.
        CorruptError: The characters are none.
    """
    rows = shape["vocab_size"]
    document: dict[str, Any] = {}
    notes: list[str] = []
    if supplied.config:
        document = _document(supplied.config)
        if why := _unlike(document, shape):
            raise InputError(
                f"'{supplied.config}' is the config of another model", why=why, hint="give the one of its run"
            )
    elif not supplied.tokenizer:
        found = _fitting(path, shape)
        if found is None:
            raise _nothing_beside(path, rows, mask)
        place, document = found
        notes.append(f"Its config is {vocabulary.shown(place, path)}.")
    dropout = document.get("dropout")
    if supplied.tokenizer:
        tokenizer: Tokenizer = vocabulary.given(supplied.tokenizer, rows)
    else:
        tokenizer = vocabulary.characters(_table(document) or [], str(supplied.config or path))
        if list(tokenizer.to_dict()["vocabulary"]) != sorted(tokenizer.to_dict()["vocabulary"]):
            notes.append(
                "Its characters are in no order: a revision of QuillGPT numbered them anew in every run. "
                "If samples are gibberish, this config is another run's."
            )
    return tokenizer, dropout if type(dropout) is float else None, notes


def _fitting(path: Path, shape: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The config of a model: the one beside it that has its shape, or the one of the project's that does.

    Raises:
        InputError: There are several, whose characters differ.
    """
    folder = path.absolute().parent
    for place in (path.with_suffix(".json"), folder / CONFIG):
        if (document := _if_it_fits(place, shape)) is not None:
            return place, document
    found: list[tuple[Path, dict[str, Any]]] = []
    for configs in (folder / "config", folder.parent / "config"):
        for place in sorted(configs.glob("*.json"))[:_MOST_CONFIGS]:
            if (document := _if_it_fits(place, shape)) is not None:
                found.append((place, document))
    if len({tuple(_table(document) or ()) for _, document in found}) > 1:
        raise InputError(
            f"several configs fit '{path}', and their characters differ",
            why=", ".join(place.name for place, _ in found[:5]),
            hint=f"--config {shlex.quote(str(found[0][0]))}, if that is the one of its run",
        )
    return found[0] if found else None


def _if_it_fits(place: Path, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        document = _document(place)
        return None if _unlike(document, shape) else document
    except QuillError:
        # It was not asked for: a file that cannot be read is no config of this model.
        return None


def _document(path: Path) -> dict[str, Any]:
    """A config of QuillGPT.

    Raises:
        NotFoundError: There is no such file.
        InputError: It is no JSON object.
        ResourceError: It cannot be read.
    """
    try:
        with fsio.guard(path, "read"):
            size = path.stat().st_size if path.is_file() else -1
    except ResourceError:
        size = -1
    if size < 0:
        raise NotFoundError(f"no config '{path}'", hint="check the path")
    if size > _MOST_BYTES:
        raise InputError(f"'{path}' is no config", why=f"it has {size:,} bytes")
    document = strictjson.read(path)
    if not isinstance(document, dict):
        raise InputError(f"'{path}' is no config", why="a JSON object is needed")
    return document


def _unlike(document: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    """How a config is not that of a model; empty where it is."""
    for name in _SHAPE:
        if name in document and document[name] != shape[name]:
            return f"its {name} is {str(document[name])[:40]}, the model's {shape[name]}"
    if not set(_SHAPE) & set(document):
        return "it says nothing of a model"
    table = _table(document)
    if table is None:
        return "it has no table 'encode' or 'decode'"
    if len(table) != shape["vocab_size"]:
        return f"its tables have {len(table)} characters, the model {shape['vocab_size']}"
    return ""


def _table(document: Mapping[str, Any]) -> list[str] | None:
    """The characters of a config in the order of their ids.

    Raises:
        InputError: Its tables are not one permutation.
    """
    tables = {k: document[k] for k in ("encode", "decode") if k in document}
    found: list[str] | None = flat.to_sections(tables)["data"].get("vocabulary")
    return found


def _nothing_beside(path: Path, rows: int, mask: str) -> InputError:
    """The refusal of a model whose characters nobody knows."""
    text = path.parent / "input.txt"
    given = shlex.quote(str(text)) if text.is_file() else "TEXT"
    if mask == "trill":
        return InputError(
            f"the characters of '{path}' are not known",
            why=f"AkashDataScience/nanogpt saves none: they are the {rows} of the text it was trained on",
            hint=f"quill import {shlex.quote(str(path))} --tokenizer {given}",
        )
    return InputError(
        f"the config of '{path}' is missing",
        why=f"no {path.stem}.json or {CONFIG} beside it has its shape and its {rows} characters",
        hint=f"--config CONFIG, or --tokenizer {given} for the text that it was trained on",
    )
