"""`quill config init` with a text and a time: the size that follows from a speed, and the time of its run."""

from __future__ import annotations

import json
import re

import pytest

from quill.benchmark import flops, sizing
from quill.cli import config as command
from quill.cli.app import main
from quill.config import reading
from quill.config.settings import DataConfig
from quill.data.prepare import prepare
from quill.errors import InputError
from quill.training import autotune, recipe

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 3000
# Operations per second of a computer that does nothing but them.
SPEED = 1e10


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.setenv("QUILL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(autotune, "cache_file", lambda: tmp_path / "autotune.json")
    monkeypatch.setenv("QUILL_DTYPE", "float32")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text(TEXT)
    prepare(DataConfig(source="fox.txt"), tmp_path / "data", name="fox")
    return tmp_path / "data"


@pytest.fixture
def computer(data_root, monkeypatch):
    """A computer of a known speed, on which nothing needs to be run to know how long it takes."""

    def training(subject, whole_steps):
        return lambda: (SPEED / flops.training(subject.model.shape), 1.0)

    def evaluation(subject):
        shape = subject.model.shape
        return lambda: (SPEED / flops.forward(shape, shape.block_size), 1.0)

    monkeypatch.setattr(sizing, "training", training)
    monkeypatch.setattr(sizing, "evaluation", evaluation)
    return data_root


def size(data_root, minutes: float) -> sizing.Sized:
    return sizing.size_config({"source": "fox"}, 60 * minutes, data_root, name="fox")


def test_a_config_is_as_large_as_the_time_trains(computer):
    sized = [size(computer, minutes) for minutes in (2, 5, 20)]
    assert [s.parameters for s in sized] == sorted(s.parameters for s in sized)
    assert sized[0].parameters < sized[-1].parameters
    for found, minutes in zip(sized, (2, 5, 20), strict=True):
        run = reading.parse(found.document)
        tokens = run.train.max_iters * run.train.batch_size * run.model.block_size
        shape = run.model.model_copy(update={"vocab_size": 30, "ngram": 0}).shape()
        # What is left of the time evaluates and publishes.
        assert 0.6 * 60 * minutes < tokens * flops.training(shape) / SPEED < 60 * minutes
        assert found.seconds == pytest.approx(60 * minutes, rel=0.05)
        assert found.epochs == pytest.approx(tokens / (0.9 * len(TEXT)), rel=0.01)
        assert tokens > 0.8 * recipe.TOKENS_PER_PARAMETER * found.parameters
        assert found.parameters < recipe.PARAMETERS_PER_TOKEN * len(TEXT)


def test_a_short_text_is_not_learned_by_heart(computer):
    found = size(computer, 10_000)
    assert found.epochs == pytest.approx(recipe.MOST_EPOCHS, rel=0.02)
    assert found.seconds < 60 * 10_000 / 2
    assert "a longer text would use more time" in "\n".join(found.reasons)


def test_the_reasons_give_the_time(computer):
    found = size(computer, 5)
    assert re.match("time: (4m 59s|5m 00s) expected, ", found.reasons[-1])
    assert f"{found.tokens_per_second:,.0f} tokens/s on cpu in float32" in found.reasons[1]


def test_too_little_time_is_refused(computer):
    with pytest.raises(InputError, match="too short for a run") as error:
        size(computer, 0.01)
    assert "20 steps take" in error.value.why


def test_what_is_timed_here_trains_as_written(data_root, monkeypatch, capsys):
    """The real work, of one small size; how long it takes is up to the computer."""
    for module in (recipe, sizing):
        monkeypatch.setattr(module, "WIDTHS", (32, 64))
    monkeypatch.setattr(sizing, "_FIRST_WIDTH", 32)
    monkeypatch.setattr(sizing, "_TRIAL_SECONDS", 0.01)
    monkeypatch.setattr(sizing, "_FINAL_SECONDS", 0.01)
    assert main(["config", "init", "fox", "--minutes", "1", "--name", "fox"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["name"] == "fox"
    assert document["data"] == {"source": "fox"}
    assert reading.parse(document).train.max_iters >= 20
    assert "tokens/s on cpu" in err and "quill train fox.json" in err
    document["train"] |= {"max_iters": 2, "warmup_iters": 1, "eval_interval": 2}
    (data_root.parent / "fox.json").write_text(json.dumps(document))
    assert main(["train", "fox.json"]) == 0
    assert capsys.readouterr().out.strip() == "fox:v1"
    assert (data_root.parent / "weights" / "fox" / "v1").is_dir()


@pytest.fixture
def answers(monkeypatch):
    """Answer the questions of a terminal, of which only the text and the time are of interest."""

    def give(*lines: str) -> list[tuple[str, float]]:
        asked: list[tuple[str, float]] = []
        typed = iter(lines)

        def sized(session, source, minutes, name):
            asked.append((source, minutes))
            return {}

        monkeypatch.setattr(command, "_sized", sized)
        monkeypatch.setattr(command, "is_terminal", lambda stream: True)
        monkeypatch.setattr(command, "_answer", lambda output, question: next(typed))
        return asked

    return give


@pytest.mark.parametrize(
    ("words", "lines", "asked"),
    [
        ([], ["notes.txt", "5"], [("notes.txt", 5.0)]),
        ([], ["notes.txt", ""], [("notes.txt", 30.0)]),
        ([], [""], []),
        (["notes.txt"], ["7.5"], [("notes.txt", 7.5)]),
        (["--minutes", "3"], ["notes.txt"], [("notes.txt", 3.0)]),
    ],
)
def test_a_terminal_is_asked_for_what_is_missing(words, lines, asked, answers, capsys):
    found = answers(*lines)
    assert main(["config", "init", *words]) == 0
    assert found == asked
    assert json.loads(capsys.readouterr().out)["$schema"] == "./schema.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["notes.txt"], "SOURCE without --minutes"),
        (["--minutes", "3"], "--minutes without SOURCE"),
        (["notes.txt", "--minutes", "0"], "--minutes 0 is out of range"),
        (["notes.txt", "--minutes", "nan"], "--minutes nan is out of range"),
    ],
)
def test_a_script_gives_both(words, message, capsys):
    assert main(["config", "init", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_a_wrong_answer_is_refused(answers, capsys):
    answers("notes.txt", "soon")
    assert main(["config", "init"]) == 2
    assert "'soon' is not a number" in capsys.readouterr().err


def test_a_default_config_takes_the_settings_of_the_text(capsys):
    assert main(["config", "init", "--tokenizer", "bpe", "--vocab-size", "1000"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["vocab_size"] == 1000
    assert main(["config", "init", "--tokenizer", "none-such"]) == 2
