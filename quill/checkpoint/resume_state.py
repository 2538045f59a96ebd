"""Resume states: what a run needs to continue from a step. A damaged one is skipped for an older one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quill import fsio, strictjson
from quill.checkpoint import shards
from quill.checkpoint.weights import read_tensors, save_tensors
from quill.errors import CorruptError, NotFoundError
from quill.registry.tensors import read_layout

if TYPE_CHECKING:
    from torch import Tensor

    from quill.registry.draft import Draft, ResumeState

TENSORS, INFO = "state.safetensors", "state.json"


class Saved(NamedTuple):
    """A resume state that is not damaged.

    Attributes:
        tensors: By name; empty if they were not to be read.
        info: Everything else.
        notes: A sentence for each newer state that is damaged.
        folder: Where it is.
    """

    tensors: dict[str, Tensor]
    info: dict[str, Any]
    notes: list[str]
    folder: Path


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_tensors(folder / TENSORS, tensors)


def save_state(
    draft: Draft,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    keep: int = 2,
    facts: Mapping[str, Any] | None = None,
    write: Callable[[Path, Mapping[str, Tensor]], object] = _write,
) -> Path:
    """Save a resume state, and keep only the newest ones.

    Args:
        draft: The run's draft.
        step: Optimizer steps done.
        tensors: Weights, optimizer and random number generators, by name.
        info: Everything else, as finite JSON.
        keep: How many states to keep, this one included.
        facts: What the run's status says of this step.
        write: Writes the tensors into a folder, as safetensors files.

    Returns:
        The state's folder.

    Raises:
        LockedError: Another process has taken the draft over.
        ResourceError: The disk failed or refused; the earlier states are unchanged.
    """

    def make(folder: Path) -> None:
        fsio.create(folder / INFO, [strictjson.encode(dict(info))])
        write(folder, tensors)

    return draft.save_state(step, make, keep, facts)


def load_state(
    draft: Draft, *, read: bool = True, parse: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Saved | None:
    """Find the newest resume state that is not damaged.

    Args:
        draft: The run's draft.
        read: Whether to read its tensors, not only to check their files.
        parse: Checks what the state has besides tensors, and completes it; it raises CorruptError.

    Returns:
        None if there is no state.

    Raises:
        CorruptError: Every state is damaged.
    """
    notes: list[str] = []
    for state in draft.states():
        try:
            info = parse(state.load().read_object(INFO))
            return Saved(_tensors(state) if read else _checked(state), info, notes, state.path)
        except (CorruptError, NotFoundError) as e:
            notes.append(f"skipped the resume state {state.path.name}, which is damaged: {e}")
    if notes:
        raise CorruptError(
            f"every resume state of '{draft.reference}' is damaged",
            why="; ".join(notes),
            hint='pass resume="never" to start over',
        )
    return None


def _tensors(state: ResumeState) -> dict[str, Tensor]:
    if state.has(TENSORS):
        with state.open_file(TENSORS) as file:
            return read_tensors(file, read_layout(file.path))
    _checked(state)
    return shards.read_whole(state.path)


def _checked(state: ResumeState) -> dict[str, Tensor]:
    """Check the files of a state, of which at least one must have tensors; none is returned."""
    names = list(state.facts["files"])
    for name in names if any(n.endswith(".safetensors") for n in names) else [*names, TENSORS]:
        with state.open_file(name) as file:
            file.sha256()
    return {}
