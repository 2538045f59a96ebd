"""The Hugging Face format against transformers: logits, text, folders that it saved, and hostile ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from quill.checkpoint.load import load_checkpoint
from quill.checkpoint.weights import save_tensors
from quill.config import reading
from quill.config.settings import ModelConfig, SampleConfig
from quill.errors import InputError, QuillError
from quill.formats import base, exporting, importing, plain_gpt2, tokenizer_json
from quill.generation.generator import Generator
from quill.model.gpt import GPT
from quill.registry.store import Registry
from quill.tokenizers._patterns import QWEN2
from quill.tokenizers.char import CharTokenizer

if TYPE_CHECKING:
    from quill.registry.version import Version

transformers = pytest.importorskip("transformers", reason="transformers, which loads what is written")

HF = base.load("hf")
NOTHING = base.Supplied()
GPT2: dict[str, Any] = {"block": "gpt2", "bias": True}
UNTIED: dict[str, Any] = {**GPT2, "tie_embeddings": False}
MODERN: dict[str, Any] = {"block": "modern"}
# What differs from a default, in every way that a model of each family can.
VARIANTS: dict[str, dict[str, Any]] = {
    "gelu": GPT2,
    "gelu_tanh": {**GPT2, "activation": "gelu_tanh"},
    "relu": {**GPT2, "activation": "relu"},
    "relu2": {**GPT2, "activation": "relu2"},
    "no-bias": {**GPT2, "bias": False},
    "no-qkv-bias": {**GPT2, "qkv_bias": False},
    "untied": UNTIED,
    "head-bias": {**UNTIED, "head_bias": True},
    "odd-heads": {**GPT2, "n_head": 3, "head_size": 10},
    "odd-heads-no-bias": {**GPT2, "bias": False, "n_head": 3, "head_size": 10, "tie_embeddings": False},
    "narrow-heads": {**GPT2, "head_size": 5},
    "wide-heads": {**GPT2, "head_size": 24},
    "scale": {**GPT2, "attention_scale": 32**-0.5},
    "quillgpt": {**UNTIED, "qkv_bias": False, "activation": "relu", "head_bias": True, "n_head": 3,
                 "head_size": 10},
    "akash": {**UNTIED, "head_bias": True, "attention_scale": 32**-0.5, "activation": "relu"},
    "eps": {**GPT2, "norm_eps": 0.03, "n_head": 5, "head_size": 6},
    "mlp": {**GPT2, "mlp_size": 50},
    "padded": {**GPT2, "vocab_size": 96},
    "bigram": {"n_layer": 0},
    "bigram-gpt2": {"n_layer": 0, "block": "gpt2"},
    "modern": MODERN,
    "grouped": {**MODERN, "n_kv_head": 1, "head_size": 10},
    "modern-untied": {**MODERN, "tie_embeddings": False, "rope_theta": 5e5, "norm_eps": 1e-4},
    "modern-relu2": {**MODERN, "activation": "relu2"},
    "modern-relu": {**MODERN, "activation": "relu", "tie_embeddings": False},
    "modern-gelu": {**MODERN, "activation": "gelu", "n_kv_head": 1, "head_size": 10, "rope_theta": 500.0},
    "modern-gelu_tanh": {**MODERN, "activation": "gelu_tanh"},
}  # fmt: skip


def theirs_of(folder: Path) -> Any:
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def ours_of(found: base.Incoming) -> GPT:
    model = GPT(found.model.shape())
    model.load_state_dict({name: found.weights[name].float() for name in found.weights})
    return model.eval()


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def greedy(version: Version, folder: Path, prompt: str, n: int) -> tuple[str, str]:
    """What quill and transformers go on with from a text."""
    loaded = load_checkpoint(version)
    config = SampleConfig(temperature=0.0, max_new_tokens=n)
    ours = Generator(loaded.model, loaded.tokenizer).generate(prompt, config)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    made = theirs_of(folder).generate(**ids, do_sample=False, max_new_tokens=n)
    return ours, tokenizer.decode(made[0, ids["input_ids"].shape[1] :])


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same_logits_and_quill_reads_them_back(variant, publish, tmp_path):
    version = publish("gpt2", **{"block": "modern", "bias": False, **VARIANTS[variant]})
    loaded = load_checkpoint(version)
    ours, rows = loaded.model, loaded.tokenizer.vocab_size
    folder = exporting.export(version, "hf", tmp_path / "out").path
    theirs, back = theirs_of(folder), ours_of(HF.read(folder, NOTHING))
    assert type(theirs).__module__.startswith("transformers.models.")
    for length in (1, 7, 24):
        idx = torch.randint(rows, (2, length))
        with torch.inference_mode():
            logits = theirs(idx).logits
        wanted = ours.predict(idx)[..., :rows]
        assert wanted.std() > 0.1
        assert largest(logits, wanted) < 1e-4
        assert largest(back.predict(idx), wanted) < 1e-5


@pytest.mark.parametrize("variant", ["head-bias", "odd-heads", "quillgpt", "eps", "bigram"])
def test_what_is_rewritten_is_rewritten_exactly(variant):
    config = ModelConfig(
        n_embd=32, block_size=24, vocab_size=61, **{"n_head": 2, "n_layer": 2, **VARIANTS[variant]}
    )
    model = GPT(config.shape()).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    plain, weights, notes = plain_gpt2.rewrite(config.shape(), model.state_dict())
    assert not plain.head_bias and plain.n_head * plain.head_size == plain.n_embd
    assert notes
    again = GPT(plain).double()
    again.load_state_dict({n: t.double() for n, t in weights.items()})
    idx = torch.randint(61, (2, 24))
    # Not only nearly: in double precision what is left is that precision's rounding.
    limit = 1e-5 if variant == "bigram" else 1e-12
    assert largest(again.predict(idx), model.predict(idx)) < limit


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["quillgpt", "modern", "bigram"])
def test_every_dtype_is_kept_and_verified(variant, dtype, publish, tmp_path):
    version = publish("gpt2", **{"block": "modern", "bias": False, **VARIANTS[variant]})
    made = exporting.export(version, "hf", tmp_path / "out", dtype=dtype, verify=True)
    assert made.difference is not None
    assert str(theirs_of(made.path).dtype) == f"torch.{dtype}"
    kept = HF.read(made.path, NOTHING).weights
    assert {str(t.dtype) for t in kept.values()} == {f"torch.{dtype}"}


def test_weights_that_float16_cannot_hold_are_refused(publish, tmp_path):
    version = publish("gpt2")
    loaded = load_checkpoint(version)
    with torch.no_grad():
        loaded.model.h[0].ln_1.weight[0] = 1e6
    with pytest.raises(InputError, match="do not fit float16") as caught:
        HF.write(loaded, tmp_path / "out", "float16")
    assert "ln_1.weight" in caught.value.why
    assert "bfloat16" in caught.value.hint


def test_the_shipped_model_goes_on_with_the_same_text(root, tmp_path):
    version = Registry(root / "weights").resolve("shakespeare")
    folder = exporting.export(version, "hf", tmp_path / "out").path
    ours, theirs = greedy(version, folder, "ROMEO:\n", 120)
    assert len(ours) == 120
    assert theirs == ours


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Version:
    """A model of QuillGPT's kind, heads that do not fit and a head with a bias, that has learnt something."""
    from quill.data.prepare import prepare
    from quill.training.run import train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(tiny_text, encoding="utf-8")
    settings = {
        "data.source": "tiny", "model.n_layer": 1, "model.n_embd": 32, "model.block_size": 48,
        "train.batch_size": 8, "train.max_iters": 60, "train.eval_interval": 60, "train.warmup_iters": 0,
        "train.device": "cpu", "train.dtype": "float32", "train.compile": "off",
    }  # fmt: skip
    settings |= {f"model.{key}": value for key, value in VARIANTS["quillgpt"].items()}
    config = reading.parse({"name": "trained"}, settings, origin="the tests")
    prepare(config.data.model_copy(update={"source": str(folder / "text.txt")}), folder / "data", name="tiny")
    registry = Registry(folder / "weights")
    train(config, registry, folder / "data")
    return registry.resolve("trained")


def test_a_trained_gpt2_goes_on_with_the_same_text_and_evaluates_the_same(trained, tiny_text, tmp_path):
    folder = exporting.export(trained, "hf", tmp_path / "out").path
    ours, theirs = greedy(trained, folder, "12 bells, ", 36)
    assert theirs == ours
    back = load_checkpoint(importing.import_model(str(folder), Registry(tmp_path / "other"), name="back"))
    wanted = load_checkpoint(trained)
    ids = torch.tensor([wanted.tokenizer.encode(tiny_text[:480])]).view(-1, 48)
    assert back.tokenizer.fingerprint == wanted.tokenizer.fingerprint
    losses = [
        float(torch.nn.functional.cross_entropy(m.predict(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        for m in (wanted.model, back.model)
    ]
    assert losses[0] < 3
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
@pytest.mark.parametrize("shape", ["quillgpt", "modern"])
def test_text_goes_on_alike_with_every_tokenizer(shape, kind, publish, tokenizers, tmp_path):
    if kind not in tokenizers:
        pytest.skip("rustbpe is not installed")
    version = publish(shape, kind)
    folder = exporting.export(version, "hf", tmp_path / "out").path
    ours, theirs = greedy(version, folder, "The 3 seas", 12)
    assert ours and theirs == ours
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The 12 seas\n\n are  rough, said old Ahab; <|endoftext|>"
    text = "".join(c for c in text if kind == "bpe" or c in tokenizers["char"].to_dict()["vocabulary"])
    assert theirs(text)["input_ids"] == tokenizers[kind].encode(text)
    assert theirs.decode(tokenizers[kind].encode(text)) == text
    if kind == "bpe":
        assert theirs.eos_token_id == tokenizers[kind].eot_id
        assert theirs("<|endoftext|>", split_special_tokens=False)["input_ids"] == [theirs.eos_token_id]


def test_gpt2s_own_tokenizer_loads_with_its_model(publish, ranks, monkeypatch, tokenizers, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
    from quill.tokenizers.gpt2 import Gpt2Tokenizer

    gpt2 = Gpt2Tokenizer.train([])
    monkeypatch.setitem(tokenizers, "gpt2", gpt2)
    folder = exporting.export(publish("openai", "gpt2", n_embd=8), "hf", tmp_path / "out", verify=True).path
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = " Hello,  world!\n\n\nIt's 12345 😀 <|endoftext|> naïve"
    assert theirs(text)["input_ids"] == gpt2.encode(text)
    assert theirs.decode(gpt2.encode(text)) == text
    assert HF.read(folder, NOTHING).tokenizer.fingerprint == gpt2.fingerprint


@pytest.mark.parametrize("name", ["hf", "onnx"])
@pytest.mark.parametrize("shape", ["gpt2", "quillgpt", "untied", "bigram"])
def test_w12_rows_without_a_token_are_not_exported(shape, name, publish, tmp_path):
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    made = exporting.export(publish(shape, vocab_size=96), name, tmp_path / "out", verify=True)
    rows = load_checkpoint(publish(shape, name="b")).tokenizer.vocab_size
    assert any(f"{96 - rows} rows of the embedding without a token" in note for note in made.notes)
    assert json.loads((made.path / "config.json").read_text())["vocab_size"] == rows
    if name == "hf":
        assert HF.read(made.path, NOTHING).model.vocab_size == rows
        assert theirs_of(made.path).get_output_embeddings().weight.shape[0] == rows


def test_w12_transformers_draws_no_id_without_a_token(publish, tokenizers, tmp_path, monkeypatch):
    pytest.importorskip("rustbpe")
    from quill.tokenizers import base as kinds

    stored = tokenizers["bpe"].to_dict()
    size = len(stored["ranks"].split())
    gaps = kinds.read({**stored, "specials": {"<|endoftext|>": size + 60}})
    monkeypatch.setitem(tokenizers, "gaps", gaps)
    folder = exporting.export(publish("modern", "gaps", vocab_size=500), "hf", tmp_path / "out").path
    model, theirs = theirs_of(folder), transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    ids = model.generate(
        **theirs("The", return_tensors="pt"), do_sample=True, max_new_tokens=20, num_return_sequences=64
    )
    drawn = set(ids.flatten().tolist())
    assert len(drawn) > 100
    assert not drawn & set(range(size, size + 60)) and max(drawn) <= size + 60


@pytest.mark.parametrize("block_size", [1, 2, 24])
@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_the_card_has_the_hubs_metadata_and_code_that_runs(kind, block_size, publish, tokenizers, tmp_path):
    if kind not in tokenizers:
        pytest.skip("rustbpe is not installed")
    folder = exporting.export(publish("gpt2", kind, block_size=block_size), "hf", tmp_path / "out").path
    card = (folder / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert front.splitlines() == [
        "library_name: transformers", "license: unknown", "pipeline_tag: text-generation", "tags:", "- quill",
        "- GPT2LMHeadModel",
    ]  # fmt: skip
    code = text.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert ("drops characters" in text) == (kind == "char") and ("<unk>" in text) == (kind == "word")


def test_transformers_drops_characters_that_a_char_tokenizer_does_not_know(publish, tokenizers, tmp_path):
    folder = exporting.export(publish("gpt2"), "hf", tmp_path / "out").path
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The ☃ seas\x00 are 日本"
    assert theirs(text)["input_ids"] == tokenizers["char"].encode(text, unknown="skip")


# Folders that transformers saved.


@pytest.fixture
def char() -> CharTokenizer:
    return CharTokenizer.train(["abcdefghijklmnopqrstuvwxyz .,\n"])


def saved(folder: Path, config: Any, tokenizer: Any, **how: Any) -> Any:
    """A random model as transformers saves it."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    model.save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json.write(tokenizer)))
    return model


def gpt2_config(**changed: Any) -> Any:
    return transformers.GPT2Config(
        **{"vocab_size": 30, "n_positions": 20, "n_embd": 24, "n_layer": 2, "n_head": 3, **changed},
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def qwen3_config(**changed: Any) -> Any:
    return transformers.Qwen3Config(
        **{"vocab_size": 30, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 20,
           **changed},
    )  # fmt: skip


CONFIGS = {
    "gpt2": lambda: gpt2_config(),
    "gpt2-untied": lambda: gpt2_config(tie_word_embeddings=False, activation_function="gelu", n_inner=50),
    "gpt2-unscaled": lambda: gpt2_config(scale_attn_weights=False, layer_norm_epsilon=1e-3),
    "qwen3-tied": lambda: qwen3_config(tie_word_embeddings=True),
    "qwen3": lambda: qwen3_config(
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saved_is_read(name, sharded, char, tmp_path):
    folder = tmp_path / "saved"
    how = {"max_shard_size": "8KB"} if sharded else {}
    theirs = saved(folder, CONFIGS[name](), char, **how)
    assert (folder / "model.safetensors").exists() != sharded
    assert HF.recognises(folder)
    version = importing.import_model(str(folder), Registry(tmp_path / "weights"), name="theirs")
    ours = load_checkpoint(version)
    idx = torch.randint(30, (2, 20))
    with torch.inference_mode():
        assert largest(ours.model.predict(idx), theirs(idx).logits) < 1e-5
    assert ours.tokenizer.fingerprint == char.fingerprint
    again = exporting.export(version, "hf", tmp_path / "again", verify=True)
    assert again.difference is not None and again.difference.largest < 1e-4


def rewritten(folder: Path, change: Any, name: str = "model.safetensors") -> None:
    """Change the tensors of a file by names."""
    found = dict(HF_FOLDER(folder).tensors())
    found = {n: t.clone() for n, t in found.items()}
    save_tensors(folder / name, change(found))


def HF_FOLDER(folder: Path) -> Any:
    from quill.formats.hf.folder import Folder

    return Folder(folder)


def old(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As OpenAI's first checkpoints are: no prefix, and masks among the weights."""
    bare = {n.removeprefix("transformer."): t for n, t in found.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20).tril() for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return {**bare, **masks, "lm_head.weight": bare["wte.weight"].clone()}


def test_old_names_and_masks_and_a_tied_head_written_out_are_read(char, tmp_path):
    theirs = saved(tmp_path, gpt2_config(), char)
    rewritten(tmp_path, old)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stated, "architectures": ["GPT2Model"]}))
    ours = ours_of(HF.read(tmp_path, NOTHING))
    idx = torch.randint(30, (2, 20))
    with torch.inference_mode():
        assert largest(ours.predict(idx), theirs(idx).logits) < 1e-5


def same_logits(folder: Path) -> None:
    """transformers and quill compute the same for a folder."""
    theirs, ours = theirs_of(folder), ours_of(HF.read(folder, NOTHING))
    idx = torch.randint(30, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert largest(ours.predict(idx), theirs(idx).logits) < 1e-5


@pytest.mark.parametrize("stored", ["other", "same", "half", "alone"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3-tied"])
def test_w8_a_tied_model_has_the_head_that_transformers_gives_it(name, stored, char, tmp_path):
    saved(tmp_path, CONFIGS[name](), char)

    def with_head(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        key = next(n for n in found if n.endswith(("wte.weight", "embed_tokens.weight")))
        table = found.pop(key) if stored == "alone" else found[key]
        head = {"other": torch.randn_like(table), "half": table.half()}.get(stored, table.clone())
        return {**found, "lm_head.weight": head}

    rewritten(tmp_path, with_head)
    same_logits(tmp_path)
    found = HF.read(tmp_path, NOTHING)
    untied = stored in ("other", "half")
    assert found.model.tie_embeddings != untied
    assert any("untied" in note for note in found.notes) == untied


def test_w8_a_stored_head_of_another_size_is_refused(char, tmp_path):
    saved(tmp_path, gpt2_config(), char)
    rewritten(tmp_path, lambda found: {**found, "lm_head.weight": torch.randn(34, 24)})
    with pytest.raises(QuillError) as caught:
        importing.import_model(str(tmp_path), Registry(tmp_path / "weights"), name="x")
    assert "lm_head.weight" in caught.value.why and caught.value.exit_code == 5


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({"rope_parameters": PLAIN, "rope_scaling": YARN}, "yarn"),
        ({"rope_parameters": YARN, "rope_scaling": PLAIN}, "yarn"),
        ({"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "default", "rope_theta": 77.0}}, "several"),
        ({"rope_parameters": PLAIN, "rope_theta": 77.0}, "several"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"full_attention": PLAIN}}, "between layers"),
        ({"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": PLAIN}, None),
        ({"rope_parameters": PLAIN, "rope_scaling": None, "rope_theta": 5e5}, None),
        ({"rope_parameters": None, "rope_theta": 5e5}, None),
        ({"rope_parameters": None, "rope_scaling": PLAIN}, None),
        ({"rope_parameters": None, "rope_scaling": {"type": "default"}, "rope_theta": 300.0}, None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 300.0}, None),
        ({"rope_parameters": None}, None),
        ({"rope_parameters": {}}, None),
    ],
)
def test_w9_rotary_positions_are_those_of_transformers_or_refused(changed, refused, char, tmp_path):
    saved(tmp_path, qwen3_config(), char)
    stated(tmp_path, "config.json", **changed)
    if refused is None:
        same_logits(tmp_path)
        return
    with pytest.raises(InputError, match="does not support") as caught:
        HF.read(tmp_path, NOTHING)
    assert refused in caught.value.why


@pytest.mark.parametrize("how", ["missing", "null"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "qwen3-128", "apertus"])
def test_w18_a_missing_setting_means_what_it_means_to_transformers(name, how, char, tmp_path):
    configs = {
        **CONFIGS,
        "qwen3-128": lambda: qwen3_config(head_dim=128),
        "apertus": lambda: transformers.ApertusConfig(
            vocab_size=30, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            hidden_act="gelu", max_position_embeddings=20, rope_parameters=PLAIN, pad_token_id=None,
            bos_token_id=None, eos_token_id=None,
        ),
    }  # fmt: skip
    saved(tmp_path, configs[name](), char)
    sound = json.loads((tmp_path / "config.json").read_text())
    read = 0
    for key in sorted(set(sound) - {"architectures", "model_type", "transformers_version"}):
        changed = {k: v for k, v in sound.items() if k != key}
        changed |= {key: None} if how == "null" else {}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        try:
            version = importing.import_model(str(tmp_path), Registry(tmp_path / "weights" / key), name="x")
        except QuillError:
            # Refusing is always right; reading another model never is.
            continue
        try:
            theirs = theirs_of(tmp_path)
        except Exception:
            assert how == "null", key
            continue
        read += 1
        idx = torch.randint(30, (1, 20))
        with torch.inference_mode():
            assert largest(load_checkpoint(version).model.predict(idx), theirs(idx).logits) < 1e-5, key
    assert read >= (9 if how == "missing" else 3)


def added_token(i: int, content: str, special: bool, **rules: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special, **plain, **rules}


def learned(specials: tuple[str, ...] = ()) -> dict[str, Any]:
    """A tokenizer.json as the tokenizers library trains it."""
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(specials), show_progress=False,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(["the cat sat on the mat, and they're there"] * 5, trainer)
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def same_ids(folder: Path, texts: tuple[str, ...]) -> None:
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), HF.read(folder, NOTHING).tokenizer
    for text in texts:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == ids == ours.encode_array(text).tolist()
        assert ours.decode(ids) == theirs.decode(ids) == text


NOTED = ("the <note> cat<note></note>", "<note", "a<|endoftext|> the", "the  cat", "")


@pytest.mark.parametrize("first", [(), ("<|endoftext|>",), ("<|endoftext|>", "<pad>")])
@pytest.mark.parametrize("ordinary", [(), ("<note>", "</note>"), ("<note>", "<note></", "  ")])
def test_w10_w17_added_and_leading_special_tokens_have_the_ids_of_transformers(first, ordinary, tmp_path):
    document = learned(first)
    size = len(document["model"]["vocab"])
    document["added_tokens"] += [added_token(size + i, name, False) for i, name in enumerate(ordinary)]
    saved(tmp_path, gpt2_config(vocab_size=size + len(ordinary)), CharTokenizer.train(["ab"]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    version = importing.import_model(str(tmp_path), Registry(tmp_path / "weights"), name="x")
    same_ids(tmp_path, NOTED)
    assert (load_checkpoint(version).tokenizer.eot_id == 0) == bool(first)
    again = exporting.export(version, "hf", tmp_path / "again").path
    same_ids(again, NOTED)
    assert HF.read(again, NOTHING).tokenizer.fingerprint == HF.read(tmp_path, NOTHING).tokenizer.fingerprint


def test_w10_added_tokens_without_tokenizer_json(tmp_path):
    model = learned()["model"]
    size = len(model["vocab"])
    saved(tmp_path, gpt2_config(vocab_size=size + 3), CharTokenizer.train(["ab"]))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    listed = {
        str(size): added_token(size, "<|endoftext|>", True),
        str(size + 1): added_token(size + 1, "<note>", False),
        str(size + 2): added_token(size + 2, "</note>", False),
    }
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": listed,
        "eos_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    same_ids(tmp_path, NOTED)
    # As older folders have it.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    names = {"<|endoftext|>": size, "<note>": size + 1, "</note>": size + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    found = HF.read(tmp_path, NOTHING).tokenizer
    assert found.eot_id == size and found.encode("<note>a</note>") == [size + 1, *found.encode("a"), size + 2]


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json"])
def test_w11_a_space_before_every_text_is_refused_wherever_it_is_stated(where, files, tmp_path):
    document = learned()
    saved(tmp_path, gpt2_config(vocab_size=290), CharTokenizer.train(["ab"]))
    document["pre_tokenizer"]["add_prefix_space"] = where == "tokenizer.json"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    stated(tmp_path, "tokenizer_config.json", add_prefix_space=where == "tokenizer_config.json")
    if files == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(" ".join(p) for p in document["model"]["merges"]))
        if where == "tokenizer.json":
            same_ids(tmp_path, ("the cat", " the cat"))
            return
    with pytest.raises(InputError, match="does not support") as caught:
        HF.read(tmp_path, NOTHING)
    assert "space before every text" in caught.value.why


def test_one_file_of_weights_is_read_with_what_lies_beside_it(char, tmp_path):
    saved(tmp_path, qwen3_config(), char)
    (tmp_path / "model.safetensors").rename(tmp_path / "best.safetensors")
    assert HF.recognises(tmp_path / "best.safetensors")
    assert HF.read(tmp_path / "best.safetensors", NOTHING).model.n_layer == 2
    elsewhere = tmp_path / "elsewhere.json"
    (tmp_path / "config.json").rename(elsewhere)
    with pytest.raises(InputError, match=r"no config\.json") as caught:
        HF.read(tmp_path / "best.safetensors", NOTHING)
    assert "config=" in caught.value.hint
    found = HF.read(tmp_path / "best.safetensors", base.Supplied(config=elsewhere))
    assert found.model.n_layer == 2


def test_a_tokenizer_of_either_kind_may_be_given(char, tmp_path):
    saved(tmp_path, gpt2_config(), char)
    theirs, own = tmp_path / "theirs.json", tmp_path / "own.json"
    (tmp_path / "tokenizer.json").rename(theirs)
    own.write_text(json.dumps(char.to_dict()))
    with pytest.raises(InputError, match="no tokenizer") as caught:
        HF.read(tmp_path, NOTHING)
    assert "tokenizer=" in caught.value.hint
    for given in (theirs, own):
        assert (
            HF.read(tmp_path, base.Supplied(tokenizer=str(given))).tokenizer.fingerprint == char.fingerprint
        )


def test_vocabulary_and_merges_do_without_tokenizer_json(tokenizers, tmp_path):
    if "bpe" not in tokenizers:
        pytest.skip("rustbpe is not installed")
    bpe = base_of(tokenizers["bpe"], QWEN2)
    saved(tmp_path, qwen3_config(vocab_size=bpe.vocab_size), bpe)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *model["merges"], ""]))
    added = {str(bpe.eot_id): {"content": "<|endoftext|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert HF.read(tmp_path, NOTHING).tokenizer.fingerprint == bpe.fingerprint


def base_of(bpe: Any, pattern: str) -> Any:
    from quill.tokenizers import base as kinds

    return kinds.read({**bpe.to_dict(), "pattern": pattern})


def test_another_end_of_text_is_told_of(tokenizers, tmp_path):
    if "bpe" not in tokenizers:
        pytest.skip("rustbpe is not installed")
    saved(tmp_path, qwen3_config(vocab_size=tokenizers["bpe"].vocab_size, eos_token_id=65), tokenizers["bpe"])
    assert "end with 'A'" in HF.read(tmp_path, NOTHING).notes[0]


@pytest.mark.parametrize(
    ("config", "changed", "why"),
    [
        ("gpt2", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "LlamaForCausalLM"),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "Classification"),
        ("gpt2", {"activation_function": "swish"}, "swish"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3", {"hidden_act": "relu"}, "with a gate"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rotary"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "whole context"),
    ],
)
def test_what_quill_does_not_compute_is_refused(config, changed, why, char, tmp_path):
    saved(tmp_path, CONFIGS[config](), char)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stated, **changed}))
    with pytest.raises(InputError, match="does not support") as caught:
        HF.read(tmp_path, NOTHING)
    assert why in caught.value.why


def test_bigrams_of_many_tokens_are_refused_before_anything_is_written(char):
    config = ModelConfig(n_layer=0, vocab_size=50257)
    assert "4,096" in str(HF.refusal(config.shape(), char))
    assert HF.refusal(config.model_copy(update={"vocab_size": 65}).shape(), char) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak of memory from")
def test_a_large_model_is_imported_in_the_memory_it_takes(char, tmp_path):
    saved(tmp_path / "large", gpt2_config(n_embd=512, n_layer=6, n_head=8), char)
    saved(tmp_path / "small", gpt2_config(), char)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 75e6
    code = (
        "import re, sys; from pathlib import Path; import torch;"
        "from quill.formats import importing; from quill.registry.store import Registry;"
        "status = Path('/proc/self/status');"
        "gauge = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', status.read_text())[1]) * 1024;"
        "folder, registry = Path(sys.argv[1]), Registry(Path(sys.argv[2]));"
        "importing.import_model(str(folder / 'small'), registry, name='small'); before = gauge();"
        "importing.import_model(str(folder / 'large'), registry, name='large'); print(gauge() - before)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "weights")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    # Each tensor once: those to be written, and the one that is being read.
    assert 0 < int(done.stdout) < 1.2 * size


# F47: folders that mean harm.


@pytest.fixture
def folder(char, tmp_path) -> Path:
    saved(tmp_path / "model", gpt2_config(), char)
    return tmp_path / "model"


def refused(folder: Path, code: int = 5) -> QuillError:
    before = time.monotonic()
    with pytest.raises(QuillError) as caught:
        importing.import_model(str(folder), Registry(folder.parent / "weights"), format_name="hf")
    assert time.monotonic() - before < 5
    assert caught.value.exit_code == code, caught.value
    assert not Registry(folder.parent / "weights").entries()
    return caught.value


def stated(folder: Path, name: str, **changed: Any) -> None:
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **changed}))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_f47_code_that_comes_with_a_model_never_runs(name, folder):
    (folder / "modeling_evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    stated(
        folder, name, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.C"}
    )
    error = refused(folder)
    assert "auto_map" in error.why and "modeling_evil" in error.why
    assert not (folder / "ran").exists()


def test_f47_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    error = refused(folder)
    assert "pickle" in error.what and "save_pretrained" in error.hint
    (folder / "pytorch_model.bin").unlink()
    assert "no weights" in refused(folder).what


@pytest.fixture
def shards(char, tmp_path) -> Path:
    saved(tmp_path / "model", gpt2_config(), char, max_shard_size="8KB")
    return tmp_path / "model"


def test_f47_a_missing_shard(shards):
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in refused(shards).what


def test_f47_a_shard_without_a_tensor_that_the_index_lists(shards):
    one, other = sorted(shards.glob("model-*.safetensors"))[:2]
    one.write_bytes(other.read_bytes())
    assert "is damaged" in refused(shards).what


@pytest.mark.parametrize(
    "place",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "", ".", "..",
     "x\0.safetensors", "pytorch_model.bin", 7, None, ["x"]],
)  # fmt: skip
def test_f47_an_index_with_paths(shards, place):
    one = sorted(shards.glob("model-*.safetensors"))[0]
    (shards.parent / "secret.safetensors").write_bytes(one.read_bytes())
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = place
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(shards)


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b"\x80"])
def test_f47_an_index_that_is_none(shards, index):
    (shards / "model.safetensors.index.json").write_bytes(index)
    refused(shards)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_f47_links_out_of_the_folder_are_not_followed(folder, name):
    outside = folder.parent / name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert "link" in refused(folder).what
    (folder / name).unlink()
    # Within the folder a link is as good as the file.
    outside.rename(folder / f"real-{name}")
    (folder / name).symlink_to(f"real-{name}")
    assert HF.read(folder, NOTHING).model.n_layer == 2
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert "link" in refused(folder).what


def test_f47_the_hubs_own_links_are_followed_and_no_others(folder):
    snapshot = folder.parent / "hub" / "models--org--x" / "snapshots" / ("a" * 40)
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert HF.recognises(snapshot)
    version = importing.import_model(str(snapshot), Registry(folder.parent / "ok"), name="x")
    assert load_checkpoint(version).config.model.n_layer == 2
    (blobs / "blob-model.safetensors").rename(snapshot.parent / "elsewhere")
    (blobs / "blob-model.safetensors").symlink_to("../snapshots/elsewhere")
    assert "link" in refused(snapshot).what


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", (2**63).to_bytes(8, "little") + b"{}", (100 << 20).to_bytes(8, "little") + b"{" * 64,
     b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"<!DOCTYPE html>" + b" " * 600],
    ids=["empty", "short", "2^63", "100MB", "lfs", "html"],
)  # fmt: skip
def test_f47_weights_that_are_none(folder, raw):
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder)


def test_f47_a_shape_that_the_weights_have_not(folder):
    for changed in (
        {"n_layer": 10**6},
        {"n_layer": 0},
        {"n_embd": 2**19, "n_head": 2},
        {"vocab_size": 2**24},
    ):
        stated(folder, "config.json", **changed)
        refused(folder)
        stated(folder, "config.json", n_layer=2, n_embd=24, n_head=3, vocab_size=30)
    assert HF.read(folder, NOTHING).model.n_layer == 2


@pytest.mark.parametrize("value", [None, -1, "6", 1.5, True, [], {}, [[]], "\ud800"])
def test_f47_whatever_a_config_holds_is_no_traceback(folder, value):
    sound = json.loads((folder / "config.json").read_text())
    for key in sound:
        (folder / "config.json").write_text(json.dumps({**sound, key: value}))
        try:
            HF.read(folder, NOTHING)
        except QuillError as e:
            assert e.exit_code in (2, 5)
    (folder / "config.json").write_text(json.dumps(value))
    with pytest.raises(QuillError) as caught:
        HF.read(folder, NOTHING)
    assert caught.value.exit_code in (2, 5)


def test_a_folder_that_is_not_of_transformers_is_not_recognised(tmp_path, root):
    (tmp_path / "config.json").write_text('{"model": {"n_layer": 1}}')
    (tmp_path / "model.safetensors").touch()
    assert not HF.recognises(tmp_path)
    assert not HF.recognises(root / "weights" / "shakespeare" / "v1")
    assert not HF.recognises(tmp_path / "model.safetensors")
    assert not HF.recognises(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert not HF.recognises(tmp_path)


def test_without_transformers_verifying_says_what_to_install(publish, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="transformers") as caught:
        exporting.export(publish("gpt2"), "hf", tmp_path / "out", verify=True)
    assert caught.value.hint == "pip install transformers"
    assert exporting.export(publish("gpt2", name="b"), "hf", tmp_path / "out").path.is_dir()


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_transformers_generates_a_batch_of_texts_of_several_lengths(
    kind, block, publish, tokenizers, tmp_path
):
    """The shorter ones are filled up; each is continued as alone."""
    version = publish(block, kind)
    HF.write(load_checkpoint(version), tmp_path / "hf", "float32")
    model = theirs_of(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.pad_token_id < model.config.vocab_size == len(tokenizer)
    texts = ["The", "A\nsea and\n", "old"]
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    found = model.generate(**batch, **options)
    for text, ids in zip(texts, found, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0]
        assert ids[-len(alone) :].tolist() == alone.tolist()
        assert alone[: -options["max_new_tokens"]].tolist() == tokenizers[kind].encode(text)
        # A symbol in the place of a padding token is the only one that is left out.
        shown = tokenizer.decode(alone, skip_special_tokens=True)
        assert shown == tokenizers[kind].decode(alone.tolist()).replace(tokenizer.pad_token, "")
    assert tokenizer.pad_token == {"char": "😀", "word": "<unk>"}[kind]


def test_fine_tuning_has_the_losses_of_transformers(char, tmp_path):
    """Before a step, and after one of AdamW that decays matrices alone, with gradients that are clipped."""
    from quill.data.batches import batch
    from quill.data.dataset import Dataset
    from quill.training.events import Stepped
    from quill.training.run import train

    theirs = saved(tmp_path / "saved", gpt2_config(), char)
    registry = Registry(tmp_path / "weights")
    importing.import_model(str(tmp_path / "saved"), registry, name="theirs")
    (tmp_path / "text.txt").write_text("the tide is in, and the bells are rung.\n" * 30)
    own = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    settings = {
        "data.source": str(tmp_path / "text.txt"), "train.init_from": "theirs", "train.batch_size": 3,
        "train.optimizer": "adamw", "train.learning_rate": own["lr"], "train.schedule": "constant",
        "train.beta1": 0.9, "train.beta2": 0.95, "train.weight_decay": 0.1, "train.grad_clip": 0.1,
        "train.warmup_iters": 0, "train.max_iters": 2, "train.eval_interval": 2, "train.device": "cpu",
        "train.dtype": "float32", "train.compile": "off",
    }  # fmt: skip
    config = reading.parse({"name": "tuned"}, settings, origin="the tests")
    found: list[Any] = []
    train(config, registry, tmp_path / "data", observer=found.append)
    ours = [event.loss for event in found if isinstance(event, Stepped)]

    [folder] = [path.parent for path in (tmp_path / "data").glob("*/manifest.json")]
    tokens = Dataset.open(folder).train
    parameters = list(theirs.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, **own)
    wanted = []
    for step in range(2):
        x, y = batch(tokens, seed=config.train.seed, step=step, batch_size=3, block_size=20)
        loss = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        wanted.append(loss.item())
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(parameters, 0.1) > 0.1
        adamw.step()
        adamw.zero_grad()
    assert ours == pytest.approx(wanted, abs=1e-4)
    assert abs(wanted[1] - wanted[0]) > 0.01, "the step must show"
