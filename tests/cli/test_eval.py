"""`quill eval` and `quill prepare`."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from quill.cli.app import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def measured(capsys, *arguments: str) -> list[dict[str, Any]]:
    code, out, err = run(capsys, "eval", *arguments, "--json")
    assert code == 0, err
    rows: list[dict[str, Any]] = json.loads(out)["models"]
    return rows


@pytest.fixture
def there(tiny_registry, tiny, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    monkeypatch.setenv("QUILL_DEVICE", "cpu")
    return tiny


def test_the_loss_equals_that_of_training(there, capsys):
    code, out, _ = run(capsys, "eval", "tiny", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == "quill.eval/1"
    [row] = document["models"]
    assert row["reference"] == "tiny:v1"
    assert row["data"] == "tiny/val"
    assert row["loss"] == pytest.approx(there.manifest["best_val_loss"], abs=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    code, out, err = run(capsys, "eval", "tiny", "tiny:v1")
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    assert header.split("  ")[0] == "MODEL"
    assert lines[0] == lines[1]
    assert f"{row['loss']:.4f}" in lines[0]
    assert run(capsys, "eval", "tiny", "-q")[1] == f"{row['loss']:.4f}\n"


def test_any_text_and_any_split(there, tiny_text, tmp_path, capsys):
    file = tmp_path / "other.txt"
    file.write_text(tiny_text)
    [row] = json.loads(run(capsys, "eval", "tiny", "--data", str(file), "--json")[1])["models"]
    assert row["tokens"] == len(tiny_text) - 1
    assert row["bits_per_byte"] == pytest.approx(
        row["loss"] / math.log(2) * row["tokens"] / row["bytes"], rel=1e-3
    )
    [train] = json.loads(run(capsys, "eval", "tiny", "--split=train", "--json")[1])["models"]
    assert train["data"] == "tiny/train"
    assert train["tokens"] > row["tokens"] * 0.8
    code, _, err = run(capsys, "eval", "tiny", "--data", str(file), "--split=val")
    assert code == 2
    assert "has no val split" in err


def test_a_dataset_with_another_tokenizer_is_encoded_again(there, tiny_text, tmp_path, capsys, monkeypatch):
    file = tmp_path / "tiny.txt"
    file.write_text(tiny_text)
    monkeypatch.setenv("QUILL_DATA", str(tmp_path / "data"))
    assert run(capsys, "prepare", str(file), "--name=words", "--tokenizer=word")[0] == 0
    assert run(capsys, "prepare", str(file), "--name=tiny", "--tokenizer=char")[0] == 0
    [by_word] = json.loads(run(capsys, "eval", "tiny", "--data=words", "--json")[1])["models"]
    [by_char] = json.loads(run(capsys, "eval", "tiny", "--data=tiny", "--json")[1])["models"]
    assert by_word["loss"] == pytest.approx(by_char["loss"])
    assert by_word["bytes"] == by_char["bytes"]


def test_a_threshold_not_met_exits_4_after_the_table(there, capsys):
    code, out, err = run(capsys, "eval", "tiny", "--fail-above=0.1")
    assert code == 4
    assert "tiny:v1" in out
    assert "--fail-above" in err
    assert run(capsys, "eval", "tiny", "--fail-above=100")[0] == 0
    assert run(capsys, "eval", "tiny", "--fail-above=nan")[0] == 2
    assert run(capsys, "eval", "tiny", "--iters=0")[0] == 2


def test_characters_without_a_token_are_refused_or_skipped(there, tmp_path, capsys):
    known, mixed = tmp_path / "known.txt", tmp_path / "mixed.txt"
    known.write_text("3 bells, and the tide is 4 feet.")
    mixed.write_text("3 bells, 日and the tide本 is 4 feet.")
    code, out, err = run(capsys, "eval", "tiny", "--data", str(mixed))
    assert (code, out) == (2, "")
    assert "U+65E5" in err
    assert "--unknown skip" in err
    [skipped] = measured(capsys, "tiny", "--data", str(mixed), "--unknown=skip")
    [wanted] = measured(capsys, "tiny", "--data", str(known))
    assert skipped | {"data": ""} == wanted | {"data": ""}


def test_bits_per_byte_leave_out_the_first_token_as_in_python(there, tiny_registry, tmp_path, capsys):
    import quill

    text = "3 bells and 4 bells\n"
    file = tmp_path / "short.txt"
    file.write_text(text)
    [row] = measured(capsys, "tiny", "--data", str(file))
    assert row["bytes"] == row["tokens"] == len(text) - 1
    figures = quill.evaluate("tiny", text, registry=tiny_registry.root)
    assert (row["bytes"], row["bits_per_byte"]) == (figures.bytes, pytest.approx(figures.bits_per_byte))


def test_the_figures_of_a_version_are_those_of_eval(there, tiny, capsys):
    [row] = measured(capsys, "tiny")
    facts = tiny.facts
    assert row["loss"] == pytest.approx(facts["best_val_loss"], rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(facts["bits_per_byte"], rel=1e-6)


def test_documents_of_another_tokenizer_are_measured_as_their_text(there, tmp_path, capsys, monkeypatch):
    pytest.importorskip("rustbpe")
    monkeypatch.setenv("QUILL_DATA", str(tmp_path / "data"))
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i % 9} bells and the tide"}) + "\n" for i in range(80)))
    for tokenizer in ("char", "bpe"):
        options = ["--vocab-size=260"] if tokenizer == "bpe" else []
        name = f"--name=docs-{tokenizer}"
        assert main(["prepare", str(file), name, f"--tokenizer={tokenizer}", *options, "-q"]) == 0
    capsys.readouterr()
    [by_char] = measured(capsys, "tiny", "--data=docs-char", "--split=train")
    [by_bpe] = measured(capsys, "tiny", "--data=docs-bpe", "--split=train")
    assert by_bpe["bytes"] == by_bpe["tokens"]
    assert by_bpe["bits_per_byte"] == pytest.approx(by_char["bits_per_byte"], rel=0.02)


def test_prepare_prints_the_name_and_does_nothing_twice(tiny_text, tmp_path, capsys, monkeypatch):
    file = tmp_path / "log.txt"
    file.write_text(tiny_text)
    monkeypatch.setenv("QUILL_DATA", str(tmp_path / "data"))
    code, out, err = run(capsys, "prepare", str(file), "--name", "log")
    assert (code, out) == (0, "log\n")
    cut = int(len(tiny_text) * 0.9)
    assert f"{cut:,} tokens for training, {len(tiny_text) - cut:,} for validation" in err
    before = (tmp_path / "data" / "log" / "train.bin").stat().st_mtime_ns
    assert run(capsys, "prepare", str(file), "--name", "log", "-q") == (0, "log\n", "")
    assert (tmp_path / "data" / "log" / "train.bin").stat().st_mtime_ns == before
    document = json.loads(run(capsys, "prepare", str(file), "--name", "log", "--json")[1])
    assert document["schema"] == "quill.prepare/1"
    assert document["name"] == "log"
    assert document["manifest"]["splits"]["train"]["tokens"] == cut
    assert run(capsys, "prepare", str(file), "--name", "log", "--val-fraction=0.2")[0] == 4


def test_prepare_reads_stdin_when_asked(quill, tiny_text, tmp_path):
    done = quill(
        "prepare", "-", "--name=piped", stdin=tiny_text.encode(), env={"QUILL_DATA": str(tmp_path / "d")}
    )
    assert done.stdout == b"piped\n", done.stderr.decode()
    assert (tmp_path / "d" / "piped" / "manifest.json").is_file()


def test_f17_a_text_that_is_not_utf8_exits_2_with_the_byte(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QUILL_DATA", str(tmp_path / "data"))
    file = tmp_path / "bad.txt"
    file.write_bytes(b"good text " * 100 + b"\xff\xfe")
    code, out, err = run(capsys, "prepare", str(file), "--name=bad")
    assert (code, out) == (2, "")
    assert "1,000" in err or "1000" in err
    assert not (tmp_path / "data" / "bad").exists()


def test_overlap_is_measured_for_samples_and_validation_text(there, tiny_text, tmp_path, capsys):
    code, out, err = run(capsys, "eval", "tiny", "--overlap", "3")
    assert code == 0
    header, samples, validation = out.splitlines()
    assert " ".join(header.split()) == "MODEL TEXT TEXTS MEDIAN 95% LONGEST 8-GRAMS 16-GRAMS 32-GRAMS REPEATS"
    assert samples.split()[:3] == ["tiny:v1", "samples", "3"]
    assert validation.split()[1] == "validation"
    assert "the longest run of tiny:v1:" in err
    document = json.loads(run(capsys, "eval", "tiny", "--overlap=3", "--json")[1])
    assert document["schema"] == "quill.overlap/1"
    first, second = document["overlaps"]
    assert (first["data"], first["text"], first["texts"]) == ("tiny", "samples", 3)
    assert set(first["shares"]) == set(first["repeats"]) == {"8", "16", "32"}
    assert run(capsys, "eval", "tiny", "--overlap=3", "-q")[1] == f"{first['longest']}\n"
    file = tmp_path / "other.txt"
    file.write_text(tiny_text)
    whole = json.loads(run(capsys, "eval", "tiny", "--overlap=3", "--data", str(file), "--json")[1])
    assert [row["text"] for row in whole["overlaps"]] == ["samples"], "a plain text has no validation split"
    assert second["longest"] > 0


def test_a_report_adds_calibration_and_the_loss_by_context(there, capsys):
    [plain], [row] = measured(capsys, "tiny"), measured(capsys, "tiny", "--report")
    assert {k: row[k] for k in plain} == plain
    assert set(row) - set(plain) == {"calibration", "fitted", "context"}
    assert 0 < row["fitted"]["loss"] <= row["loss"] and 0.7 <= row["fitted"]["temperature"] <= 2
    assert sum(b["tokens"] for b in row["calibration"]["bins"]) == row["tokens"]
    total = sum(c["loss"] * c["tokens"] for c in row["context"])
    assert total / row["tokens"] == pytest.approx(row["loss"], abs=1e-6)
    code, out, err = run(capsys, "eval", "tiny", "--report")
    assert (code, err) == (0, "")
    table, calibration, bins, context, losses = out.split("\n\n")
    assert table + "\n" == run(capsys, "eval", "tiny")[1]
    assert calibration.startswith("tiny:v1: confidence ")
    assert f"loss {row['loss']:.4f} nats per token; {row['fitted']['loss']:.4f} at temperature" in calibration
    assert bins.split()[:5] == ["BIN", "TOKENS", "CONFIDENCE", "ACCURACY", "DIFFERENCE"]
    assert context == "tiny:v1: loss by tokens of context"
    assert losses.split()[:6] == ["CONTEXT", "TOKENS", "LOSS", "1", *losses.split()[4:6]]
    assert run(capsys, "eval", "tiny", "--report", "-q") == run(capsys, "eval", "tiny", "-q")


def test_a_report_is_drawn(there, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "report.svg"
    code, out, err = run(capsys, "eval", "tiny", "tiny:v1", "--plot", str(file))
    assert (code, out) == (0, run(capsys, "eval", "tiny", "tiny:v1")[1])
    assert str(file) in err
    first = file.read_bytes()
    assert first.startswith(b"<?xml")
    assert run(capsys, "eval", "tiny", "tiny:v1", "--plot", str(file), "--report")[0] == 0
    assert file.read_bytes() == first
    assert run(capsys, "eval", "tiny", "--plot", "report.pdf")[0] == 2


def test_questions_are_answered(there, tiny_registry, tmp_path, capsys):
    import quill

    file = tmp_path / "questions.jsonl"
    asked = [{"text": f"{i} bells and the", "answer": " tide"} for i in range(3)]
    file.write_text("".join(json.dumps(q) + "\n" for q in asked))
    code, out, err = run(capsys, "eval", "tiny", "--cloze", str(file))
    assert (code, err) == (0, "")
    assert out.split()[:6] == ["MODEL", "QUESTIONS", "ACCURACY", "±", "PERPLEXITY", "LOSS"]
    document = json.loads(run(capsys, "eval", "tiny", "--cloze", str(file), "--json")[1])
    assert (document["schema"], document["file"]) == ("quill.cloze/1", str(file))
    [row] = document["models"]
    assert row == {"reference": "tiny:v1", **vars(quill.cloze("tiny", file, registry=tiny_registry.root))}
    assert run(capsys, "eval", "tiny", "--cloze", str(file), "-q")[1] == f"{row['accuracy']:.4f}\n"
    for other in (["--overlap=2"], ["--report"], ["--data=tiny"], ["--fail-above=1"]):
        code, out, err = run(capsys, "eval", "tiny", "--cloze", str(file), *other)
        assert (code, out) == (2, "")
        assert "mutually exclusive" in err
    with_choices = [q | {"choices": [" tide", " nail"]} for q in asked]
    file.write_text("".join(json.dumps(q) + "\n" for q in with_choices))
    assert run(capsys, "eval", "tiny", "--cloze", str(file))[1].split()[4:6] == ["BY", "LENGTH"]
    file.write_text('{"text": "日 bells", "answer": "x"}')
    assert "--unknown skip" in run(capsys, "eval", "tiny", "--cloze", str(file))[2]


def test_tasks_are_shown_with_their_figures(there, monkeypatch, capsys):
    from quill.evaluation import harness

    row = {"metric": "acc", "filter": "none", "value": 0.5, "standard_error": None, "examples": 4}
    monkeypatch.setattr(harness, "measure", lambda model, names, report: [{"task": n, **row} for n in names])
    code, out, err = run(capsys, "eval", "tiny", "--tasks", "one,two")
    assert (code, err) == (0, "")
    assert out.splitlines()[2].split() == ["tiny:v1", "two", "acc", "0.5000", "none", "4"]
    document = json.loads(run(capsys, "eval", "tiny", "--tasks=one", "--json")[1])
    assert document["schema"] == "quill.tasks/1"
    assert document["results"] == [{"reference": "tiny:v1", "task": "one", **row}]
    assert run(capsys, "eval", "tiny", "--tasks=one,two", "-q")[1] == "0.5000\n0.5000\n"
    assert run(capsys, "eval", "tiny", "--tasks=one", "--cloze=x.jsonl")[0] == 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--overlap=0"],
        ["--overlap=3", "--iters=2"],
        ["--overlap=3", "--fail-above=2"],
        ["--overlap=3", "--report"],
    ],
)
def test_overlap_is_validated(flags, there, capsys):
    code, out, err = run(capsys, "eval", "tiny", *flags)
    assert (code, out) == (2, "")
    assert "--overlap" in err
