"""Whether a dataset is the one that was asked for.

A dataset is identified by its key, a hash of the text and of the settings that turn it into tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from quill import fsio, strictjson
from quill.config.settings import DataConfig
from quill.data.dataset import Dataset
from quill.data.named_sources import OnBytes
from quill.errors import CorruptError, InputError, NotFoundError, RefusedError, shorten
from quill.tokenizers import base

DEFAULT_TOKENIZER = "char"

_SETTINGS = ("tokenizer", "vocab_size", "vocabulary", "val_fraction", "encoding", "text_field")
# Encoding and field say how to read the text, and the text's own hash covers the result.
_KEYED = ("tokenizer", "vocab_size", "vocabulary", "val_fraction")
# Fingerprint of a tokenizer that was trained on another text.
_GIVEN = "tokenizer_sha256"
# Recorded if characters were skipped.
_UNKNOWN = "unknown"
# Recorded if documents were left out; the text's own hash covers which.
_DEDUP = "dedup"
# Recorded if documents are held out; without it, the end of the text is.
SPLIT, DOCUMENTS, END = "split", "documents", "end"
# Recorded for a shard of a text, such as "2/8".
SHARD = "shard"


class Wanted(NamedTuple):
    """A dataset to be made.

    Attributes:
        key: Its key.
        settings: What its manifest is to record.
        origin: Hash of its sources' paths; None for a stream.
        any_split: Whether an existing dataset may have held out something else.
    """

    key: str
    settings: Mapping[str, Any]
    origin: str | None
    any_split: bool = False

    def matches(self, settings: Mapping[str, Any]) -> bool:
        """Whether a dataset of these settings is what was asked for."""
        return settings == self.settings or (
            self.any_split and without_split(settings) == without_split(self.settings)
        )


def without_split(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without what is held out for validation."""
    return {k: v for k, v in settings.items() if k != SPLIT}


def settings_of(config: DataConfig, tokenizer: base.Tokenizer | None) -> dict[str, Any]:
    """Return the settings that a dataset's manifest records.

    Args:
        config: The data settings of a run or a preparation.
        tokenizer: The tokenizer to encode with, if it exists already.
    """
    settings = {k: getattr(config, k) for k in _SETTINGS}
    if config.dedup:
        settings[_DEDUP] = config.dedup
    if config.split == DOCUMENTS:
        settings[SPLIT] = DOCUMENTS
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer.kind
        if tokenizer.learns == "text":
            settings |= {_GIVEN: tokenizer.fingerprint, "vocab_size": None}
    settings["tokenizer"] = settings["tokenizer"] or DEFAULT_TOKENIZER
    return settings


def key_of(settings: Mapping[str, Any], sha256: str, layout: str = "") -> str:
    """Return the key of the dataset made from a text.

    Args:
        settings: From `settings_of`.
        sha256: The text's hash, as in Survey.
        layout: Hash of where its documents begin, as in Survey.
    """
    keyed = {k: settings[k] for k in (*_KEYED, _GIVEN, _UNKNOWN, SPLIT, SHARD) if k in settings}
    made_of = {"schema": 1, "text": sha256, "layout": layout, **keyed}
    return hashlib.sha256(strictjson.canonical(made_of)).hexdigest()


def difference(dataset: Dataset, settings: Mapping[str, Any]) -> str:
    """Describe the settings in which an existing dataset differs from a new one; empty if in none."""
    was, new = ({SPLIT: END, **found} for found in (dataset.settings, settings))
    return ", ".join(
        f"its {k} is {_plain(was.get(k))}, not {_plain(new.get(k))}"
        for k in (*_SETTINGS, _DEDUP, SPLIT)
        if was.get(k) != new.get(k)
    )


def conflicts(
    config: DataConfig, dataset: Dataset, tokenizer: base.Tokenizer | None
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that a dataset does not meet, as (actual, wanted); unset ones always match.

    Args:
        config: The data settings of a run.
        dataset: A dataset of the name that they give.
        tokenizer: The tokenizer of the model that training starts from, if there is one.
    """
    was = dataset.settings
    sizes = (was.get("vocab_size"), dataset.vocab_size)
    found: dict[str, tuple[Any, Any]] = {}
    if tokenizer is not None:
        if dataset.tokenizer.fingerprint != tokenizer.fingerprint:
            found["tokenizer"] = (was["tokenizer"], tokenizer.kind)
    elif config.tokenizer not in (None, was["tokenizer"]):
        found["tokenizer"] = (was["tokenizer"], config.tokenizer)
    elif config.vocab_size is not None and config.vocab_size not in sizes:
        found["vocab_size"] = (sizes[1], config.vocab_size)
    elif config.vocabulary is not None and dataset.tokenizer.to_dict().get("vocabulary") != "".join(
        config.vocabulary
    ):
        found["vocabulary"] = (f"{sizes[1]} characters", f"the {len(config.vocabulary)} given")
    default = DataConfig.model_fields["val_fraction"].default
    if config.val_fraction not in (default, was["val_fraction"]):
        found["val_fraction"] = (was["val_fraction"], config.val_fraction)
    if config.dedup not in (None, was.get(_DEDUP)):
        found[_DEDUP] = (was.get(_DEDUP), config.dedup)
    if config.split not in (None, was.get(SPLIT, END)):
        found[SPLIT] = (was.get(SPLIT, END), config.split)
    return found


def refuse(
    dataset: Dataset,
    found: Mapping[str, tuple[Any, Any]],
    config: DataConfig,
    tokenizer: base.Tokenizer | None,
) -> InputError:
    """Return the error for a dataset that does not meet the settings.

    Args:
        dataset: The dataset of that name.
        found: From `conflicts`; not empty.
        config: The data settings of the run.
        tokenizer: The tokenizer of the model that training starts from, if there is one.
    """
    if tokenizer is not None:
        other = "other characters" if dataset.kind == tokenizer.kind == "char" else "another tokenizer"
        given = _path_of(dataset)
        return InputError(
            f"dataset '{dataset.name}' has {other} than the model that training starts from",
            why="its ids mean something else to that model, which has to read the text itself",
            hint=f'set data.source="{given}"' if given else "name the text instead of the dataset",
        )
    name = f"{dataset.name[:50]}-{config.tokenizer or '2'}"
    changed = {k: new for k, (_, new) in found.items() if k != "vocabulary"}
    return InputError(
        f"dataset '{dataset.name}' was prepared with other settings",
        why=", ".join(f"its {k} is {_plain(old)}, not {_plain(new)}" for k, (old, new) in found.items()),
        hint=dataset.prepare_command(name=name, settings=changed),
    )


def _path_of(dataset: Dataset) -> str:
    """Return the file that a dataset was made of, if it is a single one that still exists."""
    given = dataset.manifest["source"]["given"]
    if len(given) != 1 or '"' in (path := given[0]) or not Path(path).exists():
        return ""
    return path if "/" in path else f"./{path}"


def _plain(value: Any) -> str:
    return "unset" if value is None else shorten(value, 40).strip("'")


def choose(
    root: Path, names: Sequence[str], wanted: Wanted, *, force: bool, on_bytes: OnBytes | None
) -> tuple[str, Dataset | None]:
    """Return the first usable name and the dataset that has it now.

    A name is usable if it is free or its dataset is this one or an older state of it. A damaged dataset
    is removed; nothing is lost.

    Args:
        root: The data root.
        names: The names to try.
        wanted: The dataset to be made.
        force: Replace another dataset.
        on_bytes: Called with the progress of verifying.

    Raises:
        RefusedError: No name is usable.
    """
    taken = RefusedError("no name is free")
    for name in names:
        path = root / name
        if not os.path.lexists(path):
            return name, None
        if fsio.is_removed(path):
            fsio.discard(path, root / fsio.TRASH)
            return name, None
        try:
            there = Dataset.open(path)
            if there.key == wanted.key and not force:
                there.verify(on_bytes, again=False)
        except CorruptError:
            fsio.discard(path, root / fsio.TRASH)
            return name, None
        except NotFoundError:
            taken = RefusedError(
                f"'{path}' exists but is not a dataset",
                why="quill only replaces what it made",
                hint=f"name={name}-2",
            )
            continue
        older = there.origin is not None and there.origin == wanted.origin
        if there.key == wanted.key or force or (older and wanted.matches(there.settings)):
            return name, there
        taken = RefusedError(
            f"dataset '{name}' exists already",
            why=difference(there, wanted.settings) or "it was made of another text",
            hint="force=True",
        )
    raise taken
