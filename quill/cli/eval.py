"""Measure how well models predict a text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.cli.prepare import watch
from quill.errors import InputError, RefusedError

if TYPE_CHECKING:
    from quill.checkpoint.load import Checkpoint
    from quill.data.batches import Tokens
    from quill.data.prepare import Observer
    from quill.data.store import Dataset, Split


class Measured(NamedTuple):
    """What a model is measured on, as its own tokens.

    Attributes:
        what: The data's name, for whoever reads the figures.
        tokens: Token ids, (n,).
        n_bytes: The text's size in UTF-8.
    """

    what: str
    tokens: Tokens
    n_bytes: int


@options.command()
def command(
    session: Session,
    references: Annotated[list[str], Argument(metavar="REF", help="Models: name, name:v2, or ./folder.")],
    data: Annotated[
        str | None, Option(metavar="TEXT", help="A dataset or a text; unset: what each was trained on.")
    ] = None,
    split: Annotated[
        Literal["train", "val"] | None,
        Option(metavar="train|val", help="Which part of a dataset; unset: val."),
    ] = None,
    iters: Annotated[
        int | None, Option(metavar="INT", help="That many batches only; unset: every token once.")
    ] = None,
    fail_above: Annotated[
        float | None, Option(metavar="LOSS", help="Exit with 4 if a model's loss is higher.")
    ] = None,
) -> None:
    """Measure how well models predict a text: loss and perplexity per token, and bits per byte.

    Bits per byte compare models of different tokenizers; the other figures do not.
    """
    if iters is not None and iters < 1:
        raise InputError(f"--iters {iters} is refused", why="it takes at least 1 batch")
    if fail_above is not None and fail_above != fail_above:
        raise InputError("--fail-above nan is refused", why="no loss is above it or below it")
    registry, output = session.registry(), session.output
    versions = [registry.resolve(r) for r in references]

    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation import measure

    rows: list[dict[str, Any]] = []
    with watch(output) as observer:
        for version in versions:
            loaded = load_checkpoint(version, session.device())
            on = _find(session, loaded, data, split, observer)
            output.detail(f"{version.reference}: {len(on.tokens):,} tokens of {on.what}")
            figures = measure.evaluate(loaded.model, on.tokens, n_bytes=on.n_bytes, iters=iters)
            rows.append({"reference": version.reference, "data": on.what, **asdict(figures)})
    output.emit(
        "quill.eval/1",
        {"models": rows},
        human=output.table(
            ["MODEL", "DATA", "LOSS", "PERPLEXITY", "BITS/BYTE", "TOKENS"],
            [_cells(row) for row in rows],
            right=("LOSS", "PERPLEXITY", "BITS/BYTE", "TOKENS"),
        ),
        quiet=[f"{row['loss']:.4f}" for row in rows],
    )
    # What is not a number is no loss that may pass.
    missed = [r for r in rows if fail_above is not None and not r["loss"] <= fail_above]
    if missed:
        raise RefusedError(
            f"{missed[0]['reference']} has a loss of {missed[0]['loss']:.4f}",
            why=f"--fail-above asks for {fail_above:g} at the most",
        )


def _find(
    session: Session, loaded: Checkpoint, data: str | None, split: Split | None, observer: Observer
) -> Measured:
    """The text a model is to be measured on, in its own tokens."""
    from quill.data import named_sources, prepare
    from quill.data.store import MANIFEST, Dataset

    root = session.datasets()
    if data is None:
        if loaded.version.manifest is not None and loaded.version.facts["data"] is None:
            raise InputError(
                f"{loaded.version.reference} has no data of its own",
                why="it was made elsewhere",
                hint=f"quill eval {loaded.version.reference} --data TEXT",
            )
        return _of_dataset(loaded, prepare.ensure(loaded.config.data, root, observer), split or "val")
    if "/" not in data and (root / data / MANIFEST).is_file():
        return _of_dataset(loaded, Dataset.open(root / data), split or "val")
    if data in named_sources.NAMED:
        # Whatever tokenizer it is prepared with, the text is the same.
        settings = loaded.config.data.model_copy(update={"source": data})
        return _of_dataset(loaded, prepare.ensure(settings, root, observer), split or "val")
    if split is not None:
        raise InputError(
            f"--split {split} is refused",
            why=f"'{data}' is a text and measured whole; only a prepared dataset has splits",
            hint=f"quill prepare {data} --name my-text",
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
        # The ids are of another vocabulary; the text behind them is what is asked for.
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
        # Leaving characters out, as sampling may, would flatter the figures.
        raise InputError(
            f"{loaded.version.reference} cannot read '{what}': {e.what}",
            why=e.why,
            hint="a text of the characters it was trained on",
        ) from None


def _cells(row: dict[str, Any]) -> list[str]:
    figures = [f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.4f}"]
    return [row["reference"], row["data"], *figures, f"{row['tokens']:,}"]
