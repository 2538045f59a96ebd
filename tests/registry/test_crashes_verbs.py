"""A crash, a refusing disk or a power loss at every single write of the commands that change a registry.

Afterwards every visible version is whole, what was not named is untouched, aliases resolve, the same command
works when it is repeated, no number is given twice, and `gc` removes whatever was left behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest
import torch
from crashing import WAYS, at_every_operation, invariants, power_loss, snapshot, versions

from quill.checkpoint.resume_state import save_state
from quill.errors import NotFoundError, RefusedError
from quill.registry import aliases, copy, gc, remove, rename
from quill.registry.store import Registry

pytestmark = pytest.mark.slow

OTHERS = {"c:v1"}
# One refusal that passes and one that stays; each has its like in the tests of a publish.
_WAYS = [w for w in WAYS if w not in ("enospc", "eio lasting")]


def rm(registry: Registry, ref: str, **options: bool) -> None:
    remove.plan(registry, [ref], **options).execute()


def clean(registry: Registry) -> None:
    done = gc.plan(registry, keep=1, older_than=0).execute()
    if done.failed:
        raise done.failed[0]


# What is done, and what is to be seen of `a` and `b` before and after it.
FIRST = {"a:v1", "a:v2"}
ACTIONS: dict[str, tuple[Callable[[Registry], object], set[str]]] = {
    "copy to a new name": (lambda r: copy.plan(r, "a:v1", "b").execute(), FIRST | {"b:v1"}),
    "copy to its own name": (lambda r: copy.plan(r, "a:v1", "a").execute(), FIRST | {"a:v4"}),
    "rename": (lambda r: rename.plan(r, "a", "b").execute(), {"b:v1", "b:v2"}),
    "removal of a version": (lambda r: rm(r, "a:v2"), {"a:v1"}),
    "removal of an unfinished run": (lambda r: rm(r, "a:v3"), FIRST),
    "removal of a name": (lambda r: rm(r, "c"), FIRST),
    "new alias": (lambda r: aliases.set_alias(r.root / "a", "second", 2), FIRST),
    "alias moved": (lambda r: aliases.set_alias(r.root / "a", "champion", 2), FIRST),
    "alias taken away": (lambda r: aliases.remove_alias(r.root / "a", "champion"), FIRST),
    "cleaning": (clean, {"a:v1", "a:v4"}),
}
# The others write as one of these does; they are killed all the same.
OF_ITS_OWN = {"copy to a new name", "rename", "removal of a version", "alias moved", "cleaning"}


@pytest.fixture
def before(registry, publish, fill):
    """a:v1, the champion; a:v2; a:v3, unfinished; and c:v1."""
    publish("c")
    publish("a")
    publish("a")
    aliases.set_alias(registry.root / "a", "champion", 1)
    draft = registry.begin("a")
    fill(draft)
    draft.update_status(pid=1)
    (draft.path / "state").mkdir()
    return registry


@pytest.fixture
def untidy(before, publish):
    """As before, with a:v4, which supersedes the run, a state too many of another, and leftovers."""
    publish("a")
    root = before.root
    left = (".staging/7-{0}/x", ".trash/7-{0}-v9/x", "a/.tmp-7-{0}/x", ".tmp-7-{0}")
    for path in (p.format("0123456789ab") for p in left):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"left")
    draft = before.begin("c")
    draft.write_json("config.json", {"train": {"keep_states": 1}})
    draft.update_status(pid=1)
    for step in (100, 200):
        save_state(draft, step, {"w": torch.full((16,), float(step))}, {"step": step})
    (root / "empty").mkdir()
    return before


def leftovers(registry: Registry) -> list[str]:
    found = [p for p in registry.root.rglob("*") if p.name.startswith(".tmp-")]
    found += [p for name in (".staging", ".trash") for f in registry.root.rglob(name) for p in f.iterdir()]
    return [str(p.relative_to(registry.root)) for p in found]


def without_its_process(registry: Registry, outcome) -> None:
    """Forget who held a lock when the power went: here that is this process, which lives on."""
    if outcome.way == "power loss":
        shutil.rmtree(registry.root / ".locks", ignore_errors=True)


class Aftermath:
    """What must hold of a registry after a fault in an action, and after the action is repeated.

    Args:
        action: The action's name.
        before: The registry as it was.
    """

    def __init__(self, action: str, before: Registry) -> None:
        self.action, (self.act, self.done) = action, ACTIONS[action]
        self.versions = versions(before)
        self.start = self.seen(before)
        self.given = self.numbers(before)
        self.found: set[frozenset[str]] = set()
        self.told = 0

    def seen(self, registry: Registry) -> set[str]:
        return {v.reference for v in registry.entries(all_versions=True)}

    def numbers(self, registry: Registry) -> dict[str, int]:
        """The highest number of each name."""
        every = [*registry.entries(all_versions=True), *registry.drafts()]
        return {n: max(e.number for e in every if e.name == n) for n in {e.name for e in every}}

    def __call__(self, registry: Registry, outcome) -> None:
        without_its_process(registry, outcome)
        seen = self.check(registry)
        done = (self.done | OTHERS) - ({"c:v1"} if self.action == "removal of a name" else set())
        self.found.add(frozenset(seen))
        if outcome.done:
            assert seen == done
        elif outcome.error:
            self.told += 1
            assert outcome.error.exit_code == 7
        if self.action == "cleaning":
            assert done <= seen <= self.start
        else:
            assert seen in (self.start, done)
        if self.action.startswith("copy") and outcome.error:
            assert seen == self.start, "who is told of a failure finds no copy"
        if outcome.way != "power loss" or outcome.done:
            self.repeat(registry)
        if outcome.way == "exit" or outcome.done:
            self.tidy_up(registry)

    def check(self, registry: Registry) -> set[str]:
        """I1, I2 and I5: what is there is whole, and is what it was, under whichever name."""
        seen = invariants(registry, {})
        for path, files in self.versions.items():
            renamed = path.replace("a/", "b/") if self.action == "rename" else path
            for place in {path, renamed}:
                assert not (registry.root / place).exists() or snapshot(registry.root / place) == files
        names = {p.name for p in registry.root.iterdir() if not p.name.startswith(".")}
        if self.action == "rename":
            assert len(names & {"a", "b"}) == 1, "it has one name or the other"
            (name,) = names & {"a", "b"}
            assert aliases.read(registry.root / name)["aliases"] == {"champion": 1}
            assert [d.reference for d in registry.drafts(name)] == [f"{name}:v3"]
        elif self.action == "removal of an unfinished run":
            assert [d.reference for d in registry.drafts("a")] in (["a:v3"], [])
        elif "alias" not in self.action:
            assert aliases.read(registry.root / "a")["aliases"] == {"champion": 1}
        return seen

    def repeat(self, registry: Registry) -> None:
        """I3: the same command works, or says that it is done already."""
        try:
            self.act(registry)
        except (NotFoundError, RefusedError):
            assert self.action.startswith(("rename", "removal"))
        self.check(registry)

    def tidy_up(self, registry: Registry) -> None:
        """I4: cleaning takes every leftover and no version; the next version of each name is a new one."""
        before = self.seen(registry)
        done = gc.plan(registry, older_than=0).execute()
        assert (done.failed, done.skipped, leftovers(registry)) == ([], [], [])
        assert gc.plan(registry, older_than=0).execute().removed == []
        assert self.seen(registry) == before
        self.number_of_next(registry)

    def number_of_next(self, registry: Registry) -> None:
        """No number is given twice, whatever became of the versions that had them."""
        now = self.numbers(registry)
        for name, number in self.given.items():
            draft = registry.begin(name)
            assert draft.number > max(number, now.get(name, 0))
            draft.discard()


@pytest.mark.parametrize(
    ("action", "way"), [(a, w) for a in ACTIONS for w in (_WAYS if a in OF_ITS_OWN else ["exit"])]
)
def test_f26_f27_f28_a_fault_at_every_operation_of_a_command(action, way, request, injections, tmp_path):
    before = request.getfixturevalue("untidy" if action == "cleaning" else "before")
    after = Aftermath(action, before)
    struck = at_every_operation(before, after.act, after, way, tmp_path / "struck")
    injections.add(action, way, struck)
    assert struck > (3 if way in ("exit", "eio") else -1)
    assert way != "short" or after.told == 0, "a write that takes a part is carried on"
    assert way != "eio" or after.told > 3


@pytest.mark.parametrize("action", sorted(OF_ITS_OWN))
def test_f29_power_lost_after_every_operation_of_a_command(action, request, injections, tmp_path):
    before = request.getfixturevalue("untidy" if action == "cleaning" else "before")
    after = Aftermath(action, before)
    states = power_loss(before, after.act, after, tmp_path / "lost", draws=1)
    injections.add(action, "power loss", states)
    assert states > 15
    assert len(after.found) >= (1 if action == "alias moved" else 2)


@pytest.mark.parametrize("way", [*_WAYS, "power loss"])
def test_f28_a_model_put_there_by_hand_is_removed_or_is_not(
    registry, publish, fill, way, injections, tmp_path
):
    """Its files go one by one; from the first on it is no model any more, and gc takes the rest."""
    publish("c")
    folder = registry.root / "hand"
    folder.mkdir()
    fill(folder)
    (folder / "README.md").write_text("x")
    of_model = snapshot(folder)
    (folder / "mine.txt").write_text("not of the model")
    found = set()

    def then(registry, outcome):
        without_its_process(registry, outcome)
        folder = registry.root / "hand"
        seen = bool(registry.entries("hand"))
        found.add(seen)
        assert [v.damaged for v in registry.entries()] == [None] * (1 + seen)
        if seen or outcome.done:
            left = {n: raw for n, raw in snapshot(folder).items() if n in of_model}
            assert left == (of_model if seen else {})
        done = gc.plan(registry, older_than=0).execute()
        assert (done.failed, done.skipped, leftovers(registry)) == ([], [], [])
        assert {n for n in snapshot(folder) if n in of_model} == (set(of_model) if seen else set())
        assert (folder / "mine.txt").read_text() == "not of the model"
        assert registry.begin("hand").number == 2

    def act(registry):
        rm(registry, "hand:v1")

    if way == "power loss":
        count = power_loss(registry, act, then, tmp_path / "lost", draws=1)
    else:
        count = at_every_operation(registry, act, then, way, tmp_path / "struck")
    injections.add("removal of a model put there by hand", way, count)
    assert way not in ("exit", "eio", "power loss") or found == {True, False}


def test_what_the_tests_above_rest_on(untidy):
    """The untidy registry has something of every kind to clean, and a repeated cleaning has nothing."""
    done = gc.plan(untidy, keep=1, older_than=0).execute()
    kinds = [t.kind for t in done.removed]
    assert {k: kinds.count(k) for k in kinds} == {
        "version": 1,
        "unfinished run": 1,
        "resume state": 1,
        "leftover": 5,
    }
    assert json.loads((untidy.root / "a" / "model.json").read_text())["next_version"] == 5
    assert not (untidy.root / "empty").exists()
    assert gc.plan(untidy, keep=1, older_than=0).execute().removed == []
    shutil.rmtree(untidy.root)
