"""The shipped configs: they are valid, named as expected, and build without allocating weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from quill.config import reading
from quill.model.gpt import n_params, outline
from quill.training.schedule import rate

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.json") if p.name != "schema.json")
# The name `harpoon` is that of the small model, which ships.
NAMES = {"harpoon": "harpoon-large", "harpoon-small": "harpoon"}
VOCABULARY = {"gpt2": 50257, "finetune-gpt2": 50257, "harpoon": 135, "harpoon-small": 135, "quickstart": 135}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_builds_on_meta_and_is_named_after_its_file(path: Path) -> None:
    config = reading.load(path)
    assert config.name == NAMES.get(path.stem, path.stem)
    shape = config.model.shape(VOCABULARY.get(path.stem, 65))
    assert sum(p.numel() for p in outline(shape).parameters()) == n_params(shape)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_it_refers_to_the_schema_next_to_it(path: Path) -> None:
    assert reading.load(path).schema_ == "./schema.json"
    assert (path.parent / "schema.json").exists()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("harpoon", 226_922_631),
        ("gpt2", 124_439_808 + (50_304 - 50_257) * 768),
        ("shakespeare-nanogpt", 10_745_088),
        ("bigram", 65 * 65),
    ],
)
def test_parameter_counts_of_shipped_configs(name: str, parameters: int) -> None:
    model = reading.load(ROOT / f"configs/{name}.json").model
    assert n_params(model.shape(VOCABULARY.get(name, 65))) == parameters


@pytest.mark.parametrize("name", ["gpt2", "finetune-gpt2"])
def test_the_learning_rate_of_gpt2_falls_to_a_tenth(name: str) -> None:
    train = reading.load(ROOT / f"configs/{name}.json").train
    rates = [rate(step, train) for step in range(0, train.max_iters + 1, train.max_iters // 20)]
    assert max(rates) == pytest.approx(1, rel=0.02)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_quillgpts_shakespeare_has_its_count() -> None:
    flat = {"n_embd": 384, "n_head": 6, "n_layer": 6, "block_size": 256, "vocab_size": 65}
    assert n_params(reading.parse(flat).model.shape()) == 10_788_929
