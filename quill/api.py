"""The Python API, found as attributes of `quill`.

Each function is the command of the same name without its output. Torch is imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from quill import shipped
from quill.config import keywords, reading
from quill.config.settings import SECTIONS, DataConfig, RunConfig, SampleConfig
from quill.registry.folder import Folder

if TYPE_CHECKING:
    from os import PathLike

    from quill.config.keyword_types import RunSettings, SampleSettings, TextSettings
    from quill.data import prepare as preparing
    from quill.data.dataset import Dataset
    from quill.evaluation.cloze import Cloze
    from quill.evaluation.measure import Figures
    from quill.evaluation.overlap import Overlaps
    from quill.explanation.explanation import Explanation
    from quill.formats.exporting import Exported
    from quill.generation.generator import Generator
    from quill.notebook import Comparison, Facts, Models
    from quill.registry.store import Registry
    from quill.registry.version import Version
    from quill.training.events import Observer

    StrPath = str | PathLike[str]
    # A reference, or what another call returned.
    Reference = str | Folder

# The facts of a manifest that compare shows.
_FIGURES = (
    "best_val_loss", "bits_per_byte", "parameters", "steps", "best_step", "seconds", "device", "created",
)  # fmt: skip


def load(reference: Reference, *, registry: StrPath | None = None, device: str = "auto") -> Generator:
    """Load a trained model, ready to generate text.

    Args:
        reference: "name", "name:vN", "name:alias", a folder written with a slash, or a Version.
        registry: The registry's folder; found as the command line finds it if None.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        A generator: `.generate(prompt, temperature=0.5)` and `.stream(...)` generate text, `.model` is the
        torch module with `predict(idx, targets=...)`, `.tokenizer` its tokenizer.

    Raises:
        NotFoundError: There is no such model.
        CorruptError: Its files are damaged.
        ResourceError: There is no such device.
    """
    from quill.checkpoint.load import load_checkpoint
    from quill.generation.generator import Generator
    from quill.training.device import find_device

    loaded = load_checkpoint(
        _find(_home(reference, registry), reference), find_device(reading.device(device))
    )
    return Generator(loaded.model, loaded.tokenizer, name=loaded.version.reference)


@keywords.documented({"data": DataConfig}, without=frozenset({"data.source"}))
def prepare(
    source: str | list[str],
    *,
    name: str | None = None,
    registry: StrPath | None = None,
    force: bool = False,
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    observer: preparing.Observer | None = None,
    **settings: Unpack[TextSettings],
) -> Dataset:
    """Prepare a dataset from text, or return it if it exists unchanged.

    Args:
        source: Files, folders and globs, or a named source.
        name: Name of the dataset; derived from the source if None.
        registry: The registry whose datasets are used.
        force: Rebuild even if the dataset is up to date.
        workers: Number of threads that encode; one per processor if None.
        shard: Prepare only the second of eight shards of the text, for (2, 8), as the dataset NAME-2-of-8;
            `merge` makes them one.
        observer: Called with progress and notices.
        **settings: Fields of DataConfig, such as tokenizer="bpe", vocab_size=4096.

    Raises:
        InputError: The text or a setting is invalid.
        NotFoundError: There is no such file.
        RefusedError: The name belongs to another dataset.
    """
    from quill.data import prepare as preparing
    from quill.data.store import locate

    config = reading.check(DataConfig, {"source": source, **settings}, origin="the arguments")
    root = locate(_registry(registry).root)
    return preparing.prepare(
        config, root, name=name, force=force, workers=workers, observer=observer, shard=shard
    )


def merge(
    name: str,
    *,
    registry: StrPath | None = None,
    force: bool = False,
    observer: preparing.Observer | None = None,
) -> Dataset:
    """Merge all shards of a text into the dataset that a single call would have prepared, and remove them.

    Args:
        name: The name that the shards were prepared for, which the dataset gets.
        registry: The registry whose datasets are used.
        force: Replace another dataset of that name.
        observer: Called with progress.

    Raises:
        InputError: Shards are missing, or are of different texts, settings or versions of quill.
        NotFoundError: There are no shards.
        CorruptError: A file of one is damaged.
        RefusedError: The name belongs to another dataset.
    """
    from quill.data import merge as merging
    from quill.data import prepare as preparing
    from quill.data.store import locate

    root = locate(_registry(registry).root)
    return merging.merge(name, root, force=force, on_bytes=preparing.reporter(observer))


@keywords.documented(SECTIONS)
def train(
    config: StrPath | Mapping[str, Any] | RunConfig | None = None,
    *,
    name: str | None = None,
    registry: StrPath | None = None,
    resume: Literal["auto", "never", "must"] = "auto",
    new_version: bool = False,
    max_seconds: float | None = None,
    publish: bool = True,
    wait: float = 0.0,
    keep: int | None = None,
    log_to: str | Sequence[str] = (),
    progress: bool | None = None,
    observer: Observer | None = None,
    on_data: preparing.Observer | None = None,
    poll: Callable[[], None] = lambda: None,
    **settings: Unpack[RunSettings],
) -> Version | None:
    """Train a model; an unfinished run of the same settings is resumed, a finished one returned.

    Args:
        config: A config file, its content, a RunConfig, the name of a config in ./configs, or a dataset or
            text to train on.
        name: Name of the model; that of the config or the data if None.
        registry: The registry's folder; found as the command line finds it if None.
        resume: Resume an unfinished run if there is one (auto), never, or fail without one (must).
        new_version: Train another version of a model that is finished with other settings.
        max_seconds: Time for this call. If it does not suffice for max_iters, the learning rate decays to the
            end of the time instead, and the model reached by then is published.
        publish: Whether to publish at the end of the time; if not, the state is saved, and another call
            resumes.
        wait: Seconds to wait for another process that is training this name.
        keep: Afterwards remove all but this many of the newest versions; those with an alias stay.
        log_to: Loggers to copy the run's figures to: tensorboard, wandb, trackio, mlflow.
        progress: Whether to show progress; only in a notebook if None.
        observer: Called with each of the run's events; see `quill.events`.
        on_data: Called with the progress of preparing the data.
        poll: Called between forward passes; may raise to stop the run.
        **settings: Fields of DataConfig, ModelConfig and TrainConfig by the names of their flags, such as
            data="shakespeare", max_iters=300; they win over `config`.

    Returns:
        The version; None if the time ended the call and `publish` is False.

    Raises:
        InputError: A setting is invalid.
        RefusedError: The name has a run with other settings.
        LockedError: Another process is training this name.
    """
    from quill.data.store import locate
    from quill.notebook import Progress, is_notebook
    from quill.training import run

    store = _registry(registry)
    if isinstance(parent := settings.get("init_from"), Folder):
        settings["init_from"] = _in(store, parent)
    shown = Progress() if progress or (progress is None and is_notebook()) else None
    observers = [o for o in (shown, observer) if o is not None]

    def observe(event: Any) -> None:
        for each in observers:
            each(event)

    try:
        return run.train(
            _run_config(config, name, settings),
            store,
            locate(store.root),
            resume=resume,
            new_version=new_version,
            max_seconds=max_seconds,
            publish=publish,
            wait=wait,
            keep=keep,
            log_to=[log_to] if isinstance(log_to, str) else log_to,
            observer=observe,
            on_data=on_data,
            poll=poll,
        ).version
    finally:
        if shown is not None:
            shown.close()


def evaluate(
    reference: Reference,
    text: str | None = None,
    *,
    data: str | None = None,
    split: Literal["train", "val"] | None = None,
    iters: int | None = None,
    report: bool = False,
    unknown: Literal["error", "skip"] = "error",
    registry: StrPath | None = None,
    device: str = "auto",
) -> Figures:
    """Measure loss, perplexity and bits per byte of a model.

    Args:
        reference: The model.
        text: A text to predict.
        data: A dataset, a named source or a file instead; what the model was trained on if neither is given.
        split: The split of a dataset; "val" if None.
        iters: Number of random batches to estimate from; every token once if None.
        report: Also measure calibration and the loss by context: `.report` of what is returned.
        unknown: What to do with characters that have no token; skipped ones are not measured.
        registry: The registry's folder; found as the command line finds it if None.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        InputError: The text is too short, or a character of it has no token.
        NotFoundError: There is no such model or data.
    """
    from quill.checkpoint.load import load_checkpoint
    from quill.data.store import locate
    from quill.errors import InputError
    from quill.evaluation import measure, texts
    from quill.training.device import find_device

    if text is not None and (data is not None or split is not None):
        raise InputError("text and data are mutually exclusive", why="one text is measured at a time")
    store = _home(reference, registry)
    loaded = load_checkpoint(_find(store, reference), find_device(reading.device(device)))
    if text is not None:
        tokens, n_bytes = texts.encode(loaded.tokenizer, text, unknown)
    else:
        _, tokens, n_bytes = texts.find(loaded, data, split, locate(store.root), unknown=unknown)
    return measure.evaluate(loaded.model, tokens, n_bytes=n_bytes, iters=iters, report=report)


@keywords.documented({"": SampleConfig})
def explain(
    model: Reference | Generator,
    prompt: str = "",
    *,
    last: int = 64,
    unknown: Literal["error", "skip"] = "error",
    registry: StrPath | None = None,
    device: str = "auto",
    **settings: Unpack[SampleSettings],
) -> Explanation:
    """Explain how a model gets from a prompt to the next token.

    Args:
        model: A model, or what `quill.load` returned.
        prompt: The text that it reads; empty for the start of a text.
        last: Only the last tokens of the prompt are read, so many; at most 256.
        unknown: What to do with characters of the prompt that have no token.
        registry: The registry's folder; found as the command line finds it if None.
        device: auto, cpu, cuda, cuda:N or mps.
        **settings: Fields of SampleConfig; temperature, top_k, top_p and min_p matter here.

    Returns:
        An explanation, which a notebook shows as an interactive page: `.trace` has every intermediate result
        (`.trace.layers[0].weights` is the attention of the first block), `.lens`, `.next_tokens()` and
        `.contributions([token])` read it, `.to_dict()` and `.html()` write it.

    Raises:
        InputError: A setting is invalid, or the model's block does not show what happens inside.
        NotFoundError: There is no such model.
    """
    from quill.explanation.explanation import Explanation
    from quill.generation.generator import Generator

    config = reading.check(SampleConfig, settings, origin="the arguments")
    generator = model if isinstance(model, Generator) else load(model, registry=registry, device=device)
    return Explanation(generator, prompt, config, last=last, unknown=unknown)


def overlap(
    reference: str,
    samples: int = 500,
    *,
    data: str | None = None,
    registry: StrPath | None = None,
    device: str = "auto",
) -> Overlaps:
    """Measure how much of a model's samples stands verbatim in its training text.

    Args:
        reference: The model.
        samples: Number of samples to generate, each of 300 characters at temperature 1.
        data: A dataset, a named source or a file instead of what the model was trained on.
        registry: The registry's folder; found as the command line finds it if None.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        The overlap of the samples, and that of the validation text for comparison.

    Raises:
        InputError: There are no samples, or the model was imported and `data` is None.
        NotFoundError: There is no such model or data.
    """
    from quill.checkpoint.load import load_checkpoint
    from quill.data.store import locate
    from quill.errors import InputError
    from quill.evaluation import overlap, texts
    from quill.generation.generator import Generator
    from quill.training.device import find_device

    if samples < 1:
        raise InputError(f"samples={samples} is out of range", why="at least 1 is needed")
    store = _home(reference, registry)
    loaded = load_checkpoint(_find(store, reference), find_device(reading.device(device)))
    training = texts.training(loaded, data, locate(store.root))
    return overlap.measure(Generator(loaded.model, loaded.tokenizer), training, samples)


def cloze(
    reference: Reference,
    file: StrPath,
    *,
    unknown: Literal["error", "skip"] = "error",
    registry: StrPath | None = None,
    device: str = "auto",
) -> Cloze:
    """Measure how many questions of a file a model answers right.

    Args:
        reference: The model.
        file: JSON lines with `text`, `answer` and perhaps `choices`.
        unknown: What to do with characters that have no token.
        registry: The registry's folder; found as the command line finds it if None.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        InputError: A line of the file is not a question, or does not suit the model.
        NotFoundError: There is no such model or file.
    """
    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation import cloze
    from quill.training.device import find_device

    questions = cloze.read(Path(file))
    store = _home(reference, registry)
    loaded = load_checkpoint(_find(store, reference), find_device(reading.device(device)))
    return cloze.measure(loaded.model, loaded.tokenizer, questions, unknown=unknown)


def tasks(
    reference: Reference,
    names: str | Sequence[str],
    *,
    registry: StrPath | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Measure a model on tasks of lm-evaluation-harness, which the extra `lm-eval` installs.

    Args:
        reference: The model.
        names: A task that the harness knows, a YAML file of one, or several of them.
        registry: The registry's folder; found as the command line finds it if None.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        For each task and metric `task`, `metric`, `filter`, `value`, `standard_error` (None without one) and
        `examples`.

    Raises:
        InputError: No task is named, the harness is not installed, or a character of a task has no token.
        NotFoundError: There is no such model or task.
        ResourceError: A task fails, for example because its data cannot be downloaded.
    """
    from quill.errors import InputError
    from quill.evaluation import harness

    wanted = [names] if isinstance(names, str) else list(names)
    if not wanted:
        raise InputError("no task is named", why="at least 1 is needed")
    return harness.measure(load(reference, registry=registry, device=device), wanted)


def export(
    reference: Reference,
    format: str = "hf",
    out: StrPath | None = None,
    *,
    dtype: str | None = None,
    verify: bool = False,
    modelfile: bool = False,
    force: bool = False,
    registry: StrPath | None = None,
    device: str = "auto",
) -> Exported:
    """Export a model to another format.

    Args:
        reference: The model.
        format: A registered format: hf, gguf, onnx, pt2, nanogpt, quillgpt.
        out: The file or folder; named after the model if None.
        dtype: Precision of the exported weights; the format's default if None.
        verify: Run the export in the program it is for and compare the logits.
        modelfile: Also write a Modelfile for Ollama.
        force: Replace an existing export.
        registry: The registry's folder; found as the command line finds it if None.
        device: Where quill's own model runs when they are compared: auto, cpu, cuda, cuda:N or mps.

    Raises:
        InputError: The format does not support the model.
        RefusedError: The path exists, or the other program computes different logits.
    """
    from quill.formats import exporting
    from quill.training.device import find_device

    version, target = _find(_home(reference, registry), reference), None if out is None else Path(out)
    return exporting.export(
        version,
        format,
        target,
        dtype=dtype,
        verify=verify,
        modelfile=modelfile,
        force=force,
        device=find_device(reading.device(device)),
    )


def import_model(
    source: str,
    *,
    name: str | None = None,
    format: str = "auto",
    config: StrPath | None = None,
    tokenizer: str | None = None,
    new_version: bool = False,
    notice: Callable[[str], None] = lambda message: None,
    registry: StrPath | None = None,
) -> Version:
    """Import a model from another format.

    Args:
        source: A file, a folder, or hf:REPOSITORY.
        name: Name of the model; derived from the source if None.
        format: A registered format; "auto" to detect it.
        config: A config file of the other project, for a source without one.
        tokenizer: The vocabulary, for a source without one: a published tokenizer, a tokenizer.json, a
            meta.pkl, or the text that the model was trained on.
        new_version: Import even if the name has a different model.
        notice: Called with a message before something that takes long.
        registry: The registry's folder; found as the command line finds it if None.

    Raises:
        CorruptError: The source is damaged, unsafe or incomplete.
        InputError: Something is missing, or quill does not support the model.
        RefusedError: The name has a different model.
    """
    from quill.formats import importing

    return importing.import_model(
        source,
        _registry(registry),
        name=name,
        format_name=format,
        config=None if config is None else Path(config),
        tokenizer=tokenizer,
        new_version=new_version,
        notice=notice,
    )


def models(glob: str | None = None, *, all_versions: bool = False, registry: StrPath | None = None) -> Models:
    """List the newest version of every model, damaged ones and those that come with quill included.

    Args:
        glob: Only names that match, such as "shake*".
        all_versions: Include all versions, not just the newest.
        registry: The registry's folder; found as the command line finds it if None.
    """
    from quill.notebook import Models

    store = _registry(registry)
    found = [
        *store.models(glob, all_versions=all_versions),
        *store.shipped_models(glob, all_versions=all_versions),
    ]
    return Models(v for model in found for v in model.versions)


def show(reference: Reference, *, registry: StrPath | None = None) -> Facts:
    """Return everything known of one model or unfinished run: its manifest, state, path, aliases and config.

    Args:
        reference: The model.
        registry: The registry's folder; found as the command line finds it if None.

    Raises:
        NotFoundError: There is no such model.
    """
    from quill.notebook import Facts

    store = _home(reference, registry)
    found = store.find(_in(store, reference))
    own = {"reference": found.reference, "state": found.state, "path": found.path, "bytes": found.size}
    aliases = [] if found.label else store.aliases_of(found)
    return Facts({**found.facts, **own, "aliases": aliases, "config": found.config()})


def compare(first: Reference, second: Reference, *, registry: StrPath | None = None) -> Comparison:
    """Compare two models: their figures, and the settings in which they differ.

    Args:
        first: A model or unfinished run.
        second: Another.
        registry: The registry's folder; found as the command line finds it if None.

    Raises:
        NotFoundError: There is no such model.
    """
    from quill.checkpoint.load import read_config
    from quill.config.differences import differences
    from quill.notebook import Comparison

    a, b = (_home(r, registry).find(_in(_home(r, registry), r)) for r in (first, second))
    figures: dict[str, tuple[Any, Any]] = {k: (a.facts.get(k), b.facts.get(k)) for k in _FIGURES}
    settings = differences(
        read_config(a).to_dict(), read_config(b).to_dict(), {"$schema", "schema_version", "name"}
    )
    return Comparison((a.reference, b.reference), figures, settings)


def alias(reference: Reference, name: str, *, registry: StrPath | None = None) -> Version:
    """Point an alias at a version; "shakespeare:NAME" means it from then on.

    Args:
        reference: The version.
        name: The alias.
        registry: The registry's folder; found as the command line finds it if None.

    Returns:
        The version.

    Raises:
        InputError: The name is not a valid alias, or the reference is a path.
        NotFoundError: There is no such version.
    """
    from quill.errors import InputError
    from quill.registry import aliases, names

    store = _home(reference, registry)
    version = store.resolve(_in(store, reference))
    if version.label:
        raise InputError(f"'{reference}' is a path", why="aliases belong to names in the registry")
    aliases.set_alias(store.root / version.name, names.check_alias(name), version.number)
    return version


def rm(
    *references: Reference,
    all_versions: bool = False,
    missing_ok: bool = False,
    dry_run: bool = False,
    registry: StrPath | None = None,
) -> list[str]:
    """Remove versions of models.

    Args:
        *references: Versions, as in "name:v2", or names of a single version.
        all_versions: Remove all versions of each name, and its unfinished run.
        missing_ok: Do not fail if a reference does not exist.
        dry_run: Only return what would be removed.
        registry: The registry's folder; found as the command line finds it if None.

    Returns:
        The references that were removed.

    Raises:
        NotFoundError: There is no such version.
        RefusedError: An alias points at a version.
        LockedError: A process is using it.
    """
    from quill.registry import remove

    store = _home(references[0], registry) if references else _registry(registry)
    named = [_in(store, r) for r in references]
    plan = remove.plan(store, named, all_versions=all_versions, missing_ok=missing_ok)
    return [r.what for r in (plan.removals if dry_run else plan.execute())]


def _run_config(
    config: StrPath | Mapping[str, Any] | RunConfig | None, name: str | None, settings: Mapping[str, Any]
) -> RunConfig:
    """The run that a call of `train` describes, with a name."""
    known = keywords.paths(SECTIONS)
    overrides = {known.get(word, word): value for word, value in settings.items()}
    if name is not None:
        overrides["name"] = name
    if isinstance(config, str) and not config.endswith(".json"):
        local = Path("configs", f"{config}.json")
        if local.is_file():
            config = local
        elif config in shipped.configs():
            config = shipped.configs()[config]
        else:
            overrides.setdefault("data.source", config)
            config = None
    if config is None:
        run = reading.parse({}, overrides, origin="the arguments")
    elif isinstance(config, RunConfig):
        run = reading.parse(config.to_dict(), overrides, origin="the config") if overrides else config
    elif isinstance(config, Mapping):
        run = reading.parse(dict(config), overrides, origin="the config")
    else:
        run = reading.load(Path(config), overrides)
    return run if run.name else run.model_copy(update={"name": reading.name_after(run.data.source)})


def _find(store: Registry, reference: Reference) -> Folder:
    """A version, or an unfinished run with weights, which a warning says."""
    import warnings

    return store.find_weights(_in(store, reference), lambda message: warnings.warn(message, stacklevel=5))


def _home(reference: Reference, folder: StrPath | None) -> Registry:
    """The registry that is named, else that of a version, else the one the command line uses."""
    if folder is None and not isinstance(reference, str) and not reference.label:
        found = _registry(None)
        return found if found.contains(reference) else _registry(reference.root)
    return _registry(folder)


def _in(store: Registry, reference: Reference) -> str:
    """What finds a version in a registry: its name there, or its path."""
    if isinstance(reference, str):
        return reference
    return reference.reference if store.contains(reference) else str(reference.path)


def _registry(folder: StrPath | None) -> Registry:
    from quill.registry.store import Registry, locate

    found = locate(Path(folder) if folder is not None else None)
    return Registry(found.root, found.why, found.shipped)
