"""QuillGPT's checkpoints and those of AkashDataScience/nanogpt, as their scripts write and read them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quill.checkpoint.load import Checkpoint
from quill.config import reading
from quill.config.settings import ModelConfig, RunConfig
from quill.errors import CorruptError, InputError, NotFoundError
from quill.formats import base
from quill.formats.quillgpt import QuillGPT
from quill.model.gpt import GPT
from quill.registry.version import Version
from quill.tokenizers.char import CharTokenizer

SORTED = "\n !abcdefghß"
# As a set of Python's gives them: in no order.
CHARACTERS = "hb\nßa!cgd fe"
SHAPE = {"n_layer": 2, "n_head": 3, "n_embd": 10, "block_size": 6, "vocab_size": 12}
FORMAT = QuillGPT()
NOTHING = base.Supplied()
IDS = torch.tensor([[1, 5, 3, 0, 2, 11], [4, 4, 1, 7, 9, 10]])


def layout(shape: dict[str, int], mask: str = "tril") -> dict[str, tuple[int, ...]]:
    """The names and shapes of their state dict, in its order: a head has 10 // 3 of the width."""
    C, T, H = shape["n_embd"], shape["block_size"], shape["n_head"]
    D, names = C // H, {}
    names["token_embedding_table.weight"] = (shape["vocab_size"], C)
    names["position_embedding_table.weight"] = (T, C)
    for i in range(shape["n_layer"]):
        for h in range(H):
            head = f"blocks.{i}.sa.heads.{h}"
            names[f"{head}.{mask}"] = (T, T)
            names |= {f"{head}.{part}.weight": (D, C) for part in ("key", "query", "value")}
        modules = {"sa.proj": (C, H * D), "ffwd.net.0": (4 * C, C), "ffwd.net.2": (C, 4 * C)}
        modules |= {"ln1": (C,), "ln2": (C,)}
        for module, size in modules.items():
            names[f"blocks.{i}.{module}.weight"] = size
            names[f"blocks.{i}.{module}.bias"] = size[:1]
    names |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return names | {"lm_head.weight": (shape["vocab_size"], C), "lm_head.bias": (shape["vocab_size"],)}


def state(shape: dict[str, int] = SHAPE, mask: str = "tril") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = {n: torch.randn(s, generator=generator) * 0.3 for n, s in layout(shape, mask).items()}
    triangle = torch.ones(shape["block_size"], shape["block_size"]).tril()
    return {n: triangle.clone() if n.endswith(mask) else t for n, t in drawn.items()}


def settings(shape: dict[str, int] = SHAPE, characters: str = CHARACTERS, **changes: Any) -> dict[str, Any]:
    """The config that QuillGPT's train_gpt.py writes."""
    return {
        **shape,
        "batch_size": 8, "max_iters": 100, "eval_interval": 50, "learning_rate": 1e-3, "eval_iters": 3,
        "dropout": 0.25, "device": "cuda",
        "encode": {c: i for i, c in enumerate(characters)},
        "decode": {str(i): c for i, c in enumerate(characters)},
        **changes,
    }  # fmt: skip


def save(path: Path, weights: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights or state(), path)
    return path


def put(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def reference(weights: dict[str, Tensor], shape: dict[str, int], idx: Tensor, mask: str = "tril") -> Tensor:
    """Their model in plain torch, one head at a time."""
    C, T = shape["n_embd"], idx.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = weights["token_embedding_table.weight"][idx] + weights["position_embedding_table.weight"][:T]
    for i in range(shape["n_layer"]):
        y, heads = norm(x, f"blocks.{i}.ln1"), []
        for h in range(shape["n_head"]):
            parts = ("query", "key", "value")
            q, k, v = (y @ weights[f"blocks.{i}.sa.heads.{h}.{part}.weight"].T for part in parts)
            width = C if mask == "trill" else k.shape[-1]
            scores = (q @ k.transpose(-2, -1)) * width**-0.5
            triangle = weights[f"blocks.{i}.sa.heads.{h}.{mask}"][:T, :T]
            heads.append(scores.masked_fill(triangle == 0, -torch.inf).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.sa.proj")
        hidden = linear(norm(x, f"blocks.{i}.ln2"), f"blocks.{i}.ffwd.net.0").clamp(min=0)
        x = x + linear(hidden, f"blocks.{i}.ffwd.net.2")
    return linear(norm(x, "ln_f"), "lm_head")


def build(incoming: base.Incoming) -> GPT:
    model = GPT(incoming.model.shape())
    model.load_state_dict(dict(incoming.weights))
    return model


def in_memory(characters: str = CHARACTERS, **model: Any) -> Checkpoint:
    """A model in memory whose settings all differ from the defaults."""
    shape = {
        "block": "gpt2", "n_layer": 2, "n_head": 3, "n_embd": 10, "head_size": 3, "block_size": 6,
        "vocab_size": len(characters), "activation": "relu", "bias": True, "qkv_bias": False,
        "tie_embeddings": False, "head_bias": True, "dropout": 0.25, **model,
    }  # fmt: skip
    config = reading.check(RunConfig, {"name": "held", "model": shape}, origin="a test")
    network = GPT(config.model.shape()).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    return Checkpoint(config, network, CharTokenizer(characters), Version("held", 1, Path("held")))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefixes_of_wrappers_are_removed_from_names(prefix, tmp_path):
    path = save(tmp_path / "GPT.pt", {prefix + n: t for n, t in state().items()})
    put(tmp_path / "config.json", settings())
    found = build(FORMAT.read(path, NOTHING)).predict(IDS)
    assert torch.allclose(found, reference(state(), SHAPE, IDS), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_an_imported_checkpoint_computes_the_same_logits(tmp_path, heads, dtype):
    shape = SHAPE | {"n_head": heads}
    weights = {n: t.to(dtype) for n, t in state(shape).items()}
    path = save(tmp_path / "trained_models" / "GPT.pt", weights)
    put(path.parent / "config.json", settings(shape))
    for source in (path, path.parent):
        assert FORMAT.recognises(source)
        incoming = FORMAT.read(source, NOTHING)
        assert {t.dtype for t in incoming.weights.values()} == {dtype}
        exact = {n: t.float() for n, t in weights.items()}
        assert torch.allclose(build(incoming).predict(IDS), reference(exact, shape, IDS), atol=1e-5)
        config = incoming.model
        assert (config.head_size, config.n_embd, config.attention_scale) == (10 // heads, 10, None)
        assert (config.activation, config.tie_embeddings, config.head_bias) == ("relu", False, True)
        assert (config.bias, config.qkv_bias, config.dropout) == (True, False, 0.25)
        assert incoming.tokenizer.decode(range(12)) == CHARACTERS


def test_heads_that_do_not_fill_the_width_are_read(tmp_path):
    shape = {"n_layer": 1, "n_head": 12, "n_embd": 1024, "block_size": 4, "vocab_size": 12}
    weights = state(shape)
    assert weights["blocks.0.sa.proj.weight"].shape == (1024, 1020)
    put(save(tmp_path / "GPT.pt", weights).with_suffix(".json"), settings(shape))
    incoming = FORMAT.read(tmp_path / "GPT.pt", NOTHING)
    assert incoming.model.head_size == 85
    ids = IDS[:, :4]
    found, wanted = build(incoming).predict(ids), reference(weights, shape, ids)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_a_checkpoint_of_akash_needs_its_text_and_has_its_own_scale(tmp_path):
    weights = state(mask="trill")
    path = save(tmp_path / "nanogpt.pth", weights)
    assert FORMAT.recognises(path)
    with pytest.raises(InputError, match="characters") as caught:
        FORMAT.read(path, NOTHING)
    assert "as tokenizer=" in caught.value.hint
    text = put(tmp_path / "input.txt", "".join(reversed(SORTED)))
    with pytest.raises(InputError) as caught:
        FORMAT.read(path, NOTHING)
    assert caught.value.hint == f'tokenizer="{text}"'
    incoming = FORMAT.read(path, base.Supplied(tokenizer=str(text)))
    assert torch.allclose(build(incoming).predict(IDS), reference(weights, SHAPE, IDS, "trill"), atol=1e-5)
    assert incoming.model.attention_scale == 10**-0.5
    assert incoming.model.dropout == 0
    assert incoming.tokenizer.decode(range(12)) == SORTED
    assert any("n_embd ** -0.5" in note for note in incoming.notes)
    with pytest.raises(InputError, match="not the vocabulary"):
        FORMAT.read(path, base.Supplied(tokenizer=str(put(tmp_path / "other.txt", "abc"))))


def test_a_single_head_has_the_same_scale_in_both_projects(tmp_path):
    shape = SHAPE | {"n_head": 1}
    path = save(tmp_path / "nanogpt.pth", state(shape, "trill"))
    text = put(tmp_path / "input.txt", SORTED)
    assert FORMAT.read(path, base.Supplied(tokenizer=str(text))).model.attention_scale is None


def test_the_config_is_the_nearest_that_fits(tmp_path):
    path = save(tmp_path / "weights" / "GPT_model_char.pt")
    orders = [CHARACTERS[i:] + CHARACTERS[:i] for i in range(6)]
    with pytest.raises(InputError, match="characters") as caught:
        FORMAT.read(path, NOTHING)
    assert "config=" in caught.value.hint
    other = settings(SHAPE | {"n_layer": 3})
    put(tmp_path / "config" / "a.json", other)
    put(tmp_path / "config" / "broken.json", '{"n_embd": 10,}')
    put(tmp_path / "config" / "list.json", [])
    put(tmp_path / "config" / "example.json", {"n_embd": 10, "n_head": 3})
    with pytest.raises(InputError, match="characters"):
        FORMAT.read(path, NOTHING)
    places = [tmp_path / "config" / "z.json", path.parent / "config.json", path.with_suffix(".json")]
    for place, order in zip(places, orders, strict=False):
        put(place, settings(characters=order))
        incoming = FORMAT.read(path, NOTHING)
        assert incoming.tokenizer.decode(range(12)) == order
        assert any(place.name in note for note in incoming.notes)
        assert str(tmp_path) not in " ".join(incoming.notes)
    given = put(tmp_path / "given.json", settings(characters=orders[4], dropout=0.5))
    incoming = FORMAT.read(path, base.Supplied(config=given))
    assert (incoming.tokenizer.decode(range(12)), incoming.model.dropout) == (orders[4], 0.5)
    text = put(tmp_path / "text.txt", SORTED)
    incoming = FORMAT.read(path, base.Supplied(config=given, tokenizer=str(text)))
    assert (incoming.tokenizer.decode(range(12)), incoming.model.dropout) == (SORTED, 0.5)


def test_one_of_several_configs_is_not_guessed(tmp_path):
    path = save(tmp_path / "weights" / "GPT_model_char.pt")
    put(tmp_path / "config" / "one.json", settings())
    put(tmp_path / "config" / "same.json", settings())
    assert FORMAT.read(path, NOTHING).tokenizer.decode(range(12)) == CHARACTERS
    put(tmp_path / "config" / "two.json", settings(characters=SORTED))
    with pytest.raises(InputError, match="several configs") as caught:
        FORMAT.read(path, NOTHING)
    assert "one.json" in caught.value.hint


def test_an_unsorted_vocabulary_is_read_with_a_warning(tmp_path):
    path = save(tmp_path / "GPT.pt")
    config = put(tmp_path / "config.json", settings())
    assert any("gibberish" in note for note in FORMAT.read(path, NOTHING).notes)
    put(config, settings(characters=SORTED))
    assert not any("gibberish" in note for note in FORMAT.read(path, NOTHING).notes)


GIVEN: dict[str, Any] = {
    "other layers": settings(SHAPE | {"n_layer": 3}),
    "other heads": settings(SHAPE | {"n_head": 2}),
    "other width": settings(SHAPE | {"n_embd": 20}),
    "other context": settings(SHAPE | {"block_size": 7}),
    "too few characters": settings(SHAPE | {"vocab_size": 12}, CHARACTERS[:-1]),
    "no tables": {k: v for k, v in settings().items() if k not in ("encode", "decode")},
    "tables that disagree": settings(decode={str(i): c for i, c in enumerate(SORTED)}),
    "tables of numbers": settings(encode=None, decode=5),
    "words": {k: v for k, v in settings(decode={i: f"{i}" for i in range(12)}).items() if k != "encode"},
    "a list": [],
    "nothing": {},
    "a trailing comma": '{"n_embd": 10,}',
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_the_config_of_another_model_is_refused(name, tmp_path):
    given = put(tmp_path / "given.json", GIVEN[name])
    with pytest.raises((InputError, CorruptError)):
        FORMAT.read(save(tmp_path / "GPT.pt"), base.Supplied(config=given))


def test_a_missing_config_is_not_found(tmp_path):
    path = save(tmp_path / "GPT.pt")
    for place in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(NotFoundError):
            FORMAT.read(path, base.Supplied(config=place))


def _without(*names: str) -> dict[str, Tensor]:
    return {n: t for n, t in state().items() if not n.endswith(names)}


STATES: dict[str, Any] = {
    "no mask": _without(".tril"),
    "two masks": state() | {"blocks.0.sa.heads.0.trill": torch.ones(6, 6)},
    "no positions": _without("position_embedding_table.weight"),
    "no heads": _without(".key.weight", ".query.weight", ".value.weight"),
    "a key less": {n: t for n, t in state().items() if n != "blocks.1.sa.heads.2.key.weight"},
    "a head of another size": state() | {"blocks.1.sa.heads.1.key.weight": torch.zeros(4, 10)},
    "a head of another type": state() | {"blocks.1.sa.heads.1.key.weight": torch.zeros(3, 10).half()},
    "a layer less": {n: t for n, t in state().items() if not n.startswith("blocks.0.")},
    "a vector for a matrix": state() | {"token_embedding_table.weight": torch.zeros(12)},
}


@pytest.mark.parametrize("name", STATES)
def test_an_incomplete_checkpoint_is_refused(name, tmp_path):
    path = save(tmp_path / "GPT.pt", STATES[name])
    put(tmp_path / "config.json", settings())
    with pytest.raises(CorruptError, match="not a complete checkpoint"):
        FORMAT.read(path, NOTHING)


@pytest.mark.parametrize(
    "value", [{"conv.weight": torch.zeros(2)}, {}, [1], {"epoch": 3}, torch.zeros(3)], ids=str
)
def test_the_checkpoint_of_another_program_is_refused(value, tmp_path):
    path = tmp_path / "net.pt"
    torch.save(value, path)
    with pytest.raises(InputError, match="not a model that quill imports"):
        FORMAT.read(path, NOTHING)


def test_an_unknown_tensor_keeps_its_name(tmp_path):
    path = save(tmp_path / "GPT.pt", state() | {"value_head.weight": torch.zeros(2)})
    put(tmp_path / "config.json", settings())
    assert "value_head.weight" in FORMAT.read(path, NOTHING).weights


def test_each_torch_file_belongs_to_one_format(tmp_path):
    """So one of them says what is wrong with a file."""
    nanogpt = base.load("nanogpt")
    ours = save(tmp_path / "GPT.pt")
    theirs = save(tmp_path / "their.pt", {"model": {"_orig_mod.transformer.wte.weight": torch.zeros(2, 2)}})
    named = save(tmp_path / "a" / "ckpt.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    lost = tmp_path / "b" / "ckpt.pt"
    lost.parent.mkdir()
    lost.write_bytes(b"")
    claims = {
        p: (FORMAT.recognises(p), nanogpt.recognises(p))
        for p in (ours, theirs, named, named.parent, broken, lost, lost.parent)
    }
    assert claims == {
        ours: (True, False),
        theirs: (False, True),
        named: (True, False),
        named.parent: (True, False),
        broken: (True, False),
        lost: (False, True),
        lost.parent: (False, True),
    }
    with pytest.raises(CorruptError, match="damaged") as caught:
        FORMAT.read(broken, NOTHING)
    assert "LFS" in caught.value.why


def test_folders_of_other_formats_and_of_several_models_are_not_guessed(tmp_path):
    save(tmp_path / "GPT.pt")
    (tmp_path / "model.safetensors").touch()
    assert not FORMAT.recognises(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save(tmp_path / "other.pt")
    assert not FORMAT.recognises(tmp_path)
    with pytest.raises(InputError, match="several models"):
        FORMAT.read(tmp_path, NOTHING)
    with pytest.raises(NotFoundError):
        FORMAT.read(put(tmp_path / "empty" / "x.json", {}).parent, NOTHING)


def test_f44_a_malicious_state_dict_is_refused_and_nothing_runs(tmp_path, quill):
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    path = save(tmp_path / "evil.pt", state() | {"x": Evil()})
    put(tmp_path / "config.json", settings())
    done = quill("import", str(path))
    assert (done.returncode, done.stdout) == (5, b"")
    assert b"not safe to read" in done.stderr
    assert b"Traceback" not in done.stderr
    assert not mark.exists()
    assert quill("list", "-q").stdout == b""


@pytest.mark.parametrize("heads", [{}, {"n_head": 5, "n_kv_head": 5, "head_size": 2}], ids=str)
def test_an_export_is_what_quillgpt_reads(tmp_path, heads):
    made = in_memory(**heads)
    notes = FORMAT.write(made, tmp_path / "out", "float32")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "held.pt"]
    weights = torch.load(tmp_path / "out" / "held.pt")
    shape = SHAPE | {"n_head": made.config.model.n_head}
    assert {n: tuple(t.shape) for n, t in weights.items()} == layout(shape)
    assert list(weights) == list(layout(shape))
    assert torch.allclose(reference(weights, shape, IDS), made.model.predict(IDS), atol=1e-5)
    assert any("bd407e3" in note for note in notes) == (10 % shape["n_head"] != 0)
    raw = (tmp_path / "out" / "config.json").read_bytes()
    assert raw.isascii(), "their reader takes the system's encoding"
    config = json.loads(raw)
    assert {k: config[k] for k in SHAPE} == shape
    assert set(config) == set(settings()) - {"device"}
    assert config["encode"] == {c: i for i, c in enumerate(CHARACTERS)}
    assert config["decode"] == {str(i): c for i, c in enumerate(CHARACTERS)}


def test_the_scale_of_akash_is_exported_with_his_mask(tmp_path):
    made = in_memory(attention_scale=10**-0.5)
    FORMAT.write(made, tmp_path / "out", "float32")
    weights = torch.load(tmp_path / "out" / "held.pt")
    assert list(weights) == list(layout(SHAPE, "trill"))
    assert torch.allclose(reference(weights, SHAPE, IDS, "trill"), made.model.predict(IDS), atol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [{"bias": False}, {"head_bias": False}, {"tie_embeddings": True, "head_bias": False}, {"vocab_size": 15}],
    ids=str,
)
def test_what_quillgpt_lacks_is_exported_as_equal_tensors(tmp_path, shape):
    made = in_memory(**shape)
    assert FORMAT.refusal(made.model.shape, made.tokenizer) is None
    notes = FORMAT.write(made, tmp_path / "out", "float32")
    assert len(notes) > 1
    weights = torch.load(tmp_path / "out" / "held.pt")
    assert {n: tuple(t.shape) for n, t in weights.items()} == layout(SHAPE)
    assert torch.allclose(reference(weights, SHAPE, IDS), made.model.predict(IDS)[..., :12], atol=1e-5)


@pytest.mark.parametrize("shape", [{}, {"attention_scale": 10**-0.5}], ids=str)
def test_an_export_imports_to_the_same_model(tmp_path, shape):
    made = in_memory(**shape)
    FORMAT.write(made, tmp_path / "out", "float32")
    back = FORMAT.read(tmp_path / "out", NOTHING)
    assert back.model == made.config.model
    assert back.tokenizer.fingerprint == made.tokenizer.fingerprint
    assert set(back.weights) == set(made.model.state_dict())
    assert all(torch.equal(t, back.weights[n]) for n, t in made.model.state_dict().items())


REFUSED: dict[str, dict[str, Any]] = {
    "modern": {"block": "modern"},
    "bigram": {"n_layer": 0},
    "gelu": {"activation": "gelu"},
    "biases": {"qkv_bias": True},
    "head_size": {"head_size": 3},
    "mlp_size": {"mlp_size": 16},
    "attention_scale": {"attention_scale": 0.3},
    "norm_eps": {"norm_eps": 1e-6},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_quillgpt_lacks_is_refused_by_name(name):
    settings = {"n_head": 2, "n_embd": 8, "n_layer": 2}
    if name != "modern":
        settings |= {"block": "gpt2", "activation": "relu", "qkv_bias": False}
    config = reading.check(ModelConfig, settings | REFUSED[name], origin="a test")
    why = FORMAT.refusal(config.shape(len(CHARACTERS)), CharTokenizer(CHARACTERS))
    assert why
    assert name in why


def test_other_tokenizers_are_refused():
    from quill.tokenizers.word import WordTokenizer

    made = in_memory()
    assert "word" in (FORMAT.refusal(made.model.shape, WordTokenizer.train(["some words"])) or "")
