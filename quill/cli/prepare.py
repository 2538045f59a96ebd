"""Turn text into a dataset to train on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.cli.output import Output
from quill.config.settings import DataConfig
from quill.units import size

if TYPE_CHECKING:
    from quill.data.prepare import Observer
    from quill.data.store import Dataset


@options.command({"": DataConfig}, skip=frozenset({"source"}))
def command(
    session: Session,
    source: Annotated[
        list[str],
        Argument(
            metavar="SOURCE",
            help="Files, folders and globs (.txt .md .jsonl, .gz, .zst), '-' for stdin, or the name of a "
            "text: harpoon, shakespeare.",
        ),
    ],
    name: Annotated[str | None, Option(help="What to call it; unset: after the text.")] = None,
    workers: Annotated[int | None, Option(metavar="INT", help="Threads; unset: all processors.")] = None,
    force: Annotated[bool, Option("--force", help="Again, even if it is there unchanged.")] = False,
) -> None:
    """Turn text into a dataset to train on; nothing is done if it is there and unchanged.

    The validation split is the end of the text. Prints the dataset's name.
    """
    from quill.config import reading
    from quill.data import prepare
    from quill.errors import InputError

    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} is refused", why="it takes at least 1")
    given = {"source": source[0] if len(source) == 1 else source, **session.overrides}
    config = reading.check(DataConfig, given, origin="the arguments")
    with watch(session.output) as observer:
        dataset = prepare.prepare(
            config, session.datasets(), name=name, force=force, workers=workers, observer=observer
        )
    session.output.emit(
        "quill.prepare/1",
        {"name": dataset.name, "path": str(dataset.path), "manifest": dataset.manifest},
        human=dataset.name,
        quiet=dataset.name,
    )
    session.output.say(describe(dataset))


@contextmanager
def watch(output: Output) -> Iterator[Observer]:
    """An observer of preparing that shows its progress, and warns of what it is told."""
    from quill.data.prepare import Notice, Progress

    with output.progress(size) as report:

        def observe(event: Progress | Notice) -> None:
            if isinstance(event, Progress):
                report(event.stage, event.done_bytes, event.total_bytes)
            else:
                output.warn(event.message)

        yield observe


def describe(dataset: Dataset) -> str:
    """A dataset in one line: its tokens, their kind, and where they are."""
    kind, width = dataset.manifest["tokenizer"]["kind"], dataset.manifest["tokenizer"]["vocab_size"]
    return (
        f"{dataset.count('train'):,} tokens to train on and {dataset.count('val'):,} to validate, "
        f"{kind} vocabulary of {width:,}, in {dataset.path}"
    )
