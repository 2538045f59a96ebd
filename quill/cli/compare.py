"""Compare the settings and figures of two models."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument

from quill.cli import options
from quill.cli.options import Session
from quill.config.differences import differences
from quill.registry.folder import Folder
from quill.units import count, duration, size

# What a config says of itself and not of the run.
_ASIDE = frozenset({"$schema", "schema_version", "name"})


@options.command()
def command(
    session: Session,
    first: Annotated[str, Argument(metavar="REF1", help="A model, or a run in progress.")],
    second: Annotated[str, Argument(metavar="REF2", help="Another.")],
) -> None:
    """Compare two models: the settings in which they differ, and their figures side by side.

    Losses of different tokenizers or texts do not compare; quill eval measures both on one text.
    """
    output, registry = session.output, session.registry()
    found = [registry.find(r) for r in (first, second)]
    figures = [_figures(f) for f in found]
    one, other = (_settings(f) for f in found)
    differing = differences(one, other, _ASIDE)
    document = {
        "models": [{"reference": f.reference, **row} for f, row in zip(found, figures, strict=True)],
        "settings": [{"setting": k, "values": list(v)} for k, v in differing.items()],
    }
    shown = [_shown(row) for row in figures]
    rows = [[name, *(s[name] for s in shown)] for name in shown[0] if any(s[name] for s in shown)]
    rows += [[name, *(_value(v) or "unset" for v in values)] for name, values in differing.items()]
    human = output.table(["WHAT", *(f.reference for f in found)], rows)
    output.emit("quill.compare/1", document, human=human, quiet=list(differing))
    a, b = figures
    if any(a[k] is not None and b[k] is not None and a[k] != b[k] for k in ("text_sha256", "tokenizer")):
        names = " ".join(f.reference for f in found)
        output.say(
            f"their losses are of different texts or tokens; on one text: quill eval {names} --data FILE"
        )


def _settings(found: Folder) -> dict[str, Any]:
    """The config with its defaults, so that one of an earlier quill differs only where it does."""
    from quill.checkpoint.load import read_config

    return read_config(found).to_dict()


def _figures(found: Folder) -> dict[str, Any]:
    """What is known of a model in numbers; None for what is not."""
    facts = found.facts
    data, parent = facts["data"], facts["parent"]
    figures: dict[str, Any] = {
        "state": found.state,
        "val_loss": facts["best_val_loss"],
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
        "created": facts["created"],
    }
    if not found.is_published:
        from quill.evaluation import curves

        best = curves.curves(curves.parse(found.metrics())).best
        figures |= {"val_loss": best.loss, "best_step": best.step} if best else {}
    return figures


def _shown(figures: dict[str, Any]) -> dict[str, str]:
    """The same for a person."""
    loss = figures["val_loss"]
    same = {k: _value(figures[k]) for k in ("data", "parent", "device", "created")}
    return {
        "state": "" if figures["state"] == "ok" else figures["state"],
        "val loss": "" if loss is None else f"{loss:.4f}",
        "parameters": _count(figures["parameters"]),
        "steps": _count(figures["steps"]),
        "best step": _count(figures["best_step"]),
        "time": duration(figures["seconds"]),
        "size": size(figures["bytes"]),
        "data": same["data"],
        "text sha256": str(figures["text_sha256"] or "")[:12],
        "tokens": count(figures["tokens"]) if isinstance(figures["tokens"], int) else "",
        "parent": same["parent"],
        "device": same["device"],
        "made": same["created"],
    }


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else ""


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
