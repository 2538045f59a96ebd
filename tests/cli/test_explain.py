"""`quill explain`: the sections, their widths, and the forms of the result."""

from __future__ import annotations

import json

import pytest
from rich.cells import cell_len

from quill.cli import _explained
from quill.cli._tables import Canvas
from quill.cli.app import main
from quill.config.settings import ModelConfig
from quill.explanation.explanation import Explanation
from quill.generation.generator import Generator
from quill.model.gpt import GPT
from quill.tokenizers.char import CharTokenizer


@pytest.fixture(autouse=True)
def _there(tiny_registry, tiny, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    monkeypatch.setenv("QUILL_DEVICE", "cpu")


def explain(capsys, *arguments: str) -> str:
    assert main(["explain", "tiny", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_people_see_every_section_in_80_columns(capsys):
    out = explain(capsys, "3 bells", "--temperature", "0.5", "--top-k", "3")
    for heading in ("THE MODEL", "TOKENS", "ATTENTION", "LOGIT LENS", "THE NEXT TOKEN", "WHO RAISED IT"):
        assert f"\n{heading}\n" in f"\n{out}"
    assert "temperature 0.5, top-k 3, top-p off" in out
    assert "Vaswani et al. 2017" in out
    assert "  3 " in out and "␣ " in out
    assert max(map(cell_len, out.splitlines())) <= 80


@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_wide_letters_and_large_models_fit(block):
    characters = "\n\t \x1b日本語語" + "abcdefghijklmnop"
    tokenizer = CharTokenizer.train([characters])
    config = ModelConfig(block=block, n_layer=12, n_head=12, n_embd=48, block_size=64, tie_embeddings=False)
    generator = Generator(GPT(config.shape(tokenizer.vocab_size)), tokenizer, name="m:v1")
    text = _explained.draw(Explanation(generator, "日本語\x1b\t" * 12), Canvas(None, False))
    assert max(map(cell_len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "12.12" in text


def test_programs_get_everything(capsys):
    document = json.loads(explain(capsys, "3 bells", "--json"))
    assert document["schema"] == "quill.explain/1"
    assert document["reference"] == "tiny:v1"
    assert len(document["layers"][0]["weights"][0][6]) == 7
    assert explain(capsys, "3 bells", "-q") == "tiny:v1\n"


def test_a_long_prompt_is_cut_with_a_warning(capsys):
    assert main(["explain", "tiny", "3 bells", "--last", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "explaining only the last 3 of the prompt's 7 tokens" in err
    assert [t["text"] for t in json.loads(out)["tokens"]] == ["l", "l", "s"]
    assert main(["explain", "tiny", "3 bells", "--last", "0"]) == 2
    assert "--last" in capsys.readouterr().err


def test_unknown_letters_are_refused_or_skipped(capsys):
    assert main(["explain", "tiny", "3 bells€"]) == 2
    assert "€" in capsys.readouterr().err
    assert "TOKENS" in explain(capsys, "3 bells€", "--unknown", "skip")


def test_a_bigram_table_has_no_layers():
    tokenizer = CharTokenizer.train(["ab\n"])
    generator = Generator(GPT(ModelConfig(n_layer=0, block_size=8).shape(3)), tokenizer, name="m:v1")
    text = _explained.draw(Explanation(generator, "ab"), Canvas(None, False))
    assert "table of what follows" in text
    assert "ATTENTION" not in text


def test_a_page_is_one_file(capsys, tmp_path):
    path = tmp_path / "tiny.html"
    assert explain(capsys, "3 bells", "--html", str(path)) == f"{path}\n"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<title>tiny:v1: a look inside</title>" in text
    assert main(["explain", "tiny", "--html", str(tmp_path / "no" / "where.html")]) == 7
    assert "cannot write" in capsys.readouterr().err
