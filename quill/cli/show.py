"""Show everything known of one model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quill import strictjson
from quill.cli import options
from quill.cli.list import ago
from quill.cli.options import Session
from quill.cli.output import count, duration, size
from quill.errors import NotFoundError, QuillError

if TYPE_CHECKING:
    from quill.registry.store import Registry
    from quill.registry.version import Version

_METRICS = "metrics.jsonl"


@options.command()
def command(
    session: Session,
    reference: Annotated[str, Argument(metavar="REF", help="A model: name, name:v2, or a ./folder.")],
    config: Annotated[bool, Option("--config", help="Its config alone, as it ran.")] = False,
    metrics: Annotated[bool, Option("--metrics", help="Its metrics alone, as JSON lines.")] = False,
    lineage: Annotated[bool, Option("--lineage", help="The models it came from alone.")] = False,
    path: Annotated[bool, Option("--path", help="Its folder alone.")] = False,
) -> None:
    """Show everything known of one model."""
    output, registry = session.output, session.registry()
    version = registry.resolve(reference)
    if path:
        output.emit(
            "quill.path/1",
            {"reference": version.reference, "path": str(version.path)},
            human=str(version.path),
            quiet=str(version.path),
        )
    elif config:
        output.write(strictjson.dumps(version.read_object("config.json")))
    elif metrics:
        output.write(_metrics(version))
    elif lineage:
        chain = _lineage(registry, version)
        output.emit(
            "quill.lineage/1",
            {"lineage": chain},
            human=output.table(["MODEL", "STATE"], [[c["reference"], c["state"]] for c in chain]),
            quiet=[c["reference"] for c in chain],
        )
    else:
        settings = version.read_object("config.json")
        document = {
            "reference": version.reference,
            "path": str(version.path),
            "bytes": version.size,
            "manifest": version.manifest,
            "config": settings,
        }
        human = output.fields(_pairs(version, settings))
        output.emit("quill.show/1", document, human=human, quiet=version.reference)


def _metrics(version: Version) -> str:
    if not (version.path / _METRICS).exists():
        raise NotFoundError(
            f"{version.reference} has no metrics",
            why=f"its folder holds no {_METRICS}",
            hint=f"quill eval {version.reference}",
        )
    return version.read_file(_METRICS).decode(errors="replace")


def _lineage(registry: Registry, version: Version) -> list[dict[str, Any]]:
    """The model and its parents, as far as they are still there and still the same."""
    chain: list[dict[str, Any]] = [
        {"reference": version.reference, "digest": version.digest, "state": "here"}
    ]
    while (parent := (version.manifest or {}).get("parent")) and len(chain) < 100:
        reference, digest = str(parent.get("reference")), parent.get("digest")
        entry = {"reference": reference, "digest": digest, "state": "gone"}
        chain.append(entry)
        try:
            version = registry.resolve(reference)
        except QuillError:
            break
        if digest is not None and version.digest != digest:
            entry["state"] = "another model has this name now"
            break
        entry["state"] = "here"
    return chain


def _pairs(version: Version, settings: dict[str, Any]) -> list[tuple[str, str]]:
    manifest = version.manifest or {}
    data, versions, git = (_table(manifest.get(k)) for k in ("data", "versions", "git"))
    loss = manifest.get("best_val_loss")
    created = manifest.get("created")
    commit = str(git.get("commit", ""))[:12] + (" with changes" if git.get("dirty") else "")
    files = ", ".join(sorted(manifest.get("files", {})))
    return [
        ("model", version.reference),
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
        ("seeds", ", ".join(f"{k} {v}" for k, v in _table(manifest.get("seeds")).items())),
        ("parent", str(_table(manifest.get("parent")).get("reference", ""))),
        ("made with", ", ".join(f"{k} {v}" for k, v in versions.items() if v)),
        ("git", commit if git else ""),
        ("files", files),
        ("config", f"quill show {version.reference} --config"),
    ]


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
        f"{get('block', '?')}, {get('n_layer', '?')} layers, {get('n_head', '?')} heads, "
        f"width {get('n_embd', '?')}, context {get('block_size', '?')}, vocabulary {get('vocab_size', '?')}"
    )


def _data(data: dict[str, Any]) -> str:
    if not data:
        return ""
    tokens = data.get("tokens")
    parts = [str(data.get("name", "")), f"{tokens:,} tokens" if isinstance(tokens, int) else ""]
    return ", ".join(p for p in parts if p)
