"""Which tokenizers, blocks and formats exist: the files in their folders, and nothing else.

A file's name is its registered name. Names are read from the folder, so asking what exists imports
nothing; `load` imports the one that is wanted.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from quill.errors import InputError

# Files that hold what the members of a folder share, and so are not members.
_SHARED = {"tokenizers": {"base"}, "model.blocks": set[str](), "formats": {"base", "exporting", "importing"}}


@lru_cache
def names(package: str) -> tuple[str, ...]:
    """Names registered in a package of quill, sorted.

    Args:
        package: Dotted path below `quill`, such as "model.blocks".
    """
    folder = Path(__file__).parent.joinpath(*package.split("."))
    found = {f.stem for f in folder.glob("*.py") if not f.stem.startswith("_")}
    return tuple(sorted(found - _SHARED.get(package, set())))


def load(package: str, name: str) -> ModuleType:
    """Import one member of a package by its registered name.

    Raises:
        InputError: Nothing of that name is registered.
    """
    if name not in names(package):
        kind = package.rpartition(".")[2].rstrip("s")
        raise InputError(f"no {kind} named '{name}'", why=f"there is {', '.join(names(package))}")
    return import_module(f"quill.{package}.{name}")
