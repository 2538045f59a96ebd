"""Flags made from settings: every setting, in both spellings, validated as in a file."""

from __future__ import annotations

import json
import re

import pytest

from quill.cli import options
from quill.cli.app import main
from quill.cli.train import read_config
from quill.config import reading
from quill.config.settings import SECTIONS, DataConfig, SampleConfig
from quill.errors import InputError

FIELDS = [
    (f"{section}.{name}", str((info.json_schema_extra or {}).get("flag", name)), info.annotation)
    for section, model in SECTIONS.items()
    for name, info in model.model_fields.items()
]


@pytest.fixture
def given(monkeypatch):
    """The overrides that a command line makes, without what the command does with them."""

    def parse(*arguments: str) -> dict[str, object]:
        seen: dict[str, object] = {}
        monkeypatch.setattr(
            "quill.cli.train.read_config", lambda session, *_: seen.update(session.overrides) or stop()
        )
        assert main(["train", *arguments]) == 3
        return seen

    def stop() -> None:
        from quill.errors import NotFoundError

        raise NotFoundError("stopped")

    return parse


def test_every_setting_is_a_flag_of_train_with_its_help(capsys):
    assert main(["train", "--help-all"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, model in SECTIONS.items():
        assert f"{model.title} settings:" in text
        for name, info in model.model_fields.items():
            flag = str((info.json_schema_extra or {}).get("flag", name)).replace("_", "-")
            assert re.search(rf"--{flag}\b", text), f"{section}.{name}"
            assert " ".join(info.description.removesuffix(".").split()[:3]) in text


def test_settings_of_prepare_and_sample_are_flags_too(capsys):
    for screen, model, apart in (
        (["prepare", "--help"], DataConfig, {"source", "unknown"}),
        (["sample", "--help-all"], SampleConfig, set()),
    ):
        assert main(screen) == 0
        text = capsys.readouterr().out
        for name in set(model.model_fields) - apart:
            assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize("spelling", ["--{dashes} {v}", "--{dashes}={v}", "--{under} {v}", "--{under}={v}"])
def test_either_spelling_is_the_same_flag(spelling, given):
    text = spelling.format(dashes="learning-rate", under="learning_rate", v="0.01")
    assert given(*text.split()) == {"train.learning_rate": 0.01}


def test_only_flags_that_were_given_override(given):
    assert given() == {}


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["--n-layer", "0"], {"model.n_layer": 0}),
        (["--bias"], {"model.bias": True}),
        (["--no-bias"], {"model.bias": False}),
        (["--no_tie_embeddings"], {"model.tie_embeddings": False}),
        (["--eval-iters", "none"], {"train.eval_iters": None}),
        (["--learning-rate", "3"], {"train.learning_rate": 3}),
        (["--data", "a"], {"data.source": "a"}),
        (["--data", "a", "--data", "b"], {"data.source": ["a", "b"]}),
        (["--vocabulary", "a", "--vocabulary", "b"], {"data.vocabulary": ["a", "b"]}),
        (["--vocab-size", "5"], {"data.vocab_size": 5}),
        (["--model-vocab-size", "5"], {"model.vocab_size": 5}),
        (["--from", "a:v1"], {"train.init_from": "a:v1"}),
        (["--n-layer", "2.0"], {"model.n_layer": "2.0"}),
        (["--n-layer", "\u0663"], {"model.n_layer": "\u0663"}),
        (["--n-layer", "9" * 400], {"model.n_layer": "9" * 400}),
        (["--block", "gpt2"], {"model.block": "gpt2"}),
        # As nanoGPT's users type them.
        (["--compile=False"], {"train.compile": "off"}),
        (["--compile", "true"], {"train.compile": "on"}),
        (["--bias=False"], {"model.bias": False}),
        (["--bias=true"], {"model.bias": True}),
        (["--lr", "3"], {"train.learning_rate": 3}),
        (["--init_from=gpt2"], {"train.init_from": "gpt2"}),
    ],
)
def test_a_flag_is_a_raw_value_of_its_settings_type(arguments, overrides, given):
    found = given(*arguments)
    assert found == overrides
    assert [type(v) for v in found.values()] == [type(v) for v in overrides.values()]


@pytest.mark.parametrize("path", [p for p, _, kind in FIELDS if kind in (int, float)])
def test_f6_f7_a_number_out_of_bounds_is_refused_by_its_path(path):
    convert, model = options._number, SECTIONS[path.split(".")[0]]
    kind = next(k for p, _, k in FIELDS if p == path)
    for text in ("nan", "inf", "-inf", "-1", "1e999", "true", "", "six", "0x10", "none", " 1", "1_0"):
        value = convert(kind, optional=False)(text)
        with pytest.raises(InputError, match=path.split(".")[1]):
            reading.check(model, {path.split(".")[1]: value}, origin="the flags")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e999", "six", ""])
def test_f6_a_refused_flag_exits_2_with_path_and_value(value, capsys):
    assert main(["train", f"--learning-rate={value}", "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "'train.learning_rate' = " in err.splitlines()[0]
    assert len(err.splitlines()) <= 3


@pytest.mark.parametrize("path", ["train.learning_rate", "train.seed", "model.dropout", "model.n_layer"])
def test_a_flag_is_refused_as_the_file_is(path, tmp_path, capsys):
    flag = next(f for p, f, _ in FIELDS if p == path)
    section, name = path.split(".")
    file = tmp_path / "run.json"
    file.write_text(json.dumps({section: {name: -1}}))
    assert main(["config", "check", str(file)]) == 2
    by_file = capsys.readouterr().err.splitlines()[1:]
    assert main(["train", f"--{flag}=-1", "--dry-run"]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == by_file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "My-Run.json"
    file.write_text(json.dumps({"train": {"batch_size": 3, "max_iters": 7}}))
    session = options.Session(output=None, overrides={"train.batch_size": 5})
    run = read_config(session, file, None)
    assert (run.train.batch_size, run.train.max_iters, run.train.seed) == (5, 7, 1337)
    assert run.name == "my-run"
    assert read_config(session, file, "other").name == "other"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("./Moby Dick.txt", "moby-dick"),
        ("notes.txt", "notes"),
        ("log.jsonl.gz", "log"),
        ("texts/", "texts"),
        ("shakespeare", "shakespeare"),
        ("v1.2", "v1.2"),
        ("-", None),
        ("texts/*.md", None),
        ("中.txt", None),
        (["a.txt", "b.txt"], None),
    ],
)
def test_a_model_is_named_after_its_data(source, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("Moby Dick.txt", "notes.txt", "log.jsonl.gz", "中.txt"):
        (tmp_path / file).write_text("x")
    session = options.Session(output=None, overrides={"data.source": source})
    if name is None:
        with pytest.raises(InputError, match="no name"):
            read_config(session, None, None)
    else:
        assert read_config(session, None, None).name == name
    assert read_config(session, None, "other").name == "other"


def test_the_argument_of_train_is_a_text_or_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "run.json").write_text('{"data": {"source": "a"}}')
    session = options.Session(output=None)
    run = read_config(session, None, None, "notes.txt")
    assert (run.name, run.data.source) == ("notes", "notes.txt")
    run = read_config(session, None, None, "run.json")
    assert (run.name, run.data.source) == ("run", "a")
    assert read_config(session, None, None).name == "harpoon"
    run = read_config(session, None, None, "data:sea")
    assert (run.name, run.data.source) == ("sea", "sea")
    # A config and a text: the text replaces that of the config.
    run = read_config(session, tmp_path / "run.json", None, "notes.txt")
    assert (run.name, run.data.source) == ("run", "notes.txt")
    with pytest.raises(InputError, match="mutually exclusive"):
        read_config(session, tmp_path / "run.json", None, "run.json")
    with pytest.raises(InputError, match="mutually exclusive") as twice:
        read_config(options.Session(output=None, overrides={"data.source": "b.txt"}), None, None, "a")
    # As `quill sample a` names a model.
    assert twice.value.hint == "quill train b.txt --name a"


def test_help_shows_types_and_defaults(capsys):
    main(["train", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--dropout NUMBER Probability of dropping an activation in training (default: 0.0)." in text
    assert "--optimizer adamw|muon" in text
    assert "--block gpt2|modern" in text
    assert "--tie-embeddings/--no-tie-embeddings" in text
