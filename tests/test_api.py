"""The Python API: each call does what the command of its name does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import quill
from quill.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from quill.registry.store import Registry


def test_importing_quill_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys, quill; print({'torch', 'pydantic', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_it_offers_is_there_and_nothing_else() -> None:
    for name in set(quill.__all__) - {"__version__"}:
        assert callable(getattr(quill, name)), name
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        _ = quill.sampel  # type: ignore[attr-defined]


def test_a_model_is_loaded_drawn_from_and_measured(tiny_registry: Registry) -> None:
    model = quill.load("tiny", registry=tiny_registry.root)
    config = quill.SampleConfig(max_new_tokens=20, seed=1)
    [text] = model.generate("3 bells", config)
    assert text == "".join(model.stream("3 bells", config))
    assert len(text) == 20
    ids = model.tokenizer.encode("3 bells")
    assert model.tokenizer.decode(ids) == "3 bells"
    figures = quill.evaluate("tiny", "3 bells, and the tide is 4 feet.", registry=tiny_registry.root)
    assert 0 < figures.loss < 6
    assert [v.reference for v in quill.models(registry=tiny_registry.root)] == ["tiny:v1"]


def test_predict_gives_every_position_or_the_last(tiny_registry: Registry) -> None:
    import torch

    model = quill.load("tiny", registry=tiny_registry.root)
    idx = torch.tensor([model.tokenizer.encode("3 bells")])
    every, last = model.model.predict(idx), model.model.predict(idx, targets=False)
    assert every.shape == (1, 7, model.tokenizer.vocab_size)
    assert last.shape == (1, model.tokenizer.vocab_size)
    assert torch.allclose(every[:, -1], last, atol=1e-5)


def test_text_is_prepared_and_a_model_trained_from_a_dict(tmp_path: Path, tiny_text: str) -> None:
    text = tmp_path / "tide.txt"
    text.write_text(tiny_text)
    root = tmp_path / "weights"
    dataset = quill.prepare(str(text), name="tide", registry=root)
    assert dataset.path == tmp_path / "data" / "tide"
    config = {
        "name": "t",
        "data": {"source": "tide"},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8},
        "train": {"max_iters": 2, "batch_size": 2, "eval_interval": 2, "warmup_iters": 0, "device": "cpu"},
    }
    version = quill.train(config, registry=root)
    assert version is not None
    assert version.reference == "t:v1"
    again = quill.train(config, registry=root)
    assert again is not None
    assert again.reference == "t:v1"


def test_what_is_wrong_is_said_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        quill.load("nobody", registry=tmp_path)
    with pytest.raises(InputError, match="lerning_rate"):
        quill.train({"name": "x", "train": {"lerning_rate": 1.0}}, registry=tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        quill.prepare("x.txt", registry=tmp_path, tokenizer="nope")
