"""The lineage of a model: its data, settings, code and seeds, and those of the models before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quill.cli import _facts
from quill.cli._tables import Column
from quill.errors import NotFoundError, QuillError
from quill.registry.folder import Folder
from quill.registry.manifest import UNKNOWN
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.registry.store import Registry

_FACTS = ("created", "data", "config_sha256", "seeds", "versions", "git", "device", "dtype", "imported")
_COLUMNS = (
    Column("model", lambda e: e["reference"] + ("" if e["state"] == "here" else f" ({e['state']})")),
    Column("weights", lambda e: _facts.sha256(e["digest"])),
    Column("created", lambda e: " on ".join(str(e[k]) for k in ("created", "device") if e[k])),
    Column("data", lambda e: _facts.data(e["data"])),
    Column("text", lambda e: _facts.sha256(_facts.mapping(e["data"]).get("sha256"))),
    Column("tokenizer", lambda e: _tokenizer(_facts.mapping(e["data"]))),
    Column("config", lambda e: _facts.sha256(e["config_sha256"])),
    Column("code", lambda e: _facts.pairs(e["versions"])),
    Column("git", lambda e: _facts.commit(e["git"])),
    Column("seeds", lambda e: _facts.pairs(e["seeds"])),
    Column("imported", lambda e: _texts(e["imported"])),
    Column("copied from", lambda e: _facts.pairs(e.get("copied_from"))),
    Column("parent", lambda e: str((e["parent"] or {}).get("reference") or "")),
)


def show(output: Output, registry: Registry, found: Folder) -> None:
    """Print a model and its ancestors, the youngest first.

    Raises:
        NotFoundError: The run is unfinished.
    """
    if not found.is_published:
        raise NotFoundError(
            f"{found.reference} has no lineage yet",
            why="lineage is written when a run is published",
            hint=f"quill show {found.reference}",
        )
    chain = trace(registry, found)
    if output.form == "human":
        for i, entry in enumerate(chain):
            output.write("\n" if i else "")
            output.show("quill.lineage/1", entry, _COLUMNS, key="reference")
    else:
        output.show("quill.lineage/1", chain, key="reference", within="lineage")


def trace(registry: Registry, version: Folder) -> list[dict[str, Any]]:
    """The model and its ancestors as far as they exist; renamed ones are found by their weights."""
    chain = [_entry(version.reference, version.digest, "here", version)]
    known: list[Version] | None = None
    seen = {version.path}
    while parent := chain[-1]["parent"]:
        reference, digest = str(parent.get("reference")), parent.get("digest")
        if chain[-1]["imported"]:
            # A file or repository: its hash is not one of quill's weights.
            chain.append(_entry(reference, digest, "imported", None))
            break
        found, state = _resolve(registry, reference), "here"
        if found is None or (digest is not None and found.digest != digest):
            state = "removed" if found is None else "another model has this name now"
            known = registry.entries(all_versions=True) if known is None else known
            found = next((v for v in known if digest is not None and v.digest == digest), None)
            if found is not None:
                state = f"now {found.reference}"
        chain.append(_entry(reference, digest, state, found))
        if found is None or found.path in seen:
            # An edited manifest may form a circle.
            break
        seen.add(found.path)
    return chain


def _resolve(registry: Registry, reference: str) -> Version | None:
    try:
        return registry.resolve(reference)
    except QuillError:
        return None


def _entry(reference: str, digest: Any, state: str, version: Folder | None) -> dict[str, Any]:
    facts = version.facts if version else UNKNOWN
    return {
        "reference": reference,
        "digest": digest,
        "state": state,
        **{k: v for k, v in facts.items() if k in _FACTS},
        **{k: v for k, v in facts.items() if k.endswith("_from") and isinstance(v, dict)},
        "parent": facts["parent"],
    }


def _tokenizer(data: dict[str, Any]) -> str:
    return " ".join(str(data[k]) for k in ("tokenizer", "tokenizer_sha256") if data.get(k))


def _texts(imported: Any) -> str:
    return _facts.pairs({k: v for k, v in _facts.mapping(imported).items() if isinstance(v, str)})
