"""An unfinished run is a model too: it can be sampled, evaluated, exported, shown and published."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
from trainings import events, finish, send, start, until

import quill
from quill.checkpoint.verify import find_targets, verify_target
from quill.cli.app import main
from quill.registry.store import Registry


@pytest.fixture
def run(place, capsys, monkeypatch):
    """Run a command in the place: run("sample", "m") -> (code, stdout, stderr)."""
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("QUILL_REGISTRY", str(place.weights))

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def training(place):
    """Start a training of m and stop it, alive, once it has told of an event."""
    children = []

    def begin(event, times=1, *more):
        child = start(place.arguments("m", *more), place.folder, place.folder / "first")
        children.append(child)
        until(place.folder / "first", event, times)
        send(child, signal.SIGSTOP)
        return child

    yield begin
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()


def interrupt(child) -> None:
    send(child, signal.SIGINT)
    send(child, signal.SIGCONT)
    assert finish(child) == 130


NOTE = "m:v1 is unfinished: using its best weights so far, step 3\n"


def use_it(run, place, reference: str, state: str) -> None:
    """Everything that needs weights, with the note on stderr and nothing but the result on stdout."""
    code, text, err = run("sample", reference, "bells", "--max-new-tokens", "5", "--seed", "1")
    assert (code, err) == (0, NOTE)
    assert text.startswith("bells")
    assert run("sample", reference, "bells", "--max-new-tokens", "5", "--seed", "1")[1] == text
    code, out, err = run("eval", reference, "--json")
    assert (code, NOTE in err) == (0, True)
    row = json.loads(out)["models"][0]
    assert row["reference"] == "m:v1"
    best = next(e for e in events(place.folder / "first") if e["event"] == "evaluated")
    assert row["loss"] == pytest.approx(best["val_loss"], abs=1e-5)
    with pytest.warns(UserWarning, match=NOTE.strip()) as caught:
        assert quill.load(reference, registry=place.weights, device="cpu").generate("bells")
    assert caught[0].filename == __file__
    code, out, err = run("export", reference, "--format", "hf", "--out", f"out-{state}-{reference[2:]}")
    assert (code, NOTE in err) == (0, True)
    code, out, err = run("show", reference, "--json")
    shown = json.loads(out)
    assert (code, shown["reference"], shown["state"]) == (0, "m:v1", state)
    assert shown["best"]["step"] == 3
    row = json.loads(run("list", "--json")[1])["models"][0]
    assert (row["state"], row["parameters"], row["val_loss"]) == (
        state, place.whole["parameters"], pytest.approx(best["val_loss"], abs=1e-5),
    )  # fmt: skip


@pytest.mark.parametrize("reference", ["m", "m:v1"])
def test_a_run_is_a_model_while_it_trains_and_after_ctrl_c(place, training, run, reference):
    child = training("saved")
    use_it(run, place, reference, "training")
    code, out, err = run("publish", reference)
    assert (code, out) == (75, "")
    assert f"pid {child.pid}" in err
    assert Registry(place.weights).entries() == []
    interrupt(child)
    use_it(run, place, reference, "unfinished")
    assert run("publish", reference) == (0, "m:v1\n", "")
    (version,) = Registry(place.weights).entries()
    facts = version.facts
    assert (facts["best_step"], facts["parameters"]) == (3, place.whole["parameters"])
    assert facts["data"] == place.whole["data"]
    assert facts["seeds"] == place.whole["seeds"]
    assert facts["steps"] >= 3
    assert (
        facts["seconds"] > 0
        and facts["device"] == "cpu"
        and facts["instructions"]
        and facts["best_val_loss"] > 0
    )
    assert facts["bits_per_byte"] > 0
    assert "state" not in {p.name for p in version.path.iterdir()}
    assert b"# m" in version.read_file("README.md")
    assert [verify_target(t).state for t in find_targets(Registry(place.weights))] == ["ok", "ok"]
    code, out, err = run("sample", reference, "bells", "--max-new-tokens", "5")
    assert (code, err) == (0, "")
    assert run("publish", reference) == (0, "m:v1\n", "m:v1 is already published\n")


def test_a_run_that_was_published_is_not_resumed(place, training, run):
    interrupt(training("saved"))
    assert run("publish", "m", "-q") == (0, "m:v1\n", "")
    before = (place.weights / "m" / "v1" / "manifest.json").read_bytes()
    again = start(place.arguments("m"), place.folder, place.folder / "again")
    assert finish(again) == 0
    assert (place.weights / "m" / "v1" / "manifest.json").read_bytes() == before


def test_a_run_without_weights_says_what_to_do(place, training, run):
    child = training("stepped")
    for command in ("sample", "eval", "export", "publish"):
        code, out, err = run(command, "m")
        assert code == (75 if command == "publish" else 3)
        assert out == ""
        if command != "publish":
            assert "'m:v1' has no weights yet" in err
            assert "the first evaluation is at step 3" in err
            assert "try: quill logs m:v1 -f" in err
    interrupt(child)
    for command in ("sample", "publish"):
        code, out, err = run(command, "m")
        assert (code, out) == (3, "")
        assert "'m:v1' has no weights yet" in err
    hint = err.rpartition("try: quill ")[2].split()
    assert hint == ["train", "--config", str(place.weights / "m" / "v1" / "config.json")]
    # The hint is a command that does what is needed.
    assert run(*hint, "--registry", str(place.weights))[0] == 0
    assert json.loads((place.weights / "m" / "v1" / "manifest.json").read_text())["steps"] == 24


def test_with_a_published_version_the_name_alone_means_that(place, training, run):
    assert finish(start(place.arguments("m"), place.folder, place.folder / "zero")) == 0
    child = training("saved", 1, "--new-version", "--seed=7")
    code, _, err = run("sample", "m", "b", "--max-new-tokens", "3")
    assert (code, err) == (0, "")
    code, _, err = run("sample", "m:v2", "b", "--max-new-tokens", "3")
    assert (code, err.startswith("m:v2 is unfinished: using its best weights so far")) == (0, True)
    interrupt(child)
    # A name alone publishes the newer run.
    assert run("publish", "m", "-q") == (0, "m:v2\n", "")


def test_a_run_of_an_earlier_quill_that_recorded_less_is_published(place, training, run):
    interrupt(training("saved"))
    folder = place.weights / "m" / "v1"
    status = json.loads((folder / "status.json").read_text())
    del status["facts"]
    (folder / "status.json").write_text(json.dumps(status))
    code, _, err = run("sample", "m", "b", "--max-new-tokens", "3")
    assert (code, err) == (0, "m:v1 is unfinished: using its best weights so far\n")
    assert run("publish", "m") == (0, "m:v1\n", "")
    facts = Registry(place.weights).resolve("m").facts
    assert (facts["best_step"], facts["parameters"]) == (3, place.whole["parameters"])
    assert facts["best_val_loss"] > 0


def test_damaged_weights_are_not_published(place, training, run):
    interrupt(training("saved"))
    folder = place.weights / "m" / "v1"
    (folder / "model.safetensors").write_bytes(b"")
    code, out, _ = run("publish", "m")
    assert (code, out) == (5, "")
    assert not (folder / "manifest.json").exists()
    shutil.rmtree(folder)
    assert run("publish", "m")[0] == 3
    assert run("publish", "nobody")[0] == 3
