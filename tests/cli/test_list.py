"""`quill list` and `quill show`, over registries made by hand."""

from __future__ import annotations

import json
import os
import socket

import pytest

from quill.cli.app import main
from quill.cli.list import ago


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


def test_a_run_in_progress_is_told_from_one_left_behind(publish, registry, capsys):
    publish("a")
    alive, left = registry.begin("a"), registry.begin("b")
    alive.set_status({"pid": os.getpid(), "host": socket.gethostname(), "step": 1500})
    # No process has the highest number that a pid can be.
    left.set_status({"pid": 2**22 + 1, "host": socket.gethostname(), "step": 20})
    out = run(capsys, "list")[1]
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert "training, step 1,500" in rows["a:v2"]
    assert "unfinished, step 20" in rows["b:v1"]
    assert "ok" in rows["a:v1"]


@pytest.mark.parametrize(
    "status", [{"pid": "1"}, {"pid": -1, "host": socket.gethostname()}, {"pid": 10**30}, {}]
)
def test_a_senseless_status_is_nobodys_run(status, registry, publish, capsys):
    registry.begin("b").set_status(status)
    assert "unfinished" in run(capsys, "list")[1]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("name", ["a", "b", "c"]),
        ("loss", ["b", "a", "c"]),
        ("params", ["c", "a", "b"]),
        ("created", ["c", "b", "a"]),
    ],
)
def test_rows_in_the_order_asked_for(sort, order, publish, capsys):
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
def test_f38_times_as_a_person_says_them_and_never_false(created, now, said):
    assert ago(created, now) == said


def test_f15_metadata_cannot_reach_the_terminal(publish, capsys):
    publish("a", created="\x1b[2Jnow", device="cpu\x1b]0;title\x07", data={"name": "[red]x\r"})
    for arguments in (["list"], ["list", "--json"], ["show", "a"], ["show", "a", "--json"]):
        code, out, err = run(capsys, *arguments)
        assert code == 0
        assert not any(ord(c) < 32 and c != "\n" for c in out + err)


def test_show_tells_what_the_manifest_holds(publish, capsys):
    publish("a", steps=2000, seconds=87.2, device="cpu", data={"name": "shakespeare", "tokens": 1115394})
    code, out, _ = run(capsys, "show", "a")
    assert code == 0
    for words in ("a:v1", "10,788,929 (10.8M)", "1.4697", "2,000", "1m 27s", "shakespeare, 1,115,394 tokens"):
        assert words in out
    document = json.loads(run(capsys, "show", "a", "--json")[1])
    assert document["schema"] == "quill.show/1"
    assert document["manifest"]["steps"] == 2000
    assert document["config"]["model"] == {"n_layer": 2}
    assert run(capsys, "show", "a", "-q")[1] == "a:v1\n"


def test_show_one_thing_alone(publish, registry, capsys):
    first = publish("a")
    publish("b", parent={"reference": "a:v1", "digest": first.digest})
    assert run(capsys, "show", "a", "--path")[1] == f"{registry.root / 'a' / 'v1'}\n"
    assert json.loads(run(capsys, "show", "a", "--config")[1])["name"] == "x"
    code, _, err = run(capsys, "show", "a", "--metrics")
    assert code == 3
    assert "metrics.jsonl" in err
    lineage = json.loads(run(capsys, "show", "b", "--lineage", "--json")[1])["lineage"]
    assert [(entry["reference"], entry["state"]) for entry in lineage] == [("b:v1", "here"), ("a:v1", "here")]


def test_a_parent_that_is_gone_or_replaced_is_said_to_be(publish, capsys):
    publish("a")
    publish("b", parent={"reference": "a:v1", "digest": "0" * 64})
    publish("c", parent={"reference": "gone:v3", "digest": "0" * 64})
    assert "another model has this name now" in run(capsys, "show", "b", "--lineage")[1]
    assert "gone:v3  gone" in run(capsys, "show", "c", "--lineage")[1]


def test_a_missing_name_exits_3_with_what_is_near(publish, capsys):
    publish("shakespeare")
    code, out, err = run(capsys, "show", "shakespear")
    assert (code, out) == (3, "")
    assert err.splitlines()[0].startswith("error: no model named 'shakespear'")
    assert "shakespeare" in err.splitlines()[2]


@pytest.mark.parametrize("name", ["../x", "/etc", "", "a b", "A", "x\n", "x" * 300, "con", "a:v0", "a:b:c"])
def test_f13_names_that_are_none_exit_2_or_3(name, publish, capsys):
    code, out, err = run(capsys, "show", name)
    assert code in (2, 3)
    assert out == ""
    assert len(err.splitlines()) <= 3
