"""The model card: it says what is known, its commands run, and text from elsewhere stays text."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quill.checkpoint.card import card
from quill.config.settings import RunConfig

CONFIG = RunConfig.model_validate({"data": {"tokenizer": "char"}, "model": {"vocab_size": 65}})
FACTS = {
    "parameters": 4_837_632,
    "data": {"tokenizer": "char", "name": "shakespeare", "tokens": 1_115_394, "sha256": "86c4" + "0" * 60},
    "parent": {"reference": "base:v2", "digest": "ab" * 32},
    "seeds": {"train": 1337},
    "best_val_loss": 1.4654,
    "bits_per_byte": 2.1142,
    "steps": 1800,
    "best_step": 1200,
    "seconds": 3189.0,
    "device": "cpu",
    "dtype": "bfloat16",
    "versions": {"quill": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7", "other": None},
}
HOSTILE = [
    "<script>alert(1)</script>",
    "| a | b |",
    "a\n# b",
    "`x` ``y``",
    "![x](http://evil/x.png)",
    "[x](javascript:alert(1))",
    "&lt;b&gt;",
    "\x1b[31mred",
    "\u202egnp.exe",
    "www.evil.example",
    "<!--",
    "`",
    "\\",
    "\\`",
]


def rendered(text: str) -> str:
    markdown_it = pytest.importorskip("markdown_it")
    return markdown_it.MarkdownIt("commonmark").enable("table").render(text)


def test_a_card_states_every_fact():
    text = card("shakespeare:v1", CONFIG, FACTS, "And so to bed.", "the curve\n")
    for words in (
        "# shakespeare:v1",
        "| Parameters | 4,837,632 |",
        "| Tokenizer | char, vocabulary of 65 |",
        "context length 128 |",
        "| Validation loss | 1.4654 nats per token |",
        "| Perplexity | 4.33 |",
        "| Bits per byte | 2.1142 |",
        f"| Dataset | shakespeare, 1,115,394 tokens, sha256 86c4{'0' * 60} |",
        "| 1,800 steps in 53m 09s on cpu in bfloat16; weights from step 1,200, which had the lowest loss |",
        f"| Fine-tuned from | base:v2, sha256 {'ab' * 32} |",
        "| Seeds | train 1337 |",
        "| Versions | quill 0.1.0, torch 2.13.0+cpu, python 3.11.7 |",
        "```text\nthe curve\n```",
        "```text\nAnd so to bed.\n```",
        "quill sample shakespeare:v1",
        "quill eval shakespeare:v1",
        "quill show shakespeare:v1",
        'model = quill.load("shakespeare:v1")',
    ):
        assert words in text


def test_unknown_facts_are_left_out():
    text = card("x:v1", CONFIG, {"parameters": 3})
    assert "not measured" in text
    for word in (
        "None",
        "Dataset",
        "Training",
        "Fine",
        "Seeds",
        "## Loss",
        "## Sample",
        "Perplexity",
        "eval",
    ):
        assert word not in text


def test_an_imported_model_says_from_where():
    facts = {
        "parameters": 3,
        "parent": {"reference": "out/ckpt.pt", "digest": "cd" * 32},
        "imported": {"format": "nanogpt", "notes": ["its <vocabulary> is of_another|run", "two"]},
    }
    text = card("x:v1", CONFIG, facts, "text")
    assert f"| Imported from | `out/ckpt.pt`, format nanogpt, sha256 {'cd' * 32} |" in text
    assert "<td>its &lt;vocabulary&gt; is of_another|run</td>" in rendered(text)


def code(text: str, language: str) -> str:
    return text.split(f"```{language}\n")[1].split("```")[0]


def test_the_code_of_a_trained_models_card_runs(registry, tmp_path, monkeypatch, capsys):
    """The Python program and each command, next to the registry that the model is in."""
    import quill
    from quill.cli.app import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "sea.txt").write_text("The sea is wide, and the tide is out.\n" * 60)
    config = {
        "name": "sea",
        "data": {"source": "sea.txt", "tokenizer": "char"},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
        "train": {"max_iters": 4, "eval_interval": 2, "eval_iters": 1, "batch_size": 2, "device": "cpu"},
    }
    version = quill.train(config, registry=registry.root)
    text = (version.path / "README.md").read_text(encoding="utf-8")
    exec(compile(code(text, "python"), "card", "exec"), {})
    assert len(capsys.readouterr().out) > 100
    commands = code(text, "sh").splitlines()
    assert [c.split()[1] for c in commands] == ["sample", "eval", "show"]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0
        assert capsys.readouterr().out


def test_the_code_of_a_card_without_a_dataset_runs(trained, registry, tmp_path, monkeypatch, capsys):
    from quill.cli.app import main

    version = trained()
    monkeypatch.chdir(tmp_path)
    text = card(version.reference, CONFIG, {"parameters": 3, "imported": {"format": "nanogpt"}})
    exec(compile(code(text, "python"), "card", "exec"), {})
    commands = code(text, "sh").splitlines()
    assert [c.split()[1] for c in commands] == ["sample", "show"]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_f15_names_and_text_stay_text(text):
    facts = {
        **FACTS,
        "data": {"name": text, "tokenizer": text, "tokens": 1, "sha256": text},
        "parent": {"reference": text, "digest": text},
        "imported": {"format": text, "notes": [text]},
        "seeds": {text: 1},
        "device": text,
        "versions": {"quill": text},
    }
    made = card(text, CONFIG, facts, text, text)
    assert not any(c < " " and c != "\n" for c in made)
    assert "\u202e" not in made
    html = rendered(made)
    for tag in ("<script", "<img", "<a ", "<!--", "<b>"):
        assert tag not in html
    assert html.count("<h1>") == 1
    assert [line[4:-5] for line in html.splitlines() if line.startswith("<h2>")] == [
        "Usage",
        "Sample",
        "Loss curve",
    ]
    # One name and one value in each row of one table, however many bars the values contain.
    assert html.count("<table>") == 1
    assert html.count("<td>") == 2 * (html.count("<tr>") - 1)
    assert html.count("<pre>") == 4


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_name_and_any_sample_stay_text(text):
    markdown_it = pytest.importorskip("markdown_it")
    facts = {**FACTS, "data": {"name": text, "tokens": 1}, "device": text}
    made = card("x:v1", CONFIG, facts, text, "curve")
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(made)
    assert html.count("<h2>") == (3 if text.strip() else 2)
    assert html.count("<td>") == 2 * (html.count("<tr>") - 1)
    made.encode("utf-8")


def test_a_model_cannot_close_the_fence_of_its_own_card() -> None:
    facts = {
        "parameters": 3,
        "data": {"tokenizer": "char", "name": "x", "tokens": 5, "sha256": "0" * 64},
        "best_val_loss": None,
        "steps": 1,
        "seconds": 2.0,
        "device": "cpu",
    }
    config = RunConfig.model_validate({"model": {"vocab_size": 5}})
    text = card("x:v1", config, facts, "a ```` b\n```\n# not a heading")
    assert text.count("`````") == 2
    assert "not measured" in text
