"""What a repeated command finds under its name: nothing, a run to go on with, or a model that is done.

Repeating a run is always safe: an unfinished run of the same settings goes on, a finished one is
found, and other settings under the same name are refused.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from quill import strictjson
from quill.checkpoint import load as checkpoint
from quill.config import reading
from quill.config.differences import differences
from quill.config.settings import RunConfig
from quill.errors import NotFoundError, RefusedError
from quill.registry.draft import Draft
from quill.registry.store import Registry
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.data.store import Dataset

Resume = Literal["auto", "never", "must"]

# Where a run computes may differ from one repetition to the next without making it another run.
_OF_THE_MACHINE = frozenset({"train.device", "train.dtype", "train.compile", "train.keep_states"})
_OF_THE_FILE = frozenset({"name", "$schema", "schema_version", "train.log_interval"})
# What stands for "the data" is its content, compared apart; where it was read from may change.
_OF_THE_DATA = frozenset({"data.source", "data.encoding", "data.text_field"})


def changes(ran: RunConfig, asked: RunConfig) -> list[str]:
    """Settings that make one run another, as "train.batch_size 32 -> 64"."""
    aside = _OF_THE_MACHINE | _OF_THE_FILE | _OF_THE_DATA
    found = differences(ran.to_dict(), asked.to_dict(), aside)
    return [f"{name} {before!r} -> {after!r}" for name, (before, after) in found.items()]


def claim(
    config: RunConfig,
    dataset: Dataset,
    registry: Registry,
    resume: Resume,
    new_version: bool,
    parent: Version | None = None,
) -> Draft | Version:
    """The draft to work on, or the finished version that makes work needless.

    Args:
        config: The run, settled.
        dataset: Its data.
        registry: Where the name is looked up, and a new version begun.
        resume: Go on with an unfinished run if there is one (auto), never, or only then (must).
        new_version: Begin beside a finished version of other settings instead of refusing.
        parent: The model that a new run starts from.

    Raises:
        RefusedError: The name holds a run of other settings or data.
        NotFoundError: There is nothing to resume, and `resume` asks for it.
    """
    name = config.name or ""
    newest, draft = registry.newest(name), registry.unfinished(name)
    if draft is not None and newest is not None and draft.number < newest.number:
        draft = None  # given up for a later run; gc removes it
    if draft is not None:
        begun = _begun(draft)
        changed = _changes(begun, config, dataset) if begun else []
        if begun and not changed and resume != "never":
            return draft
        if resume == "must" or (changed and resume == "auto" and not new_version):
            raise RefusedError(
                f"{draft.reference} is unfinished and was begun with other settings",
                why="; ".join(changed) or "its settings cannot be read",
                hint=f"--name another, or start {name} over with --resume never",
            )
        if not new_version or not begun:
            draft.discard()
    if resume == "must":
        raise NotFoundError(
            f"no unfinished run of '{name}'", why="--resume must asks for one", hint="--resume auto"
        )
    if newest is not None and not newest.damaged:
        changed = _changes(newest, config, dataset) + _other_parent(newest, parent)
        if not changed and not (new_version and newest.manifest is None):
            return newest
        if not new_version:
            raise RefusedError(
                f"{newest.reference} was trained with other settings",
                why="; ".join(changed),
                hint=f"--new-version trains {name}:v{newest.number + 1}, --name another model",
            )
    draft = registry.begin(name)
    draft.write_json("config.json", config.to_dict())
    draft.write_json("tokenizer.json", dataset.tokenizer.to_dict())
    known = {"reference": parent.reference, "digest": parent.digest} if parent else None
    draft.update_status(**status(0), data_key=dataset.key, parent=known)
    return draft


def _begun(draft: Draft) -> Draft | None:
    """The draft, if it got as far as having settings."""
    return draft if draft.status() and draft.has("config.json") else None


def _changes(earlier: Draft | Version, config: RunConfig, dataset: Dataset) -> list[str]:
    if isinstance(earlier, Version):
        ran = checkpoint.read_config(earlier)
        key = ((earlier.manifest or {}).get("data") or {}).get("key")
    else:
        ran = reading.parse(strictjson.read(earlier.path / "config.json"), origin=earlier.reference)
        key = (earlier.status() or {}).get("data_key")
    changed = changes(ran, config)
    if key is not None and key != dataset.key:
        changed.append(f"the text or its preparation: {key[:12]} -> {dataset.key[:12]}")
    return changed


def _other_parent(finished: Version, parent: Version | None) -> list[str]:
    """What is said of a model that started from another one than its reference means by now."""
    before = (finished.manifest or {}).get("parent") or {}
    if parent is None or before.get("digest") in (None, parent.digest):
        return []
    return [f"the model it starts from: {before.get('reference')} -> {parent.reference}"]


def status(step: int) -> dict[str, Any]:
    """What status.json says of a run at a step, beside who is at it."""
    return {
        "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
    }
