"""The config of a checkpoint of QuillGPT: supplied, or found near it by the shape of the model.

The weights show everything except what the tokens mean. The config that says so is next to them, or in the
project's folder of configs together with those of other models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio, strictjson
from quill.config import flat
from quill.errors import InputError, NotFoundError, QuillError, ResourceError, shorten
from quill.formats import vocabulary

if TYPE_CHECKING:
    from quill.formats.base import Supplied
    from quill.tokenizers.base import Tokenizer

CONFIG = "config.json"
_MOST_BYTES = 32 << 20
_MOST_CONFIGS = 200
# What a config must say about a model to be that model's.
_SHAPE = ("vocab_size", "block_size", "n_embd", "n_head", "n_layer")


def find_vocabulary(
    path: Path, settings: Mapping[str, Any], supplied: Supplied, mask: str
) -> tuple[Tokenizer, float | None, list[str]]:
    """The characters and the dropout, from the config that was supplied or found, or from a text.

    Args:
        path: The file of weights.
        settings: The model settings that its tensors show.
        supplied: What the user passed.
        mask: The name of its causal masks.

    Returns:
        The tokenizer, the dropout if a config has it, and notes for the user.

    Raises:
        InputError: There is no config, or it belongs to another model.
        NotFoundError: What was supplied does not exist.
        CorruptError: The characters are not a vocabulary.
    """
    document: dict[str, Any] = {}
    notes: list[str] = []
    if supplied.config:
        document = _read(supplied.config)
        if why := _mismatch(document, settings):
            raise InputError(
                f"'{supplied.config}' is the config of another model",
                why=why,
                hint="pass the config that the model was trained with",
            )
    elif not supplied.tokenizer:
        found = _find(path, settings)
        if found is None:
            raise _missing(path, settings["vocab_size"], mask)
        place, document = found
        notes.append(f"Its config is {vocabulary.relative(place, path)}.")
    dropout = document.get("dropout")
    if supplied.tokenizer:
        tokenizer: Tokenizer = vocabulary.given(supplied.tokenizer, settings["vocab_size"])
    else:
        characters = _characters(document) or []
        tokenizer = vocabulary.characters(characters, str(supplied.config or path))
        if characters != sorted(characters):
            notes.append(
                "Its characters are unsorted: a revision of QuillGPT numbered them differently in every run. "
                "If samples are gibberish, this config belongs to another run."
            )
    return tokenizer, dropout if type(dropout) is float else None, notes


def _find(path: Path, settings: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The config with a model's shape: next to its weights, else in the project's folder of configs.

    Raises:
        InputError: There are several, and their characters differ.
    """
    folder = path.absolute().parent
    for place in (path.with_suffix(".json"), folder / CONFIG):
        if (document := _if_it_fits(place, settings)) is not None:
            return place, document
    found: list[tuple[Path, dict[str, Any]]] = []
    for configs in (folder / "config", folder.parent / "config"):
        for place in sorted(configs.glob("*.json"))[:_MOST_CONFIGS]:
            if (document := _if_it_fits(place, settings)) is not None:
                found.append((place, document))
    if len({tuple(_characters(document) or ()) for _, document in found}) > 1:
        raise InputError(
            f"several configs fit '{path}', and their characters differ",
            why=f"{', '.join(place.name for place, _ in found[:5])}; only one is of the same run",
            hint=f'config="{found[0][0]}"',
        )
    return found[0] if found else None


def _if_it_fits(place: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        document = _read(place)
        return None if _mismatch(document, settings) else document
    except QuillError:
        # The user did not name this file: if it cannot be read, it is not the config of this model.
        return None


def _read(path: Path) -> dict[str, Any]:
    """A config of QuillGPT.

    Raises:
        NotFoundError: It does not exist.
        InputError: It is not a JSON object.
        ResourceError: It cannot be read.
    """
    try:
        with fsio.guard(path, "read"):
            size = path.stat().st_size if path.is_file() else -1
    except ResourceError:
        size = -1
    if size < 0:
        raise NotFoundError(f"no config '{path}'", why="it does not exist, or is not a file")
    if size > _MOST_BYTES:
        raise InputError(f"'{path}' is not a config", why=f"it has {size:,} bytes")
    document = strictjson.read(path)
    if not isinstance(document, dict):
        raise InputError(f"'{path}' is not a config", why="a JSON object is needed")
    return document


def _mismatch(document: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Why a config does not belong to a model; empty if it does."""
    for name in _SHAPE:
        if name in document and document[name] != settings[name]:
            return f"its {name} is {shorten(document[name], 40)}; the model's is {settings[name]}"
    if not set(_SHAPE) & set(document):
        return "it describes no model"
    characters = _characters(document)
    if characters is None:
        return "it has no table 'encode' or 'decode'"
    if len(characters) != settings["vocab_size"]:
        return f"its tables have {len(characters)} characters; the model has {settings['vocab_size']}"
    return ""


def _characters(document: Mapping[str, Any]) -> list[str] | None:
    """The characters of a config in the order of their ids.

    Raises:
        InputError: Its tables do not agree.
    """
    tables = {k: document[k] for k in ("encode", "decode") if k in document}
    found: list[str] | None = flat.to_sections(tables)["data"].get("vocabulary")
    return found


def _missing(path: Path, rows: int, mask: str) -> InputError:
    """The refusal of a model whose characters are unknown."""
    why = f"neither {path.stem}.json nor {CONFIG} next to it has its shape and its {rows} characters"
    hint = "pass its config as config=, or the text that it was trained on as tokenizer="
    if mask == "trill":
        why = f"AkashDataScience/nanogpt does not save them: they are the {rows} of its training text"
        hint = vocabulary.hint(path)
    return InputError(f"the characters of '{path}' are unknown", why=why, hint=hint)
