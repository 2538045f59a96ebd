"""Older layouts of what is stored, brought up to date while reading; what is on disk stays as it is.

Each step is a pure function from the dict of version N to that of version N + 1. A layout from the
future is refused, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from quill.errors import CorruptError, InputError

Kind = Literal["manifest", "config"]
Step = Callable[[dict[str, Any]], dict[str, Any]]

# STEPS[kind][n - 1] leads from version n to n + 1.
STEPS: Mapping[Kind, tuple[Step, ...]] = {"manifest": (), "config": ()}
SCHEMA_VERSION = len(STEPS["manifest"]) + 1
_KEYS: Mapping[Kind, str] = {"manifest": "schema", "config": "schema_version"}


def migrate(
    document: dict[str, Any],
    kind: Kind = "manifest",
    *,
    origin: str = "",
    steps: tuple[Step, ...] | None = None,
) -> dict[str, Any]:
    """Bring a stored document up to the version that this quill writes.

    Args:
        document: As it was read; it is not changed.
        kind: Which of the stored documents it is.
        origin: Its path, for messages.
        steps: The chain to follow; unset: the kind's own.

    Raises:
        InputError: A newer quill wrote it.
        CorruptError: Its version is not a number from 1 on.
    """
    chain = STEPS[kind] if steps is None else steps
    key = _KEYS[kind]
    # Configs put there by hand need not say a version; what quill writes always does.
    version = document.get(key, 1 if kind == "config" else None)
    if type(version) is not int or version < 1:
        raise CorruptError(
            f"'{origin or kind}' says {key} {ascii(version)[:60]}", why="versions are whole numbers from 1"
        )
    newest = len(chain) + 1
    if version > newest:
        raise InputError(
            f"'{origin or kind}' needs quill {_writer(document)}",
            why=f"its layout is version {version}, this quill reads up to {newest}",
            hint="pip install --upgrade quill",
        )
    migrated = dict(document)
    for number, step in enumerate(chain[version - 1 :], start=version + 1):
        migrated = {**step(migrated), key: number}
    return migrated


def _writer(document: dict[str, Any]) -> str:
    versions = document.get("versions")
    written_by = versions.get("quill") if isinstance(versions, dict) else None
    return f">= {written_by}" if isinstance(written_by, str) else "of a later release"
