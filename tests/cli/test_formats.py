"""`quill export` and `quill import`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from quill.cli.app import main


@pytest.fixture
def place(tiny_registry, tmp_path, monkeypatch):
    """A folder to work in, with a registry of its own that holds `tiny`."""
    shutil.copytree(tiny_registry.root, tmp_path / "weights")
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_export_in_the_three_forms(place, capsys):
    assert main(["export", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny-hf\n"
    assert main(["export", "tiny", "-f", "gguf", "-o", "a.gguf", "-q"]) == 0
    assert capsys.readouterr() == ("a.gguf\n", "")
    assert main(["export", "tiny", "--format", "hf", "--out", "b", "--dtype", "bf16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "quill.export/1"
    assert (document["path"], document["format"], document["dtype"]) == ("b", "hf", "bfloat16")
    assert document["difference"] is None


def test_f48_an_existing_target_stays_unless_forced(place, capsys):
    (place / "tiny-hf").write_text("mine")
    assert main(["export", "tiny"]) == 4
    assert "--force" in capsys.readouterr().err
    assert (place / "tiny-hf").read_text() == "mine"
    # A folder does not take the place of a file either.
    assert main(["export", "tiny", "--force"]) == 4
    assert (place / "tiny-hf").read_text() == "mine"


def test_verify_reports_the_difference_in_logits(place, capsys):
    pytest.importorskip("transformers")
    assert main(["export", "tiny", "--verify"]) == 0
    out, err = capsys.readouterr()
    assert out == "tiny-hf\n"
    assert "transformers and quill agree: logits up to" in err
    assert main(["export", "tiny", "--verify", "--force", "--json"]) == 0
    difference = json.loads(capsys.readouterr().out)["difference"]
    assert 0 <= difference["largest"] < 1e-4
    assert difference["lengths"] == [1, 2, 16]


def test_verify_runs_the_model_on_the_chosen_device(place, capsys, monkeypatch):
    from quill.formats import exporting

    used = []
    monkeypatch.setattr(exporting, "_compare", lambda kind, loaded, made, device: used.append(device))
    assert main(["export", "tiny", "--verify", "--device", "cpu"]) == 0
    monkeypatch.setenv("QUILL_DEVICE", "cpu")
    assert main(["export", "tiny", "--verify", "--force"]) == 0
    assert used == ["cpu", "cpu"]
    capsys.readouterr()
    assert main(["export", "tiny", "--device", "foo", "--force"]) == 2
    assert "'device' = 'foo' in the arguments is invalid\n  why: choose auto, cpu" in capsys.readouterr().err
    monkeypatch.setenv("QUILL_DEVICE", "foo")
    for command in (["export", "tiny", "--force"], ["eval", "tiny"], ["train"]):
        assert main(command) == 2
        assert "device' = 'foo' in QUILL_DEVICE is invalid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "ggfu"], "no format named 'ggfu'"),
        (["--dtype", "int4"], "no dtype 'int4'"),
        (["--format", "nanogpt"], "does not support tiny:v1"),
    ],
)
def test_impossible_exports_are_refused_and_leave_nothing(place, capsys, arguments, said):
    before = sorted(os.listdir(place))
    assert main(["export", "tiny", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert sorted(os.listdir(place)) == before


def test_f48_an_interrupted_export_leaves_nothing(place):
    code = (
        "import os, signal\n"
        "from quill.formats import hf\n"
        "write = hf.HuggingFace.write\n"
        "def half(self, *a): write(self, *a); os.kill(os.getpid(), signal.SIGTERM)\n"
        "hf.HuggingFace.write = half\n"
        "from quill.cli.app import run; run()"
    )
    before = sorted(os.listdir(place))
    done = subprocess.run([sys.executable, "-c", code, "export", "tiny"], capture_output=True, check=False)
    assert done.returncode == 143
    assert b"Traceback" not in done.stderr
    assert sorted(os.listdir(place)) == before


def test_an_export_can_be_imported_trained_on_and_evaluated(place, capsys, tiny_text):
    (place / "log.txt").write_text(tiny_text)
    assert main(["export", "tiny", "-q"]) == 0
    assert main(["import", "tiny-hf", "--name", "back"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "back:v1"
    assert main(["import", "tiny-hf", "--name", "back", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["reference"] == "back:v1", "the same once more is no other version"
    assert document["manifest"]["parent"]["reference"] == "tiny-hf"
    assert str(place) not in json.dumps(document), "a registry may be moved"
    assert main(["sample", "back", "--max-new-tokens", "5", "--prompt", "3 bells"]) == 0
    capsys.readouterr()
    assert main(["eval", "back"]) == 2
    assert "quill eval back:v1 --data" in capsys.readouterr().err
    assert main(["eval", "tiny", "back", "--data", "log.txt", "-q"]) == 0
    first, second = capsys.readouterr().out.split()
    assert first == second
    assert main(["train", "--from", "back", "--data", "log.txt", "--name", "tuned", "--max-iters", "2"]) == 0
    assert capsys.readouterr().out == "tuned:v1\n"
    assert main(["show", "tuned", "--lineage", "-q"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["tuned:v1", "back:v1"]


def test_importing_missing_files_and_other_files(place, capsys):
    assert main(["import", "nowhere.gguf"]) == 3
    assert "'nowhere.gguf' does not exist" in capsys.readouterr().err
    (place / "noise.bin").write_bytes(b"noise" * 100)
    assert main(["import", "noise.bin"]) == 2
    assert "not in a format that quill imports" in capsys.readouterr().err
    assert main(["import", "weights/tiny/v1"]) == 2
    assert "quill cp weights/tiny/v1 my-model" in capsys.readouterr().err
    assert main(["import", ""]) == 2
    assert main(["export", "tiny"]) == 0
    assert main(["import", "tiny-hf/config.json"]) == 2
    assert "only one file of a model" in capsys.readouterr().err
    assert main(["list", "-q"]) == 0
    assert capsys.readouterr().out == "tiny:v1\n"


def test_a_modelfile_for_ollama_on_request(place, capsys):
    assert main(["export", "tiny", "-f", "gguf", "--modelfile"]) == 0
    assert capsys.readouterr().out == "tiny.gguf\n"
    assert (place / "tiny.gguf.Modelfile").read_text().startswith("FROM ./tiny.gguf\n")
    assert main(["export", "tiny", "-f", "gguf", "-o", "b.gguf", "--modelfile"]) == 0
    (place / "b.gguf").unlink()
    assert main(["export", "tiny", "-f", "gguf", "-o", "b.gguf", "--modelfile"]) == 4, (
        "the Modelfile is there"
    )
    assert main(["export", "tiny", "-f", "hf", "--modelfile"]) == 2
    assert "Ollama cannot load hf" in capsys.readouterr().err
    assert not (place / "tiny-hf").exists()
