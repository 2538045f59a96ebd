"""ONNX: what ONNX Runtime computes is what quill computes, whatever the shape, the batch and the length."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes import SHAPES

from quill import strictjson
from quill.checkpoint.load import load_checkpoint
from quill.config.settings import ModelConfig
from quill.errors import CorruptError, InputError
from quill.formats import base
from quill.generation.generator import generate
from quill.model.gpt import GPT, outline
from quill.registry.store import Registry
from quill.tokenizers import base as quill_tokenizers

onnx = pytest.importorskip("onnx", reason="onnx, which the format is written with")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime, which logits are compared with")
np = pytest.importorskip("numpy")

from quill.formats.onnx.graph import WeightsFile  # noqa: E402
from quill.formats.onnx.model import GraphOfGPT  # noqa: E402

CONTEXT = 24
VARIANTS = {
    **SHAPES,
    "scaled": {
        "block": "gpt2",
        "head_size": 5,
        "attention_scale": 0.7,
        "activation": "relu2",
        "dropout": 0.3,
    },
    "grouped": {"block": "modern", "n_head": 6, "n_kv_head": 2, "head_size": 6, "norm_eps": 1e-3},
    "gelu": {"block": "modern", "activation": "gelu"},
    "padded": {"block": "gpt2", "bias": True, "qkv_bias": False, "tie_embeddings": False, "vocab_size": 128},
    "narrow": {
        "block": "modern",
        "n_head": 1,
        "n_kv_head": 1,
        "head_size": 2,
        "n_layer": 1,
        "activation": "gelu_tanh",
    },
}

USAGE = """
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("shakespeare-onnx/tokenizer.json")
session = onnxruntime.InferenceSession("shakespeare-onnx/model_with_past.onnx")
past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[1:]}
ids = new = tokenizer.encode("Once upon a time").ids
for _ in range(50):
    logits, *present = session.run(None, {"input_ids": np.array([new]), **past})
    past = dict(zip(past, present))
    new = [int(logits[0, -1].argmax())]
    ids = ids + new
print(tokenizer.decode(ids))
"""


@pytest.fixture
def exported(publish, tmp_path):
    """Write a model: `exported("gpt2", dtype="float16")` gives the checkpoint and the folder."""

    def write(shape, dtype="float32", **settings):
        variant = VARIANTS[shape]
        family = shape if shape in SHAPES else variant["block"]
        made = load_checkpoint(publish(family, **{**variant, **settings}))
        base.load("onnx").write(made, tmp_path / "out", dtype)
        return made, tmp_path / "out"

    return write


def run(session, idx, past=None):
    """Logits, and the keys and values for the next call."""
    names = [i.name for i in session.get_inputs()[1:]]
    if past is None:
        rows = {i.name: i.shape for i in session.get_inputs()[1:]}
        past = {n: np.zeros((len(idx), rows[n][1], 0, rows[n][3]), np.float32) for n in names}
    logits, *present = session.run(None, {"input_ids": idx.numpy(), **past})
    return torch.from_numpy(logits), dict(zip(names, present, strict=True))


def tokens(made, batch, length):
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(made.tokenizer.vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize("shape", VARIANTS)
def test_onnx_runtime_computes_the_same_logits_with_and_without_a_cache(shape, exported):
    made, folder = exported(shape)
    plain = ort.InferenceSession(folder / "model.onnx")
    cached = ort.InferenceSession(folder / "model_with_past.onnx")
    for batch, length in itertools.product((1, 3), (1, 2, 7, CONTEXT)):
        idx = tokens(made, batch, length)
        ours = made.model.predict(idx)[..., : made.tokenizer.vocab_size]
        assert ours.std() > 0.05
        theirs, none = run(plain, idx)
        assert none == {}
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        torch.testing.assert_close(run(cached, idx)[0], ours, rtol=0, atol=1e-5)
    theirs = torch.stack(list(base.load("onnx").logits(folder, idx[:1]).values()))
    assert float((theirs - ours[0]).abs().max()) < 1e-5


@pytest.mark.parametrize("chunks", [(1,) * 8, (5, 3), (3, 1, 4), (5, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("shape", ["openai", "quillgpt", "modern", "grouped", "bigram"])
def test_cached_logits_equal_full_ones_however_the_text_is_cut(shape, chunks, exported):
    made, folder = exported(shape)
    session = ort.InferenceSession(folder / "model_with_past.onnx")
    for batch in (1, 3):
        idx = tokens(made, batch, 8)
        past, parts = None, []
        for part in idx.split(chunks, 1):
            logits, past = run(session, part, past)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), made.model.predict(idx), rtol=0, atol=1e-5)
        assert all(t.shape[2] == 8 for t in past.values())
        assert len(past) == 2 * made.config.model.n_layer


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", VARIANTS)
def test_the_graphs_are_what_the_standard_asks_for(shape, dtype, exported):
    _, folder = exported(shape, dtype)
    for name in ("model.onnx", "model_with_past.onnx"):
        onnx.checker.check_model(folder / name, full_check=True)
        graph = onnx.load(folder / name, load_external_data=False)
        assert [(o.domain, o.version) for o in graph.opset_import] == [("", 20)]


def test_inputs_and_outputs_are_called_as_optimum_calls_them_and_as_the_config_says(exported):
    made, folder = exported("grouped")
    config = strictjson.read(folder / "config.json")
    assert config["max_position_embeddings"] == CONTEXT and config["eos_token_id"] == made.tokenizer.eot_id
    for name, stated in config["graphs"].items():
        session = ort.InferenceSession(folder / name)
        for found, kind in ((session.get_inputs(), "inputs"), (session.get_outputs(), "outputs")):
            layers = range(config["num_hidden_layers"])
            wanted = {n.format(i=i): d["shape"] for n, d in stated[kind].items() for i in layers}
            assert {v.name for v in found} == set(wanted)
            for v in found:
                assert [n for n in v.shape if type(n) is int] == [n for n in wanted[v.name] if type(n) is int]
    assert [i.name for i in session.get_inputs()][:3] == [
        "input_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [o.name for o in session.get_outputs()][:3] == ["logits", "present.0.key", "present.0.value"]
    assert session.get_inputs()[1].shape == ["batch", 2, "past", 6]


@pytest.mark.parametrize("name", ["model.onnx", "model_with_past.onnx"])
@pytest.mark.parametrize("shape", ["openai", "modern"])
def test_what_is_beyond_the_context_is_an_error_and_no_made_up_position(shape, name, exported):
    made, folder = exported(shape)
    session = ort.InferenceSession(folder / name)
    with pytest.raises(Exception, match="out of data bounds"):
        run(session, tokens(made, 1, CONTEXT + 1))
    if "past" in name:
        past = run(session, tokens(made, 1, CONTEXT))[1]
        with pytest.raises(Exception, match="out of data bounds"):
            run(session, tokens(made, 1, 1), past)


@pytest.mark.parametrize("shape", ["openai", "untied", "bigram"])
def test_float16_halves_the_weights_and_keeps_the_logits(shape, exported, tmp_path):
    made, folder = exported(shape, n_embd=64)
    whole = (folder / "model.onnx_data").stat().st_size
    base.load("onnx").write(made, tmp_path / "half", "float16")
    assert (tmp_path / "half" / "model.onnx_data").stat().st_size < 0.6 * whole
    idx = tokens(made, 1, CONTEXT)
    ours = made.model.predict(idx)[0]
    theirs = torch.stack(list(base.load("onnx").logits(tmp_path / "half", idx).values()))
    assert 0 < float((ours - theirs).abs().max()) < 5e-3 * max(1, float(ours.abs().max()))


def test_a_weight_beyond_float16_is_refused(publish, tmp_path):
    made = load_checkpoint(publish("gpt2"))
    with torch.no_grad():
        made.model.h[1].mlp.c_fc.weight[0, 0] = 70_000
    with pytest.raises(InputError, match="do not fit float16") as caught:
        base.load("onnx").write(made, tmp_path / "out", "float16")
    assert "h.1.mlp.c_fc.weight" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_a_model_beyond_the_two_gigabytes_of_a_protobuf_has_all_weights_outside():
    config = ModelConfig(
        block="gpt2", n_layer=48, n_head=25, n_embd=1600, block_size=1024, vocab_size=50257, bias=True
    )
    model, weights = outline(config.shape()), WeightsFile("model.onnx_data")
    graphs = [
        GraphOfGPT(model.shape, model.state_dict(), weights, torch.float32, cached=cached).build("0")
        for cached in (False, True)
    ]
    size = sum(t.nbytes for t in model.state_dict().values())
    assert size > 2**32 and size <= weights.size < 1.01 * size
    for graph in graphs:
        assert graph.ByteSize() < 1 << 20
        outside = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        assert {t.name.removesuffix(".T") for t in outside} == set(model.state_dict())
        end = 0
        for place in ({e.key: e.value for e in t.external_data} for t in outside):
            start, length = int(place["offset"]), int(place["length"])
            assert place["location"] == "model.onnx_data" and start >= end
            # Where a page of any system may start, else it cannot be mapped into memory.
            assert start % (1 << 16) == 0 or length < 1 << 20
            end = start + length
        assert end == weights.size


def test_the_usage_shown_goes_on_as_quill_does(root: Path, tmp_path: Path):
    pytest.importorskip("tokenizers", reason="tokenizers, which the usage reads text with")
    made = load_checkpoint(Registry(root / "weights").resolve("shakespeare"))
    base.load("onnx").write(made, tmp_path / "shakespeare-onnx", "float32")
    done = subprocess.run(
        [sys.executable, "-I", "-c", USAGE], cwd=tmp_path, capture_output=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    prompt = torch.tensor([made.tokenizer.encode("Once upon a time")])
    ours = generate(made.model, prompt, 50, temperature=0)[0].tolist()
    assert done.stdout.decode() == made.tokenizer.decode(ours) + "\n"


def test_the_tokenizer_is_there_as_quill_and_as_the_tokenizers_library_read_it(publish, tokenizers, tmp_path):
    library = pytest.importorskip("tokenizers")
    text = "The 3 seas are calm; ünd Ælfrid laughed"
    for kind, ours in tokenizers.items():
        made = load_checkpoint(publish("gpt2", kind, name=kind))
        folder = tmp_path / kind
        base.load("onnx").write(made, folder, "float32")
        theirs = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
        assert quill_tokenizers.read(folder / "quill_tokenizer.json").fingerprint == ours.fingerprint


def test_a_block_it_does_not_know_is_refused(publish):
    made = load_checkpoint(publish("modern"))
    kind = base.load("onnx")
    assert kind.refusal(made.model.shape, made.tokenizer) is None
    new = dataclasses.replace(made.model.shape, block="newer")
    assert "gpt2 and modern, not for newer" in (kind.refusal(new, made.tokenizer) or "")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(package, exported, monkeypatch):
    made, folder = exported("bigram")
    import quill.formats.onnx as format_package

    for name in ("graph", "model"):
        monkeypatch.delattr(format_package, name)
        monkeypatch.delitem(sys.modules, f"quill.formats.onnx.{name}")
    for loaded in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    kind, idx = base.load("onnx"), tokens(made, 1, 2)
    needing = {
        "onnx": lambda: kind.write(made, folder / "again", "float32"),
        "onnxruntime": lambda: kind.logits(folder, idx),
    }
    with pytest.raises(InputError, match=f"{package} is not installed") as caught:
        needing[package]()
    assert "quill-gpt[onnx]" in caught.value.hint


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_what_onnx_runtime_cannot_run_is_a_corrupt_file(name, exported):
    made, folder = exported("gpt2")
    whole = (folder / name).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        (folder / name).write_bytes(damaged)
        with pytest.raises(CorruptError, match="ONNX Runtime cannot run"):
            base.load("onnx").logits(folder, tokens(made, 1, 2))


def test_writing_leaves_the_model_as_it_was(exported):
    made, _ = exported("modern", "float16")
    assert isinstance(made.model, GPT)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


def test_looking_at_the_format_loads_nothing_heavy():
    script = (
        "import sys; from quill.formats import base; base.load('onnx'); base.load('pt2');"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().strip() == "[]"
