"""The models and configs that come with quill. They are read-only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def folder(kind: Literal["weights", "configs"]) -> Path | None:
    """Find the folder of shipped models or configs.

    An installed package contains them; a checkout, and an editable installation of it, has them at its top.
    """
    package = Path(__file__).parent
    packed, checkout = package / "_shipped" / kind, package.parent / kind
    if packed.is_dir():
        return packed
    return checkout if checkout.is_dir() and (package.parent / "pyproject.toml").is_file() else None


def configs() -> dict[str, Path]:
    """The shipped configs by name."""
    found = folder("configs")
    paths = sorted(found.glob("*.json")) if found else []
    return {path.stem: path for path in paths if path.name != "schema.json"}
