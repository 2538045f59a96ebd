"""What gc and --keep remove, and above all what they leave alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from crashing import snapshot, versions

from quill import fsio
from quill.errors import CorruptError, InputError, ResourceError
from quill.registry import aliases, gc, locks, remove
from quill.registry.gc import DAY, Result, prune

UNIQUE = "4242-0123456789ab"


@pytest.fixture
def data(registry) -> Path:
    folder = registry.root.parent / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def leave():
    """Leave a file somewhere, as a crash does: leave(path)."""

    def put(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left")
        return path

    return put


@pytest.fixture
def state(fill):
    """Give a draft a resume state without torch: state(draft, 100)."""

    def put(draft, step):
        folder = draft.path / "state" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        fsio.write_bytes(folder / "state.safetensors", bytes(50))
        described = {"bytes": 50, "sha256": fsio.sha256(folder / "state.safetensors")}
        fsio.write_json(folder / "manifest.json", {"schema": 1, "files": {"state.safetensors": described}})
        return folder

    return put


def clean(registry, data=None, *, dry_run=False, **options) -> Result:
    plan = gc.plan(registry, data, **options)
    return Result(plan.removals, plan.skipped, plan.failed) if dry_run else plan.execute()


def removed(done: Result) -> list[str]:
    assert done.failed == []
    return sorted(t.what for t in done.removed)


def references(registry) -> list[str]:
    return [v.reference for v in registry.entries(all_versions=True)]


def later(days: float = 2.0) -> float:
    return time.time() + days * DAY


class TestLeftovers:
    def test_what_a_crash_left_goes_once_it_is_old(self, registry, publish, data, leave):
        publish("a")
        left = [
            registry.root / ".staging" / UNIQUE / "x",
            registry.root / ".trash" / f"{UNIQUE}-v3" / "x",
            registry.root / f".tmp-{UNIQUE}",
            registry.root / f".tmp-lock-77-{'0' * 8}",
            registry.root / "a" / f".tmp-{UNIQUE}",
            registry.root / "a" / "v1" / f".tmp-{UNIQUE}" / "x",
            registry.root / "a" / "v2" / "state" / ".staging" / UNIQUE / "x",
            data / ".staging" / UNIQUE / "text",
            data / ".trash" / f"{UNIQUE}-old" / "train.bin",
            data / ".downloads" / f".tmp-{UNIQUE}",
            data / "set" / f".tmp-{UNIQUE}",
        ]
        for path in left:
            leave(path)
        leave(data / "set" / "manifest.json")
        before = versions(registry)["a/v1"]
        for path in list(before):
            if ".tmp" in path:
                del before[path]
        assert clean(registry, data).removed == [], "it is younger than a day"
        done = clean(registry, data, now=later(), dry_run=True)
        assert len(removed(done)) == len(left)
        assert done.bytes == 4 * len(left)
        assert all(p.exists() for p in left)
        assert clean(registry, data, now=later()) == done
        assert not any(p.exists() for p in left)
        assert clean(registry, data, now=later()).removed == []
        assert snapshot(registry.root / "a" / "v1") == before
        assert (data / "set" / "manifest.json").exists()

    def test_what_quill_did_not_name_is_not_its_to_remove(self, registry, publish, data, leave, tmp_path):
        publish("a")
        theirs = [
            registry.root / ".staging" / "mine",
            registry.root / ".trash" / "photo.jpg",
            registry.root / ".tmp-mine",
            registry.root / "notes.txt",
            registry.root / ".git" / f".tmp-{UNIQUE}",
            registry.root / "a" / "notes.txt",
            registry.root / "Not A Model" / f".tmp-{UNIQUE}",
            data / "corpus" / "deep" / f".tmp-{UNIQUE}",
            data / "corpus" / ".trash" / f"{UNIQUE}-x",
            data / ".staging" / "4242",
            data / "x.txt",
        ]
        for path in theirs:
            leave(path)
        assert removed(clean(registry, data, older_than=0)) == []
        assert all(p.exists() for p in theirs)

    def test_something_in_use_is_young_whatever_its_age(self, registry, leave, publish):
        publish("a")
        folder = leave(registry.root / ".staging" / UNIQUE / "deep" / "x").parent.parent
        old = time.time() - 10 * DAY
        os.utime(folder, (old, old))
        assert clean(registry).removed == [], "something in it was written a moment ago"
        assert removed(clean(registry, now=later())) == [f"weights/.staging/{UNIQUE}"]

    def test_f38_a_clock_that_went_back_makes_nothing_old(self, registry, leave, publish):
        publish("a")
        leave(registry.root / ".trash" / UNIQUE)
        assert clean(registry, now=time.time() - 400 * DAY).removed == []

    def test_a_glob_keeps_to_its_names(self, registry, publish, data, leave):
        publish("a")
        publish("ab")
        left = [registry.root / n / f".tmp-{UNIQUE}" for n in (".", "a", "ab")] + [data / f".tmp-{UNIQUE}"]
        for path in left:
            leave(path)
        assert removed(clean(registry, data, glob="a?", older_than=0)) == [f"weights/ab/.tmp-{UNIQUE}"]
        assert [p.exists() for p in left] == [True, True, False, True]

    def test_a_model_that_was_removed_leaves_its_numbers(self, registry, publish):
        publish("a")
        draft = registry.begin("a")
        draft.discard()
        shutil.rmtree(registry.root / "a" / "v1")
        (registry.root / "empty").mkdir()
        assert removed(clean(registry, older_than=0)) == ["weights/empty"]
        assert (registry.root / "a" / "model.json").exists()
        assert registry.begin("a").number == 3

    def test_what_publishing_could_not_tidy_up(self, registry, publish):
        version = publish("a")
        (version.path / "state" / "step-000100").mkdir(parents=True)
        fsio.write_json(version.path / "status.json", {"step": 1})
        (version.path / "run.log").write_text("stays")
        assert removed(clean(registry)) == ["a:v1 state", "weights/a/v1/status.json"]
        assert (version.path / "run.log").exists()
        assert version.read_file("config.json")

    def test_hard_links_to_what_stays_free_nothing(self, registry, publish, leave):
        publish("a")
        kept = leave(registry.root.parent / "kept")
        (registry.root / ".trash").mkdir()
        os.link(kept, registry.root / ".trash" / UNIQUE)
        done = clean(registry, older_than=0)
        assert (len(done.removed), done.bytes) == (1, 0)
        assert kept.read_bytes() == b"left"

    @pytest.mark.parametrize("place", [".trash", ".staging", "a", "a/v1/state", "a/v2", f".trash/{UNIQUE}"])
    def test_f14_nothing_is_deleted_through_a_link(self, registry, publish, tmp_path, leave, place):
        publish("a")
        outside = tmp_path / "outside"
        for name in (UNIQUE, f".tmp-{UNIQUE}", "state/step-000001/x", "step-000001/x"):
            leave(outside / name)
        if place == "a":
            shutil.rmtree(registry.root / "a")
        (registry.root / place).parent.mkdir(exist_ok=True)
        (registry.root / place).symlink_to(outside)
        before = snapshot(outside)
        done = clean(registry, older_than=0, keep=1)
        assert snapshot(outside) == before
        if place == "a":
            assert [s.what for s in done.skipped] == ["a"]

    @pytest.mark.parametrize("place", [".trash", ".staging", ".downloads", "set"])
    def test_f14_nor_of_the_datasets(self, registry, publish, data, tmp_path, leave, place):
        publish("a")
        outside = leave(tmp_path / "outside" / UNIQUE).parent
        leave(outside / f".tmp-{UNIQUE}")
        leave(outside / "manifest.json")
        (data / place).symlink_to(outside)
        before = snapshot(outside)
        assert clean(registry, data, older_than=0).removed == []
        assert snapshot(outside) == before

    def test_f14_a_leftover_that_is_a_link_goes_and_what_it_points_at_stays(
        self, registry, publish, tmp_path, leave
    ):
        publish("a")
        outside = leave(tmp_path / "outside" / "x").parent
        (registry.root / f".tmp-{UNIQUE}").symlink_to(outside)
        assert removed(clean(registry, older_than=0)) == [f"weights/.tmp-{UNIQUE}"]
        assert (outside / "x").exists()

    def test_one_thing_that_cannot_be_removed_keeps_no_other(self, registry, publish, leave, monkeypatch):
        publish("a")
        publish("b")
        publish("b")
        publish("a")
        leave(registry.root / f".tmp-{UNIQUE}")
        real = os.rename

        def rename(source, target):
            if source.parent.name == "a":
                raise OSError(5, "Input/output error")
            real(source, target)

        monkeypatch.setattr(os, "rename", rename)
        done = clean(registry, older_than=0, keep=1)
        assert [t.what for t in done.removed] == ["b:v1", f"weights/.tmp-{UNIQUE}"]
        assert [f.exit_code for f in done.failed] == [7]
        assert references(registry) == ["a:v1", "a:v2", "b:v2"]

    def test_no_registry_is_nothing_to_clean(self, registry, data):
        assert clean(registry, data, older_than=0) == Result([], [], [])
        assert not registry.root.exists()

    def test_f12_a_later_quills_registry_is_left_alone(self, registry, publish):
        publish("a")
        fsio.write_json(registry.root / ".quill.json", {"format": 2})
        with pytest.raises(InputError):
            clean(registry, older_than=0)

    def test_nothing_to_do_writes_nothing(self, registry, publish):
        publish("a")
        shutil.rmtree(registry.root / ".locks")
        before = sorted(registry.root.rglob("*"))
        clean(registry, older_than=0, keep=1)
        assert sorted(registry.root.rglob("*")) == before

    def test_the_same_folder_twice_is_counted_once(self, registry, publish, leave):
        publish("a")
        leave(registry.root / f".tmp-{UNIQUE}")
        assert clean(registry, registry.root, older_than=0).bytes == 4


class TestUnfinished:
    def test_a_run_that_a_later_version_superseded_goes(self, registry, publish, state):
        draft = registry.begin("a")
        draft.update_status(step=9)
        state(draft, 9)
        assert clean(registry).removed == []
        publish("a")
        done = clean(registry)
        assert [(t.what, t.kind) for t in done.removed] == [("a:v1", "unfinished run")]
        assert registry.drafts() == []
        assert references(registry) == ["a:v2"]

    def test_a_run_that_could_go_on_stays(self, registry, publish, state):
        publish("a")
        draft = registry.begin("a")
        draft.update_status(step=9)
        state(draft, 9)
        before = snapshot(draft.path)
        assert clean(registry, older_than=0, keep=1).removed == []
        assert snapshot(draft.path) == before

    def test_a_damaged_later_version_supersedes_nothing(self, registry, publish):
        registry.begin("a").update_status(step=9)
        (publish("a").path / "model.safetensors").write_bytes(b"")
        assert clean(registry, older_than=0).removed == []

    def test_what_never_got_to_be_a_run_goes_once_it_is_old(self, registry, publish, fill):
        """A killed copy or import: nothing ever goes on with it, though no later version is there."""
        publish("a")
        fill(registry.begin("a"))
        assert clean(registry).removed == []
        assert removed(clean(registry, now=later())) == ["a:v2"]
        assert publish("a").number == 3

    def test_a_copy_under_way_is_not_taken_for_one_that_was_superseded(self, registry, publish, fill):
        draft = registry.begin("a")
        publish("a")
        assert clean(registry).removed == []
        fill(draft)
        assert draft.publish().reference == "a:v1"

    def test_resume_states_beyond_the_runs_own_number(self, registry, state):
        draft = registry.begin("a")
        draft.update_status(step=400)
        draft.write_json("config.json", {"train": {"keep_states": 3}})
        folders = {step: state(draft, step) for step in (100, 200, 300, 400, 500)}
        (folders[500] / "state.safetensors").write_bytes(b"torn")
        assert removed(clean(registry)) == ["a:v1 step-000100"]
        assert sorted(p.name for p in (draft.path / "state").iterdir()) == [
            f"step-{n:06d}" for n in (200, 300, 400, 500)
        ]

    @pytest.mark.parametrize(
        "config", ["{", '{"train": {"keep_states": 0}}', '{"train": {"keep_states": "2"}}', None]
    )
    def test_states_of_a_run_whose_config_cannot_be_read_stay(self, registry, state, config):
        draft = registry.begin("a")
        draft.update_status()
        for step in (1, 2, 3, 4):
            state(draft, step)
        if config is not None:
            (draft.path / "config.json").write_text(config)
        done = clean(registry)
        assert done.removed == []
        assert [s.what for s in done.skipped] == ["a:v1 state"]

    def test_without_a_setting_two_states_stay(self, registry, state):
        draft = registry.begin("a")
        draft.update_status()
        draft.write_json("config.json", {"train": {}})
        for step in (9, 10, 1000000):
            state(draft, step)
        assert removed(clean(registry)) == ["a:v1 step-000009"]


class TestKeep:
    def test_the_newest_stay_and_their_numbers_are_not_given_again(self, registry, publish):
        for _ in range(5):
            publish("a")
        publish("b")
        done = clean(registry, keep=2)
        assert [(t.what, t.kind) for t in done.removed] == [(f"a:v{n}", "version") for n in (1, 2, 3)]
        assert references(registry) == ["a:v4", "a:v5", "b:v1"]
        assert clean(registry, keep=2).removed == []
        assert removed(clean(registry, keep=1)) == ["a:v4"]
        assert publish("a").number == 6

    def test_what_has_an_alias_stays_beside_the_newest(self, registry, publish):
        for _ in range(4):
            publish("a")
        aliases.set_alias(registry.root / "a", "champion", 1)
        aliases.set_alias(registry.root / "a", "newest", 4)
        assert removed(clean(registry, keep=1)) == ["a:v2", "a:v3"]
        assert registry.resolve("a:champion").read_file("config.json")

    def test_a_damaged_version_neither_counts_nor_goes(self, registry, publish):
        for _ in range(4):
            publish("a")
        for number in (1, 4):
            (registry.root / "a" / f"v{number}" / "model.safetensors").write_bytes(b"")
        assert removed(clean(registry, keep=1)) == ["a:v2"]
        assert references(registry) == ["a:v1", "a:v3", "a:v4"]

    def test_aliases_that_cannot_be_read_keep_everything(self, registry, publish):
        for name in ("a", "a", "b", "b"):
            publish(name)
        (registry.root / "a" / "model.json").write_text("{")
        done = clean(registry, keep=1)
        assert removed(done) == ["b:v1"]
        assert [s.what for s in done.skipped] == ["a"]
        with pytest.raises(CorruptError):
            prune(registry, "a", 1)
        assert references(registry) == ["a:v1", "a:v2", "b:v2"]

    def test_a_glob_limits_it(self, registry, publish):
        for name in ("nightly", "nightly", "shakespeare", "shakespeare"):
            publish(name)
        assert removed(clean(registry, keep=1, glob="night*")) == ["nightly:v1"]

    def test_f42_a_name_that_is_held_is_passed_over(self, registry, publish):
        for name in ("a", "a", "b", "b"):
            publish(name)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with locks.hold(registry.root, "a"):
                    os.write(write, b"r")
                    time.sleep(60)
            finally:
                os._exit(1)
        try:
            os.read(read, 1)
            for dry_run in (True, False):
                done = clean(registry, keep=1, dry_run=dry_run)
                assert removed(done) == ["b:v1"]
                assert [s.what for s in done.skipped] == ["a"]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert removed(clean(registry, keep=1)) == ["a:v1"]

    def test_an_alias_set_between_planning_and_removing_counts(self, registry, publish):
        publish("a")
        publish("a")
        plan = gc.plan(registry, keep=1)
        assert [r.what for r in plan.versions] == ["a:v1"]
        aliases.set_alias(registry.root / "a", "champion", 1)
        done = plan.execute()
        assert (done.removed, [s.what for s in done.skipped]) == ([], ["a:v1"])
        assert registry.resolve("a:champion").number == 1

    def test_an_alias_set_at_the_last_moment_counts(self, registry, publish, monkeypatch):
        publish("a")
        publish("a")
        take_away = remove.take_away

        def set_alias_first(registry, folder):
            aliases.set_alias(registry.root / "a", "champion", 1)
            return take_away(registry, folder)

        monkeypatch.setattr(remove, "take_away", set_alias_first)
        done = clean(registry, keep=1)
        assert (done.removed, [s.what for s in done.skipped]) == ([], ["a:v1"])
        assert registry.resolve("a:champion").number == 1

    def test_only_what_was_planned_is_removed(self, registry, publish):
        """What became removable while someone was asked stays until the next time."""
        publish("a")
        draft = registry.begin("a")
        draft.update_status(step=1)
        publish("a")
        plan = gc.plan(registry)
        assert [r.what for r in plan.removals] == ["a:v2"]
        registry.begin("a").update_status(step=1)
        publish("a")
        assert removed(plan.execute()) == ["a:v2"]
        assert removed(clean(registry)) == ["a:v4"]

    def test_an_unfinished_run_that_was_published_in_the_meantime_stays(self, registry, publish, fill):
        draft = registry.begin("a")
        draft.update_status(step=1)
        publish("a")
        plan = gc.plan(registry, keep=1)
        assert [r.what for r in plan.removals] == ["a:v1"]
        fill(draft)
        draft.publish()
        done = plan.execute()
        assert (done.removed, [s.what for s in done.skipped]) == ([], ["a:v1"])
        assert registry.resolve("a:v1").read_file("config.json")

    def test_a_dry_run_tells_the_same_and_does_nothing(self, registry, publish):
        for _ in range(3):
            publish("a")
        before = snapshot(registry.root)
        told = clean(registry, keep=1, dry_run=True)
        assert snapshot(registry.root) == before
        assert clean(registry, keep=1) == told


class TestPrune:
    def test_the_holder_of_a_name_prunes_it(self, registry, publish):
        for _ in range(4):
            publish("a")
        registry.begin("a").update_status(step=1)
        aliases.set_alias(registry.root / "a", "champion", 1)
        with locks.hold(registry.root, "a"):
            assert [v.reference for v in prune(registry, "a", 2)] == ["a:v2"]
            assert prune(registry, "a", 2) == []
        assert references(registry) == ["a:v1", "a:v3", "a:v4"]
        assert [d.reference for d in registry.drafts()] == ["a:v5"]

    def test_one_put_there_by_hand_counts_as_the_oldest(self, registry, publish, fill):
        folder = registry.root / "a"
        folder.mkdir(parents=True)
        fill(folder)
        publish("a")
        assert [v.reference for v in prune(registry, "a", 1)] == ["a:v1"]
        assert json.loads((folder / "model.json").read_text())["next_version"] == 3
        assert sorted(p.name for p in folder.iterdir()) == ["model.copy.json", "model.json", "v2"]

    def test_f41_what_cannot_be_removed_is_told(self, registry, publish, monkeypatch):
        publish("a")
        publish("a")

        def refuse(*args):
            raise OSError(30, os.strerror(30))

        monkeypatch.setattr(os, "rename", refuse)
        with pytest.raises(ResourceError) as caught:
            prune(registry, "a", 1)
        assert caught.value.exit_code == 7
        assert references(registry) == ["a:v1", "a:v2"]


class TestClocks:
    """A clock that jumps makes everything look old; what a process is working in stays all the same."""

    LATER = 10 * 365 * 86400.0

    @pytest.mark.parametrize("where", ["registry", "model", "data", "dataset"])
    def test_f58_what_a_live_process_stages_is_no_leftover(self, registry, publish, tmp_path, where):
        version, data = publish("a"), tmp_path / "data"
        (data / "sea").mkdir(parents=True)
        (data / "sea" / "manifest.json").write_text("{}")
        place = {
            "registry": registry.root,
            "model": version.path.parent,
            "data": data,
            "dataset": data / "sea",
        }
        with fsio.scratch(place[where]) as folder:
            (folder / "half").write_bytes(b"x")
            found = gc.plan(registry, data, now=time.time() + self.LATER, older_than=0)
            assert found.removals == []
            assert gc.plan(registry, data, now=time.time() + self.LATER).execute().removed == []
            assert (folder / "half").exists()
        os.mkdir(folder)
        done = gc.plan(registry, data, now=time.time() + self.LATER).execute()
        assert [r.path for r in done.removed] == [folder]

    def test_f58_a_copy_in_progress_stays_and_an_abandoned_one_goes(self, registry, publish):
        publish("a")
        draft = registry.begin("b")
        draft.lock_folder()
        draft.write_bytes("config.json", b"{}")
        assert gc.plan(registry, now=time.time() + self.LATER).execute().removed == []
        del draft
        done = gc.plan(registry, now=time.time() + self.LATER).execute()
        assert [r.what for r in done.removed] == ["b:v1"]
