"""Datasets as list, show and rm know them: data:NAME."""

from __future__ import annotations

import json

import pytest

from quill.cli.app import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def prepared(tmp_path, monkeypatch, capsys):
    """The datasets `log` and `sea`, and a damaged one, `torn`."""
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    for name in ("log", "sea", "torn"):
        file = tmp_path / f"{name}.txt"
        file.write_text(f"{name}: the tide turns at dawn, and the boats go out.\n" * 50)
        assert main(["prepare", str(file), "--name", name]) == 0
    (tmp_path / "data" / "torn" / "train.bin").unlink()
    capsys.readouterr()
    return tmp_path / "data"


def test_datasets_are_listed(prepared, capsys):
    code, out, err = run(capsys, "list", "data:")
    assert (code, err) == (0, f"{prepared}\n")
    header, *rows = out.splitlines()
    assert header.split() == ["DATASET", "TOKENIZER", "VOCABULARY", "TRAIN", "VAL", "SIZE", "WHEN", "STATE"]
    assert [row.split()[0] for row in rows] == ["data:log", "data:sea", "data:torn"]
    assert "char" in rows[0]
    assert rows[0].endswith("  ok")
    assert "damaged: " in rows[2]
    assert run(capsys, "list", "data:s*", "-q")[1] == "data:sea\n"
    document = json.loads(run(capsys, "list", "data:", "--json")[1])
    assert document["schema"] == "quill.datasets/1"
    assert [d["state"] for d in document["datasets"]] == ["ok", "ok", "damaged"]
    assert document["datasets"][0]["train_tokens"] > 0


def test_no_datasets_are_no_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    code, out, err = run(capsys, "list", "data:")
    assert (code, out) == (0, "")
    assert "no datasets yet" in err


def test_a_dataset_is_shown(prepared, capsys):
    code, out, _ = run(capsys, "show", "data:sea")
    assert code == 0
    for words in ("data:sea", str(prepared / "sea"), "char, vocabulary of", "quill train sea"):
        assert words in out
    document = json.loads(run(capsys, "show", "data:sea", "--json")[1])
    assert document["schema"] == "quill.dataset/1"
    assert document["manifest"]["name"] == "sea"
    assert run(capsys, "show", "data:sea", "-q")[1] == "data:sea\n"
    code, _, err = run(capsys, "show", "data:see")
    assert code == 3
    assert "try: quill show data:sea" in err
    assert run(capsys, "show", "data:sea", "--metrics")[0] == 2
    assert run(capsys, "show", "data:torn")[0] == 5


def test_datasets_are_removed_together_with_models(prepared, registry, publish, capsys):
    publish("m")
    code, out, _ = run(capsys, "rm", "data:sea", "m", "data:torn", "--dry-run")
    assert (code, out) == (0, "m:v1\ndata:sea\ndata:torn\n")
    assert (prepared / "sea").is_dir()
    code, out, err = run(capsys, "rm", "data:sea")
    assert (code, out) == (2, "")
    assert "quill rm data:sea --yes" in err
    document = json.loads(run(capsys, "rm", "data:sea", "m", "data:torn", "-y", "--json")[1])
    assert [r["reference"] for r in document["removed"]] == ["m:v1", "data:sea", "data:torn"]
    assert document["bytes"] == sum(r["bytes"] for r in document["removed"]) > 0
    assert not (prepared / "sea").exists()
    assert (prepared / "log").is_dir()
    assert run(capsys, "rm", "data:sea", "-y")[0] == 3
    assert run(capsys, "rm", "data:sea", "-y", "--missing-ok") == (0, "", "nothing to remove\n")


@pytest.mark.parametrize("name", ["data:../x", "data:", "data:A"])
def test_f13_names_that_are_no_datasets(name, prepared, capsys):
    for command in (["show", name], ["rm", name, "-y"]):
        assert run(capsys, *command)[0] in (2, 3)


def test_dropped_duplicates_are_counted(tmp_path, registry, capsys):
    text = tmp_path / "sea.jsonl"
    text.write_text('{"text": "a bell at sea"}\n' * 3 + '{"text": "and a light"}\n')
    main(["prepare", str(text), f"--registry={registry.root}", "--dedup", "exact"])
    assert "without 2 exact and 0 near duplicates of 4 documents, in" in capsys.readouterr().err
    main(["show", "data:sea", f"--registry={registry.root}"])
    assert "dropped      2 exact and 0 near duplicates of 4 documents\n" in capsys.readouterr().out
