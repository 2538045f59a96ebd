"""The Python API: what a notebook or a script calls, found as attributes of `quill`.

Each call is the command of the same name without its output; imports wait until they are needed, as
the command line's do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from quill.config.settings import RunConfig
    from quill.data.store import Dataset
    from quill.evaluation.measure import Figures
    from quill.formats.exporting import Exported
    from quill.generation.generator import Generator
    from quill.registry.store import Registry
    from quill.registry.version import Version


def load(reference: str, *, registry: str | PathLike[str] | None = None, device: str = "cpu") -> Generator:
    """A trained model by name, ready to draw text.

    Args:
        reference: "name", "name:vN", "name:alias", or a folder with a slash in it.
        registry: The registry's folder; found as the command line finds it where None.
        device: Where its weights shall be.

    Returns:
        A generator: `.generate(prompt, SampleConfig(...))` and `.stream(...)` draw text, `.model` is the
        torch module with `predict(idx, targets=...)`, `.tokenizer` its tokenizer.

    Raises:
        NotFoundError: There is no such model.
        CorruptError: Its files are damaged.
    """
    from quill.checkpoint.load import load_checkpoint
    from quill.generation.generator import Generator

    loaded = load_checkpoint(_registry(registry).resolve(reference), device)
    return Generator(loaded.model, loaded.tokenizer)


def prepare(
    source: str | list[str],
    *,
    name: str | None = None,
    registry: str | PathLike[str] | None = None,
    **data: Any,
) -> Dataset:
    """Turn text into a dataset; done already, it is found.

    Args:
        source: Files, folders and globs, or a named source.
        name: What to call it.
        registry: The registry beside which datasets are kept.
        **data: Settings of DataConfig, such as tokenizer="bpe", vocab_size=4096.

    Raises:
        InputError: The text or a setting does not allow it.
    """
    from quill.config import reading
    from quill.config.settings import DataConfig
    from quill.data import prepare as preparing
    from quill.data.store import locate

    config = reading.check(DataConfig, {"source": source, **data}, origin="prepare()")
    return preparing.prepare(config, locate(_registry(registry).root), name=name)


def train(
    config: str | PathLike[str] | Mapping[str, Any] | RunConfig,
    *,
    registry: str | PathLike[str] | None = None,
    **options: Any,
) -> Version | None:
    """Train a model and keep it; an unfinished run goes on, a finished one is found.

    Args:
        config: A config file, its content, or a RunConfig.
        registry: Where the model is kept.
        **options: As of `quill.training.run.train`: observer, resume, new_version, max_seconds, poll.

    Returns:
        The version; None where max_seconds ended the call first.

    Raises:
        InputError: A setting is refused.
        RefusedError: The name holds a run of other settings.
    """
    from pathlib import Path

    from quill.config import reading
    from quill.config.settings import RunConfig
    from quill.data.store import locate
    from quill.training import run

    if isinstance(config, RunConfig):
        settled = config
    elif isinstance(config, dict):
        settled = reading.parse(config, origin="train()")
    else:
        settled = reading.load(Path(config))  # type: ignore[arg-type]
    store = _registry(registry)
    return run.train(settled, store, locate(store.root), **options).version


def evaluate(
    reference: str, text: str, *, registry: str | PathLike[str] | None = None, device: str = "cpu"
) -> Figures:
    """Loss, perplexity and bits per byte of a model on a text.

    Args:
        reference: The model.
        text: What it shall predict.
        registry: The registry's folder.
        device: Where to compute.

    Raises:
        InputError: The text has characters the model has no token for.
    """
    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation.measure import evaluate_text

    loaded = load_checkpoint(_registry(registry).resolve(reference), device)
    return evaluate_text(loaded.model, loaded.tokenizer, text)


def export(
    reference: str,
    format: str = "hf",
    out: str | PathLike[str] | None = None,
    *,
    registry: str | PathLike[str] | None = None,
    **options: Any,
) -> Exported:
    """Write a model for other programs.

    Args:
        reference: The model.
        format: A registered format: hf, gguf, onnx, pt2, nanogpt, quillgpt.
        out: The file or folder; after the model's name where None.
        registry: The registry's folder.
        **options: As of `quill.formats.exporting.export`: dtype, verify, force.

    Raises:
        InputError: The format cannot hold the model.
        RefusedError: Something is there already, or the foreign program disagrees.
    """
    from pathlib import Path

    from quill.formats import exporting

    target = None if out is None else Path(out)
    return exporting.export(_registry(registry).resolve(reference), format, target, **options)


def import_model(source: str, *, registry: str | PathLike[str] | None = None, **options: Any) -> Version:
    """Keep a model that was made elsewhere.

    Args:
        source: A file, a folder, or hf:REPOSITORY.
        registry: The registry's folder.
        **options: As of `quill.formats.importing.import_model`: name, format_name, config, tokenizer,
            new_version.

    Raises:
        CorruptError: It is damaged, unsafe, or incomplete.
        InputError: Something is missing, or quill has no such model.
        RefusedError: The name is another model's.
    """
    from quill.formats import importing

    return importing.import_model(source, _registry(registry), **options)


def models(*, registry: str | PathLike[str] | None = None) -> list[Version]:
    """The newest version of every model in the registry, damaged ones marked."""
    return _registry(registry).entries()


def _registry(folder: str | PathLike[str] | None) -> Registry:
    from pathlib import Path

    from quill.registry.store import Registry, locate

    found = locate(Path(folder) if folder is not None else None)
    return Registry(found.root, found.why)
