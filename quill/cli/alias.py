"""Give versions names, such as shakespeare:champion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quill.cli import options
from quill.cli._completion import models
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.errors import CorruptError, InputError, NotFoundError, QuillError

if TYPE_CHECKING:
    from pathlib import Path

    from quill.registry.store import Registry


_aliased = models(versions=False, drafts=False)
_names_only = models(versions=False, aliases=False)
_COLUMNS = (
    Column("ALIAS", lambda r: r["alias"]),
    Column("VERSION", lambda r: r["reference"] or ""),
    Column("STATE", lambda r: r["state"], style=lambda r: "good" if r["state"] == "ok" else "bad"),
)


@options.command(examples="quill alias set shakespeare:v2 champion")
def set_alias(
    session: Session,
    reference: Annotated[
        str,
        Argument(metavar="REF", help="Version: name for its latest, or name:v2.", autocompletion=models()),
    ],
    alias: Annotated[str, Argument(metavar="ALIAS", help="One word, such as 'champion'.")],
) -> None:
    """Point an alias at a version; an existing alias moves.

    The version can then be used as name:alias, and neither rm nor gc removes it. Prints name:alias.
    """
    from quill.registry import aliases as stored
    from quill.registry import names

    output, registry = session.output, session.registry()
    if names.is_path(reference):
        raise InputError(f"'{reference}' is a folder", why="only models in the registry have aliases")
    stored.check_alias(alias)
    version = registry.resolve(reference, shipped=False)
    before = stored.set_alias(registry.root / version.name, alias, version.number)
    known = f"{version.name}:{alias}"
    if before not in (None, version.number):
        output.say(f"moved {known} from v{before} to v{version.number}")
    row = {
        "alias": known,
        "reference": version.reference,
        "before": f"{version.name}:v{before}" if before else None,
    }
    output.show("quill.alias.set/1", row, key="alias")


@options.command(examples="quill alias rm shakespeare:champion")
def remove_alias(
    session: Session,
    aliases: Annotated[
        list[str],
        Argument(metavar="NAME:ALIAS", help="Aliases such as shakespeare:champion.", autocompletion=_aliased),
    ],
    missing_ok: Annotated[
        bool, Option("--missing-ok", help="Do not fail if an alias does not exist.")
    ] = False,
) -> None:
    """Remove aliases; the versions stay. Prints the removed aliases."""
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
    output.show("quill.alias.rm/1", removed, key="alias", within="removed")


@options.command(examples="quill alias list shakespeare")
def list_aliases(
    session: Session,
    name: Annotated[
        str | None,
        Argument(
            metavar="NAME", help="Only aliases of this model (default: all).", autocompletion=_names_only
        ),
    ] = None,
) -> None:
    """List aliases and their versions."""
    from quill.registry import aliases as stored
    from quill.registry import names

    output, registry = session.output, session.registry()
    if name is not None:
        if names.check_name(name) not in _names(registry):
            registry.resolve(name, shipped=False)
        stored.read(_folder(registry, name))["aliases"]
    rows = _rows(registry, [name] if name else _names(registry))
    output.show(
        "quill.alias.list/1",
        rows,
        _COLUMNS,
        key="alias",
        within="aliases",
        quiet=[r["alias"] for r in rows if r["reference"]],
    )
    if not rows:
        output.say("no aliases yet: quill alias set NAME:v1 champion")


@options.command(examples="quill alias restore shakespeare")
def restore_aliases(
    session: Session,
    name: Annotated[
        str, Argument(metavar="NAME", help="Model whose aliases are lost.", autocompletion=_names_only)
    ],
) -> None:
    """Restore aliases from their copy after model.json was lost or damaged.

    Until then no version of the model is removed. Prints the aliases.
    """
    from quill.registry import aliases as stored
    from quill.registry import names

    output, registry = session.output, session.registry()
    if names.check_name(name) not in _names(registry):
        registry.resolve(name, shipped=False)
    stored.restore(_folder(registry, name))
    rows = _rows(registry, [name])
    output.show("quill.alias.restore/1", rows, _COLUMNS, key="alias", within="aliases")
    if not rows:
        output.say(f"restored: {name} has no aliases")


COMMANDS = {"set": set_alias, "rm": remove_alias, "list": list_aliases, "restore": restore_aliases}


def _parse(text: str) -> tuple[str, str]:
    from quill.registry import names

    name, number, alias = names.parse(text)
    if number or alias == names.LATEST:
        raise InputError(
            f"'{text}' is not an alias",
            why="it is a version, which cannot be changed",
            hint="quill alias list",
        )
    if alias is None:
        raise InputError(
            f"'{text}' is a model", why="an alias is written NAME:ALIAS", hint=f"quill alias list {name}"
        )
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
            registry.resolve(name, shipped=False)
        except NotFoundError as e:
            return e
    have = list(stored.read(registry.root / name)["aliases"])
    return NotFoundError(
        f"'{name}' has no alias '{alias}'",
        why=f"its aliases are {', '.join(have[:8])}" if have else "it has no aliases",
        close=[f"{name}:{a}" for a in get_close_matches(alias, have, 3)],
    )


def _rows(registry: Registry, known: list[str]) -> list[dict[str, Any]]:
    """Every alias and its version; unreadable aliases of a name are one row among the others."""
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
                state = "removed"
            except CorruptError:
                state = "damaged"
            except QuillError as e:
                state = str(e)
            rows.append({"alias": f"{name}:{alias}", "reference": f"{name}:v{number}", "state": state})
    return rows
