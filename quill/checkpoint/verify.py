"""Whether what is kept is what was published: every byte is hashed, every weight looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from quill.checkpoint import resume_state as states
from quill.errors import CorruptError, NotFoundError, QuillError
from quill.registry import aliases as ledger
from quill.registry import manifest as manifests
from quill.registry import names, version
from quill.registry.hashing import OnBytes, check_tensors, digest, ignore
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.registry.store import Registry

_CONFIG, _WEIGHTS, _TOKENIZER = manifests.REQUIRED
Kind = Literal["version", "resume state", "ledger"]
State = Literal["ok", "unlisted", "damaged", "unreadable"]


class File(NamedTuple):
    """What became of one file.

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
    """What became of one version, resume state, or ledger of aliases.

    Attributes:
        reference: What it is called.
        kind: Which of the three it is.
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


class Subject(NamedTuple):
    """Something to verify.

    Attributes:
        reference: What it is called.
        kind: What it is.
        path: Its folder.
        known: The version that it is, or that it is a state of.
    """

    reference: str
    kind: Kind
    path: Path
    known: Version

    @property
    def size(self) -> int:
        """About as many bytes as will be read."""
        with suppress(OSError, QuillError):
            return sum((self.path / n).lstat().st_size for n in manifests.files(self.path))
        return 0


def subjects(registry: Registry, refs: Iterable[str] = ()) -> list[Subject]:
    """What references mean to who wants it verified.

    Args:
        registry: Where to look.
        refs: "name" for all of its versions and what its unfinished runs go on from, "name:vN",
            "name:alias", or a folder; none for everything there is.

    Raises:
        InputError: One is no reference.
        NotFoundError: There is nothing of that name.
    """
    found: dict[str, Subject] = {}
    wanted: list[str | None] = [*refs]
    for ref in wanted or [None]:
        for subject in _meant(registry, ref):
            found[f"{subject.kind} {subject.reference}"] = subject
    return list(found.values())


def check(subject: Subject, on_bytes: OnBytes = ignore) -> Verdict | None:
    """Verify one thing, byte by byte.

    Args:
        subject: From `subjects`.
        on_bytes: Told how many more bytes were read.

    Returns:
        What was found; None if it is gone by now.
    """
    if subject.kind == "ledger":
        return _check_ledger(subject)
    files: list[File] = []
    error: QuillError | None = None
    try:
        held = _opened(subject)
        files = [_check_file(held, n, on_bytes) for n in _file_names(held)]
        if subject.kind == "version" and not any(f.error for f in files):
            files = _check_together(held, files) + _unlisted(held)
    except QuillError as e:
        error = e
    if not os.path.lexists(subject.path):
        return None
    return Verdict(subject.reference, subject.kind, subject.path, files, error)


def _meant(registry: Registry, ref: str | None) -> Iterator[Subject]:
    if ref is not None and names.is_path(ref):
        known = registry.resolve(ref)
        yield Subject(known.reference, "version", known.path, known)
        return
    name, number, alias = names.parse(ref) if ref is not None else (None, None, None)
    if name and alias:
        # Not by resolving it: what is damaged is what is looked for.
        newest = registry.newest(name) if alias == names.LATEST else None
        number = newest.number if newest else ledger.aliases(registry.root / name).get(alias, 0)
    versions = [v for v in registry.entries(name, all_versions=True) if number in (None, v.number)]
    drafts = [d for d in registry.drafts(name) if number in (None, d.number)]
    if ref is not None and not versions and not drafts:
        registry.resolve(ref)
        raise NotFoundError(f"no model '{ref}'", why="it is gone by now", hint="quill list")
    for v in versions:
        yield Subject(v.reference, "version", v.path, v)
    for draft in drafts:
        folder = draft.path / manifests.STATE
        for step in sorted(p.name for p in folder.glob("step-*") if p.is_dir() and not p.is_symlink()):
            known = Version(draft.name, draft.number, folder / step)
            yield Subject(f"{draft.reference} {step}", "resume state", folder / step, known)
    if number is None:
        for one in sorted({v.name for v in versions if v.number} | {d.name for d in drafts}):
            folder = registry.root / one
            yield Subject(one, "ledger", folder, Version(one, 0, folder))


def _check_ledger(subject: Subject) -> Verdict | None:
    """Whether a name's model.json can be read, and each of its aliases means a version."""
    name, folder = subject.reference, subject.path
    error: QuillError | None = None
    try:
        for alias, number in ledger.aliases(folder).items():
            if not version.is_complete(folder / f"v{number}") and not (
                number == 1 and version.is_flat(folder)
            ):
                raise CorruptError(
                    f"'{name}:{alias}' leads nowhere",
                    why=f"it means v{number}, which is not there",
                    hint=f"quill alias set {name} {alias}",
                )
    except QuillError as e:
        error = e
    if not os.path.lexists(folder):
        return None
    return Verdict(name, "ledger", folder, [File(ledger.FILE, None, error)])


def _opened(subject: Subject) -> Version:
    """What is to be verified, with its manifest, whatever state its files are in."""
    name, number, path, *_ = subject.known
    if not number:
        raise CorruptError(f"'{name}' is no model", why=subject.known.damaged or "")
    version.refuse_link(path)
    if subject.kind == "version" and not version.is_complete(path):
        return Version(name, number, path)
    return Version(name, number, path, manifests.read(path))


def _file_names(held: Version) -> list[str]:
    """The files that a version has, or should have."""
    if held.manifest is not None:
        return sorted(held.manifest["files"])
    return [*manifests.REQUIRED]


def _check_file(held: Version, name: str, on_bytes: OnBytes) -> File:
    """Hold one file to its size and sha256, and weights to being numbers."""
    expected = held.manifest["files"][name]["sha256"] if held.manifest else None
    size = None
    try:
        with suppress(OSError):
            size = os.lstat(held.path / name).st_size
        with held.open_file(name) as reading:
            if name in (_WEIGHTS, states.WEIGHTS):
                check_tensors(reading, expected, on_bytes)
            else:
                digest(reading, expected, on_bytes)
    except QuillError as e:
        return File(name, size, e)
    return File(name, size)


def _check_together(held: Version, files: list[File]) -> list[File]:
    """Hold config, tokenizer and weights to each other; the first that does not fit is named."""
    from quill.checkpoint import weights as tensors
    from quill.checkpoint.load import blank_model, fit_vocabulary, read_config, read_tokenizer

    def read_weights(held: Version) -> Any:
        config, tokenizer = read_config(held), read_tokenizer(held)
        config = fit_vocabulary(config, tokenizer, held)
        with held.open_file(_WEIGHTS) as reading:
            layout = tensors.read_layout(reading.file, reading.size, reading.path)
            blank_model(config, layout, reading.path)

    tests: tuple[tuple[str, Callable[[Version], Any]], ...] = (
        (_CONFIG, read_config),
        (_TOKENIZER, read_tokenizer),
        (_WEIGHTS, read_weights),
    )
    for name, test in tests:
        try:
            test(held)
        except QuillError as e:
            return [f._replace(error=e) if f.name == name else f for f in files]
    return files


def _unlisted(held: Version) -> list[File]:
    """Files in a version's folder that its manifest does not know."""
    if held.manifest is None:
        return []
    extra = sorted(set(manifests.files(held.path)) - set(held.manifest["files"]))
    return [File(n, (held.path / n).lstat().st_size, listed=False) for n in extra]
