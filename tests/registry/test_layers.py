"""A registry and datasets in a lower layer of overlayfs, as in a container: their folders cannot be renamed.

What one rename does elsewhere takes several operations there. A fault at any of them leaves every version
whole, and what is left behind is completed by a second try or by `gc`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from crashing import at_every_operation, invariants, layered, leftovers, power_loss, snapshot, versions

from quill import fsio
from quill.checkpoint.resume_state import load_state, save_state
from quill.config.settings import DataConfig
from quill.data import remove as remove_data
from quill.data import store
from quill.data.prepare import prepare
from quill.errors import NotFoundError, RefusedError
from quill.registry import aliases, gc, remove, rename
from quill.registry.store import Registry


def rm(registry: Registry, ref: str, **options: bool) -> None:
    remove.plan(registry, [ref], **options).execute()


def save(registry: Registry, step: int) -> None:
    save_state(registry.unfinished("a"), step, {"w": torch.full((16,), float(step))}, {"step": step})


def clean(registry: Registry) -> None:
    done = gc.plan(registry, keep=1, older_than=0).execute()
    if done.failed:
        raise done.failed[0]


def publish_run(registry: Registry) -> None:
    if run := registry.unfinished("a"):
        run.publish(parameters=64)


# What is done, and which versions there are after it; a:v1 is the champion, a:v3 an unfinished run.
FIRST, LAST = {"a:v1", "a:v2"}, {"c:v1", "c:v2"}
ACTIONS: dict[str, tuple[Callable[[Registry], object], set[str]]] = {
    "rename": (lambda r: rename.plan(r, "a", "b").execute(), {"b:v1", "b:v2"} | LAST),
    "removal of a version": (lambda r: rm(r, "a:v2"), {"a:v1"} | LAST),
    "removal of an unfinished run": (lambda r: rm(r, "a:v3"), FIRST | LAST),
    "run given up": (lambda r: r.unfinished("a").discard(), FIRST | LAST),
    "cleaning": (clean, FIRST | {"c:v2"}),
    "resume save": (lambda r: save(r, 300), FIRST | LAST),
    "resume save of a step again": (lambda r: save(r, 200), FIRST | LAST),
    "publish": (publish_run, FIRST | LAST | {"a:v3"}),
}


@pytest.fixture
def before(registry, publish, fill) -> Registry:
    """a:v1, the champion; a:v2; a:v3, a run with states of steps 100 and 200; c:v1 and c:v2."""
    publish("c")
    publish("c")
    publish("a")
    publish("a")
    aliases.set_alias(registry.root / "a", "champion", 1)
    draft = registry.begin("a")
    fill(draft)
    draft.update_status(pid=1, data_key="k")
    save(registry, 100)
    save(registry, 200)
    return registry


def marks(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.name in (fsio.REMOVED, rename.MARK)]


class Aftermath:
    """What must hold after a fault in an action, after a second try, and after gc."""

    def __init__(self, action: str, before: Registry) -> None:
        self.action, (act, self.done) = action, ACTIONS[action]
        self.act = layered(act)
        self.versions = versions(before)
        self.found: set[frozenset[str]] = set()

    def __call__(self, registry: Registry, outcome) -> None:
        if outcome.way == "power loss":
            shutil.rmtree(registry.root / ".locks", ignore_errors=True)
        seen = self.check(registry)
        self.found.add(frozenset(seen))
        assert not outcome.done or seen == self.done
        assert outcome.error is None or outcome.error.exit_code == 7
        again = Registry(shutil.copytree(registry.root, registry.root.with_name("again")))
        with_gc = Registry(shutil.copytree(registry.root, registry.root.with_name("with gc")))
        try:
            self.act(again)
        except (NotFoundError, RefusedError, AttributeError):
            assert self.action not in ("cleaning", "resume save")
        assert outcome.way == "power loss" or self.action == "publish" or self.check(again) == self.done
        self.tidy(with_gc)
        self.tidy(again)
        for copied in (again, with_gc):
            shutil.rmtree(copied.root)

    def check(self, registry: Registry) -> set[str]:
        """Every version is whole, is what it was, and an unfinished run can be resumed."""
        seen = invariants(registry, {})
        for path, files in self.versions.items():
            for place in {path, path.replace("a/", "b/")}:
                if f"{place.replace('/', ':')}" in seen:
                    left = {n: c for n, c in snapshot(registry.root / place).items() if n != fsio.REMOVED}
                    assert left == files
        if self.action.startswith("resume save"):
            found = load_state(registry.unfinished("a"))
            assert found and found[2] == [] and found[1]["step"] in (100, 200, 300)
        return seen

    def tidy(self, registry: Registry) -> None:
        """gc removes what is left behind, and no version that it should not."""
        before = self.check(registry)
        done = gc.plan(registry, older_than=0).execute()
        assert (done.failed, done.skipped, leftovers(registry.root), marks(registry.root)) == ([], [], [], [])
        both = {"a", "b"} <= {v[0] for v in before}
        assert self.check(registry) == ({v for v in before if v[0] != "a"} if both else before)
        assert gc.plan(registry, older_than=0).execute().removed == []
        names = {p.name for p in registry.root.iterdir() if not p.name.startswith(".")}
        assert self.action != "rename" or len(names & {"a", "b"}) == 1, "it has one name or the other"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exit", "eio"])
@pytest.mark.parametrize("action", ACTIONS)
def test_f64_f27_f28_a_fault_at_every_operation(before, action, way, injections, tmp_path):
    after = Aftermath(action, before)
    struck = at_every_operation(before, after.act, after, way, tmp_path / "struck")
    injections.add(f"{action}, in a lower layer", way, struck)
    assert struck > 3


@pytest.mark.slow
@pytest.mark.parametrize("action", ["rename", "removal of a version"])
def test_f64_f29_power_lost_after_every_operation(before, action, injections, tmp_path):
    after = Aftermath(action, before)
    states = power_loss(before, after.act, after, tmp_path / "lost", draws=1)
    injections.add(f"{action}, in a lower layer", "power loss", states)
    assert states > 15
    assert len(after.found) >= 2


@pytest.mark.parametrize("change", ["version", "alias", "run", "copy"])
def test_f64_what_changed_after_an_interrupted_rename_is_never_removed(before, publish, change, monkeypatch):
    """Only a model that the new name has whole is removed under the old one."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rename, "complete", killed)
        with pytest.raises(KeyboardInterrupt):
            layered(lambda r: rename.plan(r, "a", "b").execute())(before)
    assert rename.successor(before.root, "a") == "b"
    if change == "version":
        publish("a")
    elif change == "alias":
        aliases.set_alias(before.root / "a", "other", 2)
    elif change == "run":
        before.unfinished("a").update_status(step=300)
    else:
        rm(before, "b:v2")
    kept = snapshot(before.root / "a")
    assert rename.successor(before.root, "a") is None
    with pytest.raises(RefusedError, match="taken"):
        rename.plan(before, "a", "b")
    done = gc.plan(before, older_than=0).execute()
    assert done.failed == []
    # A run that a later version supersedes is removed in any case.
    gone = ("v3/", rename.MARK) if change == "version" else rename.MARK
    assert snapshot(before.root / "a") == {n: c for n, c in kept.items() if not n.startswith(gone)}
    assert marks(before.root) == []


def test_f64_a_folder_is_replaced_or_keeps_its_old_content(tmp_path, injections):
    """As by export --force and prepare --force, into a folder of a lower layer."""

    def content(path: Path) -> bytes | None:
        files = [path / "a", path / "sub" / "b"]
        return (
            files[0].read_bytes() if len({f.read_bytes() if f.exists() else f for f in files}) == 1 else None
        )

    def make(target: Path, raw: bytes) -> None:
        with fsio.stage(target) as place:
            (place / "sub").mkdir(parents=True)
            fsio.create(place / "a", [raw])
            fsio.create(place / "sub" / "b", [raw])

    before = Registry(tmp_path / "before")
    before.root.mkdir()
    make(before.root / "out", b"old")

    def then(registry: Registry, outcome) -> None:
        found = content(registry.root / "out")
        assert found == b"new" or not outcome.done
        if found not in (b"old", b"new"):
            (left,) = [p for p in registry.root.glob(".tmp-*") if content(p) == b"old"]
            assert outcome.killed or str(left) in outcome.error.why
        make(registry.root / "out", b"again")
        assert content(registry.root / "out") == b"again"

    act = layered(lambda r: make(r.root / "out", b"new"))
    for way in ("exit", "eio"):
        struck = at_every_operation(before, act, then, way, tmp_path / way)
        injections.add("replace a folder of a lower layer", way, struck)


def test_f64_links_are_copied_and_files_where_they_cannot_be_linked(tmp_path, monkeypatch):
    outside, source = tmp_path / "outside", tmp_path / "source"
    outside.write_bytes(b"precious")
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "link").symlink_to(outside)
    (source / "file").write_bytes(b"x" * 5000)
    (source / "file").chmod(0o640)
    fsio.copy_folder(source, tmp_path / "linked")
    assert (source / "file").samefile(tmp_path / "linked" / "file")

    def refuse(path: Path, *rest: object, **more: object) -> None:
        if path.is_symlink():
            return os.symlink(os.readlink(path), Path(str(rest[0])))
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    fsio.copy_folder(source, tmp_path / "copied")
    for made in ("linked", "copied"):
        assert (tmp_path / made / "sub" / "link").readlink() == outside
        assert (tmp_path / made / "file").read_bytes() == b"x" * 5000
        assert (tmp_path / made / "file").stat().st_mode == (source / "file").stat().st_mode
    assert not (source / "file").samefile(tmp_path / "copied" / "file")


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Mount a folder as the lower layer of an overlay: overlay(folder) -> the merged folder."""
    mounted: list[Path] = []

    def mount(lower: Path) -> Path:
        upper, work, merged = (tmp_path / n for n in ("upper", "work", "merged"))
        for folder in (upper, work, merged):
            folder.mkdir()
        layers = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=off"
        command = ["mount", "-t", "overlay", "overlay", "-o", layers, str(merged)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"overlayfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(merged)
        return merged

    yield mount
    for merged in mounted:
        subprocess.run(["umount", "-l", str(merged)], check=True)


def test_f64_every_command_works_on_an_overlay(before, overlay, fill, tmp_path):
    registry = Registry(overlay(before.root.parent) / before.root.name)
    with pytest.raises(OSError, match="cross-device"):
        os.rename(registry.root / "c", registry.root / "d")
    assert rename.plan(registry, "a", "b").execute() == ["b:v1", "b:v2", "b:v3"]
    rm(registry, "c", all_versions=True)
    draft = registry.unfinished("b")
    save_state(draft, 300, {"w": torch.ones(4)}, {"step": 300}, keep=1)
    assert load_state(draft)[1] == {"step": 300}
    assert draft.publish(parameters=64).reference == "b:v3"
    assert gc.plan(registry, older_than=0).removals == []
    aliases.set_alias(registry.root / "b", "champion", 3)
    assert [v.what for v in gc.plan(registry, keep=1, older_than=0).execute().removed] == ["b:v1", "b:v2"]
    assert invariants(registry, {}) == {"b:v3"}
    assert (leftovers(registry.root), marks(registry.root)) == ([], [])


def test_f64_a_dataset_on_an_overlay_is_prepared_again_and_removed(overlay, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("the tide is out, and the boats lie on the sand\n" * 50)
    config = DataConfig.model_validate({"source": str(text), "tokenizer": "char"})
    (tmp_path / "lower").mkdir()
    first = prepare(config, tmp_path / "lower")
    root = overlay(tmp_path / "lower")
    again = prepare(config, root, force=True)
    again.verify()
    assert again.key == first.key
    remove_data.plan(root, [again.path.name]).execute()
    assert store.entries(root) == []
    assert [p.name for p in root.iterdir() if not p.name.startswith(".")] == []
