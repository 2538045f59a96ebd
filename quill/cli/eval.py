"""Evaluate how well models predict a text."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import completing, datasets, models
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.cli.prepare import watch
from quill.errors import InputError, RefusedError

if TYPE_CHECKING:
    from quill.checkpoint.load import Checkpoint
    from quill.data.batches import Tokens
    from quill.data.prepare import Observer
    from quill.data.store import Dataset, Split


_COLUMNS = (
    Column("MODEL", lambda r: r["reference"]),
    Column("DATA", lambda r: r["data"], drop=3),
    Column("LOSS", lambda r: f"{r['loss']:.4f}", right=True),
    Column("PERPLEXITY", lambda r: f"{r['perplexity']:.2f}", right=True, drop=1),
    Column("BITS/BYTE", lambda r: f"{r['bits_per_byte']:.4f}", right=True),
    Column("TOKENS", lambda r: f"{r['tokens']:,}", right=True, drop=2),
)


class Measured(NamedTuple):
    """A text that a model is evaluated on.

    Attributes:
        what: Name of the data, for the table.
        tokens: Ids of the model's own tokenizer, (n,).
        n_bytes: Size of the text in UTF-8.
    """

    what: str
    tokens: Tokens
    n_bytes: int


@options.command(
    examples="""
    quill eval shakespeare
    quill eval shakespeare:v1 shakespeare:v2 --data other.txt
    quill eval shakespeare --fail-above 1.6
    """
)
def command(
    session: Session,
    references: Annotated[
        list[str],
        Argument(metavar="REF", help="Models: name, name:v2 or ./folder.", autocompletion=models()),
    ],
    data: Annotated[
        str | None,
        Option(
            metavar="SOURCE",
            help="Dataset or text file (default: what each model was trained on).",
            autocompletion=datasets,
        ),
    ] = None,
    split: Annotated[
        Literal["train", "val"] | None,
        Option(
            metavar="train|val",
            help="Split of the dataset (default: val).",
            autocompletion=completing("train", "val"),
        ),
    ] = None,
    iters: Annotated[
        int | None, Option(metavar="N", help="Evaluate N batches only (default: every token once).")
    ] = None,
    fail_above: Annotated[
        float | None, Option(metavar="LOSS", help="Exit with code 4 if a model's loss is higher.")
    ] = None,
    device: options.Device = None,
) -> None:
    """Evaluate how well models predict a text: loss and perplexity per token, and bits per byte.

    Only bits per byte can be compared between models with different tokenizers.
    """
    if iters is not None and iters < 1:
        raise InputError(f"--iters {iters} is out of range", why="at least 1 batch is needed")
    if fail_above is not None and fail_above != fail_above:
        raise InputError("--fail-above nan is not a number", why="no loss is above or below it")
    registry, output = session.registry(), session.output
    versions = [registry.resolve(r) for r in references]

    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation import measure

    rows: list[dict[str, Any]] = []
    with watch(output) as observer:
        for version in versions:
            loaded = load_checkpoint(version, session.device(device))
            on = _find(session, loaded, data, split, observer)
            output.detail(f"{version.reference}: {len(on.tokens):,} tokens of {on.what}")
            figures = measure.evaluate(loaded.model, on.tokens, n_bytes=on.n_bytes, iters=iters)
            rows.append({"reference": version.reference, "data": on.what, **asdict(figures)})
    losses = [f"{row['loss']:.4f}" for row in rows]
    output.show("quill.eval/1", rows, _COLUMNS, key="reference", within="models", quiet=losses)
    # A loss of NaN must not pass.
    missed = [r for r in rows if fail_above is not None and not r["loss"] <= fail_above]
    if missed:
        raise RefusedError(
            f"{missed[0]['reference']} has a loss of {missed[0]['loss']:.4f}",
            why=f"--fail-above allows at most {fail_above:g}",
        )


def _find(
    session: Session, loaded: Checkpoint, data: str | None, split: Split | None, observer: Observer
) -> Measured:
    """The text to evaluate a model on, in its own tokens."""
    from quill.data import named_sources, prepare
    from quill.data.store import MANIFEST, Dataset

    root = session.datasets()
    if data is None:
        if loaded.version.manifest is not None and loaded.version.facts["data"] is None:
            raise InputError(
                f"{loaded.version.reference} has no dataset",
                why="it was imported",
                hint=f"quill eval {loaded.version.reference} --data TEXT",
            )
        return _of_dataset(loaded, prepare.ensure(loaded.config.data, root, observer), split or "val")
    if "/" not in data and (root / data / MANIFEST).is_file():
        return _of_dataset(loaded, Dataset.open(root / data), split or "val")
    if data in named_sources.NAMED:
        # The text is the same whichever tokenizer prepared it.
        settings = loaded.config.data.model_copy(update={"source": data})
        return _of_dataset(loaded, prepare.ensure(settings, root, observer), split or "val")
    if split is not None:
        raise InputError(
            f"--split {split} requires a dataset",
            why=f"'{data}' is a text, which is evaluated whole",
            hint=f"quill prepare {shlex.quote(data)} --name my-text",
        )
    return _of_text(loaded, data, root)


def _of_dataset(loaded: Checkpoint, dataset: Dataset, split: Split) -> Measured:
    if not dataset.count(split):
        raise InputError(
            f"dataset '{dataset.name}' has no {'validation' if split == 'val' else 'training'} split",
            why=f"it was prepared with val_fraction {dataset.settings['val_fraction']}",
            hint="split=train" if split == "val" else "",
        )
    what = f"{dataset.name}/{split}"
    tokens: Tokens = dataset.split(split)
    if dataset.manifest["tokenizer"]["sha256"] != loaded.tokenizer.fingerprint:
        # The ids belong to another vocabulary; encode their text again.
        text = dataset.tokenizer.decode(tokens[:].tolist())
        tokens = _encode(loaded, text, what)
    return Measured(what, tokens, dataset.count(split, "bytes"))


def _of_text(loaded: Checkpoint, path: str, root: Path) -> Measured:
    from quill.data import sources

    with sources.find(path, root) as found:
        text = "".join(chunk.joined() for chunk in found.chunks("reading"))
    return Measured(path, _encode(loaded, text, path), len(text.encode()))


def _encode(loaded: Checkpoint, text: str, what: str) -> Tokens:
    try:
        return loaded.tokenizer.encode_array(text)
    except InputError as e:
        # Skipping characters, as sampling may, would flatter the figures.
        raise InputError(
            f"{loaded.version.reference} cannot encode '{what}': {e.what}",
            why=e.why,
            hint="choose a text with only the characters that the model was trained on",
        ) from None
