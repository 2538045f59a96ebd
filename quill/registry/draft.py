"""A version that is being written: its number is taken, and its files may change until it is published.

Only this class writes into a draft's folder. Every write is staged, checked against the token of the process
that owns the draft, and renamed into place, so a process that lost its draft cannot damage its successor's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypedDict, cast

from quill import fsio, strictjson
from quill.errors import CorruptError, LockedError, NotFoundError, QuillError, RefusedError
from quill.registry import aliases, locks, manifest
from quill.registry.folder import Folder, State, is_published, refuse_link, scan, unpublished
from quill.registry.manifest import Manifest, Source
from quill.registry.version import Version

_STEP = "step-"
# Bytes at the end of the metrics that contain the last few lines.
_TAIL = 4096
_STEP_OF_LINE = re.compile(rb'^\{"step": ([0-9]{1,15})[,}]', re.MULTILINE)


class Status(TypedDict):
    """What a run records of itself while it is unfinished; None for what it did not record.

    The status file is not synced. What a run needs to resume is in its resume states too, which are.

    Attributes:
        facts: What its manifest would say if its best weights so far were published.
        pending: The same of the weights with this "sha256", which were about to replace those.
    """

    pid: int | None
    host: str | None
    started: str | None
    token: str | None
    updated: str | None
    step: int | None
    data_key: str | None
    parent: Source | None
    facts: dict[str, Any] | None
    pending: dict[str, Any] | None
    extends: Source | None
    teachers: list[Source] | None


_STATUS: Mapping[str, type] = {
    "pid": int,
    "host": str,
    "started": str,
    "token": str,
    "updated": str,
    "step": int,
    "data_key": str,
    "parent": dict,
    "facts": dict,
    "pending": dict,
    "extends": dict,
    "teachers": list,
}
_DURABLE = ("data_key", "parent", "extends", "teachers")


class ResumeState(Folder):
    """The folder of a resume state.

    Args:
        draft: The run that it belongs to.
        folder: The name of its folder, "step-000500".
    """

    kind = "resume state"

    def __init__(self, draft: Draft, folder: str) -> None:
        super().__init__(draft.name, draft.number, draft.path / manifest.STATE / folder)
        self._step = int(folder.removeprefix(_STEP))

    @property
    def reference(self) -> str:
        """For people: "name:vN step-000500"."""
        return f"{super().reference} {self.path.name}"

    @property
    def step(self) -> int:
        """The optimizer steps done."""
        return self._step

    def load(self) -> Self:
        """Read its manifest, without which its files are not checked.

        Raises:
            NotFoundError: It has none.
            CorruptError: It is damaged, or a link, or in a linked folder.
            InputError: It was made by a newer quill.
        """
        for folder in (self.path.parent, self.path):
            refuse_link(folder)
        self.manifest = manifest.read(self.path)
        return self


class Draft(Folder):
    """A version that is being written.

    Args:
        root: The registry.
        name: The model's name.
        number: The version that it becomes.

    Attributes:
        path: Its folder, for reading only.
    """

    kind = "unfinished run"

    def __init__(self, root: Path, name: str, number: int) -> None:
        super().__init__(name, number, root / name / f"v{number}")
        self._token: str | None = None

    @property
    def state(self) -> State:
        """Whether a process is training it."""
        return "training" if self.is_running() else "unfinished"

    def holder(self) -> dict[str, Any] | None:
        """The process that is working on it: it has locked the name, and there is no later draft.

        A run writes its last log lines after it is published, so a published one may have a holder too.
        """
        holder = locks.holder(self.root, self.name)
        if holder is None or any(n > self.number for n in unpublished(self.path.parent)):
            return None
        return holder

    @property
    def updated(self) -> str | None:
        """When it last saved, in UTC."""
        status = self.status()
        return status["updated"] if status else None

    @property
    def facts(self) -> Manifest:
        """What its manifest would say if its best weights so far were published."""
        with suppress(CorruptError):
            return manifest.facts(self.recorded(), self.path / manifest.STATUS)
        return manifest.UNKNOWN

    def recorded(self) -> dict[str, Any] | None:
        """What it has recorded of the weights that are on disk, not validated; None if nothing."""
        status = self.status()
        if status is None or status["pending"] is None:
            return status["facts"] if status else None
        # Its process ended while it replaced the weights.
        weights = self.path / manifest.WEIGHTS
        replaced = weights.is_file() and fsio.sha256(weights) == status["pending"].get("sha256")
        return status["pending"].get("facts") if replaced else status["facts"]

    def require_weights(self) -> None:
        """Raise NotFoundError if its run has not written any weights yet."""
        if self.has(manifest.WEIGHTS):
            return
        import shlex

        interval = self.train_setting("eval_interval")
        first = f": the first evaluation is at step {interval:,}" if manifest.fits(interval, int) else ""
        resume = f"quill train --config {shlex.quote(str(self.path / manifest.CONFIG))}"
        raise NotFoundError(
            f"'{self.reference}' has no weights yet",
            why=f"its run was not evaluated yet{first}",
            hint=f"quill logs {self.reference} -f" if self.is_running() else resume,
        )

    def status(self) -> Status | None:
        """The last recorded status; where it was lost, that of the newest resume state.

        Returns:
            None if there is neither.
        """
        status: dict[str, Any] | None = None
        with suppress(FileNotFoundError, QuillError):
            status = manifest.read_object(self.path / manifest.STATUS)
        if status is None or status.get("data_key") is None:
            for state in self.states():
                with suppress(FileNotFoundError, QuillError):
                    saved = manifest.read_object(state.path / manifest.FILE).get("status")
                    status = (
                        {"step": state.step} | (saved if isinstance(saved, dict) else {}) | (status or {})
                    )
                    break
        if status is None:
            return None
        # A field of the wrong type must not hide the others: a run needs them to resume.
        known = {k: v if manifest.fits(v := status.get(k), kind) else None for k, kind in _STATUS.items()}
        return cast(Status, status | known)

    def states(self) -> list[ResumeState]:
        """Its resume states, whole or damaged, the newest first."""
        found = [e.name for e in scan(self.path / manifest.STATE) if e.is_dir(follow_symlinks=False)]
        states = [ResumeState(self, n) for n in found if n.removeprefix(_STEP).isdecimal() and _STEP in n]
        # One that is being removed in place is empty in the end.
        there = [s for s in states if scan(s.path) and not fsio.is_removed(s.path)]
        return sorted(there, key=lambda s: s.step, reverse=True)

    @property
    def step(self) -> int | None:
        """The step that it has reached; None if it has not recorded one."""
        status = self.status()
        saved = status["step"] if status else None
        if not self.is_running():
            return saved
        # The metrics are ahead of the saved state.
        with suppress(QuillError, OSError), fsio.open_plain(self.path / manifest.METRICS) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            steps = [int(s) for s in _STEP_OF_LINE.findall(file.readall() or b"")]
            return max([*steps, *([] if saved is None else [saved])], default=None)
        return saved

    def take(self) -> None:
        """Make this process the owner: from now on, every other process's writes to it fail."""
        self._token = os.urandom(8).hex()
        self._write_status(locks.me() | {"token": self._token})

    def lock_folder(self) -> None:
        """Keep others from renaming or removing it while this object lives, where its name is not locked."""
        fsio.keep_locked(self, self.path)

    def check_owner(self) -> None:
        """Raise unless this process still owns what it took with `take`.

        A lock keeps other processes away. Where locks do nothing, the last process to take the draft wins.

        Raises:
            LockedError: Another process has taken it over or published it.
        """
        if self._token is None:
            return
        status = self.status()
        if status is None or status["token"] != self._token or self.is_published:
            by = f"pid {status['pid']} on {status['host']}" if status else "it is not known which"
            raise LockedError(
                f"another process has taken over '{self.reference}'",
                why=f"{by}; file locks do not work here",
                hint="quill doctor",
            )

    def update_status(self, **facts: Any) -> None:
        """Add facts to the status that `quill list` and `quill show` read."""
        self._write_status(facts, fence=self.check_owner)

    def write_json(self, name: str, value: Any) -> None:
        """Write one of its files as JSON, replacing it in one step.

        Raises:
            LockedError: Another process has taken it over; the old file stays, as for every write here.
            ResourceError: Disk or permission; the old file stays.
        """
        self.write_chunks(name, [strictjson.encode(value)])

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one of its files; raises as `write_json` does."""
        self.write_chunks(name, [data])

    def write_chunks(self, name: str, chunks: Iterable[bytes]) -> str:
        """Write one of its files from chunks, so that a large one is never in memory whole.

        Args:
            name: Relative to its folder; folders in it are made.
            chunks: Its content.

        Returns:
            The sha256 of what was written, hex.
        """
        path = self.path / name
        fsio.make_dir(path.parent)
        with fsio.stage(path, fence=self.check_owner) as place:
            return fsio.create(place, chunks)

    def write_file(self, name: str, make: Callable[[Path], object]) -> None:
        """Write one of its files with a function or library that needs a path.

        Args:
            name: Relative to its folder.
            make: Called with a staged path of that name to write; it need not sync.
        """
        self.check_owner()
        with fsio.stage(self.path / name, fence=self.check_owner) as place:
            make(place)

    def write_weights(self, make: Callable[[Path], object], facts: dict[str, Any]) -> None:
        """Write the best weights so far and what is known of them; one is never that of the other's past.

        Args:
            make: As for `write_file`.
            facts: What the manifest would say if they were published.
        """

        def make_known(path: Path) -> None:
            make(path)
            self.update_status(pending={"sha256": fsio.sha256(path), "facts": facts})

        self.write_file(manifest.WEIGHTS, make_known)
        self.update_status(facts=facts, pending=None)

    def open_log(self, name: str, content: Iterable[bytes] | None = None) -> fsio.Log:
        """Open a log that lines are appended to.

        Args:
            name: Relative to its folder.
            content: Start a new log with these chunks, which replaces the old one; None to append to the old
                one. Lines appended after another process started a new log are not part of that.
        """
        self.check_owner()
        return fsio.Log(self.path / name, content, fence=self.check_owner)

    def save_state(
        self, step: int, make: Callable[[Path], object], keep: int = 2, facts: Mapping[str, Any] | None = None
    ) -> Path:
        """Save a resume state as a whole, record the status, and remove outdated states.

        Args:
            step: Optimizer steps done.
            make: Called with an empty staged folder to write the state's files into; it need not sync.
            keep: How many states to keep, this one included.
            facts: What the status says of this step. The state contains it too, with what a run needs to
                resume, so that a power cut that takes the status leaves the run resumable.

        Returns:
            The state's folder.

        Raises:
            CorruptError: The folder of the states is a link.
            LockedError: Another process has taken the draft over.
            ResourceError: Disk or permission; the earlier states are untouched.
        """
        self.check_owner()
        status = {k: v for k, v in (self.status() or {}).items() if k in _DURABLE} | dict(facts or {})
        folder = self.path / manifest.STATE
        target = folder / f"{_STEP}{step:06d}"
        refuse_link(folder)
        fsio.make_dir(folder)
        # A run that resumed from an earlier state, because this one was damaged, replaces it.
        with fsio.stage(target, fence=self.check_owner) as staged:
            os.mkdir(staged)
            make(staged)
            document = manifest.of_state(staged, self.reference, step) | {"status": status}
            fsio.create(staged / manifest.FILE, [strictjson.encode(document)])
        if facts:
            self.update_status(**facts)
        states = self.states()
        # A later step belongs to a future that was given up; it must not count as the newest.
        kept = [s for s in states if s.step <= step][: max(keep, 1)]
        for state in states:
            if state not in kept:
                fsio.discard(state.path, self._trash)
        return target

    def publish(self, **facts: Any) -> Version:
        """Make it a version: sync and hash its files, write the manifest last, remove the resume states.

        Args:
            **facts: What the manifest says beyond what is found here: data, parent, seeds, device,
                steps, parameters, best_val_loss, seconds.

        Raises:
            CorruptError: A file that every version needs is missing, or one changed while it was published.
            RefusedError: It is published already.
            LockedError: Another process has taken it over.
            ResourceError: Disk or permission; it is still a draft.
        """
        path = self.path / manifest.FILE
        self.check_owner()
        if self.is_published:
            raise RefusedError(f"'{self.reference}' is already published", why="a version never changes")
        with fsio.guard(self.path, "read"):
            leftovers = [Path(e.path) for e in os.scandir(self.path) if e.name.startswith(".")]
        for leftover in leftovers:
            fsio.discard(leftover, self._trash)
        fsio.settle(self.path)
        before = manifest.stamps(self.path)
        document = manifest.build(self.path, self.reference, facts)
        validated = manifest.validate(document, path)
        ours = False

        def fence() -> None:
            nonlocal ours
            self.check_owner()
            ours = True

        try:
            with fsio.stage(path, fence=fence) as place:
                fsio.create(place, [strictjson.encode(document)])
            if manifest.stamps(self.path) != before:
                why = "another process wrote into its folder"
                raise CorruptError(f"'{self.reference}' changed while it was published", why=why)
        except BaseException:
            # The rename may have happened without being synced: a failed publish must not be visible.
            if ours:
                with suppress(QuillError):
                    fsio.remove_file(path)
            raise
        self._token = None
        # It is published; a failure to tidy up neither undoes that nor is in the way.
        with suppress(QuillError):
            aliases.reserve(self.path.parent, self.number)
            if (self.path / manifest.STATE).is_dir():
                fsio.discard(self.path / manifest.STATE, self._trash)
            fsio.remove_file(self.path / manifest.STATUS)
        return Version(self.name, self.number, self.path, validated)

    def discard(self) -> None:
        """Delete it; its number is never reused."""
        aliases.reserve(self.path.parent, self.number)
        fsio.discard(self.path, self._trash)

    @property
    def is_published(self) -> bool:
        """Whether it has become a version since it was found."""
        return is_published(self.path)

    @property
    def _trash(self) -> Path:
        return self.root / fsio.TRASH

    def _write_status(self, facts: Mapping[str, Any], fence: Callable[[], object] | None = None) -> None:
        status = {**{k: v for k, v in (self.status() or {}).items() if v is not None}, **facts}
        with fsio.stage(self.path / manifest.STATUS, durable=False, fence=fence) as place:
            fsio.create(place, [strictjson.encode(status)])

    def _missing(self, name: str) -> QuillError:
        return NotFoundError(
            f"'{self.reference}' has no {name} yet",
            why="it is unfinished",
            hint=f"quill show {self.reference}",
        )
