"""`quill compare`: differing settings and the figures side by side."""

from __future__ import annotations

import json

import pytest

from quill.cli.app import main
from quill.registry.draft import Draft

DATA = {
    "name": "sea",
    "sha256": "12" * 32,
    "tokens": 1000,
    "tokenizer": "char",
    "tokenizer_sha256": "34" * 32,
}


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def with_config(draft, **sections) -> None:
    draft.write_json("config.json", {"schema_version": 1, "name": draft.name, **sections})


@pytest.fixture
def pair(publish, registry, monkeypatch):
    """Two finished models, a:v1 and b:v1, of different settings and figures."""
    publish_draft = Draft.publish

    def publish_with(name: str, config: dict, **facts) -> None:
        with monkeypatch.context() as patched:

            def publish_with_config(draft, **fields):
                with_config(draft, **config)
                return publish_draft(draft, **fields)

            patched.setattr(Draft, "publish", publish_with_config)
            publish(name, **facts)

    publish_with(
        "a",
        {"model": {"n_layer": 2}, "train": {"batch_size": 64}},
        data=DATA,
        steps=2000,
        instructions="AVX2",
    )
    publish_with(
        "b", {"model": {"n_layer": 3}}, data=DATA, steps=1000, best_val_loss=1.25, instructions="AVX512"
    )


def test_figures_and_differing_settings_side_by_side(pair, capsys):
    code, out, err = run(capsys, "compare", "a", "b")
    assert (code, err) == (0, "")
    rows = {line[:14].strip(): line[14:].split() for line in out.splitlines()}
    assert rows["WHAT"] == ["a:v1", "b:v1"]
    assert rows["val loss"] == ["1.4697", "1.2500", "*"]
    assert rows["steps"] == ["2,000", "1,000"]
    assert rows["data"] == ["sea", "sea"]
    assert rows["model.n_layer"] == ["2", "3"]
    # 64 is the default, which the other has without a word.
    assert not {k for k in rows if "batch" in k or k == "name"}
    assert run(capsys, "compare", "a", "b", "-q")[1] == "model.n_layer\n"
    document = json.loads(run(capsys, "compare", "a", "b", "--json")[1])
    assert document["schema"] == "quill.compare/1"
    assert [m["val_loss"] for m in document["models"]] == [1.4697, 1.25]
    assert document["settings"] == [{"setting": "model.n_layer", "values": [2, 3]}]
    assert document["best"] == "b:v1"


def test_a_model_differs_from_itself_in_nothing(pair, capsys):
    code, out, _ = run(capsys, "compare", "a", "a:v1", "-q")
    assert (code, out) == (0, "")


def test_more_models_are_rows_with_what_differs_in_columns(pair, capsys):
    code, out, _ = run(capsys, "compare", "a", "b", "a", "b", "a")
    assert code == 0
    header, *rows = out.splitlines()
    assert header.split() == ["MODEL", "VAL", "LOSS", "N_LAYER", "STEPS", "SIZE", "INSTRUCTIONS"]
    assert [row.split()[:-3] for row in rows[:2]] == [
        ["a:v1", "1.4697", "2", "2,000"],
        ["b:v1", "1.2500", "*", "3", "1,000"],
    ]
    assert len(rows) == 5
    document = json.loads(run(capsys, "compare", "a", "b", "a", "b", "--json")[1])
    assert document["settings"] == [{"setting": "model.n_layer", "values": [2, 3, 2, 3]}]
    assert document["best"] == "b:v1"


def test_no_model_wins_with_equal_losses_or_on_different_texts(pair, publish, capsys):
    publish("c", data=DATA | {"sha256": "56" * 32}, best_val_loss=1.0)
    publish("d", data=DATA)
    for names in (["a", "c"], ["a", "d"]):
        assert json.loads(run(capsys, "compare", *names, "--json")[1])["best"] is None
        assert " *" not in run(capsys, "compare", *names)[1]


def test_f65_instruction_sets_are_compared(pair, capsys):
    out = run(capsys, "compare", "a", "b")[1]
    assert ["instructions", "AVX2", "AVX512"] in [line.split()[:3] for line in out.splitlines()]


def test_losses_on_different_texts_are_called_incomparable(pair, publish, capsys):
    publish("c", data=DATA | {"sha256": "56" * 32})
    assert "quill eval a:v1 c:v1 --data" in run(capsys, "compare", "a", "c")[2]


def test_an_unfinished_run_can_be_compared(pair, registry, capsys):
    draft = registry.begin("new")
    with_config(draft, model={"n_layer": 9})
    (draft.path / "metrics.jsonl").write_text('{"step": 5, "val_loss": 2.5}\n{"step": 9, "val_loss": 3.5}\n')
    draft.update_status(step=5)
    code, out, _ = run(capsys, "compare", "a", "new")
    assert code == 0
    for words in ("unfinished", "2.5000", "new:v1"):
        assert words in out
    models = json.loads(run(capsys, "compare", "a", "new", "--json")[1])["models"]
    assert (models[1]["val_loss"], models[1]["best_step"], models[1]["steps"]) == (2.5, 5, 5)


@pytest.mark.parametrize(
    ("names", "code"), [(["a"], 2), (["a", "nobody"], 3), (["a", "../b"], 3), (["a", "B"], 2)]
)
def test_what_cannot_be_compared(names, code, pair, capsys):
    assert run(capsys, "compare", *names)[:2] == (code, "")


def test_f05_a_damaged_config_is_reported(pair, registry, capsys):
    (registry.root / "b" / "v1" / "config.json").write_text("{}")
    assert run(capsys, "compare", "a", "b")[:2] == (5, "")


def test_f15_and_f49_a_hostile_name_in_twenty_columns(pair, publish, quill):
    publish("c", data={"name": "\x1b[2J|\n", "sha256": "\x07"}, device="\u202e")
    done = quill("compare", "a", "c", env={"COLUMNS": "20", "LC_ALL": "C", "NO_COLOR": "1"})
    assert done.returncode == 0
    assert not {b for b in done.stdout if b < 32 and b != 10}
    assert "\u202e" not in done.stdout.decode()
