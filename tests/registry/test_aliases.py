"""What model.json keeps: aliases, earlier names, numbers that are never given twice."""

from __future__ import annotations

import json
import os
import time

import pytest
from crashing import snapshot

from quill.errors import CorruptError, InputError, NotFoundError, RefusedError
from quill.registry import aliases, gc, remove, rename


@pytest.fixture
def folder(registry, publish):
    """The folder of a model with the versions 1 and 2."""
    publish("a")
    publish("a")
    return registry.root / "a"


def test_an_alias_means_a_version_until_it_means_another(registry, folder):
    assert aliases.set_alias(folder, "champion", 1) is None
    assert registry.resolve("a:champion").number == 1
    assert aliases.set_alias(folder, "champion", 1) == 1
    assert aliases.set_alias(folder, "champion", 2) == 1
    assert registry.resolve("a:champion").number == 2
    assert aliases.read(folder)["aliases"] == {"champion": 2}
    assert aliases.read(folder)["next_version"] == 3


def test_an_alias_is_taken_away_and_the_version_stays(registry, folder):
    aliases.set_alias(folder, "champion", 1)
    assert aliases.remove_alias(folder, "champion") == 1
    assert aliases.remove_alias(folder, "champion") is None
    with pytest.raises(NotFoundError):
        registry.resolve("a:champion")
    assert registry.resolve("a:v1").number == 1


@pytest.mark.parametrize(
    "alias", ["latest", "v1", "v12", "v0", "7", "V3", "", "a b", "../x", "A", "x:y", "con"]
)
def test_f13_words_that_cannot_be_aliases(folder, alias):
    before = (folder / "model.json").read_bytes()
    with pytest.raises(InputError):
        aliases.set_alias(folder, alias, 1)
    assert (folder / "model.json").read_bytes() == before


@pytest.mark.parametrize("number", [3, 9])
def test_an_alias_needs_a_complete_version(registry, folder, number):
    registry.begin("a")
    with pytest.raises(NotFoundError, match=f"no version v{number}"):
        aliases.set_alias(folder, "champion", number)
    assert aliases.read(folder)["aliases"] == {}


def test_what_was_put_there_by_hand_can_have_an_alias(registry, fill):
    folder = registry.root / "hand"
    folder.mkdir(parents=True)
    fill(folder)
    aliases.set_alias(folder, "champion", 1)
    assert registry.resolve("hand:champion").path == folder


def test_what_an_alias_means_is_not_released(folder):
    aliases.set_alias(folder, "champion", 1)
    aliases.set_alias(folder, "best", 1)
    with pytest.raises(RefusedError) as caught, aliases.releasing(folder, 1):
        raise AssertionError
    assert caught.value.why == "it is a:best, a:champion"
    assert caught.value.hint == "quill alias rm a:best a:champion"
    with aliases.releasing(folder, 2):
        pass


def test_while_a_version_is_released_nobody_gives_it_an_alias(folder):
    """Another process, which asks in the meantime, waits for the ledger and finds the version gone."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.read(read, 1)
            aliases.set_alias(folder, "champion", 1)
            os._exit(0)
        except NotFoundError:
            os._exit(3)
        finally:
            os._exit(1)
    with aliases.releasing(folder, 1):
        os.write(write, b"r")
        time.sleep(0.2)
        (folder / "v1").rename(folder / "gone")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert aliases.read(folder)["aliases"] == {}


def test_former_names_are_found_and_damage_elsewhere_hides_none(registry, publish):
    for name in ("a", "b", "c"):
        publish(name)
    for name, former in (("a", {"x": 3}), ("b", {"x": 5, "y": 2})):
        aliases.update(registry.root / name, lambda held, former=former: held | {"formerly": former})
    (registry.root / "c" / "model.json").write_text("{")
    assert aliases.former_holders(registry.root, "x") == {"a": 3, "b": 5}
    assert aliases.former_holders(registry.root, "z") == {}
    assert aliases.former_holders(registry.root / "none", "x") == {}


@pytest.mark.parametrize(
    "change",
    [
        {"aliases": []},
        {"aliases": {"x": "1"}},
        {"aliases": {"x": 0}},
        {"formerly": {"x": None}},
        {"formerly": 3},
    ],
    ids=str,
)
def test_a_ledger_that_misleads_is_damage_and_is_not_written_over(folder, change):
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = path.read_bytes()
    for use in (
        lambda: aliases.read(folder)["aliases"],
        lambda: aliases.set_alias(folder, "champion", 1),
        lambda: aliases.reserve(folder, 7),
    ):
        with pytest.raises(CorruptError):
            use()
    assert path.read_bytes() == before


def test_what_a_later_quill_added_stays(folder):
    aliases.update(folder, lambda held: held | {"colour": "blue"})
    aliases.set_alias(folder, "champion", 2)
    assert aliases.read(folder)["colour"] == "blue"


def test_f14_no_ledger_is_written_through_a_link(registry, folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (registry.root / "link").symlink_to(outside)
    with pytest.raises(CorruptError):
        aliases.reserve(registry.root / "link", 1)
    assert list(outside.iterdir()) == []
    (tmp_path / "other.json").write_text('{"next_version": 50}')
    (folder / "model.json").unlink()
    (folder / "model.json").symlink_to(tmp_path / "other.json")
    with pytest.raises(CorruptError):
        aliases.set_alias(folder, "champion", 1)
    assert (tmp_path / "other.json").read_text() == '{"next_version": 50}'


def test_f12_a_model_json_of_a_newer_quill_is_not_written_over(folder):
    (folder / "model.json").write_text('{"schema": 2, "aliases": {"champion": [1]}, "next_version": 9}')
    before = (folder / "model.json").read_bytes()
    for use in (lambda: aliases.read(folder), lambda: aliases.set_alias(folder, "best", 1)):
        with pytest.raises(InputError, match="a newer quill wrote it"):
            use()
    assert (folder / "model.json").read_bytes() == before


LOST = "the aliases of 'a' are lost"


@pytest.fixture(params=["with a copy", "without a copy"])
def lost(registry, publish, request):
    """A model of three versions whose model.json, with an alias for v1, was deleted."""
    for _ in range(3):
        publish("a")
    folder = registry.root / "a"
    aliases.set_alias(folder, "champion", 1)
    (folder / "model.json").unlink()
    if request.param == "without a copy":
        (folder / "model.copy.json").unlink()
    return folder


REMOVALS = {
    "rm": lambda registry: remove.plan(registry, ["a:v1"]).execute(),
    "rm --all-versions": lambda registry: remove.plan(registry, ["a"], all_versions=True).execute(),
    "train --keep": lambda registry: gc.prune(registry, "a", 1),
}


@pytest.mark.parametrize("action", REMOVALS)
@pytest.mark.parametrize("state", ["missing", "damaged", "missing, then a run began", "of a newer quill"])
def test_f53_nothing_is_removed_while_the_aliases_are_not_known(registry, lost, action, state):
    if state == "damaged":
        (lost / "model.json").write_text("{")
    elif state == "of a newer quill":
        (lost / "model.json").write_text('{"schema": 2}')
    elif state == "missing, then a run began":
        registry.begin("a").update_status(step=1)
    before = snapshot(lost)
    with pytest.raises((CorruptError, InputError)) as caught:
        REMOVALS[action](registry)
    assert caught.value.what == LOST or "model.json' " in caught.value.what
    assert snapshot(lost) == before


@pytest.mark.parametrize("state", ["missing", "damaged", "missing, then a run began"])
def test_f53_gc_keep_skips_a_model_whose_aliases_are_not_known(registry, publish, lost, state):
    if state == "damaged":
        (lost / "model.json").write_text("{")
    elif state == "missing, then a run began":
        registry.begin("a").update_status(step=1)
    publish("b")
    publish("b")
    before = snapshot(lost)
    done = gc.plan(registry, keep=1).execute()
    assert [r.what for r in done.removed] == ["b:v1"]
    assert [s.what for s in done.skipped] == ["a"]
    assert done.failed == []
    assert snapshot(lost) == before


def test_f53_gc_removes_no_superseded_run_while_the_aliases_are_not_known(registry, publish):
    registry.begin("a").update_status(step=1)
    publish("a")
    (registry.root / "a" / "model.json").unlink()
    done = gc.plan(registry, older_than=0).execute()
    assert ([r.what for r in done.removed], [s.what for s in done.skipped]) == ([], ["a"])
    assert registry.drafts() != []


def test_f53_a_plan_made_before_the_aliases_were_lost_removes_nothing(registry, publish):
    publish("a")
    publish("a")
    plans = [remove.plan(registry, ["a:v1"]), gc.plan(registry, keep=1)]
    (registry.root / "a" / "model.json").unlink()
    with pytest.raises(CorruptError, match=LOST):
        plans[0].execute()
    assert [s.what for s in plans[1].execute().skipped] == ["a"]
    assert len(registry.entries(all_versions=True)) == 2


def test_f53_aliases_that_are_set_again_end_that(registry, lost):
    registry.begin("a").discard()
    aliases.set_alias(lost, "champion", 2)
    assert "aliases_lost" not in (lost / "model.json").read_text()
    assert [r.what for r in remove.plan(registry, ["a:v1"]).execute()] == ["a:v1"]
    with pytest.raises(RefusedError):
        remove.plan(registry, ["a:v2"])


def test_f53_a_renamed_model_whose_aliases_are_lost_stays_so(registry, lost):
    rename.plan(registry, "a", "b").execute()
    with pytest.raises(CorruptError, match="the aliases of 'b' are lost"):
        remove.plan(registry, ["b:v1"])


def test_files_put_there_by_hand_never_had_a_model_json_and_can_be_removed(registry, fill):
    (registry.root / "hand").mkdir(parents=True)
    fill(registry.root / "hand")
    assert [r.what for r in remove.plan(registry, ["hand"]).execute()] == ["hand:v1"]


BROKEN = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "zeros": lambda path: path.write_bytes(bytes(200)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another's": lambda path: path.write_text('{"aliases": {"champion": "v1"}}'),
}


@pytest.mark.parametrize("state", BROKEN)
def test_f53_the_copy_restores_the_aliases(registry, folder, state):
    aliases.set_alias(folder, "champion", 1)
    remove.plan(registry, ["a:v2"]).execute()
    before = (folder / "model.json").read_bytes()
    BROKEN[state](folder / "model.json")
    with pytest.raises(CorruptError) as caught:
        aliases.read_for_removal(folder)
    assert caught.value.hint == "quill alias restore a"
    if state == "a folder":
        (folder / "model.json").rmdir()
    assert aliases.restore(folder) == {"champion": 1}
    assert (folder / "model.json").read_bytes() == (folder / "model.copy.json").read_bytes() == before
    assert registry.resolve("a:champion").number == 1
    assert registry.begin("a").number == 3


def test_f53_a_model_json_that_is_missing_is_read_from_its_copy(registry, folder):
    aliases.set_alias(folder, "champion", 1)
    remove.plan(registry, ["a:v2"]).execute()
    (folder / "model.json").unlink()
    assert registry.resolve("a:champion").number == 1
    assert registry.begin("a").number == 3
    with pytest.raises(CorruptError, match=LOST):
        remove.plan(registry, ["a:v1"])
    assert aliases.restore(folder) == {"champion": 1}
    with pytest.raises(RefusedError):
        remove.plan(registry, ["a:v1"])


@pytest.mark.parametrize("state", BROKEN)
def test_f53_a_lost_copy_is_written_again(registry, folder, state):
    aliases.set_alias(folder, "champion", 1)
    BROKEN[state](folder / "model.copy.json")
    if state == "a folder":
        (folder / "model.copy.json").rmdir()
    assert aliases.has_damaged_copy(folder) == (state not in ("missing", "a folder"))
    assert aliases.restore(folder) == {"champion": 1}
    assert (folder / "model.json").read_bytes() == (folder / "model.copy.json").read_bytes()


def test_f53_without_model_json_and_copy_nothing_is_restored(registry, folder):
    (folder / "model.copy.json").unlink()
    (folder / "model.json").write_text("{")
    with pytest.raises(CorruptError, match=r"model\.json"):
        aliases.restore(folder)
    (folder / "model.json").unlink()
    with pytest.raises(CorruptError, match=LOST) as caught:
        aliases.restore(folder)
    assert caught.value.hint == "set the aliases again: quill alias set a ALIAS"
    registry.begin("a").discard()
    with pytest.raises(CorruptError, match=LOST):
        aliases.restore(folder)
