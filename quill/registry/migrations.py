"""Migrate stored documents of older schemas while they are read; the files stay as they are.

Each step is a pure function from a document of version N to one of version N + 1. A newer schema is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from quill.errors import CorruptError, newer, shorten

Kind = Literal["manifest", "config", "model"]
Step = Callable[[dict[str, Any]], dict[str, Any]]

# STEPS[kind][n - 1] leads from version n to n + 1.
STEPS: Mapping[Kind, tuple[Step, ...]] = {"manifest": (), "config": (), "model": ()}
SCHEMA_VERSION = len(STEPS["manifest"]) + 1
_KEYS: Mapping[Kind, str] = {"manifest": "schema", "config": "schema_version", "model": "schema"}
# Files that a person may write need not have a version; what quill writes always does.
_OPTIONAL = ("config", "model")


def migrate(
    document: dict[str, Any],
    kind: Kind = "manifest",
    *,
    origin: str = "",
    steps: tuple[Step, ...] | None = None,
) -> dict[str, Any]:
    """Bring a stored document up to the schema that this quill writes.

    Args:
        document: As it was read; it is not changed.
        kind: Which of the stored documents it is; "model" for model.json.
        origin: Its path, for messages.
        steps: The steps to follow; None for the kind's own.

    Raises:
        InputError: A newer quill wrote it.
        CorruptError: Its version is not a whole number of at least 1.
    """
    chain = STEPS[kind] if steps is None else steps
    key = _KEYS[kind]
    version = document.get(key, 1 if kind in _OPTIONAL else None)
    if type(version) is not int or version < 1:
        why = f"its {key} is {shorten(version)}, not a whole number of at least 1"
        raise CorruptError(f"'{origin or kind}' is damaged", why=why)
    if version > len(chain) + 1:
        versions = document.get("versions")
        by = versions.get("quill") if isinstance(versions, dict) else None
        raise newer(f"'{origin or kind}'", version, len(chain) + 1, by if isinstance(by, str) else None)
    migrated = dict(document)
    for number, step in enumerate(chain[version - 1 :], start=version + 1):
        migrated = {**step(migrated), key: number}
    return migrated
