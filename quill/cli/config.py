"""Validate config files; print their schema, their settings, or a first one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import models
from quill.cli._tables import Column
from quill.cli.options import Session

# The settings of a first config, at their defaults.
_START = {
    "data": ("source",),
    "model": ("block", "n_layer", "n_head", "n_embd", "block_size", "dropout"),
    "train": ("batch_size", "max_iters", "learning_rate", "eval_interval", "seed"),
}
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


@options.command(examples="quill config init --name mine > mine.json")
def init(
    session: Session,
    name: Annotated[
        str | None, Option(metavar="NAME", help="Name of the model (default: the file's name).")
    ] = None,
) -> None:
    """Print a first config: the settings that people change, at their defaults.

    The schema documents every other setting.
    """
    from quill.config.settings import SECTIONS

    document: dict[str, Any] = {"$schema": "./schema.json"}
    if name:
        from quill.registry.names import check_name

        document["name"] = check_name(name)
    for section, fields in _START.items():
        known = SECTIONS[section].model_fields
        document[section] = {f: known[f].default for f in fields}
    session.output.document(document)
    file = name or "mine"
    session.output.say(
        "save it next to the schema, which your editor can use, then train:\n"
        f"  quill config init > {file}.json && quill config schema > schema.json\n"
        f"  quill train {file}.json"
    )


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
