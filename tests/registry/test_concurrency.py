"""Eight processes publish into one registry while others read it all the time: nothing is seen half.

Every process is a fork of the tests'; what goes wrong in one of them is told through its exit status and
what it wrote to its own file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from crashing import snapshot

from quill import fsio
from quill.errors import LockedError, NotFoundError
from quill.registry import aliases, gc
from quill.registry.store import Registry

pytestmark = pytest.mark.slow

WRITERS, PUBLISHES = 8, 50


def yielding(fd: int) -> None:
    """Let the other processes go on where one would wait for the disk."""
    os.sched_yield()


def payload(name: str, writer: int, k: int) -> bytes:
    """Weights that tell who wrote them, of a length of their own: what is half or mixed is found out."""
    seed = f"{name}/{writer}/{k}/".encode()
    return (seed * 400)[: 2000 + 37 * writer + k]


def publish(registry: Registry, name: str, writer: int, k: int, *, status: bool = True) -> str:
    draft = registry.begin(name)
    body = payload(name, writer, k)
    weights = safetensors.numpy.save({"w": np.frombuffer(body, dtype=np.uint8)})
    draft.write_bytes("model.safetensors", weights)
    draft.write_json("config.json", {"schema_version": 1, "name": name, "by": [writer, k]})
    draft.write_json("tokenizer.json", {"schema": 1, "kind": "char", "vocabulary": "ab"})
    if status:
        draft.update_status(step=k)
    return draft.publish(parameters=len(body)).reference


def start(work: Callable[[], object], report: Path) -> int:
    """Do some work in a process of its own; what it returns, or its traceback, is in the report."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        report.write_text(json.dumps(work()))
        code = 0
    except BaseException:
        report.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def finish(child: int, report: Path):
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, report.read_text()
    return json.loads(report.read_text())


def read_everything(registry: Registry, until: Path, seed: int) -> dict[str, int]:
    """List, resolve and read to the last byte, over and over; the registry may only ever grow."""
    luck, newest, seen, lists, files = random.Random(seed), {}, set(), 0, 0
    while True:
        last = until.exists()
        found = registry.entries(all_versions=True)
        lists += 1
        now = {v.reference for v in found}
        assert seen <= now, f"{seen - now} are gone"
        seen = now
        for version in found if last else luck.sample(found, min(len(found), 12)):
            assert version.damaged is None, version.damaged
            assert version.manifest is not None
            for name in version.manifest["files"]:
                # Checked against the manifest's size and sha256 as it is read.
                version.read_file(name)
                files += 1
            by = version.read_object("config.json")["by"]
            assert version.read_file("model.safetensors").endswith(payload(version.name, *by))
        for name in {v.name for v in found}:
            number = registry.resolve(name).number
            assert number >= newest.get(name, 0), "the newest version went back"
            newest[name] = number
            listed = aliases.read(registry.root / name)
            assert listed["next_version"] >= 1
        if last:
            return {"lists": lists, "files": files, "versions": len(found)}


@pytest.mark.parametrize("locks", ["flock", "no flock"])
def test_f31_f32_eight_writers_publish_fifty_each_while_others_read(
    registry, tmp_path, locks, monkeypatch, injections
):
    monkeypatch.setattr(os, "fsync", yielding)
    if locks == "no flock":
        monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)
    done = tmp_path / "done"
    Registry(registry.root).begin("shared").discard()
    began = time.monotonic()

    def write(writer: int) -> list[str]:
        names = ["shared", f"own-{writer}", "shared", f"pair-{writer % 4}"]
        return [publish(registry, names[k % 4], writer, k) for k in range(PUBLISHES)]

    readers = [
        start(lambda i=i: read_everything(registry, done, i), tmp_path / f"reader-{i}") for i in range(2)
    ]
    writers = [start(lambda i=i: write(i), tmp_path / f"writer-{i}") for i in range(WRITERS)]
    try:
        published = [r for i, w in enumerate(writers) for r in finish(w, tmp_path / f"writer-{i}")]
    finally:
        done.touch()
        figures = [finish(r, tmp_path / f"reader-{i}") for i, r in enumerate(readers)]
    seconds = time.monotonic() - began
    assert len(published) == len(set(published)) == WRITERS * PUBLISHES, "a number was given twice"
    there = registry.entries(all_versions=True)
    assert {v.reference for v in there} == set(published)
    assert sum(v.name == "shared" for v in there) == 200
    for version in there:
        for name, entry in version.manifest["files"].items():
            raw = (version.path / name).read_bytes()
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert all(f["versions"] == len(there) and f["lists"] > 5 for f in figures)
    assert registry.drafts() == []
    assert registry.begin("shared").number == 202
    injections.note(
        f"{WRITERS} writers x {PUBLISHES} publishes ({locks}) in {seconds:.1f} s; readers listed "
        f"{sum(f['lists'] for f in figures):,} times and read {sum(f['files'] for f in figures):,} files"
    )


def test_f31_removing_old_versions_meanwhile_takes_none_that_is_new(registry, tmp_path, injections):
    """Two sweep up all the time while four publish; the newest is always there to be read."""
    done, keep = tmp_path / "done", 12
    publish(registry, "shared", 9, 0)

    def write(writer: int) -> list[str]:
        # As copies do: a draft with a status that holds no lock is a run that was given up.
        return [publish(registry, "shared", writer, k, status=False) for k in range(25)]

    def sweep() -> int:
        removed = 0
        while not done.exists():
            found = gc.plan(registry, keep=keep).execute()
            assert found.failed == []
            removed += len(found.removed)
        return removed

    def read() -> int:
        reads, last = 0, 0
        while not done.exists():
            version = registry.resolve("shared")
            assert version.number >= last
            last = version.number
            assert version.read_file("model.safetensors").endswith(
                payload("shared", *version.read_object("config.json")["by"])
            )
            reads += 1
        return reads

    others = [start(work, tmp_path / f"other-{i}") for i, work in enumerate((sweep, sweep, read, read))]
    writers = [start(lambda i=i: write(i), tmp_path / f"writer-{i}") for i in range(4)]
    try:
        published = [r for i, w in enumerate(writers) for r in finish(w, tmp_path / f"writer-{i}")]
    finally:
        done.touch()
        counts = [finish(child, tmp_path / f"other-{i}") for i, child in enumerate(others)]
    assert len(set(published)) == 100
    gc.plan(registry, keep=keep).execute()
    there = registry.entries(all_versions=True)
    newest = sorted((int(r.rpartition("v")[2]) for r in published), reverse=True)[:keep]
    assert [v.number for v in there] == sorted(newest)
    assert all(v.damaged is None and v.read_file("model.safetensors") for v in there)
    assert registry.begin("shared").number == max(newest) + 1
    assert sum(counts[:2]) > 10 and min(counts[2:]) > 10
    assert os.listdir(registry.root / fsio.TRASH) == []


WRITES = {
    "write_json": lambda draft: draft.write_json("config.json", {"new": 1}),
    "write_bytes": lambda draft: draft.write_bytes("README.md", b"new"),
    "write_chunks": lambda draft: draft.write_chunks("model.safetensors", [b"ne", b"w"]),
    "write_file": lambda draft: draft.write_file("model.safetensors", lambda path: path.write_bytes(b"new")),
    "open_log": lambda draft: draft.open_log("run.log"),
    "open_log, a new one": lambda draft: draft.open_log("metrics.jsonl", [b"new"]),
    "save_state": lambda draft: draft.save_state(9, lambda folder: (folder / "x").write_bytes(b"new")),
    "update_status": lambda draft: draft.update_status(step=9),
    "publish": lambda draft: draft.publish(),
}


@pytest.mark.parametrize("write", WRITES)
def test_f32_a_draft_that_another_process_took_is_not_written_to(registry, fill, write):
    """Where locks have no effect, the last process to take a draft owns it."""
    first = registry.begin("a")
    fill(first)
    first.take()
    registry.unfinished("a").take()
    before = snapshot(first.path)
    with pytest.raises(LockedError, match="another process has taken over 'a:v1'"):
        WRITES[write](first)
    assert snapshot(first.path) == before


@pytest.mark.parametrize("write", sorted(WRITES.keys() - {"open_log", "update_status"}))
def test_f32_what_is_staged_when_another_process_takes_the_draft_is_dropped(
    registry, fill, monkeypatch, write
):
    first = registry.begin("a")
    fill(first)
    first.take()
    first.save_state(8, lambda folder: (folder / "x").write_bytes(b"old"))
    synced = os.fsync

    def take_over(fd: int) -> None:
        monkeypatch.setattr(os, "fsync", synced)
        registry.unfinished("a").take()

    monkeypatch.setattr(os, "fsync", take_over)
    before = snapshot(first.path)
    with pytest.raises(LockedError, match="another process has taken over 'a:v1'"):
        WRITES[write](first)
    assert os.fsync is synced, "nothing was synced, so nothing was staged"
    after = snapshot(first.path)
    assert after.pop("status.json") != before.pop("status.json")
    assert after == before


def test_f32_a_draft_that_two_work_on_belongs_to_the_last(registry, fill):
    """Without locks two runs may resume one draft; the first to notice stops, the other is complete."""
    first = registry.begin("a")
    first.take()
    second = registry.unfinished("a")
    second.take()
    with pytest.raises(LockedError) as caught:
        first.check_owner()
    assert caught.value.exit_code == 75
    fill(second)
    with pytest.raises(LockedError):
        first.publish()
    with pytest.raises(NotFoundError):
        registry.resolve("a")
    assert second.publish().reference == "a:v1"
    with pytest.raises(LockedError):
        first.check_owner()
