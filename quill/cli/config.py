"""Check a config file, print its schema, its settings, or a start of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from quill import strictjson
from quill.cli import options
from quill.cli.options import Session
from quill.cli.output import safe_line

# What a first config is made of; the values are the defaults themselves.
_START = {
    "data": ("source",),
    "model": ("block", "n_layer", "n_head", "n_embd", "block_size", "dropout"),
    "train": ("batch_size", "max_iters", "learning_rate", "eval_interval", "seed"),
}


@options.command()
def schema(session: Session) -> None:
    """Print the JSON Schema of config files, for editors and other programs."""
    from quill.config import schema

    session.output.write(strictjson.dumps(schema.build()))


@options.command()
def check(
    session: Session,
    files: Annotated[list[Path], Argument(metavar="FILE", help="Config files.")],
) -> None:
    """Say whether config files are valid; the first that is not ends it with exit code 2."""
    from quill.config import reading

    output = session.output
    found = []
    for file in files:
        config = reading.load(file)
        found.append({"file": str(file), "name": config.name, "valid": True})
    output.emit(
        "quill.config.check/1",
        {"files": found},
        human="".join(f"ok  {safe_line(str(f['file']))}\n" for f in found),
        quiet=[str(f["file"]) for f in found],
    )


@options.command()
def init(
    session: Session,
    name: Annotated[str | None, Option(help="The model's name; unset: the file's name.")] = None,
) -> None:
    """Print a first config, with the settings that are changed first at their defaults.

    Every setting it leaves out has a default too; the schema explains each.
    """
    from quill.config.settings import SECTIONS

    document: dict[str, Any] = {"$schema": "./schema.json"}
    if name:
        from quill.registry.names import check_name

        document["name"] = check_name(name)
    for section, fields in _START.items():
        known = SECTIONS[section].model_fields
        document[section] = {f: known[f].default for f in fields}
    session.output.write(strictjson.dumps(document))
    session.output.say(
        "put it into a file, and its schema beside it, where an editor finds the help of every setting:\n"
        f"  quill config init > {name or 'mine'}.json && quill config schema > schema.json\n"
        f"  quill train --config {name or 'mine'}.json"
    )


@options.command()
def show(
    session: Session,
    source: Annotated[str, Argument(metavar="FILE|REF", help="A config file, or a model of the registry.")],
) -> None:
    """Print a config as it would run: every setting, the defaults filled in."""
    from quill.config import reading

    if source.endswith(".json") or Path(source).is_file():
        document = reading.load(Path(source)).to_dict()
    else:
        from quill.checkpoint.load import read_config

        document = read_config(session.registry().resolve(source)).to_dict()
    session.output.write(strictjson.dumps(document))


@options.command()
def table(session: Session) -> None:
    """Print every setting with its default and meaning, as a Markdown table."""
    from quill.config import schema

    session.output.write(schema.table())


COMMANDS = {"schema": schema, "check": check, "init": init, "show": show, "table": table}
