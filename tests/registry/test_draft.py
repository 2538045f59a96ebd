"""Drafts: what a reference finds of them, and what they record while they are unfinished."""

from __future__ import annotations

import json
from contextlib import contextmanager, suppress

import pytest

from quill import fsio
from quill.errors import CorruptError, NotFoundError
from quill.registry import locks
from quill.registry.manifest import UNKNOWN


@pytest.fixture
def draft(registry):
    """An unfinished run a:v1 without weights."""
    draft = registry.begin("a")
    draft.write_json("config.json", {"train": {"eval_interval": 250, "max_iters": 1000}})
    draft.update_status(step=40)
    return draft


def test_a_name_without_a_version_finds_its_unfinished_run(registry, draft):
    for ref in ("a", "a:v1", str(draft.path)):
        assert registry.find(ref) == draft
        assert registry.find(ref, in_progress=True) == draft
    for ref in ("a:v2", "a:latest", "b"):
        with pytest.raises(NotFoundError):
            registry.find(ref)


def test_with_a_version_the_name_finds_that_unless_the_run_is_asked_for(registry, publish):
    version = publish("a")
    draft = registry.begin("a")
    assert registry.find("a") == version
    assert registry.find("a", in_progress=True) == registry.find("a:v2") == draft
    publish("a")
    assert registry.find("a", in_progress=True).reference == "a:v3"


def test_weights_are_those_of_the_version_or_the_best_so_far_of_the_run(registry, publish, draft, fill):
    notes: list[str] = []
    with pytest.raises(NotFoundError, match="'a:v1' has no weights yet") as caught:
        registry.find_weights("a", notes.append)
    assert caught.value.why == "its run was not evaluated yet: the first evaluation is at step 250"
    assert caught.value.hint == f"quill train --config {draft.path / 'config.json'}"
    fill(draft)
    draft.update_status(facts={"best_step": 1250, "steps": 2000, "best_val_loss": 1.5})
    assert registry.find_weights("a", notes.append) == draft
    assert notes == ["a:v1 is unfinished: using its best weights so far, step 1,250"]
    assert draft.facts["best_val_loss"] == 1.5
    publish("b")
    assert registry.find_weights("b", notes.append).reference == "b:v1"
    assert len(notes) == 1


@pytest.mark.parametrize("stopped", [1, 2, 3, None])
def test_the_facts_are_those_of_the_weights_wherever_it_was_stopped(draft, monkeypatch, stopped):
    """Stopped after any of its three writes, or not at all."""
    writes = 0

    def write(step):
        draft.write_weights(lambda path: path.write_bytes(b"%d" % step), {"best_step": step})

    @contextmanager
    def stage(*arguments, **settings):
        nonlocal writes
        with whole(*arguments, **settings) as place:
            yield place
        writes += 1
        if writes == stopped:
            raise KeyboardInterrupt

    write(1)
    whole = fsio.stage
    monkeypatch.setattr(fsio, "stage", stage)
    with suppress(KeyboardInterrupt):
        write(2)
    monkeypatch.undo()
    step = int(draft.read_file("model.safetensors"))
    assert step == (1 if stopped == 1 else 2)
    assert draft.facts["best_step"] == step
    write(3)
    assert draft.facts["best_step"] == 3
    assert draft.status()["pending"] is None


def test_while_it_trains_the_hint_is_to_follow_its_log(registry, draft):
    with locks.hold(registry.root, "a"), pytest.raises(NotFoundError) as caught:
        registry.find_weights("a")
    assert caught.value.hint == "quill logs a:v1 -f"


@pytest.mark.parametrize(
    "facts", [[], "x", 7, {"steps": "9"}, {"steps": -1}, {"data": []}, {"parent": {"digest": 5}}], ids=str
)
def test_recorded_facts_of_a_wrong_type_are_not_used(registry, draft, facts):
    draft.update_status(facts=facts)
    assert draft.facts == UNKNOWN
    assert draft.status()["step"] == draft.step == 40


def test_a_status_keeps_what_is_readable_of_it(draft):
    (draft.path / "status.json").write_text(json.dumps({"step": "1", "pid": True, "data_key": "k", "x": 1}))
    status = draft.status()
    assert (status["step"], status["pid"], status["data_key"]) == (None, None, "k")
    draft.update_status(step=2)
    assert json.loads((draft.path / "status.json").read_text()) == {"data_key": "k", "x": 1, "step": 2}


@pytest.mark.parametrize(
    "content",
    [None, b"", bytes(300), b"{", b"[]", b'{"pid": 1}'],
    ids=["missing", "empty", "zeros", "cut off", "a list", "without the data"],
)
def test_f54_a_lost_status_is_read_from_the_newest_state(registry, content):
    draft = registry.begin("b")
    draft.update_status(data_key="k", parent={"reference": "a:v1", "digest": None}, pid=7, token="t")
    for step in (10, 20):
        draft.save_state(step, lambda folder: None, facts={"step": step, "facts": {"steps": step}})
    if content is None:
        (draft.path / "status.json").unlink()
    else:
        (draft.path / "status.json").write_bytes(content)
    status = draft.status()
    assert (status["data_key"], status["step"], status["facts"]) == ("k", 20, {"steps": 20})
    assert status["parent"] == {"reference": "a:v1", "digest": None}
    assert status["token"] is None, "it is not taken by the process that died"
    (draft.path / "state" / "step-000020" / "manifest.json").write_text("{")
    assert draft.status()["step"] == 10


def test_f54_a_state_of_an_earlier_quill_tells_its_step(registry):
    draft = registry.begin("b")
    draft.save_state(10, lambda folder: None)
    assert draft.status()["step"] == 10
    assert draft.status()["data_key"] is None


def test_a_draft_is_read_like_a_version(draft, fill):
    assert draft.config() == {"train": {"eval_interval": 250, "max_iters": 1000}}
    assert not list(draft.metrics())
    with pytest.raises(NotFoundError, match=r"'a:v1' has no tokenizer\.json yet"):
        draft.read_object("tokenizer.json")
    with pytest.raises(NotFoundError, match="'a:v1' has no log"):
        draft.open_run_log()
    (draft.path / "model.safetensors").mkdir()
    with pytest.raises(CorruptError):
        draft.read_file("model.safetensors")


def test_states_are_found_by_step_and_a_link_is_not_one(draft, tmp_path):
    for step in (9, 10, 1_000_000):
        draft.save_state(step, lambda folder: (folder / "x").write_bytes(b"x"), keep=3)
    (draft.path / "state" / "step-2000000").symlink_to(tmp_path)
    (draft.path / "state" / "notes").mkdir()
    states = draft.states()
    assert [s.step for s in states] == [1_000_000, 10, 9]
    assert states[1].reference == "a:v1 step-000010"
    assert states[1].load().read_file("x") == b"x"
    (states[1].path / "x").write_bytes(b"y")
    with pytest.raises(CorruptError):
        states[1].load().read_file("x")
