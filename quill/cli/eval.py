"""Evaluate how well models predict a text."""

from __future__ import annotations

from dataclasses import asdict
from textwrap import indent
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import completing, datasets, models
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.cli.prepare import watch
from quill.errors import InputError, RefusedError

if TYPE_CHECKING:
    from quill.registry.folder import Folder


def _share(n: int) -> Column:
    def text(row: Any) -> str:
        share = row["shares"][n]
        return "" if share is None else f"{share:.1%}"

    return Column(f"{n}-GRAMS", text, right=True)


_OVERLAP = (
    Column("MODEL", lambda r: r["reference"]),
    Column("TEXT", lambda r: r["text"]),
    Column("TEXTS", lambda r: f"{r['texts']:,}", right=True, drop=1),
    Column("MEDIAN", lambda r: f"{r['median']:,}", right=True),
    Column("95%", lambda r: f"{r['p95']:,}", right=True),
    Column("LONGEST", lambda r: f"{r['longest']:,}", right=True),
    *map(_share, (8, 16, 32)),
)
_COLUMNS = (
    Column("MODEL", lambda r: r["reference"]),
    Column("DATA", lambda r: r["data"], drop=3),
    Column("LOSS", lambda r: f"{r['loss']:.4f}", right=True),
    Column("PERPLEXITY", lambda r: f"{r['perplexity']:.2f}", right=True, drop=1),
    Column("BITS/BYTE", lambda r: f"{r['bits_per_byte']:.4f}", right=True),
    Column("TOKENS", lambda r: f"{r['tokens']:,}", right=True, drop=2),
)


@options.command(
    examples="""
    quill eval shakespeare
    quill eval shakespeare:v1 shakespeare:v2 --data other.txt
    quill eval shakespeare --fail-above 1.6
    quill eval shakespeare --overlap 500
    """,
    topic="tutorial",
)
def command(
    session: Session,
    references: Annotated[
        list[str],
        Argument(
            metavar="REF", help="Models: name, name:v2 or ./folder.", autocompletion=models(drafts="weights")
        ),
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
    overlap: Annotated[
        int | None,
        Option(
            metavar="N", help="Generate N samples and measure how much of them stands in the training text."
        ),
    ] = None,
    fail_above: Annotated[
        float | None, Option(metavar="LOSS", help="Exit with code 4 if a model's loss is higher.")
    ] = None,
    unknown: Annotated[
        Literal["error", "skip"],
        Option(
            metavar="error|skip",
            help="Refuse or skip characters that are not in the vocabulary; skipped ones are not measured.",
            autocompletion=completing("error", "skip"),
        ),
    ] = "error",
    device: options.Device = None,
) -> None:
    """Evaluate how well models predict a text: loss and perplexity per token, and bits per byte.

    Only bits per byte can be compared between models with different tokenizers. With --overlap, the longest
    run of characters of each sample that stands in the training text, and the share of all runs of 8, 16 and
    32 characters that do; the validation text is measured for comparison.
    """
    if iters is not None and iters < 1:
        raise InputError(f"--iters {iters} is out of range", why="at least 1 batch is needed")
    if fail_above is not None and fail_above != fail_above:
        raise InputError("--fail-above nan is not a number", why="no loss is above or below it")
    registry, output = session.registry(), session.output
    if overlap is not None:
        given = (("--split", split), ("--iters", iters), ("--fail-above", fail_above))
        for flag in [flag for flag, value in given if value is not None]:
            raise InputError(f"--overlap and {flag} are mutually exclusive", why="--overlap measures no loss")
        if overlap < 1:
            raise InputError(f"--overlap {overlap} is out of range", why="at least 1 sample is needed")
    versions = [registry.find_weights(r, output.say) for r in references]
    if overlap is not None:
        _measure_overlap(session, versions, data, overlap, device)
        return

    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation import measure, texts

    rows: list[dict[str, Any]] = []
    with watch(output) as observer:
        for version in versions:
            loaded = load_checkpoint(version, session.device(device))
            on = texts.find(loaded, data, split, session.datasets(), unknown=unknown, observer=observer)
            output.detail(f"{version.reference}: {len(on.tokens):,} tokens of {on.name}")
            figures = measure.evaluate(loaded.model, on.tokens, n_bytes=on.n_bytes, iters=iters)
            rows.append({"reference": version.reference, "data": on.name, **asdict(figures)})
    losses = [f"{row['loss']:.4f}" for row in rows]
    output.show("quill.eval/1", rows, _COLUMNS, key="reference", within="models", quiet=losses)
    # A loss of NaN must not pass.
    missed = [r for r in rows if fail_above is not None and not r["loss"] <= fail_above]
    if missed:
        raise RefusedError(
            f"{missed[0]['reference']} has a loss of {missed[0]['loss']:.4f}",
            why=f"--fail-above allows at most {fail_above:g}",
        )


def _measure_overlap(
    session: Session, versions: list[Folder], data: str | None, samples: int, device: str | None
) -> None:
    """Print how much of each model's samples stands in its training text."""
    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation import overlap, texts
    from quill.generation.generator import Generator

    output = session.output
    rows: list[dict[str, Any]] = []
    for version in versions:
        loaded = load_checkpoint(version, session.device(device))
        with watch(output) as observer:
            training = texts.training(loaded, data, session.datasets(), observer=observer)
        with output.progress() as report:
            found = overlap.measure(Generator(loaded.model, loaded.tokenizer), training, samples, report)
        for text, figures in zip(("samples", "validation"), found, strict=True):
            if figures is not None:
                row = {"reference": version.reference, "data": training.name, "text": text}
                rows.append(row | asdict(figures))
    longest = [str(row["longest"]) for row in rows if row["text"] == "samples"]
    output.show("quill.overlap/1", rows, _OVERLAP, key="reference", within="overlaps", quiet=longest)
    if output.form == "human":
        for row in rows:
            if row["text"] == "samples" and row["run"]:
                output.say(f"\nthe longest run of {row['reference']}:\n\n{indent(row['run'], '    ')}")
