"""What a repeated command finds under its name: an unfinished run, a finished model, or nothing.

Repeating a command is always safe. An unfinished run with the same settings resumes, a finished one is
left alone, and a run with other settings is refused. A larger max_iters lengthens either of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quill.checkpoint.load import read_config
from quill.config import reading
from quill.config.differences import differences
from quill.config.settings import RunConfig
from quill.errors import NotFoundError, QuillError, RefusedError
from quill.registry.draft import Draft
from quill.registry.folder import Folder
from quill.registry.manifest import METRICS, Data, Manifest, Source
from quill.registry.store import Registry
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.training.inputs import Inputs

Resume = Literal["auto", "never", "must"]

# Settings that may differ between two calls of the same run. They change none of its steps: where it
# computes, what it logs, keeps and measures, and where the text was read from (the text has a key).
_FREE = frozenset({
    "name", "$schema", "schema_version", "data.source", "data.encoding", "data.text_field",
    "data.dedup", "train.device", "train.dtype", "train.compile", "train.keep_states", "train.log_interval",
    "train.eval_interval", "train.patience", "train.calibrate", "train.sample_every",
    "train.micro_batch_size", "train.gradient_checkpointing", "train.sharding",
})  # fmt: skip
_LENGTH = "train.max_iters"


class Found(NamedTuple):
    """What a command finds under its name, and what it should do.

    Attributes:
        config: The run to carry out: as asked for, but with the rates that the earlier run derived.
        draft: An unfinished run to resume.
        done: A finished version that needs no more training.
        longer: A finished version to train for more steps.
    """

    config: RunConfig
    draft: Draft | None = None
    done: Version | None = None
    longer: Version | None = None


def find(
    inputs: Inputs,
    registry: Registry,
    resume: Resume,
    new_version: bool,
    parent: Folder | None = None,
    teachers: Sequence[Folder] = (),
) -> Found:
    """Look for an earlier run under the name; discard a draft that is given up.

    Args:
        inputs: The settled run and its data.
        registry: Where the name is looked up.
        resume: Resume an unfinished run if there is one (auto), never, or fail without one (must).
        new_version: Train another version next to a finished one with other settings instead of refusing.
        parent: The model that the run starts from.
        teachers: The models that it learns from.

    Raises:
        RefusedError: The name belongs to a run with other settings or data.
        NotFoundError: There is no unfinished run and `resume` is "must".
    """
    name = inputs.config.name or ""
    newest, draft = registry.newest(name), registry.unfinished(name)
    if draft is not None and newest is not None and draft.number < newest.number:
        draft = None  # superseded by a later run; gc removes it
    if draft is not None:
        has_settings = bool(draft.status()) and draft.has("config.json")
        changed: list[str] = []
        if has_settings:
            status = draft.status()
            ran = reading.parse(draft.read_object("config.json"), origin=draft.reference)
            key, data = status["data_key"] if status else None, draft.facts["data"]
            changed = _changes(ran, inputs, data, key=key)
            changed += _other_teachers(status["teachers"] if status else None, teachers)
            if key is None and data is None and ran.data.source != inputs.config.data.source:
                # A state of an earlier quill whose status was lost does not say what the run read.
                changed.append(f"data.source {ran.data.source!r} -> {inputs.config.data.source!r}")
            if not changed and resume != "never":
                return Found(inputs.adopt(ran), draft=draft, longer=_extended(draft, registry))
        if resume == "must" or (changed and resume == "auto" and not new_version):
            raise refuse(draft, changed or ["its settings cannot be read"])
        if not new_version or not has_settings:
            draft.discard()
    if resume == "must":
        raise NotFoundError(
            f"no unfinished run of '{name}'", why='resume="must" requires one', hint='pass resume="auto"'
        )
    if newest is None or newest.damaged:
        return Found(inputs.config)
    ran = read_config(newest)
    changed = _changes(ran, inputs, newest.facts["data"]) + _other_parent(newest, parent)
    changed += _other_teachers(newest.facts["teachers"], teachers, newest.name)
    before, after = ran.train.max_iters, inputs.config.train.max_iters
    if not changed and not new_version and _is_longer(inputs.config, ran, newest.facts):
        if others := _other_teachers(newest.facts["teachers"], teachers):
            raise refuse(newest, others)
        return Found(inputs.adopt(ran), longer=newest)
    if not changed and after <= before and not (new_version and newest.manifest is None):
        return Found(inputs.adopt(ran), done=newest)
    if not new_version:
        raise refuse(newest, changed or [f"{_LENGTH} {before} -> {after}"])
    return Found(inputs.config)


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


def begin(
    config: RunConfig,
    inputs: Inputs,
    registry: Registry,
    parent: Folder | None,
    longer: Version | None,
    teachers: Sequence[Folder] = (),
) -> Draft:
    """Begin a version: its settings, its tokenizer, and the models it starts and learns from."""
    draft = registry.begin(config.name or "")
    draft.write_json("config.json", config.to_dict())
    draft.write_json("tokenizer.json", inputs.dataset.tokenizer.to_dict())
    facts: dict[str, Any] = {"parent": _origin(parent)}
    if longer is not None:
        facts = {"parent": longer.facts["parent"], "extends": _origin(longer)}
        draft.write_chunks(METRICS, longer.metrics())
    if teachers:
        facts["teachers"] = [_origin(t) for t in teachers]
    draft.update_status(**progress(0), data_key=inputs.dataset.key, **facts)
    return draft


def progress(step: int) -> dict[str, Any]:
    """The fields of status.json that change as a run proceeds."""
    return {"updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "step": step}


def _origin(version: Folder | None) -> dict[str, Any] | None:
    return {"reference": version.reference, "digest": version.digest} if version else None


def _changes(ran: RunConfig, inputs: Inputs, data: Data | None, key: str | None = None) -> list[str]:
    """What makes this another run than the earlier one, as "train.batch_size 32 -> 64"."""
    dataset, aside = inputs.dataset, _FREE | inputs.derived
    if inputs.config.train.max_iters > ran.train.max_iters:
        aside |= {_LENGTH}
    same_tokens = data is not None and (data["sha256"], data["tokenizer_sha256"]) == (
        dataset.manifest["source"]["sha256"],
        dataset.tokenizer.fingerprint,
    )
    if same_tokens:
        # Whether the tokenizer was made from this text or came with the parent makes no difference.
        aside |= {"data.vocabulary", "data.vocab_size"}
    found = differences(ran.to_dict(), inputs.config.to_dict(), aside)
    changed = [f"{name} {before!r} -> {after!r}" for name, (before, after) in found.items()]
    key = key or (data["key"] if data is not None else None)
    if key is not None and key != dataset.key and not same_tokens:
        changed.append(f"the text or its preparation: {key[:12]} -> {dataset.key[:12]}")
    return changed


def _other_parent(finished: Version, parent: Folder | None) -> list[str]:
    """The change of a parent since a model was trained; a model that starts from its own name has none."""
    before = finished.facts["parent"]
    if before is None or parent is None or parent.name == finished.name:
        return []
    if before["digest"] in (None, parent.digest):
        return []
    return [f"the model it starts from: {before['reference']} -> {parent.reference}"]


def _other_teachers(
    recorded: list[Source] | None, teachers: Sequence[Folder], own_name: str = ""
) -> list[str]:
    """The changes of teachers since a run started; a model that learns from its own name has none."""
    return [
        f"the model that it learns from: {before.get('reference')} -> {now.reference}"
        for before, now in zip(recorded or (), teachers, strict=False)
        if now.name != own_name and before.get("digest") != now.digest
    ]


def _is_longer(asked: RunConfig, ran: RunConfig, facts: Manifest) -> bool:
    """Whether a finished run is asked for more steps, or for those that its patience had spared it."""
    steps = facts["steps"]
    if steps is None or not 0 < steps < asked.train.max_iters:
        return False
    impatient = facts["ended"] == "patience" and asked.train.patience != ran.train.patience
    return asked.train.max_iters > ran.train.max_iters or impatient


def _extended(draft: Draft, registry: Registry) -> Version | None:
    """The finished version that an unfinished run lengthens; not needed once the run has a state."""
    status = draft.status()
    extends = status["extends"] if status else None
    if extends is None:
        return None
    try:
        return registry.resolve(str(extends["reference"]))
    except QuillError:
        if draft.states():
            return None
        raise
