"""Verify that models are what was published: every byte is hashed, every weight looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quill.checkpoint import finite
from quill.checkpoint import resume_state as states
from quill.errors import CorruptError, NotFoundError, QuillError
from quill.registry import aliases, manifest, names
from quill.registry.draft import ResumeState
from quill.registry.files import OnBytes, ignore
from quill.registry.folder import Folder, Kind, is_flat, is_published, refuse_link
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.registry.store import Registry

State = Literal["ok", "unlisted", "damaged", "unreadable"]


class File(NamedTuple):
    """What was found out about one file.

    Attributes:
        name: Relative to its folder.
        bytes: As it is on the disk; None where it is not.
        error: What is wrong with it, or None.
        listed: Whether the manifest knows it; what it does not know is read by nobody.
    """

    name: str
    bytes: int | None
    error: QuillError | None = None
    listed: bool = True

    @property
    def state(self) -> State:
        """In a word; what cannot be read may be whole."""
        if self.error is None:
            return "ok" if self.listed else "unlisted"
        return "damaged" if isinstance(self.error, CorruptError) else "unreadable"


class Verdict(NamedTuple):
    """What was found out about one version, resume state, or model.json.

    Attributes:
        reference: What it is called.
        kind: What it is; "model" for a model's model.json.
        path: Its folder.
        files: Its files.
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


def subjects(registry: Registry, refs: Iterable[str] = ()) -> list[Folder]:
    """Find what references mean to someone who wants it verified.

    Args:
        registry: Where to look.
        refs: "name" for all of its versions, the resume states of its unfinished runs and its aliases,
            "name:vN", "name:alias", or a path; none for everything there is.

    Raises:
        InputError: One is not a reference.
        NotFoundError: One means nothing.
    """
    found: dict[tuple[str, str], Folder] = {}
    wanted: list[str | None] = [*refs]
    for ref in wanted or [None]:
        found |= {(f.kind, f.reference): f for f in _find(registry, ref)}
    return list(found.values())


def size(subject: Folder) -> int:
    """About as many bytes as `check` will read."""
    with suppress(OSError, QuillError):
        return sum((subject.path / n).lstat().st_size for n in manifest.files(subject.path))
    return 0


def check(subject: Folder, on_bytes: OnBytes = ignore) -> Verdict | None:
    """Verify a version, a resume state or a model's aliases, byte by byte.

    Args:
        subject: From `subjects`.
        on_bytes: Called with the size of each chunk read.

    Returns:
        What was found; None if it is gone by now.
    """
    if subject.kind == "model":
        return _check_aliases(subject)
    files: list[File] = []
    error: QuillError | None = None
    try:
        opened = _open(subject)
        names = opened.manifest["files"] if opened.manifest else manifest.REQUIRED
        files = [_check_file(opened, n, on_bytes) for n in sorted(names)]
        if subject.kind == "version" and not any(f.error for f in files):
            files = _check_together(opened, files) + _unlisted(opened)
    except QuillError as e:
        error = e
    if not os.path.lexists(subject.path):
        return None
    return Verdict(subject.reference, subject.kind, subject.path, files, error)


def _find(registry: Registry, ref: str | None) -> Iterator[Folder]:
    if ref is not None and names.is_path(ref):
        yield registry.resolve(ref)
        return
    name, number, alias = names.parse(ref) if ref is not None else (None, None, None)
    if name and alias:
        # Without resolving it: damage is what is looked for.
        newest = registry.newest(name) if alias == names.LATEST else None
        number = newest.number if newest else aliases.read(registry.root / name)["aliases"].get(alias, 0)
    models = registry.models(name)
    versions = [v for m in models for v in m.versions if number in (None, v.number)]
    drafts = [d for m in models for d in m.drafts if number in (None, d.number)]
    if ref is not None and not versions and not drafts:
        registry.resolve(ref)
        raise NotFoundError(f"no model '{ref}'", why="it was removed in the meantime", hint="quill list")
    yield from versions
    for draft in drafts:
        yield from reversed(draft.states())
    if number is None:
        for one in sorted({v.name for v in versions if v.number} | {d.name for d in drafts}):
            yield Folder(one, 0, registry.root / one)


def _check_aliases(model: Folder) -> Verdict | None:
    """Whether a model's model.json can be read, and each of its aliases names a version."""
    error: QuillError | None = None
    try:
        for alias, number in aliases.read_for_removal(model.path).items():
            if not is_published(model.path / f"v{number}") and not (number == 1 and is_flat(model.path)):
                raise CorruptError(
                    f"'{model.name}:{alias}' leads nowhere",
                    why=f"it names v{number}, which does not exist",
                    hint=f"quill alias set {model.name} {alias}",
                )
    except QuillError as e:
        error = e
    if not os.path.lexists(model.path):
        return None
    return Verdict(model.name, model.kind, model.path, [File(aliases.FILE, None, error)])


def _open(subject: Folder) -> Folder:
    """Read a subject's manifest, whatever the state of its files."""
    if isinstance(subject, ResumeState):
        return subject.load()
    if not subject.number:
        raise CorruptError(f"'{subject.name}' is not a model", why=getattr(subject, "damaged", "") or "")
    refuse_link(subject.path)
    read = manifest.read(subject.path) if is_published(subject.path) else None
    return Version(subject.name, subject.number, subject.path, read)


def _check_file(subject: Folder, name: str, on_bytes: OnBytes) -> File:
    """Check one file's size and sha256, and that weights are finite."""
    size = None
    try:
        with suppress(OSError):
            size = os.lstat(subject.path / name).st_size
        with subject.open_file(name) as file:
            if name in (manifest.WEIGHTS, states.WEIGHTS):
                finite.check(file, on_bytes)
            else:
                file.sha256(on_bytes)
    except QuillError as e:
        return File(name, size, e)
    return File(name, size)


def _check_together(version: Folder, files: list[File]) -> list[File]:
    """Check that config, tokenizer and weights belong together; the first that does not fit is named."""
    from quill.checkpoint import weights as tensors
    from quill.checkpoint.load import blank_model, fit_vocabulary, read_config, read_tokenizer

    def read_weights(version: Folder) -> Any:
        config, tokenizer = read_config(version), read_tokenizer(version)
        config = fit_vocabulary(config, tokenizer, version)
        with version.open_file(manifest.WEIGHTS) as file:
            layout = tensors.read_layout(file.file, file.size, file.path)
            blank_model(config, layout, file.path)

    tests: tuple[tuple[str, Callable[[Folder], Any]], ...] = (
        (manifest.CONFIG, read_config),
        (manifest.TOKENIZER, read_tokenizer),
        (manifest.WEIGHTS, read_weights),
    )
    for name, test in tests:
        try:
            test(version)
        except QuillError as e:
            return [f._replace(error=e) if f.name == name else f for f in files]
    return files


def _unlisted(version: Folder) -> list[File]:
    """Files in a version's folder that its manifest does not list."""
    if version.manifest is None:
        return []
    extra = sorted(set(manifest.files(version.path)) - set(version.manifest["files"]))
    return [File(n, (version.path / n).lstat().st_size, listed=False) for n in extra]
