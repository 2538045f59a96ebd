"""Models kept by name in a folder: which there are, what a reference means, where the next version goes.

Readers take no locks and never see half a model: a version exists once its manifest does. Writers are
kept apart by exclusive mkdir, so no number is used twice.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from quill import fsio, shipped
from quill.errors import CorruptError, InputError, NotFoundError, QuillError, RefusedError, newer, shorten
from quill.registry import aliases, folder, locks, manifest, names, version
from quill.registry.draft import Draft
from quill.registry.folder import Folder
from quill.registry.version import Version

MARKER = ".quill.json"
FORMAT = 1
_ENVIRONMENT = "QUILL_REGISTRY"
# "off" leaves out the models that come with quill.
_SHIPPED = "QUILL_SHIPPED"
_FOLDER = "weights"


class Location(NamedTuple):
    """Where the registry is.

    Attributes:
        root: Its folder.
        why: Why there.
        shipped: The folder of the models that come with quill; None if QUILL_SHIPPED is "off".
    """

    root: Path
    why: str
    shipped: Path | None = None


def locate(
    flag: str | Path | None = None, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> Location:
    """Find the registry: the flag, QUILL_REGISTRY, the nearest marked `weights/` upwards, the user's own.

    Args:
        flag: The value of `--registry`.
        env: The environment.
        cwd: Where to start looking; None for the working directory.

    Raises:
        InputError: The path contains a NUL.
    """
    below = (
        None if env.get(_SHIPPED, "").lower() in ("off", "0", "no", "false") else shipped.folder("weights")
    )
    if flag:
        return Location(_expanded(flag), "--registry says so", below)
    if env.get(_ENVIRONMENT):
        return Location(_expanded(env[_ENVIRONMENT]), f"{_ENVIRONMENT} says so", below)
    # A working directory that was deleted has nothing above it either.
    with suppress(FileNotFoundError):
        start = (cwd or Path.cwd()).absolute()
        for folder in (start, *start.parents):
            if os.path.isfile(folder / _FOLDER / MARKER):
                why = "it is the nearest at or above the working directory"
                return Location(folder / _FOLDER, why, below)
    from platformdirs import user_data_path

    with suppress(RuntimeError):
        own = user_data_path("quill", appauthor=False)
        if own.is_absolute():
            return Location(own / _FOLDER, "it is your own, and no other is near", below)
    return Location(Path(_FOLDER), "no other is near, and you have no home folder", below)


def _expanded(path: str | Path) -> Path:
    if "\0" in str(path):
        raise InputError(f"{shorten(str(path))} is not a path", why="it contains a NUL")
    return fsio.expanded(path)


class Model(NamedTuple):
    """Everything under one name.

    Attributes:
        name: The model's name.
        versions: Its published versions, damaged or not, the oldest first; one of number 0 for a folder that
            cannot be a model's.
        drafts: Its drafts, the oldest first.
        aliases: The version number that each alias names; empty if they cannot be read.
    """

    name: str
    versions: list[Version]
    drafts: list[Draft]
    aliases: dict[str, int]


class Registry:
    """Named models in one folder.

    Args:
        root: The folder; it need not exist yet.
        why: Why this one, for `quill list`.
        shipped: The folder of the models that come with quill, which are never written to. A name means the
            registry's own model if it has one; its versions are numbered after the shipped ones, whose
            numbers keep their meaning.

    Attributes:
        shipped: The registry that contains them, or None.
    """

    def __init__(self, root: Path, why: str = "", shipped: Path | None = None) -> None:
        self.root = Path(root)
        self.why = why
        is_other = shipped is not None and os.path.realpath(shipped) != os.path.realpath(root)
        self.shipped = Registry(shipped, "it comes with quill") if shipped and is_other else None

    def shipped_models(self, glob: str | None = None, *, all_versions: bool = True) -> list[Model]:
        """Read the models that come with quill, as `models` does.

        Of a name that the registry has too, they are the versions that it has no number of, and only part of
        a list of all versions.
        """
        found = []
        for model in self.shipped.models(glob, all_versions=all_versions) if self.shipped else []:
            if not self._has(model.name):
                found.append(model)
            elif all_versions:
                own = folder.numbers(self.root / model.name)
                found.append(model._replace(versions=[v for v in model.versions if v.number not in own]))
        return [model for model in found if model.versions]

    def contains(self, version: Folder) -> bool:
        """Whether a version or run is in this registry, or comes with quill and is found through it."""
        roots = [self.root, *([self.shipped.root] if self.shipped else [])]
        return not version.label and any(os.path.realpath(r) == os.path.realpath(version.root) for r in roots)

    def models(self, glob: str | None = None, *, all_versions: bool = True) -> list[Model]:
        """Read everything in one pass, by name; a damaged model hides no other.

        Args:
            glob: Only names that match, such as "shake*".
            all_versions: Every published version rather than the newest of each name.

        Raises:
            ResourceError: The registry cannot be read, or is a file.
            InputError: It was made by a newer quill.
        """
        return list(self.each_model(glob, all_versions=all_versions))

    def each_model(self, glob: str | None = None, *, all_versions: bool = True) -> Iterator[Model]:
        """As `models`, one after the other, for what keeps little of each."""
        self._check_root()
        for entry in folder.scan(self.root):
            if entry.name.startswith(".") or (glob and not fnmatchcase(entry.name, glob)):
                continue
            # Only for a link is_dir may ask the disk, and fail.
            if entry.is_dir(follow_symlinks=False) or os.path.isdir(entry.path):
                yield self._model(entry.name, 0 if all_versions else 1)

    def model(self, name: str) -> Model | None:
        """Read everything under one name, without looking at any other; None if there is no such folder.

        Raises:
            InputError: The name is not valid, or the registry was made by a newer quill.
            ResourceError: The registry is a file.
        """
        names.check_name(name)
        self._check_root()
        return self._model(name, 0) if os.path.isdir(self.root / name) else None

    def entries(self, glob: str | None = None, *, all_versions: bool = False) -> list[Version]:
        """The published versions, by name and number; raises as `models` does.

        Args:
            glob: Only names that match, such as "shake*".
            all_versions: Every published version rather than the newest of each name.
        """
        return [v for m in self.models(glob, all_versions=all_versions) for v in m.versions]

    def drafts(self, glob: str | None = None) -> list[Draft]:
        """Versions that are being written, or were left unfinished, by name and number."""
        return [d for m in self.models(glob, all_versions=False) for d in m.drafts]

    def newest(self, name: str) -> Version | None:
        """The newest published version of a name, damaged or not; None if there is none."""
        return next(iter(self._versions(names.check_name(name), 1)), None)

    def unfinished(self, name: str) -> Draft | None:
        """The newest draft of a name, or None."""
        numbers = folder.unpublished(self.root / names.check_name(name))
        return next((Draft(self.root, name, n) for n in numbers), None)

    def resolve(self, ref: str, *, shipped: bool = True) -> Version:
        """Find the version that a reference means.

        Args:
            ref: "name", "name:vN", "name:alias", or a path, which contains a slash or starts with a dot.
            shipped: Whether it may be a model that comes with quill.

        Raises:
            InputError: It is not a reference, or what it means was made by a newer quill.
            NotFoundError: There is no such model; the message says which there are.
            CorruptError: It is damaged, or not safe to read.
        """
        if names.is_path(ref):
            return _open_folder(ref)
        name, number, alias = names.parse(ref)
        self._check_root()
        if alias and alias != names.LATEST:
            number = aliases.read(self.root / name)["aliases"].get(alias, 0)
        for found, path, flat in self._published(name):
            if number in (None, found):
                return version.load(name, found, path, flat=flat)
        if shipped and self.shipped and self.shipped._has(name):
            if not self._has(name):
                return self.shipped.resolve(ref)
            if number and number not in folder.numbers(self.root / name):
                # A version that came with quill keeps its number.
                with suppress(NotFoundError):
                    return self.shipped.resolve(ref)
        raise self._not_found(names.Reference(name, number, alias))

    def find(self, ref: str, *, in_progress: bool = False) -> Folder:
        """Find what a reference means where an unfinished run may be meant too.

        Args:
            ref: As for `resolve`.
            in_progress: A name alone means its unfinished run, if that is newer than its newest version.

        Raises:
            QuillError: As for `resolve`.
        """
        if names.is_path(ref):
            return _draft_in(ref) or self.resolve(ref)
        name, number, alias = names.parse(ref)
        self._check_root()
        draft = None
        if alias is None:
            numbers = folder.unpublished(self.root / name)
            draft = next((Draft(self.root, name, n) for n in numbers if number in (None, n)), None)
        if draft and in_progress and number is None:
            newest = self.newest(name)
            if newest is None or newest.number < draft.number:
                return draft
        try:
            return self.resolve(ref)
        except NotFoundError:
            if draft is None:
                raise
            return draft

    def find_weights(self, ref: str, notice: Callable[[str], object] = lambda message: None) -> Folder:
        """Find the weights that a reference means: a version's, or the best so far of an unfinished run.

        Args:
            ref: As for `resolve`; a name alone means its unfinished run if no version is published.
            notice: Receives a sentence if they are an unfinished run's.

        Raises:
            QuillError: As for `resolve`.
            NotFoundError: It is an unfinished run that has no weights yet.
        """
        found = self.find(ref)
        found.require_weights()
        if not found.is_published:
            step = found.facts["best_step"] or found.facts["steps"]
            at = f", step {step:,}" if step else ""
            notice(f"{found.reference} is unfinished: using its best weights so far{at}")
        return found

    def aliases_of(self, version: Folder) -> list[str]:
        """The aliases that name a version; none if they cannot be read."""
        with suppress(QuillError):
            known = aliases.read(version.root / version.name)["aliases"]
            return [alias for alias, number in known.items() if number == version.number]
        return []

    def begin(self, name: str) -> Draft:
        """Take the next number of a name and make its folder, and the registry itself if it is missing.

        Raises:
            InputError: It is not a valid name.
            RefusedError: There is a file in its place.
            CorruptError: Its folder is a link, or its model.json is damaged.
            ResourceError: The registry cannot be written.
        """
        names.check_name(name)
        self._check_root()
        fsio.make_dir(self.root)
        if not (self.root / MARKER).exists():
            fsio.write_json(self.root / MARKER, {"format": FORMAT})
        own = self.root / name
        # Locked, so that no other model is renamed to this name at the same time.
        with locks.record(own):
            if fsio.is_removed(own):
                fsio.discard(own, self.root / fsio.TRASH)
            if not fsio.claim(own):
                folder.refuse_link(own)
                if not own.is_dir():
                    raise RefusedError(f"'{own}' is a file", why="the model's folder would be there")
            below = folder.numbers(self.shipped.root / name) if self.shipped else []
            used = max([int(folder.is_flat(own)), *folder.numbers(own), *below])
            number = max(aliases.read(own)["next_version"], used + 1)
            if not (own / aliases.FILE).exists():
                # A name that was another model's continues with that model's numbers.
                number = max([number, *aliases.former_holders(self.root, name).values()])
            while not fsio.claim(own / f"v{number}"):
                number += 1
            aliases.update_locked(own, lambda record: aliases.reserved(record, number))
        return Draft(self.root, name, number)

    def _check_root(self) -> None:
        """Refuse a file in its place, and a layout of a newer quill."""
        with fsio.guard(self.root, "read"):
            if os.path.exists(self.root) and not os.path.isdir(self.root):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with suppress(FileNotFoundError, CorruptError):
            layout = manifest.read_object(self.root / MARKER).get("format")
            if isinstance(layout, int) and layout > FORMAT:
                raise newer(f"the registry '{self.root}'", layout, FORMAT)

    def _model(self, name: str, most: int) -> Model:
        # Texts, because a Path for each of thousands of folders takes longer than looking at them.
        own = os.path.join(self.root, name)
        drafts: list[Draft] = []
        known: dict[str, int] = {}
        try:
            numbers = {n: folder.is_published(f"{own}/v{n}") for n in folder.numbers(own)}
            drafts = [Draft(self.root, name, n) for n in folder.unpublished(own, numbers)]
            versions = self._versions(name, most, numbers)
        except QuillError as e:
            versions = [Version(name, 0, Path(own), damaged=str(e))]
        with suppress(QuillError):
            known = aliases.read(own)["aliases"]
        return Model(name, versions[::-1], drafts[::-1], known)

    def _published(
        self, name: str, numbers: Mapping[int, bool] | None = None
    ) -> Iterator[tuple[int, Path, bool]]:
        """Number, folder and flatness of each published version; the highest first.

        Args:
            name: The model's name.
            numbers: The numbers in use, and whether each is published, if they are known already.
        """
        own = os.path.join(self.root, name)
        found = folder.numbers(own) if numbers is None else list(numbers)
        for number in found:
            path = f"{own}/v{number}"
            if numbers[number] if numbers is not None else folder.is_published(path):
                yield number, Path(path), False
        if 1 not in found and folder.is_flat(own):
            yield 1, Path(own), True

    def _versions(self, name: str, most: int = 0, numbers: Mapping[int, bool] | None = None) -> list[Version]:
        """The published versions of a name, the highest first; `most` of them, or all for 0."""
        found: list[Version] = []
        for number, path, flat in self._published(name, numbers):
            names.check_name(name)
            known = version.describe(name, number, path, flat=flat)
            found += [known] if known else []
            if len(found) == most:
                break
        return found

    def _has(self, name: str) -> bool:
        """Whether there is a version or a draft of a name."""
        return os.path.isdir(self.root / name) and bool(
            folder.numbers(self.root / name) or folder.is_flat(self.root / name)
        )

    def _not_found(self, ref: names.Reference) -> NotFoundError:
        """Say what there is instead of what was asked for, and what is close to it."""
        from difflib import get_close_matches

        where = _shown(self.root)
        below = folder.numbers(self.shipped.root / ref.name) if self.shipped else []
        if ref.version in below or (below and not self._has(ref.name)):
            return NotFoundError(
                f"no model '{ref}' in {where}",
                why=f"'{ref}' comes with quill and cannot be changed, only copied",
                hint=f"quill cp {ref} NAME",
            )
        if versions := self._versions(ref.name):
            have = ", ".join(f"v{v.number}" for v in versions[:8])
            known = aliases.read(self.root / ref.name)["aliases"]
            # An alias whose version is gone is not worth suggesting again.
            meant = get_close_matches(ref.alias or "", [a for a in known if a != ref.alias], 2)
            return NotFoundError(
                f"no model '{ref}' in {where}",
                why=f"'{ref.name}' has {', '.join([have, *known])}",
                close=[f"{ref.name}:{a}" for a in meant] or [versions[0].reference],
            )
        if draft := self.unfinished(ref.name):
            return NotFoundError(
                f"no published model '{ref.name}' in {where}",
                why=f"{draft.reference} is an unfinished run",
                hint=f"quill show {draft.reference}",
            )
        have_names = [v.name for v in self.entries() if not v.damaged]
        have_names += [m.name for m in self.shipped_models()]
        close = get_close_matches(ref.name, have_names, 3)
        shown = have_names if len(have_names) <= 8 else close or have_names[:8]
        more = f" and {len(have_names) - len(shown)} more" if len(shown) < len(have_names) else ""
        return NotFoundError(
            f"no model named '{ref.name}' in {where}",
            why=f"the registry has {', '.join(shown)}{more}" if shown else "the registry is empty",
            hint="" if close else "quill list",
            close=close,
        )


def _open_folder(text: str) -> Version:
    """Open a folder that was named by its path: a version's, a model's, or files put there by hand."""
    path = fsio.expanded(text)
    if not os.path.isdir(path):
        why = "it is a file, not a folder" if os.path.exists(path) else "there is no such folder"
        raise NotFoundError(f"no model in '{text}'", why=why, hint="quill list")
    # This folder may be a link: the user chose it by typing its path.
    full, label = Path(os.path.realpath(path)), text
    number = names.version_number(full.name)
    name = full.parent.name if number else full.name
    if not folder.is_published(full) and not folder.is_flat(full):
        inside = [n for n in (names.version_number(e.name) for e in folder.scan(full)) if n]
        if published := [n for n in inside if folder.is_published(full / f"v{n}")]:
            number = max(published)
            full, label = full / f"v{number}", f"{text.rstrip('/')}/v{number}"
    return version.load(name, number or 1, full, label=label)


def _draft_in(text: str) -> Draft | None:
    """The draft in a folder that was named by its path, or None."""
    path = fsio.expanded(text)
    if not os.path.isdir(path):
        return None
    full = Path(os.path.realpath(path))
    number, inside = names.version_number(full.name), set(os.listdir(full))
    # A run that was evaluated has all of a model's files, and is still unfinished.
    written = inside & {manifest.STATUS, manifest.LOG}
    if number and written and not inside & {manifest.FILE, fsio.REMOVED}:
        return Draft(full.parent.parent, full.parent.name, number)
    return None


def _shown(path: Path) -> str:
    """A path as a person in this directory would write it."""
    with suppress(OSError, ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)
