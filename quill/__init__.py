"""quill: train, version, sample, evaluate and export small GPTs.

    import quill

    model = quill.load("shakespeare")
    print(model.generate("Once upon a time", temperature=0.5)[0])

Importing quill does not load torch; the first call that needs it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quill._version import __version__

if TYPE_CHECKING:
    from quill import errors
    from quill.api import (
        alias,
        cloze,
        compare,
        evaluate,
        explain,
        export,
        import_model,
        load,
        merge,
        models,
        overlap,
        prepare,
        rm,
        show,
        tasks,
        train,
    )
    from quill.config.settings import DataConfig, ModelConfig, RunConfig, SampleConfig, TrainConfig
    from quill.errors import QuillError
    from quill.training import events

_API = (
    "alias",
    "cloze",
    "compare",
    "evaluate",
    "explain",
    "export",
    "import_model",
    "load",
    "merge",
    "models",
    "overlap",
    "prepare",
    "rm",
    "show",
    "tasks",
    "train",
)
_HOMES = {
    "quill.api": _API,
    "quill.config.settings": ("DataConfig", "ModelConfig", "RunConfig", "SampleConfig", "TrainConfig"),
    "quill.errors": ("QuillError",),
}
_MODULES = {"errors": "quill.errors", "events": "quill.training.events"}

__all__ = [
    "DataConfig",
    "ModelConfig",
    "QuillError",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "__version__",
    "alias",
    "cloze",
    "compare",
    "errors",
    "evaluate",
    "events",
    "explain",
    "export",
    "import_model",
    "load",
    "merge",
    "models",
    "overlap",
    "prepare",
    "rm",
    "show",
    "tasks",
    "train",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _MODULES:
        return import_module(_MODULES[name])
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'quill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
