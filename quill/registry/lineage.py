"""The lineage of a model: the models that it was trained from, as far as they exist."""

from __future__ import annotations

from typing import Any

from quill.errors import NotFoundError, QuillError
from quill.registry.folder import Folder
from quill.registry.manifest import UNKNOWN
from quill.registry.store import Registry
from quill.registry.version import Version

_FACTS = (
    "created",
    "data",
    "teachers",
    "config_sha256",
    "seeds",
    "versions",
    "git",
    "device",
    "instructions",
    "dtype",
    "imported",
)


def trace(registry: Registry, version: Folder) -> list[dict[str, Any]]:
    """List a model and its ancestors, the youngest first.

    Ancestors that were renamed are found by their weights; the list ends at one that no longer exists, or
    that was imported.

    Args:
        registry: Where to look.
        version: The model.

    Returns:
        JSON values: "reference", "digest" and "state" of each, with the facts of its manifest.

    Raises:
        NotFoundError: It is an unfinished run.
    """
    if not version.is_published:
        raise NotFoundError(
            f"{version.reference} has no lineage yet",
            why="lineage is written when a run is published",
            hint=f"quill show {version.reference}",
        )
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
