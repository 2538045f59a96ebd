"""Resume states: what a run needs to continue from a step. A damaged one is skipped for an older one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio, strictjson
from quill.checkpoint.weights import read_tensors, save_tensors
from quill.errors import CorruptError, NotFoundError
from quill.registry.tensors import read_layout

if TYPE_CHECKING:
    from torch import Tensor

    from quill.registry.draft import Draft

WEIGHTS, INFO = "state.safetensors", "state.json"


def save_state(
    draft: Draft,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    keep: int = 2,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Save a resume state, and keep only the newest ones.

    Args:
        draft: The run's draft.
        step: Optimizer steps done.
        tensors: Weights, optimizer and random number generators, by name.
        info: Everything else, as finite JSON.
        keep: How many states to keep, this one included.
        facts: What the run's status says of this step.

    Returns:
        The state's folder.

    Raises:
        LockedError: Another process has taken the draft over.
        ResourceError: The disk failed or refused; the earlier states are unchanged.
    """

    def make(folder: Path) -> None:
        fsio.create(folder / INFO, [strictjson.encode(dict(info))])
        save_tensors(folder / WEIGHTS, tensors)

    return draft.save_state(step, make, keep, facts)


def load_state(draft: Draft) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Read the newest resume state that is not damaged.

    Returns:
        Its tensors, its info, and a note for each newer state that is damaged; None if there is no state.

    Raises:
        CorruptError: Every state is damaged.
    """
    notes: list[str] = []
    for state in draft.states():
        try:
            info = state.load().read_object(INFO)
            with state.open_file(WEIGHTS) as file:
                return read_tensors(file, read_layout(file.path)), info, notes
        except (CorruptError, NotFoundError) as e:
            notes.append(f"skipped the resume state {state.path.name}, which is damaged: {e}")
    if notes:
        raise CorruptError(
            f"every resume state of '{draft.reference}' is damaged",
            why="; ".join(notes),
            hint='pass resume="never" to start over',
        )
    return None
