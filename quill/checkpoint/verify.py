"""Verify models: files have their published sizes and hashes, weights are finite, and all fit together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from quill.checkpoint.finite import check_finite
from quill.errors import CorruptError, NotFoundError, QuillError
from quill.registry import aliases, manifest, names
from quill.registry.draft import ResumeState
from quill.registry.files import OnBytes, ignore
from quill.registry.folder import Folder, Kind, is_flat, is_published, refuse_link
from quill.registry.tensors import read_layout
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.registry.store import Registry

State = Literal["ok", "unlisted", "damaged", "unreadable"]


class File(NamedTuple):
    """The result for one file.

    Attributes:
        name: Relative to its folder.
        bytes: Its size; None if it is missing.
        error: What is wrong with it, or None.
        listed: Whether the manifest lists it; quill never reads a file that is not listed.
    """

    name: str
    bytes: int | None
    error: QuillError | None = None
    listed: bool = True

    @property
    def state(self) -> State:
        """The result in one word; an unreadable file may be undamaged."""
        if self.error is None:
            return "ok" if self.listed else "unlisted"
        return "damaged" if isinstance(self.error, CorruptError) else "unreadable"


class Result(NamedTuple):
    """The result for a version, a resume state, or a model.json.

    Attributes:
        reference: How to refer to it.
        kind: What it is; "model" for a model's model.json.
        path: Its folder.
        files: The results for its files.
        error: What is wrong with it as a whole, or None.
    """

    reference: str
    kind: Kind
    path: Path
    files: list[File]
    error: QuillError | None = None

    @property
    def errors(self) -> list[QuillError]:
        """Everything that is wrong with it."""
        return [e for e in (self.error, *(f.error for f in self.files)) if e is not None]

    @property
    def state(self) -> State:
        """The worst of what was found."""
        if not self.errors:
            return "ok"
        return "damaged" if any(isinstance(e, CorruptError) for e in self.errors) else "unreadable"


def find_targets(registry: Registry, refs: Iterable[str] = ()) -> list[Folder]:
    """Find what there is to verify.

    Args:
        registry: Where to look.
        refs: "name" for all of its versions, the resume states of its unfinished runs and its aliases,
            "name:vN", "name:alias", or a path. Without any, everything in the registry.

    Raises:
        InputError: One is not a reference.
        NotFoundError: There is no such model.
    """
    found: dict[tuple[str, str], Folder] = {}
    wanted: list[str | None] = [*refs]
    for ref in wanted or [None]:
        found |= {(f.kind, f.reference): f for f in _find(registry, ref)}
    return list(found.values())


def count_bytes(target: Folder) -> int:
    """Approximately how many bytes `verify_target` will read."""
    with suppress(OSError, QuillError):
        return sum((target.path / n).lstat().st_size for n in manifest.files(target.path))
    return 0


def verify_target(target: Folder, on_bytes: OnBytes = ignore) -> Result | None:
    """Verify a version, a resume state or a model's aliases, byte by byte.

    Args:
        target: From `find_targets`.
        on_bytes: Called with the size of each chunk read.

    Returns:
        The result; None if the target was removed.
    """
    if target.kind == "model":
        return _check_aliases(target)
    files: list[File] = []
    error: QuillError | None = None
    try:
        opened = _open(target)
        names = opened.manifest["files"] if opened.manifest else manifest.REQUIRED
        files = [_check_file(opened, n, on_bytes) for n in sorted(names)]
        if target.kind == "version" and not any(f.error for f in files):
            files = _check_together(opened, files) + _unlisted(opened)
    except QuillError as e:
        error = e
    if not os.path.lexists(target.path):
        return None
    return Result(target.reference, target.kind, target.path, files, error)


def _find(registry: Registry, ref: str | None) -> Iterator[Folder]:
    if ref is not None and names.is_path(ref):
        yield registry.resolve(ref)
        return
    name, number, alias = names.parse(ref) if ref is not None else (None, None, None)
    if name and alias:
        # `resolve` would refuse a damaged version, which is what this is about.
        newest = registry.newest(name) if alias == names.LATEST else None
        number = newest.number if newest else aliases.read(registry.root / name)["aliases"].get(alias, 0)
    models = registry.models(name)
    versions = [v for m in models for v in m.versions if number in (None, v.number)]
    drafts = [d for m in models for d in m.drafts if number in (None, d.number)]
    if ref is not None and not versions and not drafts:
        found = registry.resolve(ref)
        if found.root != registry.root:
            yield found
            return
        raise NotFoundError(f"no model '{ref}'", why="it was just removed", hint="quill list")
    yield from versions
    for draft in drafts:
        yield from reversed(draft.states())
    if number is None:
        for one in sorted({v.name for v in versions if v.number} | {d.name for d in drafts}):
            yield Folder(one, 0, registry.root / one)


def _check_aliases(model: Folder) -> Result | None:
    """Check that a model's aliases are known and name existing versions, and that they are kept twice."""
    error: QuillError | None = None
    try:
        for alias, number in aliases.read_for_removal(model.path).items():
            if not is_published(model.path / f"v{number}") and not (number == 1 and is_flat(model.path)):
                raise CorruptError(
                    f"'{model.name}:{alias}' points to a missing version",
                    why=f"there is no {model.name}:v{number}",
                    hint=f"quill alias set {model.name} {alias}",
                )
    except QuillError as e:
        error = e
    if not os.path.lexists(model.path):
        return None
    files = [File(aliases.FILE, None, error)]
    if error is None and aliases.has_damaged_copy(model.path):
        damaged = CorruptError(
            f"'{model.path / aliases.COPY}' is damaged",
            why=f"it is not a copy of {aliases.FILE}",
            hint=f"quill alias restore {model.name}",
        )
        files.append(File(aliases.COPY, None, damaged))
    return Result(model.name, model.kind, model.path, files)


def _open(target: Folder) -> Folder:
    """Read the target's manifest, whatever state its files are in."""
    if isinstance(target, ResumeState):
        return target.load()
    if not target.number:
        raise CorruptError(f"'{target.name}' is not a model", why=getattr(target, "damaged", "") or "")
    refuse_link(target.path)
    read = manifest.read(target.path) if is_published(target.path) else None
    return Version(target.name, target.number, target.path, read)


def _check_file(target: Folder, name: str, on_bytes: OnBytes) -> File:
    """Check one file's size and sha256, and that weights are finite."""
    size = None
    try:
        with suppress(OSError):
            size = os.lstat(target.path / name).st_size
        with target.open_file(name) as file:
            if name == manifest.WEIGHTS or (target.kind == "resume state" and name.endswith(".safetensors")):
                check_finite(file, on_bytes)
            else:
                file.sha256(on_bytes)
    except QuillError as e:
        return File(name, size, e)
    return File(name, size)


def _check_together(version: Folder, files: list[File]) -> list[File]:
    """Check that config, tokenizer and weights fit each other, and blame the first that does not."""
    from quill.checkpoint.load import fit_vocabulary, outline_model, read_config, read_tokenizer

    def outline_weights(version: Folder) -> None:
        config = fit_vocabulary(read_config(version), read_tokenizer(version), version)
        path = version.path / manifest.WEIGHTS
        outline_model(config, read_layout(path), path)

    checks: tuple[tuple[str, Callable[[Folder], object]], ...] = (
        (manifest.CONFIG, read_config),
        (manifest.TOKENIZER, read_tokenizer),
        (manifest.WEIGHTS, outline_weights),
    )
    for name, check in checks:
        try:
            check(version)
        except QuillError as e:
            return [f._replace(error=e) if f.name == name else f for f in files]
    return files


def _unlisted(version: Folder) -> list[File]:
    """Find files in a version's folder that its manifest does not list."""
    if version.manifest is None:
        return []
    extra = sorted(set(manifest.files(version.path)) - set(version.manifest["files"]))
    return [File(n, (version.path / n).lstat().st_size, listed=False) for n in extra]
