"""Models kept by name in a folder: which there are, which one is meant, where the next one goes.

Readers take no locks and never see half a model: a version exists once its manifest does. Writers are
kept apart by exclusive mkdir, so a version's number is given once and never again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from quill import fsio
from quill.errors import CorruptError, InputError, NotFoundError, QuillError, RefusedError
from quill.registry import aliases as ledger
from quill.registry import locks, names, version
from quill.registry import manifest as manifests
from quill.registry.draft import Draft as Draft
from quill.registry.version import Version as Version

MARKER = ".quill.json"
STAGING, TRASH = fsio.STAGING, fsio.TRASH
FORMAT = 1
_ENVIRONMENT = "QUILL_REGISTRY"
_FOLDER = "weights"


class Location(NamedTuple):
    """Where the registry is, and why there."""

    root: Path
    why: str


def locate(
    flag: str | Path | None = None, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> Location:
    """Find the registry: the flag, QUILL_REGISTRY, the nearest marked `weights/` upwards, the user's own.

    Args:
        flag: What `--registry` gave.
        env: The environment.
        cwd: Where to start looking; unset: the working directory.
    """
    if flag:
        return Location(fsio.expanded(flag), "--registry says so")
    if env.get(_ENVIRONMENT):
        return Location(fsio.expanded(env[_ENVIRONMENT]), f"{_ENVIRONMENT} says so")
    # A working directory that was deleted has nothing above it either.
    with suppress(FileNotFoundError):
        start = (cwd or Path.cwd()).absolute()
        for folder in (start, *start.parents):
            if os.path.isfile(folder / _FOLDER / MARKER):
                return Location(folder / _FOLDER, "it is the nearest at or above the working directory")
    from platformdirs import user_data_path

    with suppress(RuntimeError):
        own = user_data_path("quill", appauthor=False)
        if own.is_absolute():
            return Location(own / _FOLDER, "it is your own, and no other is near")
    return Location(Path(_FOLDER), "no other is near, and you have no home folder")


class Registry:
    """Named models in one folder.

    Args:
        root: The folder; it need not exist yet.
        why: Why that one, for `quill list`.
    """

    def __init__(self, root: Path, why: str = "") -> None:
        self.root = Path(root)
        self.why = why

    def entries(self, glob: str | None = None, *, all_versions: bool = False) -> list[Version]:
        """What is there, by name and number; what is damaged is listed as such and hides nothing else.

        Args:
            glob: Only names that match, such as "shake*".
            all_versions: Each complete version rather than the newest of each name.

        Raises:
            ResourceError: The registry cannot be read, or is a file.
            InputError: A newer quill made it.
        """
        found: list[Version] = []
        for entry in self._folders(glob):
            try:
                versions = list(self._versions(entry.name, 0 if all_versions else 1))
            except QuillError as e:
                versions = [Version(entry.name, 0, Path(entry.path), damaged=str(e))]
            found += versions
        return sorted(found, key=lambda v: (v.name, v.number))

    def drafts(self, glob: str | None = None) -> list[Draft]:
        """Versions in progress, or left unfinished, by name and number."""
        found: list[Draft] = []
        for entry in self._folders(glob):
            with suppress(QuillError):
                found += [Draft(self.root, entry.name, n) for n in self._unfinished(entry.name)]
        return sorted(found, key=lambda d: (d.name, d.number))

    def newest(self, name: str) -> Version | None:
        """The complete version of a name with the highest number, damaged or not; None without one."""
        return next(iter(self._versions(names.check_name(name), 1)), None)

    def unfinished(self, name: str) -> Draft | None:
        """The draft of a name with the highest number, or None."""
        return next((Draft(self.root, name, n) for n in self._unfinished(names.check_name(name))), None)

    def resolve(self, ref: str) -> Version:
        """Find the version that a reference means.

        Args:
            ref: "name", "name:vN", "name:alias", or a folder, which holds a slash or starts with a dot.

        Raises:
            InputError: It is no reference, or a newer quill made what it means.
            NotFoundError: Nothing of that name; the message tells what exists.
            CorruptError: It is damaged, or not safe to read.
        """
        if names.is_path(ref):
            return _open_folder(ref)
        name, number, alias = names.parse(ref)
        self._check_root()
        if alias and alias != names.LATEST:
            number = ledger.read(self.root / name).get("aliases", {}).get(alias, 0)
        for found, path in self._complete(name):
            if number in (None, found):
                return version.load(name, found, path)
        raise self._not_found(names.Reference(name, number, alias))

    def begin(self, name: str) -> Draft:
        """Take the next number of a name and make its folder; the registry itself where there is none.

        Raises:
            InputError: It cannot be a name.
            RefusedError: A file is in its place.
            CorruptError: Its folder is a link, or its model.json is damaged.
            ResourceError: The registry cannot be written.
        """
        names.check_name(name)
        self._check_root()
        fsio.make_dir(self.root)
        if not (self.root / MARKER).exists():
            fsio.write_json(self.root / MARKER, {"format": FORMAT})
        folder = self.root / name
        # The ledger's lock, so that no other name's folder is renamed to this one meanwhile.
        with locks.ledger(folder):
            if not fsio.claim(folder):
                version.refuse_link(folder)
                if not folder.is_dir():
                    raise RefusedError(f"'{folder}' is a file", why="a model's folder would be there")
            used = max([int(version.is_flat(folder)), *self._numbers(name)])
            number = max(ledger.next_number(folder), used + 1)
            if not (folder / ledger.FILE).exists():
                # A name that was another's goes on with the numbers that it had then.
                number = max([number, *ledger.former_holders(self.root, name).values()])
            while not fsio.claim(folder / f"v{number}"):
                number += 1
            ledger.amend(folder, lambda held: ledger.reserved(held, number))
        return Draft(self.root, name, number)

    def _check_root(self) -> None:
        """Refuse what is no folder, and a layout that a later quill changed."""
        with fsio.guard(self.root, "read"):
            if os.path.exists(self.root) and not os.path.isdir(self.root):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with suppress(FileNotFoundError, CorruptError):
            layout = manifests.read_object(self.root / MARKER).get("format")
            if isinstance(layout, int) and layout > FORMAT:
                raise InputError(
                    f"'{self.root}' needs a later quill",
                    why=f"its layout is format {layout}, this quill reads up to {FORMAT}",
                    hint="pip install --upgrade quill",
                )

    def _folders(self, glob: str | None) -> Iterator[os.DirEntry[str]]:
        """The folders that may be models; files that lie about are none, nor are hidden folders."""
        from fnmatch import fnmatchcase

        self._check_root()
        for entry in _scan(self.root):
            if entry.name.startswith(".") or not os.path.isdir(entry.path):
                continue
            if not glob or fnmatchcase(entry.name, glob):
                yield entry

    def _numbers(self, name: str) -> list[int]:
        """Numbers with anything at all in their place, the highest first."""
        version.refuse_link(self.root / name)
        found = (names.version_number(e.name) for e in _scan(self.root / name))
        return sorted((n for n in found if n), reverse=True)

    def _complete(self, name: str) -> Iterator[tuple[int, Path]]:
        """Number and folder of what has a manifest, or was put there by hand; the highest first."""
        folder = self.root / name
        numbers = self._numbers(name)
        for number in numbers:
            if version.is_complete(folder / f"v{number}"):
                yield number, folder / f"v{number}"
        if 1 not in numbers and version.is_flat(folder):
            yield 1, folder

    def _versions(self, name: str, most: int = 0) -> list[Version]:
        """The complete versions of a name, the highest first; `most` of them, 0 for all."""
        found: list[Version] = []
        for number, path in self._complete(name):
            names.check_name(name)
            found += [v] if (v := version.describe(name, number, path)) else []
            if len(found) == most:
                break
        return found

    def _unfinished(self, name: str) -> Iterator[int]:
        for number in self._numbers(name):
            path = self.root / name / f"v{number}"
            if path.is_dir() and not path.is_symlink() and not version.is_complete(path):
                yield number

    def _not_found(self, ref: names.Reference) -> NotFoundError:
        """Say what exists in the place of what was asked for, and what is close to it."""
        from difflib import get_close_matches

        where = _shown(self.root)
        if versions := self._versions(ref.name):
            have = ", ".join(f"v{v.number}" for v in versions[:8])
            aliases = sorted(ledger.read(self.root / ref.name).get("aliases", {}))
            # One that leads nowhere is not what to type again.
            meant = get_close_matches(ref.alias or "", [a for a in aliases if a != ref.alias], 2)
            return NotFoundError(
                f"no model '{ref}' in {where}",
                why=f"'{ref.name}' has {', '.join([have, *aliases])}",
                close=[f"{ref.name}:{a}" for a in meant] or [versions[0].reference],
            )
        if draft := self.unfinished(ref.name):
            why = f"{draft.reference} was begun and is not finished"
            hint = f"quill show {draft.reference}"
            return NotFoundError(f"no finished model '{ref.name}' in {where}", why=why, hint=hint)
        have_names = [v.name for v in self.entries() if not v.damaged]
        close = get_close_matches(ref.name, have_names, 3)
        shown = have_names if len(have_names) <= 8 else close or have_names[:8]
        more = f" and {len(have_names) - len(shown)} more" if len(shown) < len(have_names) else ""
        return NotFoundError(
            f"no model named '{ref.name}' in {where}",
            why=f"the registry holds {', '.join(shown)}{more}" if shown else "the registry is empty",
            hint="" if close else "quill list",
            close=close,
        )


def _open_folder(text: str) -> Version:
    """The version in a folder that was named by its path: a version, a model's folder, or files by hand."""
    path = fsio.expanded(text)
    if not os.path.isdir(path):
        why = "it is a file, not a folder" if os.path.exists(path) else "there is no such folder"
        raise NotFoundError(f"no model in '{text}'", why=why, hint="quill list")
    # The folder may be a link: whoever typed its path has chosen it.
    full, label = Path(os.path.realpath(path)), text
    number = names.version_number(full.name)
    name = full.parent.name if number else full.name
    if not version.is_complete(full) and not version.is_flat(full):
        held = [n for n in (names.version_number(e.name) for e in _scan(full)) if n]
        complete = [n for n in held if version.is_complete(full / f"v{n}")]
        if complete:
            number = max(complete)
            full, label = full / f"v{number}", f"{text.rstrip('/')}/v{number}"
    return version.load(name, number or 1, full, label=label)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where there is none."""
    with (
        fsio.guard(folder, "read"),
        suppress(FileNotFoundError, NotADirectoryError),
        os.scandir(folder) as found,
    ):
        return list(found)
    return []


def _shown(path: Path) -> str:
    """A path as a person at this place would write it."""
    with suppress(OSError, ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)
