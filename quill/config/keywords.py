"""Settings as keyword arguments of the Python API: their names, and signatures that `help` shows.

Type checkers cannot derive them from the fields; they read `keyword_types`, which is generated.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from quill.config.settings import Section

F = TypeVar("F", bound=Callable[..., Any])


def paths(sections: Mapping[str, type[Section]]) -> dict[str, str]:
    """The dotted path of each setting, by its keyword: the name of its flag, with underscores.

    Args:
        sections: Sections by the prefix of their paths; "" for paths without one.
    """
    found: dict[str, str] = {}
    for prefix, section in sections.items():
        for name, field in section.model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            word = str(extra.get("flag", name)).replace("-", "_")
            found[name if keyword.iskeyword(word) else word] = f"{prefix}.{name}" if prefix else name
    return found


def documented(
    sections: Mapping[str, type[Section]], *, without: frozenset[str] = frozenset()
) -> Callable[[F], F]:
    """Show a function's settings in its signature, with types and defaults, in place of `**settings`.

    Args:
        sections: As for `paths`.
        without: Dotted paths that the function takes in another way.
    """

    def decorate(function: F) -> F:
        shown = inspect.signature(function)
        fields = {
            f"{prefix}.{name}" if prefix else name: field
            for prefix, section in sections.items()
            for name, field in section.model_fields.items()
        }
        parameters = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(
                word,
                inspect.Parameter.KEYWORD_ONLY,
                default=fields[path].default,
                annotation=fields[path].annotation,
            )
            for word, path in paths(sections).items()
            if path not in without
        ]
        function.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate
