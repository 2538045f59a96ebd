"""`quill config` and `quill doctor`."""

from __future__ import annotations

import json

import pytest

from quill.cli.app import main
from quill.config import reading, schema


def test_schema_is_the_one_that_settings_make(capsys):
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema.build()


def test_every_shipped_config_passes(root, capsys):
    files = [str(f) for f in sorted((root / "configs").glob("*.json")) if f.name != "schema.json"]
    if not files:
        pytest.skip("no configs yet")
    assert main(["config", "check", *files]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["FILE", "NAME", "STATE"]
    assert [line.split()[0] for line in lines] == files
    assert all(line.endswith("valid") for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train": {"batch_siz": 3}}', "train.batch_siz"),
        ('{"model": {"n_layer": 1,}}', "1:25"),
        ("", "is empty"),
        ('{"data": {}, "data": {}}', "twice"),
    ],
)
def test_a_bad_config_exits_2_and_says_where(text, words, tmp_path, capsys):
    file = tmp_path / "bad.json"
    file.write_text(text)
    assert main(["config", "check", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


def test_a_first_config_is_valid_and_changes_nothing(capsys):
    assert main(["config", "init", "--name", "mine"]) == 0
    out, err = capsys.readouterr()
    config = reading.parse(json.loads(out))
    defaults = reading.parse({"name": "mine"})
    assert config.to_dict() == defaults.to_dict()
    assert "quill train mine.json" in err
    assert main(["config", "init", "--name", "../x"]) == 2


def test_a_config_is_shown_as_it_would_run(tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text('{"model": {"n_embd": 64}}')
    assert main(["config", "show", str(file)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"]["head_size"] == 16
    assert reading.parse(shown).to_dict() == shown


def test_doctor_finds_nothing_wrong_here(quill, tmp_path):
    done = quill("doctor", "--json")
    assert done.returncode == 0, done.stderr.decode()
    document = json.loads(done.stdout)
    assert document["schema"] == "quill.doctor/1"
    found = {f["what"]: f for f in document["findings"]}
    assert document["healthy"] is True
    assert str(tmp_path / "weights") in found["registry"]["found"]
    assert found["torch"]["state"] == "ok"
    assert not (tmp_path / "weights").exists()


def test_f41_doctor_reports_an_impossible_registry(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--registry", str(tmp_path / "file" / "weights")]) == 7
    assert "registry         wrong  " in capsys.readouterr().out


def test_f15_a_config_cannot_reach_the_terminal(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
    evil = "\x1b[2J\x9b31m\x7f\u202e\u2028"
    document = {"name": "mine", "data": {"source": evil}, "model": {"n_layer": 2}}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(document))
    draft = registry.begin("b")
    draft.write_json("config.json", document)
    for command in (["config", "show", str(file)], ["show", "b", "--config"]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert json.loads(out)["data"]["source"] == evil
        assert {c for c in out if not c.isprintable()} == {"\n"}
