"""Show everything known about a model or dataset."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quill.cli import _datasets, _facts, options
from quill.cli._completion import models
from quill.cli._tables import Column
from quill.cli.list import style
from quill.cli.options import Session
from quill.errors import InputError, QuillError
from quill.units import count, duration, size

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.registry.folder import Folder
    from quill.registry.store import Registry


def _manifest(row: Any, *path: str) -> Any:
    """A fact of the manifest, by its path."""
    value = row["manifest"] or {}
    for key in path:
        value = _facts.mapping(value).get(key)
    return value


def _created(row: Any) -> str:
    created = _manifest(row, "created")
    return f"{created} ({_facts.ago(created, time.time())})" if created else ""


def _device(device: Any, instructions: Any) -> str:
    return " with ".join(str(part) for part in (device, instructions) if part)


_VERSION = (
    Column("model", lambda r: r["reference"]),
    Column("aliases", lambda r: ", ".join(r["aliases"])),
    Column("path", lambda r: r["path"]),
    Column("created", _created),
    Column("parameters", lambda r: _facts.number(_manifest(r, "parameters"), count)),
    Column("size", lambda r: size(r["bytes"])),
    Column(
        "val loss",
        lambda r: _facts.loss(_manifest(r, "best_val_loss")) + _facts.held_out(_manifest(r, "held_out")),
    ),
    Column("shape", lambda r: _facts.shape(r["config"].get("model"))),
    Column("data", lambda r: _facts.data(_manifest(r, "data"))),
    Column("weights", lambda r: "a moving average" if _manifest(r, "averaged") else ""),
    Column("temperature", lambda r: _temperature(_manifest(r, "temperature"))),
    Column("steps", lambda r: _facts.number(_manifest(r, "steps"))),
    Column("time", lambda r: duration(_manifest(r, "seconds"))),
    Column("device", lambda r: _device(_manifest(r, "device"), _manifest(r, "instructions"))),
    Column("at once", lambda r: _facts.at_once(r["manifest"], r["config"].get("train"))),
    Column("seeds", lambda r: _facts.pairs(_manifest(r, "seeds"))),
    Column("parent", lambda r: str(_manifest(r, "parent", "reference") or "")),
    Column("taught by", lambda r: _facts.references(_manifest(r, "teachers"))),
    Column("made with", lambda r: _facts.pairs(_manifest(r, "versions"))),
    Column("git", lambda r: _facts.commit(_manifest(r, "git"))),
    Column("files", lambda r: ", ".join(sorted(_facts.mapping(_manifest(r, "files"))))),
    Column("config", lambda r: f"quill show {r['reference']} --config"),
)


def _temperature(value: Any) -> str:
    return "" if value is None else f"logits divided by {value:.3g}"


def _step(row: Any) -> str:
    of = f" of {row['max_iters']:,}" if row["max_iters"] else ""
    return f"{row['step']:,}{of}" if row["step"] is not None else ""


def _state(row: Any) -> str:
    who = row["holder"]
    return (
        f"{row['state']}, pid {who['pid']} on {who['host']} since {who['started']}"
        if who
        else str(row["state"])
    )


_RUN = (
    Column("model", lambda r: r["reference"]),
    Column("state", _state, style=style),
    Column("path", lambda r: r["path"]),
    Column("step", _step),
    Column(
        "best",
        lambda r: f"val loss {r['best']['val_loss']:.4f} at step {r['best']['step']:,}" if r["best"] else "",
    ),
    Column("saved", lambda r: str(r["updated"] or "")),
    Column("at once", lambda r: _facts.at_once(r, r["config"].get("train"))),
    Column("shape", lambda r: _facts.shape(r["config"].get("model"))),
    Column("data", lambda r: str(_facts.mapping(r["config"].get("data")).get("source") or "")),
    Column("metrics", lambda r: f"quill show {r['reference']} --metrics" if r["best"] else ""),
    Column("log", lambda r: f"quill logs {r['reference']}{' -f' if r['state'] == 'training' else ''}"),
    Column("config", lambda r: f"quill show {r['reference']} --config" if r["config"] else ""),
)


_ANCESTOR = (
    Column("model", lambda e: e["reference"] + ("" if e["state"] == "here" else f" ({e['state']})")),
    Column("weights", lambda e: _facts.sha256(e["digest"])),
    Column(
        "created",
        lambda e: " on ".join(t for t in (e["created"] or "", _device(e["device"], e["instructions"])) if t),
    ),
    Column("data", lambda e: _facts.data(e["data"])),
    Column("text", lambda e: _facts.sha256(_facts.mapping(e["data"]).get("sha256"))),
    Column("tokenizer", lambda e: _tokenizer(_facts.mapping(e["data"]))),
    Column("config", lambda e: _facts.sha256(e["config_sha256"])),
    Column("code", lambda e: _facts.pairs(e["versions"])),
    Column("git", lambda e: _facts.commit(e["git"])),
    Column("seeds", lambda e: _facts.pairs(e["seeds"])),
    Column("imported", lambda e: _texts(e["imported"])),
    Column("copied from", lambda e: _facts.pairs(e.get("copied_from"))),
    Column("taught by", lambda e: _facts.references(e["teachers"], digests=True)),
    Column("parent", lambda e: str((e["parent"] or {}).get("reference") or "")),
)


def _tokenizer(data: dict[str, Any]) -> str:
    return " ".join(str(data[k]) for k in ("tokenizer", "tokenizer_sha256") if data.get(k))


def _texts(imported: Any) -> str:
    return _facts.pairs({k: v for k, v in _facts.mapping(imported).items() if isinstance(v, str)})


@options.command(
    examples="""
    quill show shakespeare
    quill show shakespeare:v2 --metrics
    quill show shakespeare --lineage --json
    quill show data:shakespeare
    """
)
def command(
    session: Session,
    reference: Annotated[
        str,
        Argument(
            metavar="REF",
            help="Model or unfinished run: name, name:v2 or ./folder; or data:NAME.",
            autocompletion=models(drafts=True, datasets=True),
        ),
    ],
    config: Annotated[bool, Option("--config", help="Print only the config, as it ran.")] = False,
    metrics: Annotated[
        bool, Option("--metrics", help="Draw the loss curves; their points with --json, the file with -q.")
    ] = False,
    plot: Annotated[
        Path | None, Option("--plot", metavar="FILE", help="Write the loss curves to a .svg or .png file.")
    ] = None,
    lineage: Annotated[
        bool, Option("--lineage", help="Print the data, code, seeds and parent models it came from.")
    ] = False,
    path: Annotated[bool, Option("--path", help="Print only the path of its folder.")] = False,
) -> None:
    """Show everything known about a model, an unfinished run or a dataset.

    A name without a version means its latest version, or its unfinished run if it has no version.
    """
    chosen = [flag for flag, on in (("--config", config), ("--lineage", lineage), ("--path", path)) if on]
    chosen += ["--plot"] if plot else ["--metrics"] if metrics else []
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} are mutually exclusive", why="each prints one thing")
    if reference.startswith(_datasets.PREFIX):
        if chosen and not path:
            raise InputError(f"{chosen[0]} requires a model", why=f"'{reference}' is a dataset")
        _datasets.show_one(session, reference.removeprefix(_datasets.PREFIX), path=path)
        return
    if plot or metrics:
        from quill.cli import _curves
    if plot:
        _curves.form_of(plot)
    output, registry = session.output, session.registry()
    found = registry.find(reference)
    if path:
        row = {"reference": found.reference, "path": str(found.path)}
        output.show("quill.path/1", row, key="path")
    elif config:
        output.document(found.config())
    elif plot:
        _curves.save(output, found, plot)
    elif metrics:
        _curves.show(output, found)
        _mention_later(output, registry, found, " --metrics")
    elif lineage:
        _lineage(output, registry, found)
    elif found.is_published:
        _version(output, registry, found)
    else:
        output.show("quill.run/1", _run(found), _RUN, key="reference")


def _mention_later(output: Output, registry: Registry, found: Folder, flag: str = "") -> None:
    """Point to an unfinished run that is newer than the version shown."""
    if found.is_published and not found.label:
        for draft in [d for d in registry.drafts(found.name) if d.number > found.number][-1:]:
            output.say(f"{draft.reference} is unfinished: quill show {draft.reference}{flag}")


def _lineage(output: Output, registry: Registry, found: Folder) -> None:
    from quill.registry import lineage

    chain = lineage.trace(registry, found)
    if output.form != "human":
        output.show("quill.lineage/1", chain, key="reference", within="lineage")
        return
    for i, entry in enumerate(chain):
        output.write("\n" if i else "")
        output.show("quill.lineage/1", entry, _ANCESTOR, key="reference")


def _version(output: Output, registry: Registry, found: Folder) -> None:
    row = {
        "reference": found.reference,
        "path": str(found.path),
        "bytes": found.size,
        "aliases": [] if found.label else registry.aliases_of(found),
        "manifest": found.manifest,
        "config": found.config(),
    }
    output.show("quill.show/1", row, _VERSION, key="reference")
    _mention_later(output, registry, found)


def _run(run: Folder) -> dict[str, Any]:
    """An unfinished run as a row."""
    from quill.evaluation import curves

    holder = run.holder()
    best = curves.read(run.metrics()).best
    try:
        settings = run.config()
    except QuillError:
        settings = {}
    return {
        "reference": run.reference,
        "state": run.state,
        "step": run.step,
        "max_iters": run.max_iters,
        "path": str(run.path),
        "best": {"step": best.step, "val_loss": best.loss} if best else None,
        "updated": run.updated,
        "holder": {k: holder.get(k) for k in ("pid", "host", "started")} if holder else None,
        "config": settings,
        "micro_batch_size": run.facts["micro_batch_size"],
        "gradient_checkpointing": run.facts["gradient_checkpointing"],
    }
