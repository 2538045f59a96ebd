"""Fine-tuning: shape, tokenizer and weights of the parent, new characters, and learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import make, run

from quill.checkpoint.load import load_checkpoint
from quill.config import reading
from quill.config.settings import DataConfig, ModelConfig, RunConfig, TrainConfig
from quill.data import store
from quill.data.prepare import prepare
from quill.errors import InputError
from quill.evaluation.curves import stream
from quill.model.gpt import GPT
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.training import finetune
from quill.training.events import Evaluated, Event, Notice
from quill.training.inputs import rates


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    path = tmp_path / "tide.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


@pytest.fixture
def parent(text: Path, registry: Registry) -> Version:
    version = run(make(text, train__max_iters=40), registry).version
    assert version is not None
    return version


@pytest.fixture
def harbour(tmp_path: Path, tiny_text: str) -> Path:
    """Another text, with five characters that the parent has not seen."""
    path = tmp_path / "harbour.txt"
    path.write_text(tiny_text.replace("bells", "Böjen") + "Q!\n" * 20, encoding="utf-8")
    return path


def tuned(text: Path, **overrides: Any) -> RunConfig:
    """The settings of a run that starts from `tide`; sizes are left to the parent."""
    settings = {
        "data.source": str(text),
        "train.init_from": "tide",
        "train.batch_size": 4,
        "train.max_iters": 6,
        "train.eval_interval": 3,
        "train.warmup_iters": 0,
        "train.device": "cpu",
        "train.dtype": "float32",
        "train.compile": "off",
        **{k.replace("__", "."): v for k, v in overrides.items()},
    }
    return reading.parse({"name": "tuned"}, settings)


def test_new_characters_get_rows_that_start_as_the_mean(
    parent: Version, harbour: Path, registry: Registry
) -> None:
    notices: list[str] = []
    events: list[Event] = []
    version = run(
        tuned(harbour),
        registry,
        observer=events.append,
        on_data=lambda event: notices.append(getattr(event, "message", "")),
    ).version
    assert version is not None
    assert "5 new characters are added to the vocabulary: '!BQjö'" in notices
    before, after = load_checkpoint(parent), load_checkpoint(version)
    known = before.tokenizer.vocab_size
    assert after.tokenizer.vocab_size > known
    assert after.tokenizer.decode(range(known)) == before.tokenizer.decode(range(known))
    assert after.tokenizer.decode(after.tokenizer.encode("Böjen Q!")) == "Böjen Q!"
    assert after.model.shape.vocab_size == after.tokenizer.vocab_size
    assert [e.step for e in events if isinstance(e, Evaluated)] == [0, 3, 6]
    assert run(tuned(harbour), registry).reason == "already trained"


@pytest.mark.parametrize("block", ["gpt2", "modern"])
@pytest.mark.parametrize("sizes", [{}, {"tie_embeddings": False}, {"n_layer": 0}])
def test_weights_are_copied_and_new_rows_are_the_mean(block: str, sizes: dict[str, Any]) -> None:
    settings = {"block": block, "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, **sizes}
    old = GPT(ModelConfig(vocab_size=7, **settings).shape(), seed=1)
    new = GPT(ModelConfig(vocab_size=9, **{**settings, "block_size": 6}).shape(), seed=2)
    finetune.copy_weights(old, new, known=5, tokens=9)
    idx = torch.tensor([[0, 3, 1, 4]])
    torch.testing.assert_close(new(idx)[..., :5], old(idx)[..., :5])
    rows = new.wte.weight if sizes.get("n_layer") != 0 else new.wte.weight[:, :5]
    known = rows[:5].mean(dim=0)
    torch.testing.assert_close(rows[5:], known.expand(4, -1))


@pytest.mark.parametrize("unknown", ["skip", "error"])
def test_new_characters_can_be_skipped_or_refused(
    unknown: str, parent: Version, harbour: Path, registry: Registry
) -> None:
    config = tuned(harbour, data__unknown=unknown)
    if unknown == "error":
        with pytest.raises(InputError, match="unknown characters"):
            run(config, registry)
        assert not registry.drafts()
        return
    version = run(config, registry).version
    assert version is not None and version.manifest is not None
    after = load_checkpoint(version)
    assert after.tokenizer.vocab_size == load_checkpoint(parent).tokenizer.vocab_size
    text = harbour.read_text(encoding="utf-8")
    kept = [c for c in text if c in after.tokenizer.decode(range(after.tokenizer.vocab_size))]
    assert version.manifest["data"]["tokens"] == len(kept) < len(text)
    assert run(config, registry).reason == "already trained"


def test_sizes_of_another_model_are_refused_by_name(parent: Version, text: Path, registry: Registry) -> None:
    with pytest.raises(InputError) as caught:
        run(tuned(text, model__n_head=4, model__n_embd=32), registry)
    assert "'model.n_head' = 4, 'model.n_embd' = 32" in caught.value.what
    assert "model.n_head=2, model.n_embd=16" in caught.value.why
    with pytest.raises(InputError, match="cropped"):
        run(tuned(text, model__block_size=32), registry)
    # The default of a new model, given: it is not the parent's either.
    with pytest.raises(InputError, match="n_layer"):
        run(tuned(text, model__n_layer=4), registry)
    version = run(tuned(text, model__block_size=8, model__n_head=2), registry).version
    assert version is not None
    assert load_checkpoint(version).model.shape.block_size == 8


def test_fine_tuning_uses_lower_rates_by_default(parent: Version, text: Path, registry: Registry) -> None:
    events: list[Event] = []
    version = run(tuned(text), registry, observer=events.append).version
    assert version is not None
    train = load_checkpoint(version).config.train
    assert (train.learning_rate, train.muon_learning_rate) == pytest.approx((3e-4, 2e-3))
    said = [e.message for e in events if isinstance(e, Notice)]
    assert any("learning rate of 0.0003" in message for message in said)


@pytest.mark.parametrize(
    ("given", "expected", "sentences"),
    [
        ({}, (3e-3, 0.02), 0),
        ({"learning_rate": 6e-3}, (6e-3, 0.04), 1),
        ({"learning_rate": 6e-3, "muon_learning_rate": 0.02}, (6e-3, 0.02), 0),
        ({"learning_rate": 6e-3, "optimizer": "adamw"}, (6e-3, 0.02), 0),
        ({"init_from": "x"}, (3e-4, 2e-3), 2),
        ({"init_from": "x", "learning_rate": 1e-3}, (1e-3, 0.02 / 3), 1),
        ({"init_from": "x", "min_lr": 1e-3}, (3e-3, 0.02), 0),
        ({"muon_scale": "match_rms_adamw"}, (3e-3, 3e-3), 1),
        ({"muon_scale": "match_rms_adamw", "learning_rate": 1e-3}, (1e-3, 1e-3), 1),
        ({"muon_scale": "match_rms_adamw", "muon_learning_rate": 0.02}, (3e-3, 0.02), 0),
        ({"muon_scale": "match_rms_adamw", "init_from": "x"}, (3e-4, 3e-4), 2),
        ({"muon_scale": "spectral", "learning_rate": 6e-3}, (6e-3, 0.04), 1),
    ],
)
def test_rates_that_are_not_given_follow_from_the_given_ones(
    given: dict[str, Any], expected: tuple[float, float], sentences: int
) -> None:
    settled, notes = rates(TrainConfig(**given), fine_tuning="init_from" in given)
    assert (settled.learning_rate, settled.muon_learning_rate) == pytest.approx(expected)
    assert len(notes) == sentences


def test_a_worse_result_publishes_the_parents_weights_and_warns(
    parent: Version, text: Path, registry: Registry
) -> None:
    events: list[Event] = []
    wild = tuned(text, train__learning_rate=5.0, train__optimizer="adamw", train__grad_clip=0.0)
    version = run(wild, registry, observer=events.append).version
    assert version is not None and version.manifest is not None
    assert version.manifest["best_step"] == 0
    before, after = (load_checkpoint(v).model.state_dict() for v in (parent, version))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("did not improve tide:v1" in e.message for e in events if isinstance(e, Notice))
    assert next(iter(stream(version.metrics())))["step"] == 0


def test_a_parents_vocabulary_does_not_take_the_name_of_the_text(
    parent: Version, harbour: Path, registry: Registry
) -> None:
    root = registry.root.parent / "data"
    first = run(tuned(harbour), registry).version
    assert first is not None and first.facts["data"] is not None
    assert first.facts["data"]["name"] == "harbour-char"
    # Nothing has the name of the text yet; what is prepared then has the text's own characters.
    own = prepare(DataConfig(source=str(harbour)), root)
    assert own.name == "harbour"
    assert set(str(own.tokenizer.to_dict()["vocabulary"])) == set(harbour.read_text(encoding="utf-8"))
    # A text that grows replaces the tokens of its earlier state, night after night.
    harbour.write_text(harbour.read_text(encoding="utf-8") + "Böjen\n" * 40, encoding="utf-8")
    again = tuned(harbour, train__init_from="tuned", train__max_iters=7)
    assert run(again, registry, new_version=True).version is not None
    assert sorted(d.name for d in store.datasets(root)) == ["harbour", "harbour-char", "tide"]
