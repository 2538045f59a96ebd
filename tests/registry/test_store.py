"""The registry: numbers, drafts, versions, references, and what is damaged or hostile among them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quill import fsio
from quill.errors import CorruptError, InputError, NotFoundError, RefusedError, ResourceError
from quill.registry import manifest
from quill.registry.store import MARKER, Registry, locate


def references(registry, **how):
    return [v.reference for v in registry.entries(**how)]


def test_no_registry_is_an_empty_one(registry):
    assert registry.entries() == []
    assert registry.drafts() == []
    assert registry.newest("a") is None
    assert registry.unfinished("a") is None
    assert not registry.root.exists()


def test_f41_a_file_in_the_registrys_place_is_refused(registry):
    registry.root.write_text("not a folder")
    for use in (
        registry.entries,
        registry.drafts,
        lambda: registry.resolve("a"),
        lambda: registry.begin("a"),
    ):
        with pytest.raises(ResourceError) as caught:
            use()
        assert caught.value.exit_code == 7
    assert registry.root.read_text() == "not a folder"


def test_the_first_draft_makes_and_marks_the_registry(registry):
    draft = registry.begin("shakespeare")
    assert draft.reference == "shakespeare:v1"
    assert draft.path == registry.root / "shakespeare" / "v1"
    assert json.loads((registry.root / MARKER).read_text()) == {"format": 1}
    assert locate(env={}, cwd=registry.root.parent).root == registry.root


def test_a_version_says_where_it_came_from_and_what_its_files_are(registry, publish):
    version = publish("a", data={"name": "shakespeare"}, seconds=2.5)
    stored = json.loads((version.path / "manifest.json").read_text())
    assert version == registry.resolve("a")
    assert {k: v for k, v in version.manifest.items() if k in stored} | {"data": stored["data"]} == stored
    assert version.manifest["data"]["name"] == "shakespeare"
    assert version.manifest["data"]["tokens"] is version.manifest["parent"] is None
    assert stored["schema"] == 1
    assert stored["reference"] == "a:v1"
    assert stored["created"].endswith("Z")
    assert stored["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert stored["data"] == {"name": "shakespeare"}
    assert stored["seconds"] == 2.5
    assert set(stored["files"]) == {"config.json", "model.safetensors", "tokenizer.json"}
    for name, entry in stored["files"].items():
        path = version.path / name
        assert entry == {"bytes": path.stat().st_size, "sha256": fsio.sha256(path)}
    assert version.digest == stored["files"]["model.safetensors"]["sha256"]
    assert version.size == sum(e["bytes"] for e in stored["files"].values())


def test_the_config_hash_is_of_the_value_and_not_of_its_layout():
    assert manifest.config_sha256({"a": 1, "b": 2}) == manifest.config_sha256({"b": 2, "a": 1})
    assert manifest.config_sha256({"a": 1}) != manifest.config_sha256({"a": 2})


@pytest.mark.parametrize("dirty", [False, True])
def test_the_commit_is_noted_inside_a_checkout(publish, tmp_path, monkeypatch, dirty):
    monkeypatch.chdir(tmp_path)
    assert publish("a").manifest["git"] is None
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    (tmp_path / "f").write_text("1")
    for command in (["init", "-q"], ["add", "f"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True, cwd=tmp_path)
    if dirty:
        (tmp_path / "f").write_text("2")
    found = publish("a").manifest["git"]
    assert len(found["commit"]) == 40
    assert found["dirty"] is dirty


def test_a_broken_checkout_fails_nothing(publish, tmp_path, monkeypatch):
    (tmp_path / ".git").write_text("gitdir: /nowhere")
    monkeypatch.chdir(tmp_path)
    assert publish("a").manifest["git"] is None


def test_finishing_removes_the_resume_state_and_keeps_the_log(registry, finish):
    draft = registry.begin("a")
    (draft.path / "state" / "step-000001").mkdir(parents=True)
    (draft.path / "run.log").write_text("log")
    (draft.path / ".tmp-left-by-a-crash").mkdir()
    draft.update_status(pid=1, step=5)
    status = draft.status()
    assert (status["pid"], status["step"], status["token"]) == (1, 5, None)
    version = finish(draft)
    assert sorted(os.listdir(version.path)) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "run.log",
        "tokenizer.json",
    ]
    assert "run.log" not in version.manifest["files"]
    assert os.listdir(registry.root / fsio.TRASH) == []


def test_more_files_of_a_version_are_kept_and_hashed(registry, finish):
    draft = registry.begin("a")
    (draft.path / "README.md").write_text("# a")
    (draft.path / "plots").mkdir()
    (draft.path / "plots" / "loss.svg").write_text("<svg/>")
    version = finish(draft)
    assert {"README.md", "plots/loss.svg"} < set(version.manifest["files"])
    assert registry.resolve("a").read_file("plots/loss.svg") == b"<svg/>"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_draft_without_its_files_is_not_published(registry, missing, fill):
    draft = registry.begin("a")
    fill(draft)
    (draft.path / missing).unlink()
    with pytest.raises(CorruptError, match=missing):
        draft.publish()
    assert registry.entries() == []
    assert registry.unfinished("a").path == draft.path


def test_a_version_is_finished_once(registry, finish):
    draft = registry.begin("a")
    finish(draft)
    before = (draft.path / "manifest.json").read_bytes()
    with pytest.raises(RefusedError):
        finish(draft)
    assert (draft.path / "manifest.json").read_bytes() == before


def test_drafts_are_not_versions(registry, publish, fill):
    publish("a")
    draft = registry.begin("a")
    fill(draft)
    assert references(registry, all_versions=True) == ["a:v1"]
    assert registry.resolve("a").number == 1
    assert registry.newest("a").number == 1
    assert registry.unfinished("a").reference == "a:v2"
    assert [d.reference for d in registry.drafts()] == ["a:v2"]
    assert draft.status() is None


def test_a_number_is_never_given_twice(registry, publish, finish):
    publish("a")
    registry.begin("a").discard()
    third = registry.begin("a")
    assert third.number == 3
    finish(third)
    # As `rm` by hand does, of the newest and of all.
    shutil.rmtree(third.path)
    assert registry.begin("a").number == 4
    for path in (registry.root / "a").glob("v*"):
        shutil.rmtree(path)
    assert registry.begin("a").number == 5
    # Without model.json the folders decide.
    (registry.root / "a" / "model.json").unlink()
    (registry.root / "a" / "v9").touch()
    assert registry.begin("a").number == 10


def test_discarding_leaves_nothing_but_the_number(registry):
    registry.begin("a").discard()
    assert sorted(os.listdir(registry.root / "a")) == ["model.copy.json", "model.json"]
    assert os.listdir(registry.root / fsio.TRASH) == []
    assert registry.drafts() == []
    with pytest.raises(NotFoundError):
        registry.resolve("a")


def test_f31_numbers_differ_whoever_asks(registry):
    taken: list[int] = []
    gate = threading.Barrier(6)

    def work():
        gate.wait()
        taken.extend(registry.begin("a").number for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(taken) == len(set(taken)) == 30


def test_f31_readers_see_whole_versions_while_others_publish(registry, publish):
    publish("a")
    done = threading.Event()
    seen: list[str] = []

    def read():
        while not done.is_set():
            for v in registry.entries(all_versions=True):
                seen.append(v.damaged or "")
                v.read_file("model.safetensors")
            registry.resolve("a")

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(15):
        publish("a")
        registry.begin("a").discard()
    done.set()
    reader.join()
    assert set(seen) == {""}
    assert references(registry) == ["a:v31"] or references(registry) == ["a:v30"]


def test_entries_are_sorted_by_name_and_number(registry, publish):
    for name in ("b", "a", "shake-1"):
        publish(name)
    for _ in range(10):
        publish("b")
    assert references(registry) == ["a:v1", "b:v11", "shake-1:v1"]
    assert references(registry, glob="shake*") == ["shake-1:v1"]
    assert references(registry, glob="b", all_versions=True) == [f"b:v{n}" for n in range(1, 12)]


def test_strays_are_no_models(registry, publish):
    publish("a")
    root = registry.root
    (root / "README.md").write_text("x")
    (root / "notes").mkdir()
    (root / "My Pictures").mkdir()
    (root / ".cache" / "v1").mkdir(parents=True)
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling").symlink_to(root / "nowhere")
    for stray in ("v03", "w1", "v1-copy", "v99999999999999999999"):
        (root / "a" / stray).mkdir()
    (root / "a" / "v7").write_text("a file")
    assert references(registry, all_versions=True) == ["a:v1"]
    assert registry.drafts() == []
    assert registry.begin("a").number == 8
    (root / "readme").touch()
    with pytest.raises(RefusedError):
        registry.begin("readme")
    with pytest.raises(NotFoundError):
        registry.resolve("readme")


def damage(path: Path, how: str) -> None:
    weights = path / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "trailing byte":
        weights.write_bytes(weights.read_bytes() + b"x")
    elif how == "missing":
        weights.unlink()
    elif how == "lfs":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    elif how == "html":
        weights.write_text("<!DOCTYPE html><title>404</title>")
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "linked file":
        shutil.copy(weights, path.parents[2] / "outside")
        weights.unlink()
        weights.symlink_to(path.parents[2] / "outside")
    elif how == "folder":
        weights.unlink()
        weights.mkdir()
    elif how == "manifest":
        (path / "manifest.json").write_text("{")
    elif how == "empty manifest":
        (path / "manifest.json").write_bytes(b"")
    elif how == "linked version":
        path.rename(path.parents[2] / "outside")
        path.symlink_to(path.parents[2] / "outside")
    elif how == "linked name":
        path.parent.rename(path.parents[2] / "outside")
        path.parent.symlink_to(path.parents[2] / "outside")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "bytes, the manifest says"),
        ("trailing byte", "bytes, the manifest says"),
        ("missing", "is missing"),
        ("lfs", "Git LFS pointer"),
        ("html", "web page"),
        ("empty", "is empty"),
        ("linked file", "symbolic link"),
        ("folder", "not a regular file"),
        ("manifest", "not JSON at 1:2"),
        ("empty manifest", "is empty"),
        ("linked version", "symbolic link"),
        ("linked name", "symbolic link"),
    ],
)
def test_f1_f14_one_damaged_model_shows_and_hides_no_other(registry, publish, how, said):
    publish("good")
    damage(publish("bad").path, how)
    listed = {v.name: v for v in registry.entries()}
    assert set(listed) == {"bad", "good"}
    assert said in listed["bad"].damaged
    assert listed["good"].damaged is None
    with pytest.raises(CorruptError) as caught:
        registry.resolve("bad")
    assert caught.value.exit_code == 5
    assert said in str(caught.value)
    with pytest.raises(CorruptError):
        listed["bad"].read_file("config.json")
    assert registry.resolve("good").name == "good"
    assert registry.begin("good").number == 2


def test_an_lfs_pointer_tells_how_to_fetch_the_file(registry, publish):
    damage(publish("a").path, "lfs")
    with pytest.raises(CorruptError) as caught:
        registry.resolve("a")
    assert "lfs pull" in caught.value.hint


def test_a_damaged_newest_is_not_passed_over_in_silence(registry, publish):
    publish("a")
    damage(publish("a").path, "truncated")
    with pytest.raises(CorruptError):
        registry.resolve("a")
    assert registry.resolve("a:v1").number == 1
    assert [bool(v.damaged) for v in registry.entries(all_versions=True)] == [False, True]


def test_f3_a_flipped_bit_is_found_by_the_hash(registry, publish):
    version = publish("a")
    weights = version.path / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 4
    weights.write_bytes(raw)
    with pytest.raises(CorruptError, match="sha256"):
        registry.resolve("a").read_file("model.safetensors")
    assert registry.resolve("a").read_file("config.json")


def test_a_file_the_manifest_does_not_list_is_not_read(registry, publish):
    version = publish("a")
    (version.path / "extra.json").write_text("{}")
    with pytest.raises(CorruptError, match="does not list"):
        version.read_file("extra.json")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"a\\..\\b": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"a\0b": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"config.json": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"config.json": {"bytes": True, "sha256": "0" * 64}}},
        {"files": {"config.json": {"bytes": 1, "sha256": "0" * 63}}},
        {"files": {"config.json": 3}},
        {"files": {}},
        {"files": []},
        {"best_val_loss": "1.5"},
        {"best_val_loss": True},
        {"parameters": -5},
        {"parameters": 10**30},
        {"created": 5},
        {"data": []},
        {"schema": 0},
        {"schema": "1"},
    ],
    ids=str,
)
def test_a_manifest_that_misleads_is_damage(registry, publish, change):
    path = publish("a").path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CorruptError):
        registry.resolve("a")
    assert registry.entries()[0].damaged


def test_f12_a_newer_manifest_or_registry_needs_a_newer_quill(registry, publish):
    path = publish("a").path / "manifest.json"
    publish("b")
    path.write_text(json.dumps({"schema": 2, "versions": {"quill": "2.0.0"}}))
    with pytest.raises(InputError, match=r"needs quill >= 2\.0\.0"):
        registry.resolve("a")
    assert ["needs quill" in (v.damaged or "") for v in registry.entries()] == [True, False]
    fsio.write_json(registry.root / MARKER, {"format": 2})
    for use in (registry.entries, lambda: registry.resolve("b"), lambda: registry.begin("b")):
        with pytest.raises(InputError, match="newer quill"):
            use()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["schema", "files", "bytes", "sha256", "config.json", "data", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    )
)
@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_manifest_breaks_the_list(tmp_path_factory, value):
    root = tmp_path_factory.mktemp("weights")
    (root / "a" / "v1").mkdir(parents=True)
    (root / "a" / "v1" / "manifest.json").write_text(json.dumps(value))
    (root / "a" / "model.json").write_text(json.dumps(value))
    registry = Registry(root)
    assert [v.reference for v in registry.entries()] == ["a:v1"]
    for use in (lambda: registry.resolve("a"), lambda: registry.begin("a"), lambda: registry.resolve("a:x")):
        with suppress(InputError, NotFoundError, CorruptError):
            use()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "", ".", "-x", "a\0", "a\n", "A" * 300, "CON"])
def test_f13_a_bad_name_makes_nothing(registry, name):
    for use in (registry.begin, registry.newest, registry.unfinished):
        with pytest.raises(InputError):
            use(name)
    assert os.listdir(registry.root.parent) == []


@pytest.mark.parametrize("inside", [True, False])
def test_f14_nothing_is_written_or_deleted_through_a_link(registry, publish, tmp_path, inside, fill):
    publish("real")
    outside = tmp_path / "outside"
    shutil.copytree(registry.root / "real", outside)
    (outside / "v2").mkdir()
    before = sorted(str(p) for p in outside.rglob("*"))
    (registry.root / "link").symlink_to(registry.root / "real" if inside else outside)
    (registry.root / "real" / "v5").symlink_to(outside / "v2")
    for use in (registry.begin, registry.resolve, registry.newest, registry.unfinished):
        with pytest.raises(CorruptError):
            use("link")
    assert registry.unfinished("real") is None
    draft = registry.begin("real")
    assert draft.number == 6
    (draft.path / "run.link").symlink_to(outside)
    fill(draft)
    with pytest.raises(CorruptError):
        draft.publish()
    draft.discard()
    assert sorted(str(p) for p in outside.rglob("*")) == before


def test_f14_links_for_small_files_are_not_followed(registry, publish, tmp_path):
    publish("a")
    (tmp_path / "aliases").write_text('{"aliases": {"x": 1}, "next_version": 50}')
    (registry.root / "a" / "model.json").unlink()
    (registry.root / "a" / "model.json").symlink_to(tmp_path / "aliases")
    with pytest.raises(CorruptError):
        registry.resolve("a:x")
    assert registry.resolve("a").number == 1


def test_a_damaged_model_json_hides_no_version(registry, publish):
    publish("a")
    (registry.root / "a" / "model.json").write_text('{"next_version": "many"}')
    assert references(registry) == ["a:v1"]
    assert registry.resolve("a").number == 1
    with pytest.raises(CorruptError, match="next_version"):
        registry.begin("a")


def test_references_are_resolved(registry, publish):
    for _ in range(3):
        publish("a")
    path = registry.root / "a" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aliases": {"champion": 2, "gone": 9}}))
    found = {r: registry.resolve(r).number for r in ("a", "a:latest", "a:v1", "a:champion")}
    assert found == {"a": 3, "a:latest": 3, "a:v1": 1, "a:champion": 2}
    for ref, close in (
        ("a:v4", ("a:v3",)),
        ("a:nobody", ("a:v3",)),
        ("a:champoin", ("a:champion",)),
        ("a:gone", ("a:v3",)),
    ):
        with pytest.raises(NotFoundError) as caught:
            registry.resolve(ref)
        assert "'a' has v3, v2, v1, champion, gone" in caught.value.why
        assert caught.value.close == close
    assert registry.begin("a").number == 4


def test_a_miss_names_what_is_close(registry, publish, monkeypatch):
    monkeypatch.chdir(registry.root.parent)
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("shakespear")
    assert caught.value.exit_code == 3
    assert caught.value.why == "the registry is empty"
    publish("shakespeare")
    publish("harpoon")
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("shakespear")
    assert caught.value.what == "no model named 'shakespear' in weights"
    assert caught.value.why == "the registry has harpoon, shakespeare"
    assert caught.value.close == ("shakespeare",)
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("xyz")
    assert (caught.value.close, caught.value.hint) == ((), "quill list")
    for n in range(8):
        publish(f"other-{n}")
    with pytest.raises(NotFoundError) as caught:
        registry.resolve("shakespear")
    assert caught.value.why == "the registry has shakespeare and 9 more"


def test_prefixes_do_not_match(registry, publish):
    publish("shakespeare")
    with pytest.raises(NotFoundError):
        registry.resolve("shake")


def test_a_model_that_is_only_begun_is_said_to_be(registry):
    registry.begin("a")
    with pytest.raises(NotFoundError, match="a:v1 is an unfinished run"):
        registry.resolve("a")


def test_files_put_there_by_hand_are_version_one(registry, publish, fill):
    folder = registry.root / "hand"
    folder.mkdir(parents=True)
    fill(folder)
    version = registry.resolve("hand")
    assert (version.reference, version.path, version.manifest) == ("hand:v1", folder, None)
    assert registry.resolve("hand:v1") == version == registry.newest("hand")
    assert references(registry, all_versions=True) == ["hand:v1"]
    assert version.size == sum(p.stat().st_size for p in folder.iterdir())
    assert version.digest is None
    assert version.read_file("config.json")
    publish("hand")
    assert references(registry, all_versions=True) == ["hand:v1", "hand:v2"]


def test_files_put_there_by_hand_need_a_tokenizer(registry, fill):
    folder = registry.root / "hand"
    folder.mkdir(parents=True)
    fill(folder)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in registry.entries()[0].damaged
    with pytest.raises(CorruptError, match=r"tokenizer\.json"):
        registry.resolve("hand")


def test_a_folder_that_is_badly_named_is_shown_as_such(registry, fill):
    folder = registry.root / "My Model"
    folder.mkdir(parents=True)
    fill(folder)
    (entry,) = registry.entries()
    assert entry.reference == "My Model"
    assert "not a valid model name" in entry.damaged


@pytest.mark.parametrize("form", ["./out", "{root}/out", "./out/", "out/../out"])
def test_a_path_is_read_without_a_registry(registry, tmp_path, monkeypatch, form, fill):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    ref = form.format(root=tmp_path)
    version = registry.resolve(ref)
    assert version.reference == ref
    assert version.name == "out"
    assert version.read_file("tokenizer.json")
    assert not registry.root.exists()


def test_a_path_may_be_a_version_or_a_models_folder(registry, publish, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish("a")
    publish("a")
    registry.begin("a")
    assert registry.resolve("./weights/a/v1").number == 1
    newest = registry.resolve("weights/a/")
    assert (newest.name, newest.number, newest.reference) == ("a", 2, "weights/a/v2")
    assert newest.manifest["reference"] == "a:v2"
    (tmp_path / "link").symlink_to(registry.root / "a" / "v1")
    assert registry.resolve("./link").number == 1
    damage(registry.root / "a" / "v1", "truncated")
    with pytest.raises(CorruptError):
        registry.resolve("./weights/a/v1")


@pytest.mark.parametrize("ref", ["./nowhere", "..", "./file", "./empty", "./weights/a/v3", "./a\0b"])
def test_a_path_without_a_model_is_not_found(registry, publish, tmp_path, monkeypatch, ref):
    monkeypatch.chdir(tmp_path)
    publish("a")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError):
        registry.resolve(ref)


def test_a_registry_can_be_moved_and_renamed(registry, publish, tmp_path):
    publish("a")
    registry.root.rename(tmp_path / "elsewhere")
    moved = Registry(tmp_path / "elsewhere")
    (moved.root / "a").rename(moved.root / "b")
    version = moved.resolve("b")
    assert version.reference == "b:v1"
    assert all(version.read_file(name) for name in version.manifest["files"])
    assert str(tmp_path) not in (version.path / "manifest.json").read_text()


class TestLocate:
    def test_the_flag_wins_then_the_environment(self, tmp_path):
        (tmp_path / "weights").mkdir()
        fsio.write_json(tmp_path / "weights" / MARKER, {"format": 1})
        env = {"QUILL_REGISTRY": "/from/env"}
        assert locate("/from/flag", env, tmp_path).root == Path("/from/flag")
        assert locate(None, env, tmp_path).root == Path("/from/env")
        assert locate(None, {"QUILL_REGISTRY": ""}, tmp_path).root == tmp_path / "weights"

    def test_a_nul_is_in_no_path(self):
        with pytest.raises(InputError, match="contains a NUL"):
            locate("a\0b", {})

    def test_the_nearest_marked_folder_upwards(self, tmp_path):
        (tmp_path / "weights").mkdir()
        fsio.write_json(tmp_path / "weights" / MARKER, {"format": 1})
        below = tmp_path / "project" / "deep"
        (below / "weights").mkdir(parents=True)
        found = locate(None, {}, below)
        assert found.root == tmp_path / "weights"
        assert "nearest" in found.why

    def test_else_the_users_own(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        assert locate(None, {}, tmp_path).root.is_relative_to(tmp_path / "data") or sys.platform != "linux"

    def test_f49_without_a_home_or_a_working_directory(self, tmp_path, monkeypatch):
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        monkeypatch.setattr(os.path, "expanduser", lambda p: p)
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        assert locate(None, {}).root == Path("weights")
        monkeypatch.chdir(tmp_path)

    def test_a_tilde_is_the_home_folder(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/someone")
        assert locate(None, {"QUILL_REGISTRY": "~/models"}).root == Path("/home/someone/models")


def test_no_module_of_the_registry_loads_torch(registry, publish):
    publish("a")
    registry.begin("b")
    code = (
        "import pkgutil, sys, quill.registry\n"
        "names = [m.name for m in pkgutil.iter_modules(quill.registry.__path__, 'quill.registry.')]\n"
        "[__import__(n) for n in names]\n"
        "from quill.cli.app import main\n"
        "assert len(names) > 10 and main(['list']) == 0\n"
        "print([m for m in sys.modules if m.partition('.')[0] == 'torch'], file=sys.stderr)"
    )
    env = os.environ | {"QUILL_REGISTRY": str(registry.root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "a:v1" in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_store_is_light_to_import():
    code = (
        "import sys, quill.registry.store, quill.registry.names\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'safetensors', 'platformdirs', 'subprocess', 'dataclasses',"
        " 'shutil', 'importlib.metadata', 'hashlib', 'difflib', 'typer', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_listing_reads_each_small_file_once_and_each_folder_once(registry, publish, monkeypatch):
    """A list of thousands of models is bound by what is done for each of them."""
    for name in ("a", "b", "c"):
        publish(name)
    done: dict[str, list[str]] = {"open": [], "scandir": [], "dumps": []}

    def counted(kind, function):
        def call(what, *arguments, **more):
            done[kind].append(os.path.basename(what) if isinstance(what, str | os.PathLike) else "")
            return function(what, *arguments, **more)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", counted("open", os.open))
        patched.setattr(os, "scandir", counted("scandir", os.scandir))
        patched.setattr(json, "dumps", counted("dumps", json.dumps))
        found = registry.models(all_versions=False)
    assert [m.versions[0].state for m in found] == ["ok"] * 3
    assert sorted(done["open"]) == sorted([MARKER, *["manifest.json", "model.json"] * 3])
    assert sorted(done["scandir"]) == sorted([registry.root.name, "a", "b", "c"])
    assert done["dumps"] == [], "a document that was read is not written again to check it"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1e999", "9" * 5000])
def test_a_manifest_with_a_number_that_is_not_finite_is_damaged(registry, publish, number):
    path = publish("m").path / "manifest.json"
    path.write_text(path.read_text().replace("{", f'{{"extra": [{{"x": {number}}}],', 1))
    assert "not finite" in (registry.newest("m").damaged or "")
