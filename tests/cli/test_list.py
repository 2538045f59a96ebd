"""`quill list`, over registries made by hand."""

from __future__ import annotations

import gc
import json
import os
import shlex
import socket

import pytest

from quill.cli._facts import ago
from quill.cli.app import main
from quill.errors import NotFoundError
from quill.registry import aliases, locks
from quill.registry.store import Registry


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_one_list_in_its_three_forms(publish, capsys):
    publish("harpoon")
    publish("shakespeare", best_val_loss=1.5)
    publish("shakespeare", best_val_loss=1.25)
    code, out, err = run(capsys, "list")
    assert code == 0
    lines = [line.split("  ") for line in out.splitlines()]
    assert lines[0][0].strip() == "NAME"
    assert [line[0].strip() for line in lines[1:]] == ["harpoon:v1", "shakespeare:v2"]
    assert "10.8M" in out
    assert "1.2500" in out
    assert "just now" in out
    assert "QUILL_REGISTRY says so" in err
    code, out, _ = run(capsys, "list", "--json")
    document = json.loads(out)
    assert document["schema"] == "quill.list/1"
    assert [m["val_loss"] for m in document["models"]] == [1.4697, 1.25]
    assert [m["state"] for m in document["models"]] == ["ok", "ok"]
    assert run(capsys, "ls", "-q")[1] == "harpoon:v1\nshakespeare:v2\n"
    assert run(capsys, "list", "-q", "--all-versions", "shake*")[1] == "shakespeare:v1\nshakespeare:v2\n"


@pytest.mark.parametrize("on", [True, False])
def test_a_list_leaves_garbage_collection_as_it_was(publish, capsys, on):
    publish("harpoon")
    was_on = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        run(capsys, "list")
        assert gc.isenabled() is on
    finally:
        (gc.enable if was_on else gc.disable)()


def test_names_come_in_order_whatever_their_state(publish, registry, capsys):
    publish("b")
    publish("c")
    registry.begin("a")
    registry.begin("b")
    assert run(capsys, "list", "-q")[1].split() == ["a:v1", "b:v1", "b:v2", "c:v1"]


def test_an_empty_registry_is_no_failure(tmp_path, capsys):
    code, out, err = run(capsys, "list", "--registry", str(tmp_path / "none"))
    assert (code, out) == (0, "")
    assert "no models yet" in err
    assert not (tmp_path / "none").exists()


def test_a_damaged_model_is_listed_and_hides_no_other(publish, capsys):
    publish("good")
    bad = publish("bad")
    (bad.path / "model.safetensors").unlink()
    code, out, _ = run(capsys, "list", "--json")
    assert code == 0
    states = {m["reference"]: m["state"] for m in json.loads(out)["models"]}
    assert states == {"bad:v1": "damaged", "good:v1": "ok"}
    assert "damaged: " in run(capsys, "list")[1]


def test_running_and_unfinished_runs_are_distinguished(publish, registry, capsys):
    publish("a")
    alive, left = registry.begin("a"), registry.begin("b")
    (alive.path / "config.json").write_text('{"train": {"max_iters": 2000}}')
    (alive.path / "metrics.jsonl").write_text('{"step": 1500, "loss": 2.5}\n{"step": 151')
    # What a status says of a process is no proof that it lives.
    for draft, step in ((alive, 1000), (left, 20)):
        draft.update_status(pid=os.getpid(), host=socket.gethostname(), step=step)
    with locks.hold(registry.root, "a"):
        out = run(capsys, "list")[1]
        rows = {line.split()[0]: line for line in out.splitlines()[1:]}
        assert "training, step 1,500/2,000" in rows["a:v2"]
        assert "unfinished, step 20" in rows["b:v1"]
        assert rows["a:v1"].endswith("ok")
    # The state that a run goes on from is the saved one.
    assert "unfinished, step 1,000/2,000" in run(capsys, "list", "a")[1]


def test_of_two_unfinished_runs_the_newer_one_is_training(registry, publish, capsys):
    publish("a")
    for _ in range(2):
        registry.begin("a").update_status(step=1)
    with locks.hold(registry.root, "a"):
        rows = json.loads(run(capsys, "list", "--json")[1])["models"]
    states = {row["reference"]: row["state"] for row in rows}
    assert states == {"a:v1": "ok", "a:v2": "unfinished", "a:v3": "training"}


@pytest.mark.parametrize(
    "status",
    [{"step": "1"}, {"step": -1}, {"step": True}, {"max_iters": 1e308}, {"parameters": {}}, {}],
    ids=str,
)
def test_an_invalid_status_is_ignored(status, registry, publish, capsys):
    draft = registry.begin("b")
    draft.update_status(**status)
    (draft.path / "config.json").write_text('{"train": {"max_iters": -3}}')
    for form in ([], ["--json"], ["-q"]):
        assert run(capsys, "list", *form)[0] == 0
    row = json.loads(run(capsys, "list", "--json")[1])["models"][0]
    assert (row["state"], row["step"], row["max_iters"]) == ("unfinished", None, None)


def test_aliases_get_a_column_if_there_are_any(registry, publish, capsys):
    publish("a")
    publish("a")
    assert "ALIASES" not in run(capsys, "list")[1]
    aliases.update(registry.root / "a", lambda held: held | {"aliases": {"champion": 2, "best": 2, "old": 1}})
    publish("b")
    header, *rows = run(capsys, "list", "-a")[1].splitlines()
    assert header.split()[1] == "ALIASES"
    assert [" ".join(row.split()[:3]) for row in rows[:2]] == ["a:v1 old 10.8M", "a:v2 best, champion"]
    models = json.loads(run(capsys, "list", "--json")[1])["models"]
    assert [m["aliases"] for m in models] == [["best", "champion"], []]


def test_damaged_aliases_do_not_affect_the_list(registry, publish, capsys):
    publish("a")
    (registry.root / "a" / "model.json").write_text('{"aliases": {"x": "\\u001b[2J"}}')
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert "a:v1" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("name", ["a", "b", "c"]),
        ("loss", ["b", "a", "c"]),
        ("params", ["c", "a", "b"]),
        ("created", ["c", "b", "a"]),
    ],
)
def test_rows_are_sorted(sort, order, publish, capsys):
    publish("a", best_val_loss=1.5, parameters=20, created="2024-01-01T00:00:00Z")
    publish("b", best_val_loss=1.2, parameters=10, created="2025-01-01T00:00:00Z")
    publish("c", best_val_loss=None, parameters=30, created="2025-01-01T00:00:01Z")
    assert [r[0] for r in run(capsys, "list", "-q", "--sort", sort)[1].split()] == order


@pytest.mark.parametrize(
    ("created", "now", "said"),
    [
        ("1970-01-01T00:00:10Z", 15, "just now"),
        ("1970-01-01T00:00:10Z", 75, "1 minute ago"),
        ("1970-01-01T00:00:00Z", 2 * 86400 + 5, "2 days ago"),
        ("1971-01-01T00:00:00Z", 0, "1971-01-01T00:00:00Z"),
        ("yesterday", 0, "yesterday"),
        (None, 0, ""),
    ],
)
def test_f38_relative_times(created, now, said):
    assert ago(created, now) == said


def test_f15_metadata_cannot_reach_the_terminal(publish, capsys):
    publish("a", created="\x1b[2Jnow", device="cpu\x1b]0;title\x07", data={"name": "[red]x\r"})
    for arguments in (["list"], ["list", "--json"], ["show", "a"], ["show", "a", "--json"]):
        code, out, err = run(capsys, *arguments)
        assert code == 0
        assert not any(ord(c) < 32 and c != "\n" for c in out + err)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("show shakespear", "quill show shakespeare"),
        ("show shakespear --metrics --json", "quill show shakespeare --metrics --json"),
        ("show --json shakespear:v3", "quill show --json shakespeare"),
        ("show shakespeare:v9", "quill show shakespeare:v1"),
        ("show shakespeare:champoin", "quill show shakespeare:champion"),
        ("eval harpoon shakespear --data x", "quill eval harpoon shakespeare --data x"),
        ("sample shakespear 'it is'", "quill sample shakespeare 'it is'"),
        ("compare harpoom shakespeare", "quill compare harpoon shakespeare"),
        ("show sow", "quill show show or quill show sown"),
        ("show nothing-like-it", "quill list"),
    ],
)
def test_a_missing_name_exits_3_and_suggests_the_command(typed, hint, registry, publish, capsys):
    for name in ("shakespeare", "harpoon", "show", "sown"):
        publish(name)
    aliases.update(registry.root / "shakespeare", lambda held: held | {"aliases": {"champion": 1}})
    code, out, err = run(capsys, *shlex.split(typed))
    assert (code, out) == (3, "")
    what, why, last = err.splitlines()
    assert what.startswith("error: no model ")
    assert why.startswith("  why: ")
    assert set(last.removeprefix("  try: ").split(" or ")) == set(hint.split(" or "))


def test_a_suggested_name_replaces_only_what_was_typed(publish, capsys, monkeypatch):
    publish("shakespeare")
    failure = NotFoundError("no model named 'shakespear' in weights", close=["shakespeare"])
    monkeypatch.setattr(Registry, "each_model", lambda *args, **more: (_ for _ in ()).throw(failure))
    assert "  try: quill show shakespeare\n" in run(capsys, "list", "--sort", "name")[2]


@pytest.mark.parametrize("name", ["../x", "/etc", "", "a b", "A", "x\n", "x" * 300, "con", "a:v0", "a:b:c"])
def test_f13_invalid_names_exit_2_or_3(name, publish, capsys):
    code, out, err = run(capsys, "show", name)
    assert code in (2, 3)
    assert out == ""
    assert len(err.splitlines()) <= 3
