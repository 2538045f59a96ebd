"""How a model was made, for the playground: what `quill show` prints, without the paths of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from quill.errors import QuillError
from quill.evaluation import curves
from quill.registry import manifest
from quill.registry.version import Version

_FACTS = (
    "created", "parameters", "data", "parent", "teachers", "imported", "device", "dtype", "steps",
    "best_step", "averaged", "temperature", "held_out", "best_val_loss", "bits_per_byte", "seconds", "seeds",
    "versions",
)  # fmt: skip
# More points than a picture has columns show nothing more.
_MOST_POINTS = 400
_MOST_TEXT = 1 << 16


def describe_card(version: Version) -> dict[str, Any]:
    """The card of a version.

    Raises:
        QuillError: It is damaged.
    """
    config = version.config()
    return {
        "reference": version.reference,
        "bytes": version.size,
        "digest": version.digest,
        **{name: version.facts[name] for name in _FACTS},  # type: ignore[literal-required]
        "model": config.get("model", {}),
        "train": config.get("train", {}),
        "curves": _curves(version),
        "card": _text(version),
    }


def _text(version: Version) -> str | None:
    """The card that is stored with it; None if there is none."""
    if not version.has(manifest.CARD):
        return None
    return version.read_file(manifest.CARD)[:_MOST_TEXT].decode("utf-8", "replace")


@lru_cache(maxsize=64)
def _curves(version: Version) -> dict[str, Any] | None:
    """The losses of its run as [step, loss]; None if there are none, or they cannot be read."""
    try:
        found = curves.read(version.metrics())
    except QuillError:
        return None
    if not found:
        return None
    return {
        "train": thinned(found.smooth()),
        "val": thinned(found.val),
        "best": found.best,
    }


def thinned(points: Sequence[curves.Point]) -> list[curves.Point]:
    """Every n-th point and the last."""
    stride = -(-len(points) // _MOST_POINTS)
    return [p for i, p in enumerate(points) if i % stride == 0 or i == len(points) - 1] if points else []
