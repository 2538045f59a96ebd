"""Call a version by a name of its own, such as shakespeare:champion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quill.cli import options
from quill.cli.options import Session
from quill.errors import CorruptError, InputError, NotFoundError, QuillError

if TYPE_CHECKING:
    from pathlib import Path

    from quill.registry.store import Registry


@options.command()
def set_alias(
    session: Session,
    reference: Annotated[str, Argument(metavar="REF", help="The version: name for its newest, or name:v2.")],
    alias: Annotated[str, Argument(metavar="ALIAS", help="One word, as in 'champion'.")],
) -> None:
    """Let an alias mean a version, also where it meant another before.

    The version is found by name:alias from then on, and neither rm nor gc takes it away. Prints that.
    """
    from quill.registry import aliases as stored
    from quill.registry import names

    output, registry = session.output, session.registry()
    if names.is_path(reference):
        raise InputError(f"'{reference}' is a folder", why="aliases are of models in the registry")
    stored.check_alias(alias)
    version = registry.resolve(reference)
    before = stored.set_alias(registry.root / version.name, alias, version.number)
    known = f"{version.name}:{alias}"
    if before not in (None, version.number):
        output.say(f"{known} was v{before}, and is v{version.number} now")
    output.emit(
        "quill.alias.set/1",
        {
            "alias": known,
            "reference": version.reference,
            "before": f"{version.name}:v{before}" if before else None,
        },
        human=known,
        quiet=known,
    )


@options.command()
def remove_alias(
    session: Session,
    aliases: Annotated[list[str], Argument(metavar="REF", help="As in shakespeare:champion.")],
    missing_ok: Annotated[bool, Option("--missing-ok", help="What is gone already is no failure.")] = False,
) -> None:
    """Take aliases away; the versions stay. Prints those that were taken away."""
    from quill.registry import aliases as stored

    output, registry = session.output, session.registry()
    wanted = [_parse(a) for a in aliases]
    there = {pair: stored.read(_folder(registry, pair[0]))["aliases"].get(pair[1]) for pair in wanted}
    for (name, alias), number in there.items():
        if number is None and not missing_ok:
            raise _no_alias(registry, name, alias)
    removed = []
    for name, alias in there:
        number = stored.remove_alias(_folder(registry, name), alias)
        if number is not None:
            removed.append({"alias": f"{name}:{alias}", "reference": f"{name}:v{number}"})
    lines = [r["alias"] for r in removed]
    human = "".join(f"{line}\n" for line in lines)
    output.emit("quill.alias.rm/1", {"removed": removed}, human=human, quiet=lines)


@options.command()
def list_aliases(
    session: Session,
    name: Annotated[str | None, Argument(metavar="NAME", help="Only this model's.")] = None,
) -> None:
    """List aliases and what they mean."""
    from quill.registry import aliases as stored
    from quill.registry import names

    output, registry = session.output, session.registry()
    if name is not None:
        if names.check_name(name) not in _names(registry):
            registry.resolve(name)
        stored.read(_folder(registry, name))["aliases"]
    rows = _rows(registry, [name] if name else _names(registry))
    output.emit(
        "quill.alias.list/1",
        {"aliases": rows},
        human=output.table(
            ["ALIAS", "MEANS", "STATE"], [[r["alias"], r["reference"] or "", r["state"]] for r in rows]
        )
        if rows
        else "",
        quiet=[r["alias"] for r in rows if r["reference"]],
    )
    if not rows:
        output.say("no aliases yet: quill alias set NAME:v1 champion")


COMMANDS = {"set": set_alias, "rm": remove_alias, "list": list_aliases}


def _parse(text: str) -> tuple[str, str]:
    from quill.registry import names

    name, number, alias = names.parse(text)
    if number or alias == names.LATEST:
        raise InputError(f"'{text}' is no alias", why="it always means what it says", hint="quill alias list")
    if alias is None:
        raise InputError(f"'{text}' is a name", why="an alias is NAME:ALIAS", hint=f"quill alias list {name}")
    return name, alias


def _folder(registry: Registry, name: str) -> Path:
    from quill.registry.folder import refuse_link

    folder = registry.root / name
    refuse_link(folder)
    return folder


def _names(registry: Registry) -> list[str]:
    return [m.name for m in registry.models() if m.drafts or any(v.number for v in m.versions)]


def _no_alias(registry: Registry, name: str, alias: str) -> NotFoundError:
    from difflib import get_close_matches

    from quill.registry import aliases as stored

    if name not in _names(registry):
        try:
            registry.resolve(name)
        except NotFoundError as e:
            return e
    have = list(stored.read(registry.root / name)["aliases"])
    return NotFoundError(
        f"'{name}' has no alias '{alias}'",
        why=f"it has {', '.join(have[:8])}" if have else "it has none",
        close=[f"{name}:{a}" for a in get_close_matches(alias, have, 3)],
    )


def _rows(registry: Registry, known: list[str]) -> list[dict[str, Any]]:
    """Every alias with what it means; aliases that cannot be read hide no others."""
    from quill.registry import aliases as stored

    rows: list[dict[str, Any]] = []
    for name in known:
        try:
            meant = stored.read(_folder(registry, name))["aliases"]
        except QuillError as e:
            rows.append({"alias": name, "reference": None, "state": f"damaged: {e}"})
            continue
        for alias, number in meant.items():
            state = "ok"
            try:
                registry.resolve(f"{name}:v{number}")
            except NotFoundError:
                state = "gone"
            except CorruptError:
                state = "damaged"
            except QuillError as e:
                state = str(e)
            rows.append({"alias": f"{name}:{alias}", "reference": f"{name}:v{number}", "state": state})
    return rows
