"""Which tokenizers, blocks and formats exist: the files and packages in their folders, and nothing else.

The name of a file or package is its registered name. Names are read from the folder, so asking what
exists imports nothing; `load` imports the one that is wanted.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from quill.errors import InputError

# What the members of a folder share, and so are not members.
_SHARED = {
    "tokenizers": {"base"},
    "formats": {
        "base",
        "byte_level",
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
    folder = Path(__file__).parent.joinpath(*package.split("."))
    modules = {f.stem for f in folder.glob("*.py")} | {f.parent.name for f in folder.glob("*/__init__.py")}
    found = {name for name in modules if not name.startswith("_")}
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
