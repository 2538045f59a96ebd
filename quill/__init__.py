"""quill: train, keep, sample, measure and hand on small GPTs by name.

    import quill

    model = quill.load("shakespeare")
    print(model.generate("Once upon a time", quill.SampleConfig(max_new_tokens=200))[0])

Importing quill loads no torch; the first call that needs it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quill._version import __version__

if TYPE_CHECKING:
    from quill.api import evaluate, export, import_model, load, models, prepare, train
    from quill.config.settings import SampleConfig

__all__ = [
    "SampleConfig",
    "__version__",
    "evaluate",
    "export",
    "import_model",
    "load",
    "models",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'quill' has no attribute {name!r}")
    from importlib import import_module

    home = "quill.config.settings" if name == "SampleConfig" else "quill.api"
    return getattr(import_module(home), name)
