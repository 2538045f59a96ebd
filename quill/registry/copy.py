"""Copy a version as the next version of a name."""

from __future__ import annotations

from contextlib import suppress
from math import prod
from typing import Any

from quill import fsio
from quill.errors import CorruptError, QuillError
from quill.registry import folder as folders
from quill.registry import manifest
from quill.registry.files import OnBytes, ignore
from quill.registry.manifest import FileEntry
from quill.registry.rename import check_new
from quill.registry.store import Registry
from quill.registry.tensors import read_layout
from quill.registry.version import Version

# What a manifest says of its own folder; the rest is about the model.
_OWN = {"schema", "reference", "files", "config_sha256"}


class Plan:
    """A version to copy.

    Attributes:
        source: The version.
        name: The name that the copy gets.
        files: Its files, relative to its folder.
        bytes: Their size.
    """

    def __init__(self, registry: Registry, ref: str, source: Version, name: str) -> None:
        self._registry, self._ref = registry, ref
        self.source, self.name = source, name
        held = [p.name for p in folders.flat_files(source.path)]
        self.files = list(source.manifest["files"]) if source.manifest else held
        with source.reading(), fsio.guard(source.path, "read"):
            self.bytes = sum((source.path / f).lstat().st_size for f in self.files)

    def execute(self, on_bytes: OnBytes = ignore) -> Version:
        """Copy and publish it; every file is read twice and checked against its sha256.

        Args:
            on_bytes: Called with the size of each chunk read.

        Returns:
            The copy. Its manifest says what the original's does, and what it was copied from.

        Raises:
            NotFoundError: It was renamed or removed in the meantime; no copy is left.
            CorruptError: The version is damaged, or changed while it was copied; no copy is left.
            ResourceError: Disk or permission; no copy is left.
        """
        # First of all, so that no number is used up by a version that is damaged.
        entries = {name: self._describe(name, on_bytes) for name in self.files}
        fsio.require_space(self._registry.root, self.bytes, f"a copy of '{self._ref}'")
        with self.source.reading():
            facts = self._facts(entries[manifest.WEIGHTS])
        draft = self._registry.begin(self.name)
        draft.lock_folder()
        try:
            for name, entry in entries.items():
                with self.source.open_file(name) as file:
                    written = draft.write_chunks(name, file.chunks(on_bytes))
                if written != entry["sha256"]:
                    why = "it is no longer what was read of it before"
                    raise CorruptError(f"'{self.source.path / name}' changed while it was copied", why=why)
            return draft.publish(**facts)
        except BaseException:
            if not draft.is_published:
                with suppress(QuillError):
                    draft.discard()
            raise

    def _describe(self, name: str, on_bytes: OnBytes) -> FileEntry:
        with self.source.open_file(name) as file:
            return {"bytes": file.size, "sha256": file.sha256(on_bytes)}

    def _facts(self, weights: FileEntry) -> dict[str, Any]:
        source = self.source
        known: str | None = f"{source.name}:v{source.number}"
        if not source.manifest:
            carried: dict[str, Any] = {"parameters": _count_parameters(source)}
        else:
            carried = {k: v for k, v in source.manifest.items() if k not in _OWN and v is not None}
            if source.label:
                # A path means something on one machine only.
                known = source.manifest["reference"] or known
        return carried | {"copied_from": {"reference": known, "digest": weights["sha256"]}}


def plan(registry: Registry, ref: str, name: str) -> Plan:
    """Find the version to copy.

    Args:
        registry: Where the copy goes, and where the version is looked up.
        ref: The version, as for `Registry.resolve`.
        name: The name that the copy gets: a new one, or one that has versions already.

    Raises:
        InputError: The name is not valid.
        NotFoundError: There is no such version.
        CorruptError: It is damaged.
    """
    check_new(name, f"quill cp {ref}")
    return Plan(registry, ref, registry.resolve(ref), name)


def _count_parameters(source: Version) -> int:
    return sum(prod(t.shape) for t in read_layout(source.path / manifest.WEIGHTS).values())
