"""Where a model came from: its data, settings, code and seeds, and the same of the models before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quill.cli.show import commit, pairs
from quill.errors import NotFoundError, QuillError
from quill.registry.folder import Folder
from quill.registry.manifest import UNKNOWN
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.registry.store import Registry

_FACTS = ("created", "data", "config_sha256", "seeds", "versions", "git", "device", "dtype", "imported")


def show(output: Output, registry: Registry, found: Folder) -> None:
    """Print a model and those before it, the youngest first.

    Raises:
        NotFoundError: It is not finished, and its manifest not written.
    """
    if not found.is_published:
        raise NotFoundError(
            f"{found.reference} has no lineage yet",
            why="the manifest that holds it is written when the run is finished",
            hint=f"quill show {found.reference}",
        )
    chain = trace(registry, found)
    human = "\n".join(output.fields(_fields(entry)) for entry in chain)
    quiet = [entry["reference"] for entry in chain]
    output.emit("quill.lineage/1", {"lineage": chain}, human=human, quiet=quiet)


def trace(registry: Registry, version: Folder) -> list[dict[str, Any]]:
    """The model and its parents, as far as they are still there; by their weights, if they were renamed."""
    chain = [_entry(version.reference, version.digest, "here", version)]
    known: list[Version] | None = None
    seen = {version.path}
    while parent := chain[-1]["parent"]:
        reference, digest = str(parent.get("reference")), parent.get("digest")
        if chain[-1]["imported"]:
            # A file or a repository, whose hash is of no weights of quill's.
            chain.append(_entry(reference, digest, "imported from there", None))
            break
        found, state = _resolve(registry, reference), "here"
        if found is None or (digest is not None and found.digest != digest):
            state = "gone" if found is None else "another model has this name now"
            known = registry.entries(all_versions=True) if known is None else known
            found = next((v for v in known if digest is not None and v.digest == digest), None)
            if found is not None:
                state = f"here as {found.reference}"
        chain.append(_entry(reference, digest, state, found))
        if found is None or found.path in seen:
            # Nobody descends from itself, but a hand may have written so.
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
        # A copy says of what.
        **{k: v for k, v in facts.items() if k.endswith("_from") and isinstance(v, dict)},
        "parent": facts["parent"],
    }


def _fields(entry: dict[str, Any]) -> list[tuple[str, str]]:
    data, parent = entry["data"] or {}, entry["parent"] or {}
    tokens = f"{data['tokens']:,} tokens" if data.get("tokens") is not None else ""
    learnt = ", ".join(x for x in (data.get("name"), tokens) if x)
    other = [(k.replace("_", " "), pairs(v)) for k, v in entry.items() if k.endswith("_from")]
    imported = {k: v for k, v in (entry["imported"] or {}).items() if isinstance(v, str)}
    return [
        ("model", entry["reference"] + ("" if entry["state"] == "here" else f" ({entry['state']})")),
        ("weights", _sha256(entry["digest"])),
        ("made", " on ".join(entry[k] for k in ("created", "device") if entry[k])),
        ("data", learnt),
        ("text", _sha256(data.get("sha256"))),
        ("tokenizer", " ".join(data[k] for k in ("tokenizer", "tokenizer_sha256") if data.get(k))),
        ("config", _sha256(entry["config_sha256"])),
        ("code", pairs(entry["versions"])),
        ("git", commit(entry["git"])),
        ("seeds", pairs(entry["seeds"])),
        ("imported", pairs(imported)),
        *other,
        ("parent", parent.get("reference") or ""),
    ]


def _sha256(digest: Any) -> str:
    return f"sha256 {digest}" if digest else ""
