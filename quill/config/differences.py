"""The settings in which two configs differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def differences(
    one: dict[str, Any], other: dict[str, Any], ignored: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by dotted path and sorted, with both values.

    Args:
        one: A config in sections.
        other: Another. A setting missing from one of them counts as None there.
        ignored: Dotted paths to leave out.
    """
    before, after = _flat(one), _flat(other)
    names = [k for k in sorted(before | after) if k not in ignored]
    return {k: (before.get(k), after.get(k)) for k in names if before.get(k) != after.get(k)}


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    return flat
