"""Resume states of a run: published like versions, several kept, a damaged one passed over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio, strictjson
from quill.checkpoint import weights as tensors
from quill.errors import CorruptError, NotFoundError

if TYPE_CHECKING:
    from torch import Tensor

    from quill.registry.draft import Draft

WEIGHTS, INFO = "state.safetensors", "state.json"


def save_state(
    draft: Draft, step: int, values: Mapping[str, Tensor], info: Mapping[str, Any], keep: int = 2
) -> Path:
    """Keep what a run needs to go on from a step; the newest `keep` states stay.

    Args:
        draft: The run's version in progress.
        step: Optimizer steps done.
        values: Weights, optimizer and random number generators, by name.
        info: The rest, as finite JSON.
        keep: How many states to keep, this one among them.

    Returns:
        The state's folder.

    Raises:
        ResourceError: Disk or permission; the states before it are untouched.
    """

    def make(folder: Path) -> None:
        fsio.create(folder / INFO, [strictjson.encode(dict(info))])
        tensors.write(folder / WEIGHTS, values)

    return draft.save_state(step, make, keep)


def load_state(draft: Draft) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Read the newest resume state whose hashes hold.

    Returns:
        Its tensors, its info, and a note for each newer one that is damaged; None where there is no state.

    Raises:
        CorruptError: There are states, and every one of them is damaged.
    """
    notes: list[str] = []
    for state in draft.states():
        try:
            info = state.load().read_object(INFO)
            with state.open_file(WEIGHTS) as reading:
                layout = tensors.read_layout(reading.file, reading.size, reading.path)
                return dict(tensors.views(layout, reading.whole())), info, notes
        except (CorruptError, NotFoundError) as e:
            notes.append(f"the resume state {state.path.name} is damaged and was passed over: {e}")
    if notes:
        raise CorruptError(
            f"no resume state of '{draft.reference}' can be read",
            why="; ".join(notes),
            hint="start it again with --resume never",
        )
    return None
