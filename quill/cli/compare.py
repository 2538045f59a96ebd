"""Compare the settings and metrics of models."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument

from quill.cli import _facts, options
from quill.cli._completion import models
from quill.cli._tables import Column, Style
from quill.cli.options import Session
from quill.config.differences import differences
from quill.errors import InputError
from quill.registry.folder import Folder
from quill.units import count, duration, size

# Fields of a config that are not settings of the run.
_ASIDE = frozenset({"$schema", "schema_version", "name"})
_LOSS = "val loss"
_FIGURES = (
    Column("state", lambda m: "" if m["state"] == "ok" else m["state"]),
    Column(_LOSS, lambda m: _facts.loss(m["val_loss"])),
    Column("measured on", lambda m: f"{m['held_out']:,} held-out tokens" if m["held_out"] else ""),
    Column("parameters", lambda m: _facts.number(m["parameters"])),
    Column("steps", lambda m: _facts.number(m["steps"])),
    Column("best step", lambda m: _facts.number(m["best_step"])),
    Column("time", lambda m: duration(m["seconds"])),
    Column("size", lambda m: size(m["bytes"])),
    Column("data", lambda m: _value(m["data"])),
    Column("text sha256", lambda m: str(m["text_sha256"] or "")[:12]),
    Column("tokens", lambda m: count(m["tokens"]) if isinstance(m["tokens"], int) else ""),
    Column("parent", lambda m: _value(m["parent"])),
    Column("device", lambda m: _value(m["device"])),
    Column("instructions", lambda m: _value(m["instructions"])),
    Column("created", lambda m: _value(m["created"])),
)


# Up to this many models are compared in columns; more are rows.
_SIDE_BY_SIDE = 3
# Characters of a list of values that a table shows.
_LONGEST = 40
# Differences of any two models that a row has no room for.
_NOT_TOLD = {"created", "text sha256"}


@options.command(
    examples="""
    quill compare shakespeare:v1 shakespeare:v2
    quill compare small medium large --json
    """,
    topic="tutorial",
)
def command(
    session: Session,
    references: Annotated[
        list[str],
        Argument(metavar="REF", help="Two or more models or runs.", autocompletion=models(drafts=True)),
    ],
) -> None:
    """Compare models: the settings in which they differ, and their metrics side by side.

    The lowest validation loss is marked with a star. Losses are comparable only on the same text, or the
    same held-out part of it, with the same tokenizer; quill eval evaluates several models on one text.
    """
    if len(references) < 2:
        raise InputError("compare requires at least two models", hint="quill list")
    output, registry = session.output, session.registry()
    found = [registry.find(r) for r in references]
    rows = [{"reference": f.reference, **_figures(f)} for f in found]
    settings = _differing([_settings(f) for f in found])
    comparable = all(len({row[k] for row in rows} - {None}) < 2 for k in ("text_sha256", "tokenizer"))
    # A run without held-out text was measured on the validation split.
    comparable = comparable and len({row["held_out"] for row in rows}) == 1
    best = _best(rows) if comparable else None
    if output.form == "human":
        lines = [_line(c.title, [c.text(row) for row in rows]) for c in _FIGURES]
        lines += [_line(name, [_value(v) or "unset" for v in values]) for name, values in settings.items()]
        shown = [line for line in lines if any(line["values"])]
        if len(rows) <= _SIDE_BY_SIDE:
            output.show("quill.compare/1", shown, _side_by_side(rows, best), key="what")
        else:
            output.show("quill.compare/1", rows, _one_below_another(rows, shown, best), key="reference")
    else:
        output.show(
            "quill.compare/1",
            rows,
            key="reference",
            within="models",
            quiet=list(settings),
            settings=[{"setting": k, "values": v} for k, v in settings.items()],
            best=best,
        )
    if not comparable:
        names = " ".join(row["reference"] for row in rows)
        output.say(
            f"their losses are not comparable; evaluate them on one text:\n  quill eval {names} --data FILE"
        )


def _line(what: str, values: list[str]) -> dict[str, Any]:
    return {"what": what, "values": values, "differ": len(set(values)) > 1}


def _side_by_side(rows: list[dict[str, Any]], best: str | None) -> list[Column]:
    """A column for each model; what differs stands out, and the best loss has a star."""

    def cell(i: int) -> Column:
        won = rows[i]["reference"] == best

        def text(line: Any) -> str:
            return str(line["values"][i]) + (" *" if won and line["what"] == _LOSS else "")

        def style(line: Any) -> Style:
            return "good" if won and line["what"] == _LOSS else "" if line["differ"] else "dim"

        return Column(rows[i]["reference"], text, style=style)

    return [Column("WHAT", lambda line: line["what"]), *(cell(i) for i in range(len(rows)))]


def _one_below_another(
    rows: list[dict[str, Any]], lines: list[dict[str, Any]], best: str | None
) -> list[Column]:
    """A row for each model, and a column for everything that differs between them."""
    place = {row["reference"]: i for i, row in enumerate(rows)}

    def column(line: dict[str, Any], drop: int) -> Column:
        def text(row: Any) -> str:
            won = row["reference"] == best and line["what"] == _LOSS
            return str(line["values"][place[row["reference"]]]) + (" *" if won else "")

        def style(row: Any) -> Style:
            return "good" if row["reference"] == best and line["what"] == _LOSS else ""

        return Column(line["what"].rpartition(".")[2].upper(), text, drop=drop, style=style)

    differing = [line for line in lines if line["differ"] and line["what"] not in _NOT_TOLD]
    # Settings tell more than figures that follow from them: those are dropped first.
    differing.sort(key=lambda line: (line["what"] != _LOSS, "." not in line["what"]))
    return [
        Column("MODEL", lambda row: row["reference"]),
        *(column(line, drop) for drop, line in enumerate(differing)),
    ]


def _best(rows: list[dict[str, Any]]) -> str | None:
    """The model with the lowest validation loss, unless they are equal."""
    known = [(row["val_loss"], row["reference"]) for row in rows if row["val_loss"] is not None]
    return min(known)[1] if len({loss for loss, _ in known}) > 1 else None


def _differing(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all configs, with each config's value."""
    first, *others = configs
    names = dict.fromkeys(name for other in others for name in differences(first, other, _ASIDE))
    found = {}
    for name in names:
        section, _, key = name.rpartition(".")
        found[name] = [_facts.mapping(c.get(section)).get(key) if section else c.get(key) for c in configs]
    return found


def _settings(found: Folder) -> dict[str, Any]:
    """The config with all defaults, so that a setting added since does not count as a difference."""
    from quill.checkpoint.load import read_config

    return read_config(found).to_dict()


def _figures(found: Folder) -> dict[str, Any]:
    """The metrics and origin of a model; None for what is not known."""
    facts = found.facts
    data, parent = facts["data"], facts["parent"]
    figures: dict[str, Any] = {
        "state": found.state,
        "val_loss": facts["best_val_loss"],
        "held_out": facts["held_out"],
        "parameters": facts["parameters"],
        "steps": found.step,
        "best_step": facts["best_step"],
        "seconds": facts["seconds"],
        "bytes": found.size,
        "data": data and data["name"],
        "text_sha256": data and data["sha256"],
        "tokens": data and data["tokens"],
        "tokenizer": data and data["tokenizer_sha256"],
        "parent": parent and parent["reference"],
        "device": facts["device"],
        "instructions": facts["instructions"],
        "created": facts["created"],
    }
    if not found.is_published:
        from quill.evaluation import curves

        best = curves.read(found.metrics()).best
        figures |= {"val_loss": best.loss, "best_step": best.step} if best else {}
    return figures


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        text = ", ".join(map(str, value))
        return text if len(text) <= _LONGEST else f"{len(value):,} values: {text[:_LONGEST]}..."
    return str(value)
