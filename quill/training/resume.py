"""What a repeated command finds under its name: an unfinished run, a finished model, or nothing.

Repeating a command is always safe. An unfinished run with the same settings resumes, a finished one is
left alone, and a run with other settings is refused.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from quill.checkpoint.load import read_config
from quill.config import reading
from quill.config.differences import differences
from quill.config.settings import RunConfig
from quill.errors import NotFoundError, RefusedError
from quill.registry.draft import Draft
from quill.registry.folder import Folder
from quill.registry.store import Registry
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.data.store import Dataset

Resume = Literal["auto", "never", "must"]

# Settings that may differ between two calls of the same run: where it computes, what it logs and keeps, and
# where the text was read from (the text itself is compared by its key).
_FREE = frozenset({
    "name", "$schema", "schema_version", "data.source", "data.encoding", "data.text_field",
    "train.device", "train.dtype", "train.compile", "train.keep_states", "train.log_interval",
})  # fmt: skip


def find(
    config: RunConfig,
    dataset: Dataset,
    registry: Registry,
    resume: Resume,
    new_version: bool,
    parent: Folder | None = None,
) -> Draft | Version | None:
    """Find the draft to resume or the finished version; discard a draft that is given up.

    Args:
        config: The run, settled.
        dataset: Its data.
        registry: Where the name is looked up.
        resume: Resume an unfinished run if there is one (auto), never, or fail without one (must).
        new_version: Accept a finished version with other settings instead of refusing.
        parent: The model that the run starts from.

    Returns:
        None if a new run is to begin.

    Raises:
        RefusedError: The name belongs to a run with other settings or data.
        NotFoundError: There is no unfinished run and `resume` is "must".
    """
    name = config.name or ""
    newest, draft = registry.newest(name), registry.unfinished(name)
    if draft is not None and newest is not None and draft.number < newest.number:
        draft = None  # superseded by a later run; gc removes it
    if draft is not None:
        has_settings = bool(draft.status()) and draft.has("config.json")
        changed = _changes_of_draft(draft, config, dataset) if has_settings else []
        if has_settings and not changed and resume != "never":
            return draft
        if resume == "must" or (changed and resume == "auto" and not new_version):
            raise refuse(draft, changed or ["its settings cannot be read"])
        if not new_version or not has_settings:
            draft.discard()
    if resume == "must":
        raise NotFoundError(
            f"no unfinished run of '{name}'", why='resume="must" requires one', hint='pass resume="auto"'
        )
    if newest is not None and not newest.damaged:
        changed = _changes_of_version(newest, config, dataset, parent)
        if not changed and not (new_version and newest.manifest is None):
            return newest
        if not new_version:
            raise refuse(newest, changed)
    return None


def refuse(earlier: Folder, changed: list[str]) -> RefusedError:
    """The error for a name that belongs to a run with other settings."""
    why = "; ".join(changed)
    if not earlier.is_published:
        return RefusedError(
            f"{earlier.reference} is unfinished and was started with other settings",
            why=why,
            hint='pass resume="never" to start over, or another name=',
        )
    return RefusedError(
        f"{earlier.reference} was trained with other settings",
        why=why,
        hint=f"pass new_version=True to train {earlier.name}:v{earlier.number + 1}, or another name=",
    )


def begin(config: RunConfig, dataset: Dataset, registry: Registry, parent: Folder | None) -> Draft:
    """Begin a version: its settings, its tokenizer, and the model it starts from."""
    draft = registry.begin(config.name or "")
    draft.write_json("config.json", config.to_dict())
    draft.write_json("tokenizer.json", dataset.tokenizer.to_dict())
    origin = {"reference": parent.reference, "digest": parent.digest} if parent else None
    draft.update_status(**progress(0), data_key=dataset.key, parent=origin)
    return draft


def progress(step: int) -> dict[str, Any]:
    """The fields of status.json that change as a run proceeds."""
    return {"updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "step": step}


def _changes_of_draft(draft: Draft, config: RunConfig, dataset: Dataset) -> list[str]:
    ran = reading.parse(draft.read_object("config.json"), origin=draft.reference)
    status = draft.status()
    return _changes(ran, config, status["data_key"] if status else None, dataset)


def _changes_of_version(
    version: Version, config: RunConfig, dataset: Dataset, parent: Folder | None
) -> list[str]:
    data, before = version.facts["data"], version.facts["parent"]
    changed = _changes(read_config(version), config, data["key"] if data else None, dataset)
    if parent is not None and before is not None and before["digest"] not in (None, parent.digest):
        changed.append(f"the model it starts from: {before['reference']} -> {parent.reference}")
    return changed


def _changes(ran: RunConfig, asked: RunConfig, key: str | None, dataset: Dataset) -> list[str]:
    """What differs between two runs, as "train.batch_size 32 -> 64"."""
    found = differences(ran.to_dict(), asked.to_dict(), _FREE)
    changed = [f"{name} {before!r} -> {after!r}" for name, (before, after) in found.items()]
    if key is not None and key != dataset.key:
        changed.append(f"the text or its preparation: {key[:12]} -> {dataset.key[:12]}")
    return changed
