"""Turn text into a dataset for training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from quill.cli import _facts, options
from quill.cli.options import Session
from quill.cli.output import Output
from quill.config.settings import DataConfig
from quill.errors import InputError, shorten
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
    quill prepare corpus/ --name corpus --tokenizer gpt2 --shard 1/8
    quill prepare --merge corpus
    """,
    topic="tutorial",
)
def command(
    session: Session,
    source: Annotated[
        list[str] | None,
        Argument(
            metavar="SOURCE",
            help="Files, folders and globs (.txt .md .jsonl .parquet; .gz .zst .xz .bz2); '-' for stdin; hf:"
            "OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]; or a named source: harpoon, shakespeare, openwebtext.",
        ),
    ] = None,
    name: Annotated[
        str | None, Option(metavar="NAME", help="Name of the dataset (default: from the source).")
    ] = None,
    workers: Annotated[
        int | None, Option(metavar="INT", help="Threads that encode (default: one per CPU).")
    ] = None,
    shard: Annotated[
        str | None,
        Option(metavar="I/N", help="Prepare only shard I of N of the text, as the dataset NAME-I-of-N."),
    ] = None,
    merge: Annotated[
        str | None, Option(metavar="NAME", help="Merge all shards of NAME into one dataset, and remove them.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Rebuild even if the dataset is up to date.")] = False,
) -> None:
    """Turn text into a dataset for training.

    Does nothing if the dataset is up to date. The end of the text, or some of its documents if they are many,
    becomes the validation split. Prints the dataset's name.
    """
    if merge is None:
        dataset = _prepare(session, source or [], name, workers, shard, force=force)
    elif source or name or workers or shard:
        raise InputError(
            "--merge takes no SOURCE, --name, --workers or --shard", why="the shards record what they are of"
        )
    else:
        from quill.data import merge as merging
        from quill.data.prepare import reporter

        with watch(session.output) as observer:
            dataset = merging.merge(merge, session.datasets(), force=force, on_bytes=reporter(observer))
    session.output.show(
        "quill.prepare/1",
        {"name": dataset.name, "path": str(dataset.path), "manifest": dataset.manifest},
        key="name",
    )
    session.output.say(describe(dataset))


def _prepare(
    session: Session,
    source: list[str],
    name: str | None,
    workers: int | None,
    shard: str | None,
    *,
    force: bool,
) -> Dataset:
    from quill.config import reading
    from quill.data import prepare

    if not source:
        raise InputError("SOURCE is missing", why="it names the text", hint="quill prepare FILE")
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} is out of range", why="at least 1 is needed")
    given = {"source": source[0] if len(source) == 1 else source, **session.overrides}
    config = reading.check(DataConfig, given, origin="the arguments")
    with watch(session.output) as observer:
        return prepare.prepare(
            config,
            session.datasets(),
            name=name,
            force=force,
            workers=workers,
            observer=observer,
            shard=None if shard is None else _shard(shard),
        )


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
    if not found:
        raise InputError(
            f"--shard {shorten(text)} is not I/N",
            why="it is a number and how many there are",
            hint="--shard 1/8",
        )
    return int(found[1]), int(found[2])


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
    dropped = f", without {_facts.dropped(dataset.duplicates)}" if dataset.duplicates else ""
    return (
        f"{dataset.count('train'):,} tokens for training, {dataset.count('val'):,} for validation, "
        f"{kind} vocabulary of {width:,}{dropped}, in {dataset.path}"
    )
