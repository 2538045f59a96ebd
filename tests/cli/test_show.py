"""`quill show`: a model, its loss curves, where it came from, and a run that is not finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import quill
from quill import fsio
from quill.cli.app import main
from quill.registry import aliases, locks
from quill.registry.store import Registry

BRAILLE = range(0x2801, 0x2900)
METRICS = [
    {"step": 10, "loss": 4.0, "learning_rate": 0.1},
    {"step": 20, "loss": 3.0, "learning_rate": 0.1},
    {"step": 20, "val_loss": 3.25},
    {"step": 30, "loss": 2.0, "learning_rate": 0.1},
    {"step": 40, "loss": 1.5, "learning_rate": 0.1},
    {"step": 40, "sample": "The tide\n"},
    {"step": 40, "val_loss": 2.5},
]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def write_metrics(folder: Path, lines=METRICS) -> None:
    fsio.write_bytes(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


@pytest.fixture
def curved(publish, registry, monkeypatch):
    """Publish a version with metrics: its files are filled in when it is begun."""
    begin = Registry.begin

    def begin_with_metrics(self, name):
        draft = begin(self, name)
        write_metrics(draft.path)
        return draft

    def make(name: str, **facts):
        with monkeypatch.context() as patched:
            patched.setattr(Registry, "begin", begin_with_metrics)
            return publish(name, **facts)

    return make


@pytest.fixture
def unfinished(publish, registry):
    """A run of `new` that is not finished, at step 40 of 100."""
    draft = registry.begin("new")
    draft.write_json("config.json", {"name": "new", "model": {"n_layer": 2}, "train": {"max_iters": 100}})
    draft.update_status(step=20, updated="2025-01-01T00:00:00Z", pid=1, host="x")
    write_metrics(draft.path)
    return draft


def test_it_shows_the_facts_of_the_manifest(publish, capsys):
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


def test_f65_the_instruction_set_that_made_the_weights_is_shown(publish, registry, capsys):
    publish("a", device="cpu", instructions="AVX512", seeds={"train": 1})
    publish("b", device="cuda:0")
    assert "cpu with AVX512" in run(capsys, "show", "a")[1]
    assert "cpu with AVX512" in run(capsys, "show", "a", "--lineage")[1]
    assert "cuda:0\n" in run(capsys, "show", "b")[1]


def test_flags_that_print_one_thing(publish, registry, capsys):
    publish("a")
    assert run(capsys, "show", "a", "--path")[1] == f"{registry.root / 'a' / 'v1'}\n"
    assert json.loads(run(capsys, "show", "a", "--config")[1])["name"] == "x"
    code, out, err = run(capsys, "show", "a", "--config", "--lineage")
    assert (code, out) == (2, "")
    assert "--config and --lineage" in err


def test_aliases_are_shown(publish, registry, capsys):
    publish("a")
    aliases.update(registry.root / "a", lambda held: held | {"aliases": {"champion": 1}})
    assert "champion" in run(capsys, "show", "a")[1]
    assert json.loads(run(capsys, "show", "a:champion", "--json")[1])["aliases"] == ["champion"]


def test_metrics_are_drawn(curved, capsys):
    curved("a")
    code, out, err = run(capsys, "show", "a", "--metrics")
    assert (code, err) == (0, "")
    assert "* best: 2.5000 at step 40" in out
    assert "training: 1.5000 at step 40" in out
    assert any(ord(c) in BRAILLE for c in out)
    assert "\x1b" not in out


def test_what_reads_no_weights_loads_no_torch(curved, registry):
    curved("a")
    curved("a")
    commands = [["show", "a"], ["show", "a", "--metrics"], ["show", "a", "--metrics", "--json"]]
    commands += [["compare", "a:v1", "a:v2"], ["gc", "--dry-run"], ["list"], ["alias", "list"]]
    code = f"import sys\nfrom quill.cli.app import main\nassert not any(map(main, {commands}))\n"
    env = {**os.environ, "QUILL_REGISTRY": str(registry.root)}
    checked = code + "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", checked], capture_output=True, env=env)
    assert done.returncode == 0, done.stderr.decode()


def test_metrics_for_programs(curved, capsys):
    curved("a")
    document = json.loads(run(capsys, "show", "a", "--metrics", "--json")[1])
    assert document["schema"] == "quill.metrics/1"
    assert document["reference"] == "a:v1"
    assert document["train"] == [line for line in METRICS if "loss" in line]
    assert document["val"] == [line for line in METRICS if "val_loss" in line]
    assert document["samples"] == [{"step": 40, "sample": "The tide\n"}]
    assert document["best"] == {"step": 40, "val_loss": 2.5}
    stored = [json.loads(line) for line in run(capsys, "show", "a", "--metrics", "-q")[1].splitlines()]
    assert stored == METRICS


@pytest.mark.parametrize(
    ("env", "ascii"),
    [
        ({"LC_ALL": "C"}, True),
        ({"LC_ALL": "de_DE.ISO-8859-1"}, True),
        ({"LC_ALL": "", "LANG": "de_DE.UTF-8"}, False),
        ({"LC_ALL": "C.utf8"}, False),
        ({"LC_ALL": "", "LC_CTYPE": "", "LANG": ""}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", ["20", "72", "1", "400"])
def test_f49_curves_in_every_locale_and_width(env, ascii, columns, curved, quill):
    curved("a")
    env = {"COLUMNS": columns, "NO_COLOR": "1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **env}
    done = quill("show", "a", "--metrics", env=env)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode()
    assert text.isascii() is ascii
    assert max(map(len, text.splitlines())) <= min(max(int(columns), 20), 100)


def test_curves_have_colours_on_a_terminal_and_ascii_on_a_dumb_one(curved, on_terminal):
    version = curved("a")
    for term, no_colour, coloured, braille in (
        ("xterm", "", True, True),
        ("xterm", "1", False, True),
        ("dumb", "", False, False),
        ("linux", "", True, False),
    ):
        env = {
            **os.environ,
            "QUILL_REGISTRY": str(version.path.parent.parent),
            "TERM": term,
            "NO_COLOR": no_colour,
            "COLUMNS": "30",
            "LC_ALL": "C.UTF-8",
        }
        code = "from quill.cli.app import run; run()"
        shown = on_terminal([sys.executable, "-c", code, "show", "a", "--metrics"], env)
        assert ("\x1b[" in shown) is coloured
        assert any(ord(c) in BRAILLE for c in shown) is braille


def test_a_model_without_metrics_is_reported(publish, capsys):
    publish("a")
    for flags in (["--metrics"], ["--metrics", "--json"], ["--plot", "x.svg"]):
        code, out, err = run(capsys, "show", "a", *flags)
        assert (code, out) == (3, "")
        assert "a:v1 has no metrics" in err
        assert "quill eval a:v1" in err


def test_f03_metrics_that_changed_are_not_drawn(curved, capsys):
    version = curved("a")
    text = (version.path / "metrics.jsonl").read_text()
    (version.path / "metrics.jsonl").write_text(text.replace("4.0", "9.0"))
    code, out, err = run(capsys, "show", "a", "--metrics")
    assert (code, out) == (5, "")
    assert "sha256" in err


@pytest.mark.parametrize("form", ["svg", "png"])
def test_a_plot_is_written_whole_and_its_path_printed(form, curved, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    curved("a")
    path = tmp_path / f"loss.{form}"
    path.write_text("an earlier one")
    assert run(capsys, "show", "a", "--plot", str(path)) == (0, f"{path}\n", "")
    assert path.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    assert sorted(os.listdir(tmp_path)) == [path.name, "weights"]
    document = json.loads(run(capsys, "show", "a", "--metrics", "--plot", str(path), "--json")[1])
    assert document == {"schema": "quill.plot/1", "reference": "a:v1", "path": str(path)}


def test_a_plot_is_refused_before_anything_is_written(curved, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    curved("a")
    os.mkfifo(tmp_path / "pipe.svg")
    for name, expected in (("loss.pdf", 2), ("loss", 2), ("pipe.svg", 5), ("none/loss.svg", 7)):
        code, out, _ = run(capsys, "show", "a", "--plot", str(tmp_path / name))
        assert (code, out) == (expected, "")
    assert sorted(os.listdir(tmp_path)) == ["pipe.svg", "weights"]


def test_without_matplotlib_a_plot_says_what_to_install(curved, tmp_path, capsys, monkeypatch):
    curved("a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "show", "a", "--plot", str(tmp_path / "x.svg"))
    assert code == 2
    assert "pip install 'quill-gpt[plot]'" in err


def test_an_unfinished_run_shows_what_is_known(unfinished, registry, capsys):
    code, out, _ = run(capsys, "show", "new")
    assert code == 0
    for words in ("new:v1", "unfinished", "20 of 100", "2.5000 at step 40", "2 layers", "quill logs new:v1"):
        assert words in out
    with locks.hold(registry.root, "new"):
        out = run(capsys, "show", "new")[1]
        assert f"training, pid {os.getpid()} on " in out
        assert "40 of 100" in out
        document = json.loads(run(capsys, "show", "new:v1", "--json")[1])
    assert document["schema"] == "quill.run/1"
    assert (document["state"], document["step"], document["max_iters"]) == ("training", 40, 100)
    assert document["holder"]["pid"] == os.getpid()
    assert document["best"] == {"step": 40, "val_loss": 2.5}
    assert run(capsys, "show", "new", "-q")[1] == "new:v1\n"
    assert json.loads(run(capsys, "show", "new", "--config")[1])["train"] == {"max_iters": 100}
    assert run(capsys, "show", "new", "--path")[1] == f"{unfinished.path}\n"
    assert "* best: 2.5000 at step 40" in run(capsys, "show", "new", "--metrics")[1]
    assert "* best" in run(capsys, "show", str(unfinished.path), "--metrics")[1]
    code, _, err = run(capsys, "show", "new", "--lineage")
    assert code == 3
    assert "no lineage yet" in err


def test_a_run_that_just_began_is_shown(registry, publish, capsys):
    draft = registry.begin("new")
    assert run(capsys, "show", "new")[0] == 0
    code, _, err = run(capsys, "show", "new", "--metrics")
    assert code == 3
    assert "no metrics yet" in err
    assert run(capsys, "show", "new", "--config")[0] == 3
    (draft.path / "metrics.jsonl").symlink_to("/etc/passwd")
    assert run(capsys, "show", "new", "--metrics")[0] == 5


def test_a_later_run_of_a_name_is_mentioned(curved, registry, capsys):
    curved("a")
    registry.begin("a")
    code, out, err = run(capsys, "show", "a", "--metrics")
    assert code == 0
    assert "best: 2.5000" in out
    assert "quill show a:v2 --metrics" in err
    assert "a:v2" in run(capsys, "show", "a")[2]
    assert run(capsys, "show", "a:v2")[0] == 0
    assert run(capsys, "show", "a:v3")[0] == 3


def test_lineage_shows_data_code_seeds_and_parents(publish, capsys):
    first = publish("a", data={"name": "sea", "sha256": "12" * 32, "tokens": 5}, seeds={"train": 7})
    second = publish("b", parent={"reference": "a:v1", "digest": first.digest})
    code, out, _ = run(capsys, "show", "b", "--lineage")
    assert code == 0
    for words in (
        "b:v1",
        "a:v1",
        "12" * 32,
        "train 7",
        f"quill {quill.__version__}",
        second.digest,
        "sea, 5 tokens",
    ):
        assert words in out
    chain = json.loads(run(capsys, "show", "b", "--lineage", "--json")[1])["lineage"]
    assert [(e["reference"], e["state"]) for e in chain] == [("b:v1", "here"), ("a:v1", "here")]
    assert chain[1]["data"]["sha256"] == "12" * 32
    assert chain[1]["config_sha256"] == first.manifest["config_sha256"]
    assert chain[0]["parent"] == {"reference": "a:v1", "digest": first.digest}
    assert run(capsys, "show", "b", "--lineage", "-q")[1] == "b:v1\na:v1\n"


def test_a_parent_that_was_renamed_is_found_by_its_weights(publish, registry, capsys, monkeypatch):
    first = publish("a", data={"name": "sea", "tokens": 5})
    publish("b", parent={"reference": "a:v1", "digest": first.digest})
    # Another model would have the same digest here, as all of these have the same weights.
    path = registry.root / "b" / "v1" / "manifest.json"
    document = json.loads(path.read_text())
    document["files"]["model.safetensors"]["sha256"] = "9" * 64
    path.write_text(json.dumps(document))
    (registry.root / "a").rename(registry.root / "c")
    out = run(capsys, "show", "b", "--lineage")[1]
    assert "a:v1 (now c:v1)" in out
    assert "sea, 5 tokens" in out


def test_a_removed_or_replaced_parent_is_marked(publish, capsys):
    publish("a")
    publish("b", parent={"reference": "a:v1", "digest": "0" * 64})
    publish("c", parent={"reference": "gone:v3", "digest": "0" * 64})
    assert "a:v1 (another model has this name now)" in run(capsys, "show", "b", "--lineage")[1]
    assert "gone:v3 (removed)" in run(capsys, "show", "c", "--lineage")[1]


def test_a_circle_of_parents_ends(publish, capsys):
    publish("a", parent={"reference": "b:v1", "digest": None})
    publish("b", parent={"reference": "a:v1", "digest": None})
    assert run(capsys, "show", "a", "--lineage", "-q")[:2] == (0, "a:v1\nb:v1\na:v1\n")


def test_imports_and_copies_name_their_source(publish, capsys):
    source = {"reference": "a", "digest": "5" * 64}
    publish("a")
    publish("b", parent=source, imported={"format": "nanogpt", "notes": ["one"]})
    publish("c", copied_from={"reference": "a:v1", "digest": "6" * 64})
    out = run(capsys, "show", "b", "--lineage")[1]
    assert "a (imported)" in out
    assert "format nanogpt" in out
    assert f"copied from  reference a:v1, digest {'6' * 64}" in run(capsys, "show", "c", "--lineage")[1]


def test_f15_nothing_in_a_manifest_or_a_status_reaches_the_terminal(publish, registry, capsys):
    evil = "\x1b[2J\x07\u202e\n"
    facts = {"reference": evil, "digest": evil}
    publish(
        "a",
        parent=facts,
        data={"name": evil, "sha256": evil},
        seeds={evil: evil},
        device=evil,
        instructions=evil,
    )
    publish("b", copied_from=facts, imported={"format": evil}, git={"commit": evil, "dirty": True})
    draft = registry.begin("c")
    draft.update_status(step=1, updated=evil, host=evil)
    draft.write_json("config.json", {"model": {"block": evil}, "data": {"source": evil}})
    for name in "abc":
        for flags in ([], ["--lineage"]):
            for form in ([], ["--json"], ["-q"]):
                code, out, err = run(capsys, "show", name, *flags, *form)
                assert code == (3 if name == "c" and flags else 0)
                assert not {c for c in out + err if c < " " and c != "\n"} | {"\u202e"} & set(out + err)


@pytest.mark.parametrize(
    ("facts", "train", "said"),
    [
        ({"micro_batch_size": 32}, {}, ""),
        ({}, {}, ""),
        ({"micro_batch_size": 4}, {}, "4 of 32 sequences, to fit in memory"),
        ({"micro_batch_size": 4}, {"micro_batch_size": 4}, "4 of 32 sequences, as set"),
        # A step that ran out of memory was repeated with fewer.
        ({"micro_batch_size": 2}, {"micro_batch_size": 4}, "2 of 32 sequences, to fit in memory"),
        (
            {"micro_batch_size": 1, "gradient_checkpointing": True},
            {"gradient_checkpointing": "auto"},
            "1 of 32 sequences, to fit in memory; with gradient checkpointing, to fit in memory",
        ),
        (
            {"micro_batch_size": 32, "gradient_checkpointing": True},
            {"gradient_checkpointing": "on"},
            "with gradient checkpointing, as set",
        ),
    ],
)
def test_how_a_batch_was_computed_is_shown_and_why(facts, train, said, registry, capsys, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
    draft = registry.begin("cut")
    draft.write_bytes("model.safetensors", safetensors.numpy.save({"w": np.zeros(1, np.uint8)}))
    draft.write_json("config.json", {"schema_version": 1, "train": {"batch_size": 32, **train}})
    draft.write_json("tokenizer.json", {"schema": 1, "kind": "char", "vocabulary": "ab"})
    draft.publish(**facts)
    shown = run(capsys, "show", "cut")[1]
    assert [line.partition("  ")[2].strip() for line in shown.splitlines() if line.startswith("at once")] == (
        [said] if said else []
    )
