"""Copying, renaming and removing: what is kept, what is refused, and numbers that are never given again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from crashing import invariants, snapshot, versions
from holding import held_elsewhere

from quill import fsio
from quill.errors import CorruptError, InputError, LockedError, NotFoundError, RefusedError, ResourceError
from quill.registry import aliases, copy, remove, rename
from quill.registry.store import Registry

RECORDS = ["model.copy.json", "model.json"]


def rm(registry: Registry, *refs: str, **options: bool) -> list[str]:
    return [r.what for r in remove.plan(registry, refs, **options).execute()]


def references(registry: Registry) -> list[str]:
    return [v.reference for v in registry.entries(all_versions=True)]


@pytest.fixture
def by_hand(registry, fill):
    """Put a model into the registry by hand: by_hand("name")."""

    def put(name: str) -> Path:
        folder = registry.root / name
        folder.mkdir(parents=True, exist_ok=True)
        fill(folder)
        (folder / "README.md").write_text("by hand")
        return folder

    return put


class TestCopy:
    def test_the_files_are_the_same_and_what_is_known_goes_with_them(self, registry, publish):
        facts = {"data": {"name": "text", "tokens": 7}, "seeds": {"train": 1}, "steps": 9, "device": "cpu"}
        source = publish("a", best_val_loss=1.25, created="2024-01-01T00:00:00Z", **facts)
        (source.path / "run.log").write_text("a log is of one run")
        before = snapshot(registry.root / "a")
        made = copy.plan(registry, "a", "b").execute()
        assert made.reference == "b:v1"
        assert registry.resolve("b") == made
        files = {n: made.read_file(n) for n in made.manifest["files"]}
        assert files == {n: source.read_file(n) for n in source.manifest["files"]}
        for key in ("best_val_loss", "created", "parameters", "versions", "git", "config_sha256", *facts):
            assert made.manifest[key] == source.manifest[key], key
        assert made.manifest["copied_from"] == {"reference": "a:v1", "digest": source.digest}
        assert made.manifest["reference"] == "b:v1"
        assert snapshot(registry.root / "a") == before
        assert not any(os.path.samefile(made.path / n, source.path / n) for n in files)

    def test_onto_a_name_that_exists_it_is_the_next_version(self, registry, publish):
        publish("a")
        publish("a")
        assert copy.plan(registry, "a:v1", "a").execute().reference == "a:v3"
        assert registry.resolve("a").digest == registry.resolve("a:v1").digest
        assert copy.plan(registry, "a:v3", "b").execute().manifest["copied_from"]["reference"] == "a:v3"

    def test_an_alias_or_a_folder_may_be_copied(self, registry, publish, tmp_path):
        publish("a")
        aliases.set_alias(registry.root / "a", "champion", 1)
        assert copy.plan(registry, "a:champion", "b").execute().number == 1
        shutil.copytree(registry.root / "a" / "v1", tmp_path / "elsewhere")
        made = copy.plan(registry, str(tmp_path / "elsewhere"), "c").execute()
        assert made.manifest["copied_from"]["reference"] == "a:v1"
        assert str(tmp_path) not in (made.path / "manifest.json").read_text()

    def test_what_was_put_there_by_hand_becomes_a_version_like_any_other(self, registry, by_hand):
        folder = by_hand("hand")
        made = copy.plan(registry, "hand", "b").execute()
        assert set(made.manifest["files"]) == {
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "README.md",
        }
        assert made.manifest["parameters"] == 64
        assert made.read_file("README.md") == b"by hand"
        assert copy.plan(registry, "hand", "hand").execute().reference == "hand:v2"
        assert registry.resolve("hand:v1").path == folder

    def test_files_in_folders_of_a_version_are_copied(self, registry, fill):
        draft = registry.begin("a")
        fill(draft)
        (draft.path / "extra").mkdir()
        (draft.path / "extra" / "notes.txt").write_text("x")
        draft.publish()
        assert copy.plan(registry, "a", "b").execute().read_file("extra/notes.txt") == b"x"

    def test_f3_a_flipped_bit_is_not_copied_and_leaves_nothing(self, registry, publish):
        weights = publish("a").path / "model.safetensors"
        raw = bytearray(weights.read_bytes())
        raw[-5] ^= 4
        weights.write_bytes(raw)
        with pytest.raises(CorruptError, match="sha256"):
            copy.plan(registry, "a", "b").execute()
        assert not (registry.root / "b").exists()

    def test_what_changes_while_it_is_copied_is_given_up(self, registry, publish, monkeypatch):
        source, real = publish("a"), Registry.begin

        def begin(self, name):
            weights = source.path / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
            return real(self, name)

        monkeypatch.setattr(Registry, "begin", begin)
        with pytest.raises(CorruptError, match="changed while it was copied"):
            copy.plan(registry, "a", "b").execute()
        assert not registry.entries("b")
        assert not registry.drafts("b")
        monkeypatch.undo()
        assert registry.begin("b").number == 2

    @pytest.mark.parametrize("name", ["../x", "b/c", "", "B", "-b", "b:v2", "con", "b" * 65])
    def test_f13_names_that_are_none(self, registry, publish, name):
        publish("a")
        before = snapshot(registry.root.parent)
        with pytest.raises(InputError):
            copy.plan(registry, "a", name).execute()
        assert snapshot(registry.root.parent) == before

    def test_a_missing_version_makes_nothing(self, registry):
        with pytest.raises(NotFoundError):
            copy.plan(registry, "a", "b").execute()
        assert not registry.root.exists()

    def test_f14_no_copy_goes_through_a_link(self, registry, publish, tmp_path):
        publish("a")
        outside = tmp_path / "outside"
        outside.mkdir()
        (registry.root / "b").symlink_to(outside)
        with pytest.raises(CorruptError):
            copy.plan(registry, "a", "b").execute()
        assert list(outside.iterdir()) == []

    def test_f26_no_room_is_noticed_before_a_number_is_taken(self, registry, publish, monkeypatch):
        publish("a")
        usage = shutil.disk_usage(registry.root)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        with pytest.raises(ResourceError, match="not enough disk"):
            copy.plan(registry, "a", "b").execute()
        assert not (registry.root / "b").exists()


class TestMove:
    def test_everything_moves_at_once(self, registry, publish, fill):
        publish("a")
        publish("a")
        draft = registry.begin("a")
        draft.update_status(step=5)
        aliases.set_alias(registry.root / "a", "champion", 1)
        before = {n: raw for n, raw in snapshot(registry.root / "a").items() if n not in RECORDS}
        assert rename.plan(registry, "a", "b").execute() == ["b:v1", "b:v2", "b:v3"]
        assert references(registry) == ["b:v1", "b:v2"]
        assert [d.reference for d in registry.drafts()] == ["b:v3"]
        assert registry.resolve("b:champion").number == 1
        assert {n: r for n, r in snapshot(registry.root / "b").items() if n not in RECORDS} == before
        assert not (registry.root / "a").exists()
        fill(registry.unfinished("b"))
        assert registry.unfinished("b").publish().reference == "b:v3"

    def test_the_old_name_goes_on_with_its_numbers(self, registry, publish):
        publish("a")
        rm(registry, publish("a").reference)
        rename.plan(registry, "a", "b").execute()
        assert publish("a").reference == "a:v3"
        assert publish("a").reference == "a:v4"
        assert publish("b").reference == "b:v3"

    def test_the_old_name_goes_on_also_after_a_chain_of_moves(self, registry, publish):
        publish("a")
        for name, new in (("a", "b"), ("b", "c"), ("c", "d")):
            rename.plan(registry, name, new).execute()
            publish(new)
        assert references(registry) == ["d:v1", "d:v2", "d:v3", "d:v4"]
        assert [publish(name).number for name in ("a", "b", "c")] == [2, 3, 4]

    def test_a_name_whose_folder_was_all_that_a_crash_left_goes_on_too(self, registry, publish):
        publish("a")
        rename.plan(registry, "a", "b").execute()
        (registry.root / "a").mkdir()
        assert registry.begin("a").number == 2

    def test_it_may_move_back_to_its_own_name(self, registry, publish):
        publish("a")
        rename.plan(registry, "a", "b").execute()
        publish("b")
        rename.plan(registry, "b", "a").execute()
        assert references(registry) == ["a:v1", "a:v2"]
        assert publish("a").number == 3
        assert publish("b").number == 3

    def test_no_number_of_a_former_name_comes_back_by_moving_back(self, registry, publish):
        publish("a")
        rename.plan(registry, "a", "b").execute()
        aliases.update(registry.root / "b", lambda held: held | {"formerly": {"a": 9}})
        rename.plan(registry, "b", "a").execute()
        assert publish("a").number == 9

    def test_a_model_put_there_by_hand_moves(self, registry, by_hand):
        by_hand("hand")
        assert rename.plan(registry, "hand", "b").execute() == ["b:v1"]
        assert registry.resolve("b").manifest is None
        assert registry.begin("hand").number == 2

    def test_a_name_in_use_is_refused(self, registry, publish):
        publish("a")
        publish("b")
        before = snapshot(registry.root)
        with pytest.raises(RefusedError, match="'b' is taken: it has v1") as caught:
            rename.plan(registry, "a", "b").execute()
        assert caught.value.hint == "quill cp a b"
        assert snapshot(registry.root) == before

    def test_a_name_that_had_other_models_is_refused(self, registry, publish):
        publish("a")
        publish("b")
        publish("c")
        rm(registry, "b")
        with pytest.raises(RefusedError, match="versions up to v1 once had it") as caught:
            rename.plan(registry, "a", "b").execute()
        assert caught.value.hint == "quill cp a b"
        rename.plan(registry, "c", "d").execute()
        with pytest.raises(RefusedError, match="'c' was the name of 'd'"):
            rename.plan(registry, "a", "c").execute()
        # As a copy it gets a number that nobody had.
        assert copy.plan(registry, "a", "c").execute().reference == "c:v2"

    def test_a_folder_that_a_crash_left_empty_is_no_name_in_use(self, registry, publish):
        publish("a")
        (registry.root / "b").mkdir()
        assert rename.plan(registry, "a", "b").execute() == ["b:v1"]

    def test_f31_no_version_is_begun_in_a_folder_that_is_being_renamed(self, registry, publish, monkeypatch):
        """Another process moves a model to a name just when its folder was made, and empty as it is."""
        publish("a")
        publish("a")
        rm(registry, "a:v1")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.read(read, 1)
                rename.plan(registry, "a", "b").execute()
                os._exit(0)
            except RefusedError as e:
                os._exit(e.exit_code)
            finally:
                os._exit(1)
        real = fsio.claim

        def claim(path):
            made = real(path)
            if path.name == "b":
                os.write(write, b"r")
                time.sleep(0.3)
            return made

        monkeypatch.setattr(fsio, "claim", claim)
        assert registry.begin("b").reference == "b:v1"
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
        assert references(registry) == ["a:v2"]

    def test_a_file_in_the_way_is_refused(self, registry, publish):
        publish("a")
        (registry.root / "b").write_text("precious")
        with pytest.raises(RefusedError):
            rename.plan(registry, "a", "b").execute()
        assert (registry.root / "b").read_text() == "precious"

    @pytest.mark.parametrize(
        ("name", "new"),
        [("a:v1", "b"), ("a", "b:v1"), ("a", "a"), ("a", "../b"), ("a", ""), ("a", "latest x"), ("./a", "b")],
    )
    def test_f13_what_cannot_be_moved(self, registry, publish, name, new):
        publish("a")
        before = snapshot(registry.root.parent)
        with pytest.raises(InputError):
            rename.plan(registry, name, new).execute()
        assert snapshot(registry.root.parent) == before

    def test_one_version_is_copied_instead(self, registry, publish):
        publish("a")
        with pytest.raises(InputError) as caught:
            rename.plan(registry, "a:v1", "b").execute()
        assert caught.value.hint == "quill cp a:v1 b && quill rm a:v1"

    def test_what_is_not_there_is_not_found_and_makes_nothing(self, registry, publish):
        publish("shakespeare")
        rm(registry, "shakespeare")
        before = snapshot(registry.root)
        for name in ("shakespeare", "x"):
            with pytest.raises(NotFoundError):
                rename.plan(registry, name, "b").execute()
        assert snapshot(registry.root) == before

    @pytest.mark.parametrize("busy", ["a", "b"])
    def test_f42_while_one_of_the_names_is_held_nothing_moves(self, registry, publish, busy):
        publish("a")
        with held_elsewhere(registry.root, busy) as pid, pytest.raises(LockedError) as caught:
            rename.plan(registry, "a", "b").execute()
        assert caught.value.exit_code == 75
        assert f"pid {pid}" in caught.value.why
        assert references(registry) == ["a:v1"]
        assert rename.plan(registry, "a", "b").execute() == ["b:v1"]

    @pytest.mark.parametrize("place", ["name", "target", "ledger", "lock"])
    def test_f14_no_link_is_followed(self, registry, publish, tmp_path, place):
        publish("a")
        outside = tmp_path / "outside"
        shutil.copytree(registry.root / "a", outside)
        if place == "name":
            shutil.rmtree(registry.root / "a")
            (registry.root / "a").symlink_to(outside)
        elif place == "target":
            (registry.root / "b").symlink_to(tmp_path / "nowhere")
        elif place == "ledger":
            (registry.root / "a" / "model.json").unlink()
            (registry.root / "a" / "model.json").symlink_to(outside / "model.json")
        else:
            (registry.root / ".locks").mkdir(exist_ok=True)
            (registry.root / ".locks" / "a.lock").symlink_to(outside / "model.json")
        before = snapshot(outside)
        with pytest.raises(CorruptError) as caught:
            rename.plan(registry, "a", "b").execute()
        assert caught.value.exit_code == 5
        assert snapshot(outside) == before
        assert not (tmp_path / "nowhere").exists()

    def test_f41_a_registry_that_cannot_be_written_is_as_it_was(self, registry, publish, monkeypatch):
        publish("a")
        before = snapshot(registry.root / "a")

        def refuse(*args):
            raise OSError(30, os.strerror(30))

        for operation in ("replace", "rename", "mkdir"):
            monkeypatch.setattr(os, operation, refuse)
        for act in (
            lambda: rename.plan(registry, "a", "b").execute(),
            lambda: copy.plan(registry, "a", "b").execute(),
            lambda: rm(registry, "a"),
            lambda: aliases.set_alias(registry.root / "a", "champion", 1),
        ):
            with pytest.raises(ResourceError) as caught:
                act()
            assert caught.value.exit_code == 7
            assert "read-only" in caught.value.why
        assert snapshot(registry.root / "a") == before


class TestRemove:
    def test_its_number_is_never_given_again(self, registry, publish):
        publish("a")
        publish("a")
        assert rm(registry, "a:v2") == ["a:v2"]
        assert references(registry) == ["a:v1"]
        assert publish("a").reference == "a:v3"
        assert rm(registry, "a:v1", "a:v3") == ["a:v1", "a:v3"]
        assert registry.entries() == []
        assert publish("a").reference == "a:v4"

    def test_a_name_alone_is_its_only_version(self, registry, publish):
        publish("a")
        assert rm(registry, "a") == ["a:v1"]
        with pytest.raises(NotFoundError):
            rm(registry, "a")
        publish("a")
        registry.begin("a")
        with pytest.raises(InputError) as caught:
            rm(registry, "a")
        assert "v2, v3 (unfinished)" in caught.value.why
        assert caught.value.hint == "quill rm a --all-versions"
        assert rm(registry, "a", all_versions=True) == ["a:v2", "a:v3"]
        assert registry.drafts() == []

    def test_an_unfinished_run_is_removed_with_its_states(self, registry, publish):
        publish("a")
        draft = registry.begin("a")
        draft.update_status(step=1)
        (draft.path / "state" / "step-000100").mkdir(parents=True)
        assert rm(registry, "a:v2") == ["a:v2"]
        assert registry.drafts() == []
        assert publish("a").number == 3

    @pytest.mark.parametrize("how", ["manifest", "weights", "gone", "linked file"])
    def test_what_is_damaged_can_be_removed(self, registry, publish, tmp_path, how):
        path = publish("a").path
        (tmp_path / "outside").write_text("precious")
        if how == "manifest":
            (path / "manifest.json").write_text("{")
        elif how == "weights":
            (path / "model.safetensors").write_bytes(b"")
        else:
            (path / "config.json").unlink()
        if how == "linked file":
            (path / "config.json").symlink_to(tmp_path / "outside")
        assert rm(registry, "a") == ["a:v1"]
        assert not path.exists()
        assert (tmp_path / "outside").read_text() == "precious"

    def test_nothing_is_left_of_it(self, registry, publish):
        publish("a")
        rm(registry, "a")
        assert sorted(p.name for p in (registry.root / "a").iterdir()) == RECORDS
        assert list((registry.root / ".trash").iterdir()) == []

    def test_what_has_an_alias_stays_and_so_does_all_else_that_was_named(self, registry, publish):
        publish("a")
        publish("a")
        publish("b")
        aliases.set_alias(registry.root / "a", "champion", 1)
        for refs, options in ((("b", "a:v1"), {}), (("a:champion",), {}), (("a",), {"all_versions": True})):
            with pytest.raises(RefusedError) as caught:
                rm(registry, *refs, **options)
            assert caught.value.exit_code == 4
            assert "a:champion" in caught.value.why
            assert caught.value.hint == "quill alias rm a:champion"
        assert references(registry) == ["a:v1", "a:v2", "b:v1"]
        assert rm(registry, "a:latest") == ["a:v2"]

    def test_an_alias_given_meanwhile_is_noticed(self, registry, publish):
        publish("a")
        plan = remove.plan(registry, ["a"])
        aliases.set_alias(registry.root / "a", "champion", 1)
        with pytest.raises(RefusedError):
            plan.execute()
        assert registry.resolve("a:champion").read_file("config.json")

    def test_what_is_gone_or_finished_meanwhile_is_not_removed(self, registry, publish, fill):
        publish("a")
        draft = registry.begin("a")
        plan = remove.plan(registry, ["a"], all_versions=True)
        rm(registry, "a:v1")
        fill(draft)
        draft.publish()
        assert plan.execute() == []
        assert references(registry) == ["a:v2"]

    def test_f42_while_the_name_is_held_nothing_is_removed(self, registry, publish):
        for name in ("a", "b", "c"):
            publish(name)
        registry.begin("b").update_status(step=3)
        with held_elsewhere(registry.root, "b") as pid:
            for refs in (("b:v1",), ("b:v2",), ("a", "b:v1", "c")):
                with pytest.raises(LockedError) as caught:
                    rm(registry, *refs)
                assert caught.value.exit_code == 75
                assert f"pid {pid}" in caught.value.why
        assert references(registry) == ["a:v1", "b:v1", "c:v1"]
        assert rm(registry, "a", "b:v1", "c") == ["a:v1", "b:v1", "c:v1"]

    @pytest.mark.parametrize("ref", ["a:v2", "a:x", "b", "a:latest"])
    def test_what_is_not_there_is_not_found(self, registry, publish, ref):
        if ref != "a:latest":
            publish("a")
        with pytest.raises(NotFoundError):
            rm(registry, ref)

    @pytest.mark.parametrize("ref", ["../a", "./weights/a", "/etc", "", "a:v0", "a:", ":v1", "A", "a\n"])
    def test_f13_references_that_are_none(self, registry, publish, ref):
        publish("a")
        before = snapshot(registry.root.parent)
        with pytest.raises(InputError):
            rm(registry, ref)
        assert snapshot(registry.root.parent) == before

    @pytest.mark.parametrize("place", ["name", "version", "draft", "trash", "lock"])
    def test_f14_nothing_is_deleted_through_a_link(self, registry, publish, tmp_path, place):
        publish("a")
        outside = tmp_path / "outside"
        shutil.copytree(registry.root / "a" / "v1", outside / "v1")
        at = {"name": "a", "version": "a/v1", "draft": "a/v2", "trash": ".trash", "lock": ".locks/a.lock"}[
            place
        ]
        link = registry.root / at
        if place in ("name", "version"):
            shutil.rmtree(link)
        link.parent.mkdir(exist_ok=True)
        if place == "draft":
            (outside / "v1" / "manifest.json").unlink()
        link.symlink_to(outside if place in ("name", "trash") else outside / "v1")
        before = snapshot(outside)
        with pytest.raises((CorruptError, NotFoundError)) as caught:
            rm(registry, "a:v2" if place == "draft" else "a:v1")
        assert caught.value.exit_code == (3 if place == "draft" else 5)
        assert snapshot(outside) == before
        assert link.is_symlink()

    def test_a_model_put_there_by_hand_is_removed_and_versions_beside_it_stay(
        self, registry, publish, by_hand
    ):
        folder = by_hand("hand")
        publish("hand")
        assert rm(registry, "hand:v1") == ["hand:v1"]
        assert sorted(p.name for p in folder.iterdir()) == [*RECORDS, "v2"]
        assert references(registry) == ["hand:v2"]
        assert "removing" not in (folder / "model.json").read_text()
        by_hand("other")
        assert rm(registry, "other") == ["other:v1"]
        assert registry.begin("other").number == 2

    def test_a_model_that_is_called_like_a_version(self, registry, publish):
        publish("v1")
        publish("v1")
        assert rm(registry, "v1:v1") == ["v1:v1"]
        assert references(registry) == ["v1:v2"]

    def test_what_a_dry_look_finds_is_what_it_takes(self, registry, publish):
        version = publish("a")
        plan = remove.plan(registry, ["a"])
        assert plan.bytes == sum(p.stat().st_size for p in version.path.iterdir())
        assert references(registry) == ["a:v1"]


def until_unlocked(action: Callable[[], object]) -> None:
    """Try again later, as the error says: on a slow disk the others may take longer than it waits."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(LockedError):
            action()
            return
    action()


@pytest.mark.parametrize("writers", [4])
def test_f31_copies_moves_and_removals_side_by_side_lose_nothing(registry, publish, writers):
    """Each process copies, renames and removes under names of its own and one that they share."""
    publish("a")
    older = versions(registry)
    children = []
    for i in range(writers):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                numbers = []
                for k in range(6):
                    numbers.append(copy.plan(registry, "a:v1", "shared").execute().number)
                    copy.plan(registry, "a:v1", f"mine-{i}").execute()
                    rename.plan(registry, f"mine-{i}", f"yours-{i}-{k}").execute()
                    aliases.set_alias(
                        registry.root / f"yours-{i}-{k}", "kept", registry.resolve(f"yours-{i}-{k}").number
                    )
                    if k % 2:
                        until_unlocked(lambda number=numbers[-1]: rm(registry, f"shared:v{number}"))
                (registry.root.parent / f"numbers-{i}").write_text(json.dumps(numbers))
                os._exit(0)
            except BaseException as e:
                (registry.root.parent / f"error-{i}").write_text(repr(e))
            finally:
                os._exit(1)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]
    assert statuses == [0] * writers, [p.read_text() for p in registry.root.parent.glob("error-*")]
    given = [
        n for i in range(writers) for n in json.loads((registry.root.parent / f"numbers-{i}").read_text())
    ]
    assert sorted(given) == list(range(1, 6 * writers + 1)), "each number once"
    seen = invariants(registry, older)
    assert sum(r.startswith("shared:") for r in seen) == 3 * writers
    # Every move took the name's numbers along, so each copy under it got the next one.
    assert sum(r.startswith("yours-") for r in seen) == 6 * writers
    assert {registry.resolve(f"yours-0-{k}").number for k in range(6)} == set(range(1, 7))
