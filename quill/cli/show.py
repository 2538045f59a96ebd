"""Show everything known of one model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quill import strictjson
from quill.cli import options
from quill.cli.list import ago
from quill.cli.options import Session
from quill.cli.output import safe_line
from quill.errors import InputError, QuillError
from quill.units import count, duration, size

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.registry.folder import Folder
    from quill.registry.manifest import Data, Git
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
    found = registry.find(reference)
    if path:
        where = str(found.path)
        document = {"reference": found.reference, "path": where}
        output.emit("quill.path/1", document, human=safe_line(where), quiet=where)
    elif config:
        output.write(strictjson.dumps(found.config()))
    elif plot:
        _curves.save(output, found, plot)
    elif metrics:
        _curves.show(output, found)
        _mention_later(output, registry, found, " --metrics")
    elif lineage:
        from quill.cli import _lineage

        _lineage.show(output, registry, found)
    elif found.is_published:
        _version(output, registry, found)
    else:
        _run(output, found)


def _mention_later(output: Output, registry: Registry, found: Folder, flag: str = "") -> None:
    """Say that a run is newer than what is shown: a name alone does not mean it."""
    if found.is_published and not found.label:
        for draft in [d for d in registry.drafts(found.name) if d.number > found.number][-1:]:
            output.say(f"{draft.reference} is not finished yet: quill show {draft.reference}{flag}")


def _version(output: Output, registry: Registry, found: Folder) -> None:
    settings = found.config()
    own = [] if found.label else registry.aliases_of(found)
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


def _run(output: Output, run: Folder) -> None:
    """Show what is known of a run before it is published."""
    from quill.evaluation import curves

    holder, step, max_iters = run.holder(), run.step, run.max_iters
    best = curves.curves(curves.parse(run.metrics())).best
    try:
        settings = run.config()
    except QuillError:
        settings = {}
    who = {k: holder.get(k) for k in ("pid", "host", "started")} if holder else None
    document = {
        "reference": run.reference,
        "state": run.state,
        "step": step,
        "max_iters": max_iters,
        "path": str(run.path),
        "best": {"step": best.step, "val_loss": best.loss} if best else None,
        "updated": run.updated,
        "holder": who,
        "config": settings,
    }
    of = f" of {max_iters:,}" if max_iters else ""
    pairs = [
        ("model", run.reference),
        ("state", run.state + (f", pid {who['pid']} on {who['host']} since {who['started']}" if who else "")),
        ("path", str(run.path)),
        ("step", f"{step:,}{of}" if step is not None else ""),
        ("val loss", f"{best.loss:.4f} at step {best.step:,}, the best so far" if best else ""),
        ("saved", run.updated or ""),
        ("shape", _shape(_table(settings.get("model")))),
        ("data", str(_table(settings.get("data")).get("source") or "")),
        ("metrics", f"quill show {run.reference} --metrics" if best else ""),
        ("log", f"quill logs {run.reference}{' -f' if who else ''}"),
        ("config", f"quill show {run.reference} --config" if settings else ""),
    ]
    output.emit("quill.run/1", document, human=output.fields(pairs), quiet=run.reference)


def _pairs(version: Folder, settings: dict[str, Any], aliases: list[str]) -> list[tuple[str, str]]:
    facts = version.facts
    loss, created, parent = facts["best_val_loss"], facts["created"], facts["parent"]
    return [
        ("model", version.reference),
        ("aliases", ", ".join(aliases)),
        ("path", str(version.path)),
        ("made", f"{created} ({ago(created, time.time())})" if created else ""),
        ("parameters", _number(facts["parameters"], count)),
        ("size", size(version.size)),
        ("val loss", f"{loss:.4f}" if loss is not None else ""),
        ("shape", _shape(_table(settings.get("model")))),
        ("data", _data(facts["data"])),
        ("steps", _number(facts["steps"])),
        ("time", duration(facts["seconds"])),
        ("device", facts["device"] or ""),
        ("seeds", pairs(facts["seeds"])),
        ("parent", (parent and parent["reference"]) or ""),
        ("made with", pairs(facts["versions"])),
        ("git", commit(facts["git"])),
        ("files", ", ".join(sorted(facts["files"]))),
        ("config", f"quill show {version.reference} --config"),
    ]


def pairs(values: Mapping[str, Any] | None) -> str:
    """A small object of a manifest in one line: "quill 0.1.0, python 3.11.7"."""
    return ", ".join(f"{k} {v}" for k, v in (values or {}).items() if v not in (None, ""))


def commit(git: Git | None) -> str:
    """The state of the code that made a model."""
    return f"{git['commit'] or ''}{' with changes' if git['dirty'] else ''}" if git else ""


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


def _data(data: Data | None) -> str:
    if data is None:
        return ""
    tokens = f"{data['tokens']:,} tokens" if data["tokens"] is not None else ""
    return ", ".join(p for p in (data["name"], tokens) if p)
