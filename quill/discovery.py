"""Which tokenizers, blocks, formats, loggers and commands exist: the files and packages in their folders.

The name of a file or package is its registered name. Listing names imports none of them; `load` imports
the one requested.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from quill.errors import InputError

# Files that the members of a folder share.
_SHARED = {
    "tokenizers": {"base"},
    "loggers": {"base"},
    "formats": {
        "base",
        "exporting",
        "importing",
        "plain_gpt2",
        "tokenizer_json",
        "torch_files",
        "vocabulary",
    },
}


@lru_cache
def names(package: str) -> tuple[str, ...]:
    """Names registered in a package of quill, sorted.

    Args:
        package: Dotted path below `quill`, such as "model.blocks".
    """
    folders = [Path(folder) for folder in import_module(f"quill.{package}").__path__]
    files = {f.stem for folder in folders for f in folder.glob("*.py")}
    packages = {f.parent.name for folder in folders for f in folder.glob("*/__init__.py")}
    found = {name for name in files | packages if not name.startswith("_")}
    return tuple(sorted(found - _SHARED.get(package, set())))


def load(package: str, name: str, module: str | None = None) -> ModuleType:
    """Import one member of a package by its registered name.

    Args:
        package: Dotted path below `quill`.
        name: The registered name.
        module: A module inside the member, where that is itself a package.

    Raises:
        InputError: Nothing is registered under that name.
    """
    if name not in names(package):
        kind = package.rpartition(".")[2].rstrip("s")
        raise InputError(f"no {kind} named '{name}'", why=f"choose from {', '.join(names(package))}")
    return import_module(".".join(filter(None, ("quill", package, name, module))))
