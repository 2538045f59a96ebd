"""Turn text into a dataset for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.cli.output import Output
from quill.config.settings import DataConfig
from quill.errors import InputError
from quill.units import size

if TYPE_CHECKING:
    from quill.data.dataset import Dataset
    from quill.data.prepare import Observer


@options.command(
    {"": DataConfig},
    skip={"source", "unknown"},
    examples="""
    quill prepare notes.txt --name notes
    quill prepare 'texts/*.md' --tokenizer bpe --vocab-size 4096
    zcat dump.gz | quill prepare - --name dump
    """,
    topic="tutorial",
)
def command(
    session: Session,
    source: Annotated[
        list[str],
        Argument(
            metavar="SOURCE",
            help="Files, folders and globs (.txt .md .jsonl .parquet; .gz .zst .xz .bz2); '-' for stdin; or "
            "a named source: harpoon, shakespeare.",
        ),
    ],
    name: Annotated[
        str | None, Option(metavar="NAME", help="Name of the dataset (default: from the source).")
    ] = None,
    workers: Annotated[
        int | None, Option(metavar="INT", help="Threads that encode (default: one per CPU).")
    ] = None,
    force: Annotated[bool, Option("--force", help="Rebuild even if the dataset is up to date.")] = False,
) -> None:
    """Turn text into a dataset for training.

    Does nothing if the dataset is up to date. The end of the text becomes the validation split. Prints the
    dataset's name.
    """
    from quill.config import reading
    from quill.data import prepare

    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} is out of range", why="at least 1 is needed")
    given = {"source": source[0] if len(source) == 1 else source, **session.overrides}
    config = reading.check(DataConfig, given, origin="the arguments")
    with watch(session.output) as observer:
        dataset = prepare.prepare(
            config, session.datasets(), name=name, force=force, workers=workers, observer=observer
        )
    session.output.show(
        "quill.prepare/1",
        {"name": dataset.name, "path": str(dataset.path), "manifest": dataset.manifest},
        key="name",
    )
    session.output.say(describe(dataset))


@contextmanager
def watch(output: Output) -> Iterator[Observer]:
    """An observer of preparing that shows its progress and prints its warnings."""
    from quill.data.prepare import Notice, Progress

    with output.progress(size) as report:

        def observe(event: Progress | Notice) -> None:
            if isinstance(event, Progress):
                report(event.stage, event.done_bytes, event.total_bytes)
            else:
                output.warn(event.message)

        yield observe


def describe(dataset: Dataset) -> str:
    """A dataset in one line: its tokens, its vocabulary, and where it is."""
    kind, width = dataset.manifest["tokenizer"]["kind"], dataset.manifest["tokenizer"]["vocab_size"]
    return (
        f"{dataset.count('train'):,} tokens for training, {dataset.count('val'):,} for validation, "
        f"{kind} vocabulary of {width:,}, in {dataset.path}"
    )
