"""Validate config files; print their schema, their settings, or a first one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import datasets, models
from quill.cli._datasets import PREFIX
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.cli.output import is_terminal
from quill.config.settings import SECTIONS, DataConfig
from quill.errors import InputError

if TYPE_CHECKING:
    from quill.cli.output import Output

# The settings of a first config, at their defaults.
_START = {
    "data": ("source",),
    "model": ("block", "n_layer", "n_head", "n_embd", "block_size", "dropout"),
    "train": ("batch_size", "max_iters", "learning_rate", "eval_interval", "seed"),
}
_MINUTES, _MOST_MINUTES = 30.0, 60 * 24 * 366
_CHECKED = (
    Column("FILE", lambda r: r["file"]),
    Column("NAME", lambda r: r["name"] or "", drop=1),
    Column("STATE", lambda r: "valid", style=lambda r: "good"),
)


@options.command(examples="quill config schema > schema.json")
def schema(session: Session) -> None:
    """Print the JSON Schema of config files, for editors and other tools."""
    from quill.config import schema

    session.output.document(schema.build())


@options.command(examples="quill config check configs/*.json")
def check(
    session: Session,
    files: Annotated[list[Path], Argument(metavar="FILE", help="Config files.")],
) -> None:
    """Validate config files. Exits with code 2 at the first one that is invalid."""
    from quill.config import reading

    rows = []
    for file in files:
        config = reading.load(file)
        rows.append({"file": str(file), "name": config.name, "valid": True})
    session.output.show("quill.config.check/1", rows, _CHECKED, key="file", within="files")


@options.command(
    {"data": DataConfig},
    skip={"data.source"},
    face=("minutes", "name", "data.tokenizer", "data.vocab_size"),
    examples="""
    quill config init notes.txt --minutes 30 > notes.json
    quill config init --name mine > mine.json
    """,
    topic="configs",
)
def init(
    session: Session,
    source: Annotated[
        str | None,
        Argument(metavar="SOURCE", help="Text or dataset to size the model for.", autocompletion=datasets),
    ] = None,
    minutes: Annotated[
        float | None, Option(metavar="NUMBER", help="Time that training may take on this computer.")
    ] = None,
    name: Annotated[
        str | None, Option(metavar="NAME", help="Name of the model (default: the file's name).")
    ] = None,
) -> None:
    """Print a config: sized for a text and a time, or the settings that people change.

    With a text and a time, steps of several sizes are timed for some seconds. The config has the largest
    model that the time trains and the text is long enough for; stderr says how its settings follow. A
    terminal is asked for what is not given. The schema documents every other setting.
    """
    if name:
        from quill.registry.names import check_name

        check_name(name)
    source, minutes = _asked(session.output, source, minutes)
    if source is None or minutes is None:
        document, sizing = _defaults(session, name), ""
    else:
        document = _sized(session, source, minutes, name)
        sizing = f"{shlex.quote(source)} --minutes {minutes:g} "
    session.output.document({"$schema": "./schema.json", **document})
    file = name or "mine"
    session.output.say(
        "save it next to the schema, which your editor can use, then train:\n"
        f"  quill config init {sizing}> {file}.json && quill config schema > schema.json\n"
        f"  quill train {file}.json"
    )


def _asked(output: Output, source: str | None, minutes: float | None) -> tuple[str | None, float | None]:
    """The text and the time, asked for on a terminal if they are not given; neither for a default config."""
    if source is None or minutes is None:
        if output.form == "human" and is_terminal(output.err) and is_terminal(sys.stdin):
            if source is None:
                source = _answer(output, "text or dataset to train on (empty for a default config):") or None
            if source is not None and minutes is None:
                minutes = _number(_answer(output, f"minutes to train on this computer [{_MINUTES:g}]:"))
        if (source is None) != (minutes is None):
            given, missing = ("SOURCE", "--minutes") if minutes is None else ("--minutes", "SOURCE")
            raise InputError(
                f"{given} without {missing}",
                why="a config is sized for a text and a time",
                hint="quill config init notes.txt --minutes 30",
            )
    if minutes is not None and not 0 < minutes < _MOST_MINUTES:
        raise InputError(f"--minutes {minutes:g} is out of range", why="it is above 0, and at most a year")
    return source, minutes


def _answer(output: Output, question: str) -> str:
    output.ask(question)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        output.ask("")
    return answer.strip()


def _number(text: str) -> float:
    try:
        return float(text) if text else _MINUTES
    except ValueError:
        raise InputError(f"'{text}' is not a number", why="the time is a number of minutes") from None


def _defaults(session: Session, name: str | None) -> dict[str, Any]:
    """The settings that people change, at their defaults."""
    from quill.config import reading

    document: dict[str, Any] = {"name": name} if name else {}
    for section, fields in _START.items():
        document[section] = {f: SECTIONS[section].model_fields[f].default for f in fields}
    for path, value in session.overrides.items():
        section, _, field = path.partition(".")
        document[section][field] = value
    reading.parse(document, origin="the arguments")
    return document


def _sized(session: Session, source: str, minutes: float, name: str | None) -> dict[str, Any]:
    """A config for a text and a time; says how it follows from them."""
    from quill.benchmark.sizing import size_config
    from quill.cli.prepare import watch

    data = {path.partition(".")[2]: value for path, value in session.overrides.items()}
    data["source"] = source.removeprefix(PREFIX)
    output = session.output
    with watch(output) as on_data, output.progress() as report:
        sized = size_config(data, 60 * minutes, session.datasets(), name=name, on_data=on_data, report=report)
    for reason in sized.reasons:
        output.say(reason)
    return sized.document


@options.command(
    examples="""
    quill config show configs/shakespeare.json
    quill config show shakespeare:v2
    """
)
def show(
    session: Session,
    source: Annotated[
        str, Argument(metavar="FILE|REF", help="Config file or model.", autocompletion=models())
    ],
) -> None:
    """Print a config with every setting, defaults included."""
    from quill.config import reading

    if source.endswith(".json") or Path(source).is_file():
        document = reading.load(Path(source)).to_dict()
    else:
        from quill.checkpoint.load import read_config

        document = read_config(session.registry().resolve(source)).to_dict()
    session.output.document(document)


@options.command(examples="quill config table")
def table(session: Session) -> None:
    """Print a Markdown table of all settings, their defaults and their meaning."""
    from quill.config import schema

    session.output.write(schema.table())


COMMANDS = {"schema": schema, "check": check, "init": init, "show": show, "table": table}
