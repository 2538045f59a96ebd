"""Show everything known of one model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quill import strictjson
from quill.cli import options
from quill.cli._reference import find, metrics_of, settings_of
from quill.cli.list import ago, aliases_of, describe_draft, is_running
from quill.cli.options import Session
from quill.cli.output import safe_line
from quill.errors import InputError, QuillError
from quill.registry.draft import Draft
from quill.registry.version import Version
from quill.units import count, duration, size

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.registry.store import Registry


@options.command()
def command(
    session: Session,
    reference: Annotated[str, Argument(metavar="REF", help="A model: name, name:v2, or a ./folder.")],
    config: Annotated[bool, Option("--config", help="Its config alone, as it ran.")] = False,
    metrics: Annotated[
        bool, Option("--metrics", help="Its loss curves, drawn; with --json their points, with -q the file.")
    ] = False,
    plot: Annotated[
        Path | None, Option("--plot", metavar="FILE", help="Write the loss curves to a .svg or .png file.")
    ] = None,
    lineage: Annotated[
        bool, Option("--lineage", help="The data, code, seeds and models it came from.")
    ] = False,
    path: Annotated[bool, Option("--path", help="Its folder alone.")] = False,
) -> None:
    """Show everything known of one model, or of a run that is not finished yet.

    A name alone means its newest complete version, or its unfinished run where it has no other.
    """
    chosen = [flag for flag, on in (("--config", config), ("--lineage", lineage), ("--path", path)) if on]
    chosen += ["--plot"] if plot else ["--metrics"] if metrics else []
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} are both given", why="each is shown alone")
    if plot or metrics:
        from quill.cli import _curves
    if plot:
        _curves.form_of(plot)
    output, registry = session.output, session.registry()
    found = find(registry, reference)
    if path:
        where = str(found.path)
        document = {"reference": found.reference, "path": where}
        output.emit("quill.path/1", document, human=safe_line(where), quiet=where)
    elif config:
        output.write(strictjson.dumps(settings_of(found)))
    elif plot:
        _curves.save(output, found, plot)
    elif metrics:
        _curves.show(output, found)
        _mention_later(output, registry, found, " --metrics")
    elif lineage:
        from quill.cli import _lineage

        _lineage.show(output, registry, found)
    else:
        _everything(output, registry, found)


def _mention_later(output: Output, registry: Registry, found: Version | Draft, flag: str = "") -> None:
    """Say that a run is newer than what is shown: a name alone does not mean it."""
    if isinstance(found, Version) and not found.label:
        for draft in [d for d in registry.drafts(found.name) if d.number > found.number][-1:]:
            output.say(f"{draft.reference} is not finished yet: quill show {draft.reference}{flag}")


def _everything(output: Output, registry: Registry, found: Version | Draft) -> None:
    if isinstance(found, Draft):
        _unfinished(output, found)
        return
    settings = settings_of(found)
    named = not found.label
    aliases = aliases_of(registry, found.name) if named else {}
    own = sorted(a for a, number in aliases.items() if number == found.number)
    document = {
        "reference": found.reference,
        "path": str(found.path),
        "bytes": found.size,
        "aliases": own,
        "manifest": found.manifest,
        "config": settings,
    }
    human = output.fields(_pairs(found, settings, own))
    output.emit("quill.show/1", document, human=human, quiet=found.reference)
    _mention_later(output, registry, found)


def _unfinished(output: Output, draft: Draft) -> None:
    """What is known of a run before it is a version."""
    from quill.evaluation import curves
    from quill.registry import locks

    at_work = is_running(draft)
    row = describe_draft(draft, at_work)
    holder = locks.holder(draft.path.parent.parent, draft.name) if at_work else None
    best = curves.curves(curves.parse(metrics_of(draft))).best
    try:
        settings = settings_of(draft)
    except QuillError:
        settings = {}
    status = draft.status() or {}
    who = {k: (holder or {}).get(k) for k in ("pid", "host", "started")} if holder else None
    document = {
        **{k: row[k] for k in ("reference", "state", "step", "max_iters")},
        "path": str(draft.path),
        "best": {"step": best.step, "val_loss": best.loss} if best else None,
        "updated": status.get("updated"),
        "holder": who,
        "config": settings,
    }
    of = f" of {row['max_iters']:,}" if row["max_iters"] else ""
    pairs = [
        ("model", draft.reference),
        (
            "state",
            row["state"] + (f", pid {who['pid']} on {who['host']} since {who['started']}" if who else ""),
        ),
        ("path", str(draft.path)),
        ("step", f"{row['step']:,}{of}" if row["step"] is not None else ""),
        ("val loss", f"{best.loss:.4f} at step {best.step:,}, the best so far" if best else ""),
        ("saved", str(status.get("updated") or "")),
        ("shape", _shape(_table(settings.get("model")))),
        ("data", str(_table(settings.get("data")).get("source") or "")),
        ("metrics", f"quill show {draft.reference} --metrics" if best else ""),
        ("log", f"quill logs {draft.reference}{' -f' if at_work else ''}"),
        ("config", f"quill show {draft.reference} --config" if settings else ""),
    ]
    output.emit("quill.run/1", document, human=output.fields(pairs), quiet=draft.reference)


def _pairs(version: Version, settings: dict[str, Any], aliases: list[str]) -> list[tuple[str, str]]:
    manifest = version.manifest or {}
    data, versions, git = (_table(manifest.get(k)) for k in ("data", "versions", "git"))
    loss = manifest.get("best_val_loss")
    created = manifest.get("created")
    files = ", ".join(sorted(manifest.get("files", {})))
    return [
        ("model", version.reference),
        ("aliases", ", ".join(aliases)),
        ("path", str(version.path)),
        ("made", f"{created} ({ago(created, time.time())})" if created else ""),
        ("parameters", _number(manifest.get("parameters"), count)),
        ("size", size(version.size)),
        ("val loss", f"{loss:.4f}" if loss is not None else ""),
        ("shape", _shape(_table(settings.get("model")))),
        ("data", _data(data)),
        ("steps", _number(manifest.get("steps"))),
        ("time", duration(manifest.get("seconds"))),
        ("device", str(manifest.get("device") or "")),
        ("seeds", pairs(manifest.get("seeds"))),
        ("parent", str(_table(manifest.get("parent")).get("reference", ""))),
        ("made with", pairs(versions)),
        ("git", commit(git)),
        ("files", files),
        ("config", f"quill show {version.reference} --config"),
    ]


def pairs(values: Any) -> str:
    """A small object of a manifest in one line: "quill 0.1.0, python 3.11.7"."""
    return ", ".join(f"{k} {v}" for k, v in _table(values).items() if v not in (None, ""))


def commit(git: Any) -> str:
    """Which state of its code made a model."""
    git = _table(git)
    return str(git.get("commit", "")) + (" with changes" if git.get("dirty") else "") if git else ""


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any, short: Any = None) -> str:
    if value is None:
        return ""
    return f"{value:,}" + (f" ({short(value)})" if short and value >= 1000 else "")


def _shape(model: dict[str, Any]) -> str:
    if not model:
        return ""
    get = model.get
    return (
        f"{get('block', '?')}, {_some(get('n_layer', '?'), 'layer')}, {_some(get('n_head', '?'), 'head')}, "
        f"width {get('n_embd', '?')}, context {get('block_size', '?')}, vocabulary {get('vocab_size', '?')}"
    )


def _some(number: Any, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    tokens = data.get("tokens")
    parts = [str(data.get("name", "")), f"{tokens:,} tokens" if isinstance(tokens, int) else ""]
    return ", ".join(p for p in parts if p)
