"""nanoGPT's checkpoints: what its train.py writes, and what its sample.py and train.py read."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quill.checkpoint.load import Checkpoint
from quill.config import reading
from quill.config.settings import ModelConfig, RunConfig
from quill.errors import CorruptError, InputError, NotFoundError
from quill.formats import base
from quill.formats.nanogpt import NanoGPT
from quill.model.gpt import GPT
from quill.registry.manifest import UNKNOWN
from quill.registry.version import Version
from quill.tokenizers.char import CharTokenizer

CHARACTERS = "\n !abcdefghß"
META = {
    "vocab_size": len(CHARACTERS),
    "itos": dict(enumerate(CHARACTERS)),
    "stoi": {c: i for i, c in enumerate(CHARACTERS)},
}
ARGUMENTS = {
    "n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6, "bias": True,
    "vocab_size": len(CHARACTERS), "dropout": 0.25,
}  # fmt: skip
FORMAT = NanoGPT()
NOTHING = base.Supplied()


def layout(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of nanoGPT's state dict, in its order."""
    C, names = arguments["n_embd"], {}
    modules = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "ln_2": (C,)}
    modules |= {"mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    names["transformer.wte.weight"] = (arguments["vocab_size"], C)
    names["transformer.wpe.weight"] = (arguments["block_size"], C)
    for i in range(arguments["n_layer"]):
        for module, shape in modules.items():
            names[f"transformer.h.{i}.{module}.weight"] = shape
            if arguments["bias"]:
                names[f"transformer.h.{i}.{module}.bias"] = shape[:1]
    names["transformer.ln_f.weight"] = (C,)
    if arguments["bias"]:
        names["transformer.ln_f.bias"] = (C,)
    names["lm_head.weight"] = (arguments["vocab_size"], C)
    return names


def state(arguments: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = {n: torch.randn(s, generator=generator) * 0.3 for n, s in layout(arguments).items()}
    drawn["lm_head.weight"] = drawn["transformer.wte.weight"]
    return drawn


def save(folder: Path, arguments: dict[str, Any] | None = None, **changes: Any) -> Path:
    """What nanoGPT's train.py saves."""
    arguments = arguments or ARGUMENTS
    folder.mkdir(parents=True, exist_ok=True)
    weights = state(arguments)
    parameters = [torch.nn.Parameter(t) for n, t in weights.items() if n != "lm_head.weight"]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    sum((p * p).sum() for p in parameters).backward()
    optimizer.step()
    document = {
        "model": weights,
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.25),
        "config": {"dataset": "chars", "out_dir": "out", "compile": False, "learning_rate": 1e-3},
    }
    document |= changes
    torch.save({k: v for k, v in document.items() if v is not None}, folder / "ckpt.pt")
    return folder


def meta(path: Path, value: Any = META) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
    return path


def reference(weights: dict[str, Tensor], arguments: dict[str, Any], idx: Tensor) -> Tensor:
    """nanoGPT's model in plain torch, with attention written out."""
    B, T = idx.shape
    C, H = arguments["n_embd"], arguments["n_head"]
    get = {n.removeprefix("transformer."): t for n, t in weights.items()}.get

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    x = get("wte.weight")[idx] + get("wpe.weight")[:T]
    future = torch.ones(T, T).triu(1).bool()
    for i in range(arguments["n_layer"]):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, dim=2)
        q, k, v = (t.view(B, T, H, C // H).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(C // H)
        y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).reshape(B, T, C), f"h.{i}.attn.c_proj")
        hidden = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ get("lm_head.weight").T


def build(incoming: base.Incoming) -> GPT:
    model = GPT(incoming.model.shape())
    model.load_state_dict(dict(incoming.weights))
    return model


def in_memory(tokenizer: Any = None, steps: int | None = None, **model: Any) -> Checkpoint:
    """A model in memory whose settings all differ from the defaults."""
    tokenizer = tokenizer or CharTokenizer(CHARACTERS)
    shape = {"block": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6, "dropout": 0.25}
    shape |= {"vocab_size": tokenizer.vocab_size, **model}
    config = reading.check(RunConfig, {"name": "held", "model": shape}, origin="a test")
    network = GPT(config.model.shape()).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    manifest = UNKNOWN | {"steps": steps, "best_val_loss": 1.75} if steps is not None else None
    return Checkpoint(config, network, tokenizer, Version("held", 1, Path("held"), manifest))


IDS = torch.tensor([[1, 5, 3, 0, 2, 11], [4, 4, 1, 7, 9, 10]])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_an_imported_checkpoint_computes_the_same_logits(tmp_path, bias, prefix):
    arguments = ARGUMENTS | {"bias": bias}
    weights = state(arguments)
    folder = save(tmp_path, arguments, model={prefix + n: t for n, t in weights.items()})
    meta(folder / "meta.pkl")
    for path in (folder, folder / "ckpt.pt"):
        assert FORMAT.recognises(path)
        incoming = FORMAT.read(path, NOTHING)
        logits = build(incoming).predict(IDS)
        assert torch.allclose(logits, reference(weights, arguments, IDS), atol=1e-5)
        config = incoming.model
        assert (config.activation, config.tie_embeddings, config.bias, config.qkv_bias) == (
            "gelu",
            True,
            bias,
            bias,
        )
        assert (config.dropout, config.n_head, config.block_size) == (0.25, 2, 6)
        assert incoming.tokenizer.decode(range(len(CHARACTERS))) == CHARACTERS
        assert incoming.facts == {"steps": 250, "best_val_loss": 1.25}


def test_two_names_for_one_tensor_are_refused(tmp_path):
    weights = state(ARGUMENTS)
    weights["module.transformer.ln_f.weight"] = weights["transformer.ln_f.weight"].clone()
    meta(save(tmp_path, model=weights) / "meta.pkl")
    with pytest.raises(CorruptError) as caught:
        FORMAT.read(tmp_path, NOTHING)
    assert caught.value.why == "it has two tensors for 'ln_f.weight'"


def test_a_namespace_and_numpy_scalars_are_read_as_plain_values(tmp_path):
    run = argparse.Namespace(dataset="chars", learning_rate=np.float64(1e-3))
    folder = save(tmp_path / "out", config=run, iter_num=np.int64(250), best_val_loss=np.float32(1.25))
    meta(tmp_path / "data" / "chars" / "meta.pkl")
    incoming = FORMAT.read(folder, NOTHING)
    assert incoming.facts == {"steps": 250, "best_val_loss": 1.25}
    assert incoming.tokenizer.vocab_size == len(CHARACTERS)


def test_a_loss_that_is_not_finite_is_shown_nowhere(tmp_path, quill):
    meta(save(tmp_path / "chars", best_val_loss=float("nan")) / "meta.pkl")
    assert quill("import", str(tmp_path / "chars")).returncode == 0
    for arguments in (["list"], ["show", "chars"], ["compare", "chars", "chars"], ["list", "--json"]):
        done = quill(*arguments)
        assert done.returncode == 0
        assert not re.search(rb"\bnan\b", done.stdout, re.IGNORECASE)


def test_a_folder_with_ckpt_and_meta_imports_without_flags(tmp_path, quill):
    meta(save(tmp_path / "out-shakespeare-char") / "meta.pkl")
    done = quill("import", str(tmp_path / "out-shakespeare-char"))
    assert (done.returncode, done.stdout) == (0, b"out-shakespeare-char:v1\n"), done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_dtype(tmp_path, dtype):
    weights = {n: t.to(dtype) for n, t in state(ARGUMENTS).items()}
    meta(save(tmp_path, model=weights) / "meta.pkl")
    read = FORMAT.read(tmp_path, NOTHING).weights
    assert {t.dtype for t in read.values()} == {dtype}
    assert torch.equal(read["h.1.mlp.c_fc.weight"], weights["transformer.h.1.mlp.c_fc.weight"])


def test_the_masks_of_older_versions_are_dropped(tmp_path):
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 6, 6) for i in range(2)}
    meta(save(tmp_path, model=state(ARGUMENTS) | masks) / "meta.pkl")
    assert not [n for n in FORMAT.read(tmp_path, NOTHING).weights if n.endswith(".attn.bias")]


def test_a_head_equal_to_the_embedding_is_tied_and_any_other_is_kept(tmp_path):
    shared = state(ARGUMENTS)
    copied = shared | {"lm_head.weight": shared["lm_head.weight"].clone()}
    without = {n: t for n, t in shared.items() if n != "lm_head.weight"}
    for i, weights in enumerate((shared, copied, without)):
        meta(save(tmp_path / str(i), model=weights) / "meta.pkl")
        incoming = FORMAT.read(tmp_path / str(i), NOTHING)
        assert incoming.model.tie_embeddings
        assert "lm_head.weight" not in incoming.weights
    other = shared | {"lm_head.weight": shared["lm_head.weight"] + 1}
    meta(save(tmp_path / "own", model=other) / "meta.pkl")
    incoming = FORMAT.read(tmp_path / "own", NOTHING)
    assert not incoming.model.tie_embeddings
    assert any("head" in note for note in incoming.notes)
    assert torch.allclose(build(incoming).predict(IDS), reference(other, ARGUMENTS, IDS), atol=1e-5)


@pytest.mark.parametrize(
    "loss", [1.25, torch.tensor(1.25, dtype=torch.float64), None, 1e9, float("nan"), "x"]
)
def test_the_best_loss_is_recorded_if_it_is_finite(tmp_path, loss):
    meta(save(tmp_path, best_val_loss=loss) / "meta.pkl")
    best = FORMAT.read(tmp_path, NOTHING).facts.get("best_val_loss")
    assert best == (1.25 if isinstance(loss, Tensor) or loss == 1.25 else None)


def test_the_vocabulary_is_the_nearest_that_exists(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    folder = save(tmp_path / "nano" / "out")
    orders = [CHARACTERS[i:] + CHARACTERS[:i] for i in range(4)]
    metas = [META | {"itos": dict(enumerate(o)), "stoi": {c: i for i, c in enumerate(o)}} for o in orders]
    with pytest.raises(InputError, match="vocabulary") as caught:
        FORMAT.read(folder, NOTHING)
    assert "tokenizer=" in caught.value.hint
    places = [
        tmp_path / "work" / "data" / "chars" / "meta.pkl",
        tmp_path / "nano" / "data" / "chars" / "meta.pkl",
        folder / "meta.pkl",
    ]
    for place, values, order in zip(places, metas, orders, strict=False):
        meta(place, values)
        incoming = FORMAT.read(folder, NOTHING)
        assert incoming.tokenizer.decode(range(12)) == order
        assert str(tmp_path) not in " ".join(incoming.notes)
    given = meta(tmp_path / "given.pkl", metas[3])
    read = FORMAT.read(folder, base.Supplied(tokenizer=str(given)))
    assert read.tokenizer.decode(range(12)) == orders[3]


def test_the_vocabulary_can_be_read_from_the_text(tmp_path):
    save(tmp_path)
    text = tmp_path / "input.txt"
    # Windows' line ends are one newline to Python, and so to nanoGPT's prepare.py.
    text.write_bytes(("".join(reversed(CHARACTERS)) + "abc\r\n").encode())
    read = FORMAT.read(tmp_path, base.Supplied(tokenizer=str(text)))
    assert read.tokenizer.decode(range(12)) == CHARACTERS
    text.write_bytes((CHARACTERS + "z").encode())
    with pytest.raises(InputError, match="not the vocabulary") as caught:
        FORMAT.read(tmp_path, base.Supplied(tokenizer=str(text)))
    assert "13 tokens; the model has 12" in caught.value.why
    text.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="not UTF-8"):
        FORMAT.read(tmp_path, base.Supplied(tokenizer=str(text)))
    with pytest.raises(NotFoundError, match="no tokenizer 'nowhere'"):
        FORMAT.read(tmp_path, base.Supplied(tokenizer="nowhere"))


def test_the_vocabulary_of_another_run_is_not_used(tmp_path):
    folder = save(tmp_path / "out")
    meta(folder / "meta.pkl", {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}})
    with pytest.raises(InputError) as caught:
        FORMAT.read(folder, NOTHING)
    assert "12 tokens" in caught.value.why
    assert "meta.pkl has 2 characters" in caught.value.why
    meta(tmp_path / "data" / "chars" / "meta.pkl")
    assert FORMAT.read(folder, NOTHING).tokenizer.vocab_size == 12


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        META | {"itos": {0: "a"}},
        META | {"stoi": {}},
        META | {"itos": {i + 1: c for i, c in enumerate(CHARACTERS)}},
        META | {"itos": dict.fromkeys(range(12), "ab"), "stoi": {"ab": 0}},
        {"itos": {0: 1}, "stoi": {1: 0}},
        {"itos": {0: "\ud800"}, "stoi": {"\ud800": 0}},
        {"itos": {}, "stoi": {}},
        META | {"stoi": META["stoi"] | {"x": "y"}},
    ],
)
def test_an_invalid_vocabulary_is_refused(value, tmp_path):
    meta(save(tmp_path) / "meta.pkl", value)
    with pytest.raises(CorruptError, match="is not a vocabulary"):
        FORMAT.read(tmp_path, NOTHING)


@pytest.mark.parametrize("dataset", ["../secret", "/secret", "chars/../../secret", "", ".", 5, None, ["x"]])
def test_f44_a_dataset_cannot_lead_outside_the_data_folder(tmp_path, dataset):
    meta(tmp_path / "secret" / "meta.pkl")
    folder = save(tmp_path / "nano" / "out", config={"dataset": dataset})
    meta(tmp_path / "nano" / "secret" / "meta.pkl")
    (tmp_path / "nano" / "data" / "chars").mkdir(parents=True)
    with pytest.raises(InputError, match="vocabulary"):
        FORMAT.read(folder, NOTHING)


@pytest.mark.parametrize("rows", [50257, 50304])
def test_the_vocabulary_of_gpt2_needs_no_file(tmp_path, rows, ranks, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    arguments = ARGUMENTS | {"vocab_size": rows, "n_embd": 2, "n_layer": 1}
    folder = save(tmp_path, arguments, optimizer=None)
    incoming = FORMAT.read(folder, NOTHING)
    assert (incoming.tokenizer.kind, incoming.model.vocab_size) == ("gpt2", rows)
    meta(folder / "meta.pkl")
    incoming = FORMAT.read(folder, NOTHING)
    assert incoming.tokenizer.kind == "gpt2"
    assert any("meta.pkl has 12 characters" in note for note in incoming.notes)


CHANGES: dict[str, dict[str, Any]] = {
    "no weights": {"model": None},
    "weights that are none": {"model": {"transformer.wte.weight": 5}},
    "a list": {"model": [torch.zeros(2)]},
    "no embedding": {"model": {"transformer.wpe.weight": torch.zeros(6, 8)}},
    "an embedding of one dimension": {
        "model": state(ARGUMENTS) | {"transformer.wte.weight": torch.zeros(12)}
    },
    "no arguments": {"model_args": None},
    "no heads": {"model_args": {k: v for k, v in ARGUMENTS.items() if k != "n_head"}},
    "heads that do not divide": {"model_args": ARGUMENTS | {"n_head": 3}},
    "no head": {"model_args": ARGUMENTS | {"n_head": 0}},
    "heads of text": {"model_args": ARGUMENTS | {"n_head": "2"}},
    "more layers than there are": {"model_args": ARGUMENTS | {"n_layer": 2**31 - 1}},
    "another width": {"model_args": ARGUMENTS | {"n_embd": 16}},
    "no biases": {"model_args": ARGUMENTS | {"bias": False}},
    "too much dropout": {"model_args": ARGUMENTS | {"dropout": 2.0}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_that_contradicts_itself_is_refused(name, tmp_path):
    meta(save(tmp_path, **CHANGES[name]) / "meta.pkl")
    with pytest.raises(CorruptError):
        FORMAT.read(tmp_path, NOTHING)


def test_a_folder_without_a_checkpoint_is_refused_and_so_is_a_config(tmp_path):
    assert not FORMAT.recognises(tmp_path)
    with pytest.raises(NotFoundError, match=r"no ckpt\.pt"):
        FORMAT.read(tmp_path, NOTHING)
    with pytest.raises(InputError, match="config does not apply"):
        FORMAT.read(save(tmp_path), base.Supplied(config=tmp_path / "config.json"))


def test_f44_a_malicious_checkpoint_is_refused_and_nothing_runs(tmp_path, quill):
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    folder = save(tmp_path / "evil", config=Evil())
    meta(folder / "meta.pkl")
    done = quill("import", str(folder), "--name", "evil")
    assert (done.returncode, done.stdout) == (5, b"")
    assert b"not safe to read" in done.stderr
    assert b"system" in done.stderr
    assert b"Traceback" not in done.stderr
    meta(save(folder) / "meta.pkl", {"itos": Evil()})
    assert quill("import", str(folder), "--name", "evil").returncode == 5
    assert not mark.exists()
    assert quill("list", "-q").stdout == b""


@pytest.mark.parametrize(
    "shape", [{}, {"bias": True}, {"bias": True, "qkv_bias": False}, {"qkv_bias": True}], ids=str
)
def test_an_export_is_what_nanogpt_reads(tmp_path, shape):
    made = in_memory(steps=40, **shape)
    FORMAT.write(made, tmp_path / "out", "float32")
    # As sample.py and train.py do; torch reads weights alone by default.
    document = torch.load(tmp_path / "out" / "ckpt.pt", map_location="cpu")
    arguments = ARGUMENTS | {"bias": bool(shape)}
    assert document["model_args"] == arguments
    assert {n: tuple(t.shape) for n, t in document["model"].items()} == layout(arguments)
    assert list(document["model"]) == list(layout(arguments))
    ours = made.model.predict(IDS)
    assert torch.allclose(reference(document["model"], arguments, IDS), ours, atol=1e-5)
    assert (document["iter_num"], document["best_val_loss"]) == (40, 1.75)
    assert document["config"]["dataset"] == "held"
    assert pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes()) == META
    tied = document["model"]["lm_head.weight"], document["model"]["transformer.wte.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


def test_nanogpt_resumes_with_the_exported_optimizer(tmp_path):
    FORMAT.write(in_memory(steps=40, bias=True), tmp_path / "out", "float32")
    document = torch.load(tmp_path / "out" / "ckpt.pt")
    # As configure_optimizers groups them.
    model = {n: torch.nn.Parameter(t) for n, t in document["model"].items() if n != "lm_head.weight"}
    wide = [p for p in model.values() if p.dim() >= 2]
    narrow = [p for p in model.values() if p.dim() < 2]
    groups = [{"params": wide, "weight_decay": 0.5}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.5, 0.5))
    optimizer.load_state_dict(document["optimizer"])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    before = [p.clone() for p in model.values()]
    sum((p * p).sum() for p in model.values()).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.values(), strict=True))


@pytest.mark.parametrize("shape", [{}, {"bias": True}], ids=str)
def test_an_export_imports_to_the_same_model(tmp_path, shape):
    made = in_memory(steps=0, **shape)
    FORMAT.write(made, tmp_path / "out", "float32")
    back = FORMAT.read(tmp_path / "out", NOTHING)
    assert back.model == made.config.model
    assert back.facts == {"steps": 0, "best_val_loss": 1.75}
    assert back.tokenizer.fingerprint == made.tokenizer.fingerprint
    assert list(build(back).state_dict()) == list(made.model.state_dict())
    assert all(torch.equal(t, back.weights[n]) for n, t in made.model.state_dict().items())


def test_an_untrained_model_is_exported(tmp_path):
    FORMAT.write(in_memory(), tmp_path / "out", "float32")
    assert FORMAT.read(tmp_path / "out", NOTHING).facts == {"steps": 0}


def test_rows_without_a_character_are_left_out(tmp_path):
    made = in_memory(vocab_size=16)
    notes = FORMAT.write(made, tmp_path / "out", "float32")
    assert any("4 rows" in note for note in notes)
    back = FORMAT.read(tmp_path / "out", NOTHING)
    assert back.model.vocab_size == 12
    assert torch.allclose(build(back).predict(IDS), made.model.predict(IDS)[..., :12], atol=1e-6)


def test_a_model_with_the_vocabulary_of_gpt2_is_exported_without_meta(tmp_path, ranks, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    from quill.tokenizers.gpt2 import Gpt2Tokenizer

    made = in_memory(Gpt2Tokenizer.train([]), n_embd=2, n_layer=1, vocab_size=50400)
    assert FORMAT.refusal(made.model.shape, made.tokenizer) is None
    FORMAT.write(made, tmp_path / "out", "float32")
    assert os.listdir(tmp_path / "out") == ["ckpt.pt"]
    back = FORMAT.read(tmp_path / "out", NOTHING)
    assert (back.tokenizer.kind, back.model.vocab_size) == ("gpt2", 50400)


REFUSED: dict[str, dict[str, Any]] = {
    "modern": {"block": "modern"},
    "bigram": {"n_layer": 0},
    "relu": {"activation": "relu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "head_size": {"head_size": 3},
    "mlp_size": {"mlp_size": 16},
    "head": {"tie_embeddings": False},
    "head_bias": {"tie_embeddings": False, "head_bias": True},
    "attention_scale": {"attention_scale": 0.3},
    "norm_eps": {"norm_eps": 1e-6},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_nanogpt_lacks_is_refused_by_name(name):
    settings = {"block": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 6} | REFUSED[name]
    config = reading.check(ModelConfig, settings, origin="a test")
    why = FORMAT.refusal(config.shape(len(CHARACTERS)), CharTokenizer(CHARACTERS))
    assert why
    assert name.partition("_")[0] in why


def test_other_tokenizers_are_refused():
    from quill.tokenizers.word import WordTokenizer

    settings = {"block": "gpt2", "n_head": 2, "n_embd": 8, "attention_scale": 0.5}
    config = reading.check(ModelConfig, settings, origin="a test")
    assert FORMAT.refusal(config.shape(len(CHARACTERS)), CharTokenizer(CHARACTERS)) is None
    assert "word" in (FORMAT.refusal(config.shape(9), WordTokenizer.train(["some words"])) or "")
