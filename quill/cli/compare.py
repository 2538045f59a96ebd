"""Compare the settings and figures of two models."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Argument

from quill.cli import options
from quill.cli._reference import find, metrics_of, settings_of
from quill.cli.list import describe_draft, is_running
from quill.cli.options import Session
from quill.config.differences import differences
from quill.registry.draft import Draft
from quill.registry.version import Version
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
    found = [find(registry, r) for r in (first, second)]
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


def _settings(found: Version | Draft) -> dict[str, Any]:
    """The config with its defaults, so that one of an earlier quill differs only where it does."""
    from quill.checkpoint.load import read_config

    if isinstance(found, Draft):
        settings_of(found)
        found = Version(found.name, found.number, found.path)
    return read_config(found).to_dict()


def _figures(found: Version | Draft) -> dict[str, Any]:
    """What is known of a model in numbers; None for what is not."""
    manifest = (found.manifest if isinstance(found, Version) else None) or {}
    data, parent = manifest.get("data") or {}, manifest.get("parent") or {}
    figures: dict[str, Any] = {
        "state": "ok",
        "val_loss": manifest.get("best_val_loss"),
        "parameters": manifest.get("parameters"),
        "steps": manifest.get("steps"),
        "best_step": manifest.get("best_step"),
        "seconds": manifest.get("seconds"),
        "bytes": found.size if isinstance(found, Version) else None,
        "data": data.get("name"),
        "text_sha256": data.get("sha256"),
        "tokens": data.get("tokens"),
        "tokenizer": data.get("tokenizer_sha256"),
        "parent": parent.get("reference"),
        "device": manifest.get("device"),
        "created": manifest.get("created"),
    }
    if isinstance(found, Draft):
        from quill.evaluation import curves

        row = describe_draft(found, is_running(found))
        best = curves.curves(curves.parse(metrics_of(found))).best
        figures |= {k: row[k] for k in ("state", "parameters")} | {"steps": row["step"]}
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
