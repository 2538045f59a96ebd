"""A crash, a refusing disk or a power loss at every single write of a publish and of a resume save.

Afterwards every visible version is whole, older ones are untouched, aliases resolve, and the next run goes
on without a hand's help. The harness is crashing.py.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from crashing import WAYS, Disk, at_every_operation, collected, invariants, operations, power_loss, versions

from quill import fsio
from quill.checkpoint.resume_state import load_state, save_state
from quill.errors import CorruptError
from quill.registry import aliases
from quill.registry.store import Registry

pytestmark = pytest.mark.slow


def save(draft, step):
    tensors, facts = {"w": torch.full((64,), float(step))}, {"step": step, "data_key": "k"}
    return save_state(draft, step, tensors, {"step": step}, facts=facts)


@pytest.fixture
def before(registry, publish, fill):
    """A registry with a:v1, its alias, and a:v2 in progress with states of steps 100 and 200."""
    publish("a")
    aliases.update(registry.root / "a", lambda held: held | {"aliases": {"champion": 1}, "tags": {"x": "y"}})
    draft = registry.begin("a")
    fill(draft)
    draft.update_status(pid=1)
    save(draft, 100)
    save(draft, 200)
    return registry


@pytest.fixture
def actions(fill):
    """What is interrupted, and the versions that are there once it is done."""

    def publish_next(registry: Registry, name: str = "a"):
        draft = registry.unfinished(name) or registry.begin(name)
        # Not synced yet: that is what finishing must see to.
        fill(draft.path, durable=False)
        return draft.publish(parameters=64)

    return {
        "publish": (publish_next, {"a:v1", "a:v2"}),
        "publish of a new name": (lambda registry: publish_next(registry, "b"), {"a:v1", "b:v1"}),
        "resume save": (lambda registry: save(registry.unfinished("a"), 300), {"a:v1"}),
        "resume save of a step again": (lambda registry: save(registry.unfinished("a"), 200), {"a:v1"}),
        "run given up": (lambda registry: registry.unfinished("a").discard(), {"a:v1"}),
    }


ACTIONS = (
    "publish",
    "publish of a new name",
    "resume save",
    "resume save of a step again",
    "run given up",
)


def goes_on(registry: Registry, actions) -> None:
    """The next command works, with nothing cleaned up by hand, and no number is given twice."""
    if draft := registry.unfinished("a"):
        save(draft, 400)
        assert load_state(draft)[1]["step"] == 400
    last = actions["publish"][0](registry)
    assert registry.resolve("a").number == last.number
    assert load_state(registry.begin("a")) is None
    following = registry.begin("a").number
    assert following == last.number + 2
    assert aliases.read(registry.root / "a")["aliases"] == {"champion": 1}


# The step of the newest state once a save is done.
SAVED = {"resume save": 300, "resume save of a step again": 200}


# The last two write as the others do; what is different in them shows where they end, and where they go on.
TRIED = [(a, w) for a in ACTIONS for w in WAYS if a in ACTIONS[:3] or w in ("exit", "enospc lasting", "eio")]


@pytest.mark.parametrize(("action", "way"), TRIED)
def test_f26_f27_f28_a_fault_at_every_operation(before, actions, action, way, injections, tmp_path):
    older, (act, done) = versions(before), actions[action]
    told = 0

    def then(registry, outcome):
        nonlocal told
        shown = invariants(registry, older)
        assert shown in ({"a:v1"}, done)
        if outcome.error:
            told += 1
            assert outcome.error.exit_code == 7
            # While the disk refuses everything, even taking back what was published may be refused.
            assert way == "eio lasting" or shown == {"a:v1"}, "who is told of a failure finds no version"
        elif outcome.done:
            assert shown == done
        if draft := registry.unfinished("a"):
            state = load_state(draft)
            assert state or action in ("publish", "run given up")
            assert state is None or state[1]["step"] in (100, 200, 300)
            assert not outcome.done or action not in SAVED or state[1]["step"] == SAVED[action]
        collected(registry)
        goes_on(registry, actions)

    struck = at_every_operation(before, act, then, way, tmp_path / "struck")
    injections.add(action, way, struck)
    if action != "run given up":
        assert struck > (3 if way in ("torn", "short", "short then enospc") else 10)
        assert (told > 0) == (way not in ("exit", "torn", "short"))
    assert way != "short" or told == 0, "a write that takes a part is carried on"


@pytest.mark.parametrize("action", ACTIONS)
def test_f29_power_lost_after_every_operation(before, actions, action, injections, tmp_path):
    older, (act, done) = versions(before), actions[action]
    found = set()

    def then(registry, outcome):
        shown = invariants(registry, older)
        found.add(frozenset(shown))
        if outcome.killed:
            return
        # What was reported done is done, whatever is lost now.
        assert shown == done
        assert action not in SAVED or load_state(registry.unfinished("a"))[1]["step"] == SAVED[action]
        collected(registry)
        goes_on(registry, actions)

    states = power_loss(before, act, then, tmp_path / "lost")
    injections.add(action, "power loss", states)
    assert states > 50
    assert found == {frozenset({"a:v1"}), frozenset(done)}


def test_f29_a_power_loss_is_felt_where_nothing_is_synced(before, actions, tmp_path, monkeypatch):
    """The simulation itself: without syncs it does find the damage that they prevent."""
    disk = Disk(before.root)
    with disk.recorded(lambda operation: None):
        monkeypatch.setattr(fsio.syncing, "fsync", lambda fd: None)
        actions["publish"][0](before)
    damaged = 0
    for i in range(60):
        disk.lose_power(tmp_path / f"after-{i}", random.Random(i))
        for version in Registry(tmp_path / f"after-{i}").entries():
            try:
                assert version.damaged is None
                version.read_file("model.safetensors")
            except (AssertionError, CorruptError):
                damaged += 1
    assert damaged > 5


def test_f28_no_write_escapes_the_injection(before, actions, tmp_path: Path):
    """The harness itself: it sees the operations of fsio, and what goes past them."""
    kinds = operations(before, actions["publish"][0], tmp_path)
    assert {"create", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "close"} <= set(
        kinds
    )

    def act(registry):
        (registry.root / "a" / "stray").write_text("x")
        os.rename(registry.root / "a" / "stray", registry.root / "a" / "other")

    with pytest.raises(AssertionError, match="no fault is tried"):
        operations(before, act, tmp_path / "second")
