"""Evaluate how well models predict a text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO
from pathlib import Path
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
    from quill.cli.output import Output
    from quill.evaluation.measure import Figures
    from quill.registry.folder import Folder


def _share(n: int) -> Column:
    return Column(f"{n}-GRAMS", lambda r: _percent(r["shares"], n), right=True)


def _percent(row: Any, field: str | int) -> str:
    return "" if row[field] is None else f"{row[field]:.1%}"


_OVERLAP = (
    Column("MODEL", lambda r: r["reference"]),
    Column("TEXT", lambda r: r["text"]),
    Column("TEXTS", lambda r: f"{r['texts']:,}", right=True, drop=1),
    Column("MEDIAN", lambda r: f"{r['median']:,}", right=True),
    Column("95%", lambda r: f"{r['p95']:,}", right=True),
    Column("LONGEST", lambda r: f"{r['longest']:,}", right=True),
    *map(_share, (8, 16, 32)),
    Column("REPEATS", lambda r: _percent(r["repeats"], 16), right=True, drop=2),
)
_CLOZE = (
    Column("MODEL", lambda r: r["reference"]),
    Column("QUESTIONS", lambda r: f"{r['questions']:,}", right=True, drop=2),
    Column("ACCURACY", lambda r: _percent(r, "accuracy"), right=True),
    Column("±", lambda r: _percent(r, "standard_error"), right=True, drop=3),
    Column("BY LENGTH", lambda r: _percent(r, "accuracy_by_length"), right=True, optional=True),
    Column("CHANCE", lambda r: _percent(r, "chance"), right=True, optional=True, drop=1),
    Column("PERPLEXITY", lambda r: f"{r['perplexity']:.2f}", right=True, drop=4),
    Column("LOSS", lambda r: f"{r['loss']:.4f}", right=True, drop=4),
)
_TASKS = (
    Column("MODEL", lambda r: r["reference"]),
    Column("TASK", lambda r: r["task"]),
    Column("METRIC", lambda r: r["metric"]),
    Column("VALUE", lambda r: f"{r['value']:.4f}", right=True),
    Column("±", lambda r: "" if r["standard_error"] is None else f"{r['standard_error']:.4f}", right=True),
    Column("FILTER", lambda r: r["filter"], drop=2),
    Column("EXAMPLES", lambda r: f"{r['examples']:,}" if r["examples"] else "", right=True, drop=1),
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
    quill eval shakespeare --report --plot report.svg
    quill eval shakespeare --overlap 500
    quill eval shakespeare --cloze questions.jsonl
    quill eval gpt2 --tasks lambada_openai,hellaswag
    """,
    topic="measures",
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
    report: Annotated[
        bool, Option("--report", help="Add calibration and the loss by the length of the context.")
    ] = False,
    plot: Annotated[
        Path | None, Option(metavar="FILE", help="Draw this report in a .svg or .png file.")
    ] = None,
    overlap: Annotated[
        int | None,
        Option(
            metavar="N", help="Generate N samples and measure how much of them stands in the training text."
        ),
    ] = None,
    cloze: Annotated[
        Path | None,
        Option(metavar="FILE", help="Measure how many questions of a .jsonl file the models answer right."),
    ] = None,
    tasks: Annotated[
        str | None,
        Option(
            metavar="TASKS", help="Run tasks of lm-evaluation-harness: names or .yaml files, with commas."
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
    run of characters of each sample that stands in the training text, the share of all runs of 8, 16 and 32
    characters that do, and the share of runs of 16 that a sample repeats; the validation text is measured for
    comparison. With --cloze, the share of questions whose answer is the likeliest choice, or is generated
    token by token where there are no choices.
    """
    if iters is not None and iters < 1:
        raise InputError(f"--iters {iters} is out of range", why="at least 1 batch is needed")
    if fail_above is not None and fail_above != fail_above:
        raise InputError("--fail-above nan is not a number", why="no loss is above or below it")
    if plot:
        from quill.cli import _curves

        _curves.form_of(plot)
    registry, output = session.registry(), session.output
    of_loss: dict[str, object] = {"--split": split, "--iters": iters, "--report": report or None}
    of_loss |= {"--plot": plot, "--fail-above": fail_above}
    if tasks or cloze:
        others = of_loss | {"--data": data, "--overlap": overlap}
        _refuse("--tasks" if tasks else "--cloze", others | ({"--cloze": cloze} if tasks else {}))
    if overlap is not None:
        _refuse("--overlap", of_loss)
        if overlap < 1:
            raise InputError(f"--overlap {overlap} is out of range", why="at least 1 sample is needed")
    versions = [registry.find_weights(r, output.say) for r in references]
    if tasks:
        _run_tasks(session, versions, tasks, device)
        return
    if overlap is not None:
        _measure_overlap(session, versions, data, overlap, device)
        return
    if cloze:
        _measure_cloze(session, versions, cloze, unknown, device)
        return

    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation import measure, texts

    found: list[tuple[str, str, measure.Figures]] = []
    with watch(output) as observer:
        for version in versions:
            loaded = load_checkpoint(version, session.device(device))
            on = texts.find(loaded, data, split, session.datasets(), unknown=unknown, observer=observer)
            output.detail(f"{version.reference}: {len(on.tokens):,} tokens of {on.name}")
            figures = measure.evaluate(
                loaded.model, on.tokens, n_bytes=on.n_bytes, iters=iters, report=report or plot is not None
            )
            found.append((version.reference, on.name, figures))
    _show(output, found, report=report, plot=plot)
    # A loss of NaN must not pass.
    missed = [f for f in found if fail_above is not None and not f[2].loss <= fail_above]
    if missed:
        raise RefusedError(
            f"{missed[0][0]} has a loss of {missed[0][2].loss:.4f}",
            why=f"--fail-above allows at most {fail_above:g}",
        )


def _refuse(flag: str, given: Mapping[str, object]) -> None:
    """Refuse flags that only matter for the loss."""
    for other in [other for other, value in given.items() if value is not None]:
        raise InputError(f"{flag} and {other} are mutually exclusive", why=f"{flag} measures no loss")


def _show(
    output: Output, found: Sequence[tuple[str, str, Figures]], *, report: bool, plot: Path | None
) -> None:
    """Print and draw the figures of models, each with its reference and its data."""
    rows: list[dict[str, Any]] = []
    for reference, data, figures in found:
        row = {"reference": reference, "data": data, **asdict(figures)}
        parts, fitted = row.pop("report"), row.pop("fitted")
        if report:
            row |= {"calibration": parts["calibration"], "fitted": fitted, "context": parts["context"]}
        rows.append(row)
    losses = [f"{row['loss']:.4f}" for row in rows]
    output.show("quill.eval/1", rows, _COLUMNS, key="reference", within="models", quiet=losses)
    if report or plot:
        from quill.cli import _report

        for row in rows if report else []:
            _report.show(output, row)
        if plot:
            _report.save(output, {name: f.report for name, _, f in found if f.report}, plot)


def _measure_cloze(
    session: Session,
    versions: list[Folder],
    file: Path,
    unknown: Literal["error", "skip"],
    device: str | None,
) -> None:
    """Print how many questions of a file each model answers right."""
    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation import cloze

    questions = cloze.read(file)
    rows: list[dict[str, Any]] = []
    for version in versions:
        loaded = load_checkpoint(version, session.device(device))
        with session.output.progress() as report:
            found = cloze.measure(loaded.model, loaded.tokenizer, questions, unknown=unknown, report=report)
        rows.append({"reference": version.reference, **asdict(found)})
    accuracies = [f"{row['accuracy']:.4f}" for row in rows]
    session.output.show(
        "quill.cloze/1", rows, _CLOZE, key="reference", within="models", quiet=accuracies, file=str(file)
    )


def _run_tasks(session: Session, versions: list[Folder], tasks: str, device: str | None) -> None:
    """Print the figures of each model on tasks of lm-evaluation-harness."""
    from quill.checkpoint.load import load_checkpoint
    from quill.evaluation import harness
    from quill.generation.generator import Generator

    # It warns about its own tasks, and draws its own bars.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [name for name in tasks.split(",") if name]
    rows: list[dict[str, Any]] = []
    for version in versions:
        loaded = load_checkpoint(version, session.device(device))
        with session.output.progress() as report, redirect_stderr(StringIO()):
            found = harness.measure(Generator(loaded.model, loaded.tokenizer), names, report)
        rows += [{"reference": version.reference, **row} for row in found]
    values = [f"{row['value']:.4f}" for row in rows]
    session.output.show("quill.tasks/1", rows, _TASKS, key="reference", within="results", quiet=values)


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
