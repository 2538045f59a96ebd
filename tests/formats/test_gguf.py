"""GGUF files against llama.cpp itself, against the gguf package, and against damage."""

from __future__ import annotations

import json
import logging
import struct
import sys
import time
import tracemalloc
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quill.checkpoint.load import Checkpoint, load_checkpoint
from quill.config.settings import ModelConfig, RunConfig, SampleConfig
from quill.errors import CorruptError, InputError, QuillError
from quill.formats import importing
from quill.formats.base import Supplied
from quill.formats.gguf import Gguf, tensor_types
from quill.formats.gguf.file import File
from quill.generation.generator import Generator
from quill.model.gpt import GPT, loss
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.tokenizers import base as tokenizers
from quill.tokenizers._patterns import CL100K
from quill.tokenizers.base import Tokenizer

GGUF = Gguf()
LOG = logging.getLogger(__name__)
# Of one, two, three and four bytes, with first bytes that known and unknown characters share; what llama.cpp
# writes for spaces; what splits text in all its patterns.
CHARACTERS = "\x00\t\n\r !'.?0129AEQTZ_aehilnorstuz\x7f\xa0éèßñÅЖשआक्षञ日本語“”—▁\ufeff\ufffd😀👍🏽🇬🇧"
TEXT = "'Tis so, said he: “é — 日本”.\n\n  12 Zeiten  (ñ) 😀's\n"
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"block": "gpt2", "bias": True},
    "gpt2-tanh": {"block": "gpt2", "bias": True, "activation": "gelu_tanh", "tie_embeddings": False},
    "gpt2-no-bias": {"block": "gpt2", "attention_scale": 0.11},
    "gpt2-no-qkv-bias": {"block": "gpt2", "bias": True, "qkv_bias": False, "n_embd": 48},
    "gpt2-relu": {"block": "gpt2", "bias": True, "activation": "relu"},
    "gpt2-relu-no-bias": {"block": "gpt2", "activation": "relu", "attention_scale": 0.1, "mlp_size": 40},
    "modern": {"n_kv_head": 1, "head_size": 24, "rope_theta": 1e6},
    "modern-untied": {"tie_embeddings": False, "norm_eps": 1e-5},
    "modern-relu2": {"activation": "relu2"},
    "padded": {"vocab_size": 100},
    "quillgpt": {
        "block": "gpt2", "bias": True, "qkv_bias": False, "activation": "relu", "tie_embeddings": False,
        "head_bias": True, "n_head": 3, "head_size": 21,
    },
    "narrow-heads": {"block": "gpt2", "head_size": 20},
    "bigram": {"n_layer": 0},
}  # fmt: skip
REWRITTEN = ("quillgpt", "narrow-heads", "bigram")


def model_of(tokenizer: Tokenizer, name: str = "made", **shape: Any) -> Checkpoint:
    """A model of random weights, large enough that a wrong one shows."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "vocab_size": tokenizer.vocab_size}
    config = ModelConfig(**{**sizes, **shape})
    network = GPT(config.shape()).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.12)
    return Checkpoint(RunConfig(model=config), network, tokenizer, Version(name, 1, Path(name)))


def taught(tokenizer: Tokenizer, text: str, **shape: Any) -> Checkpoint:
    """A model that has learnt a text by heart; of a large vocabulary only what is in it."""
    ids = torch.tensor(tokenizer.encode(text))
    used, ids = ids.unique(return_inverse=True)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 48, "block_size": 256}
    torch.manual_seed(0)
    small = GPT(ModelConfig(vocab_size=len(used), **sizes, **shape).shape())
    steps, window = 160, 256
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        at = int(torch.randint(len(ids) - window, (1,))) if step % 2 else 0
        piece = ids[None, at : at + window + 1]
        optimizer.zero_grad()
        loss(small(piece[:, :-1]), piece[:, 1:]).backward()
        optimizer.step()
        schedule.step()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **sizes, **shape)
    whole = GPT(config.shape()).eval()
    weights = small.state_dict()
    weights["wte.weight"] = torch.zeros_like(whole.wte.weight).index_copy(0, used, weights["wte.weight"])
    whole.load_state_dict(weights)
    return Checkpoint(RunConfig(model=config), whole, tokenizer, Version("taught", 1, Path("taught")))


def read(path: Path, tokenizer: str | None = None) -> tuple[GPT, Tokenizer]:
    """A file as a model, every weight looked at."""
    incoming = GGUF.read(path, Supplied(tokenizer=tokenizer))
    network = GPT(incoming.model.shape()).eval()
    network.load_state_dict({name: value.float() for name, value in incoming.weights.items()})
    return network, incoming.tokenizer


def complete(runtime: str, path: Path, prompt: str, length: int) -> str:
    """What a build of llama.cpp goes on with, always taking the likeliest token."""
    module = pytest.importorskip(runtime)
    if runtime == "llama_cpp":
        loaded = module.Llama(str(path), n_ctx=256, verbose=False)
        settings = {"max_tokens": length, "temperature": 0.0, "repeat_penalty": 1.0}
        return str(loaded.create_completion(prompt, **settings)["choices"][0]["text"])
    return str(served(path, prompt, length)["text"])


def served(path: Path, prompt: str, length: int, **more: Any) -> dict[str, Any]:
    """What llama.cpp's own server answers, which Ollama runs too."""
    module = pytest.importorskip("xllamacpp")
    options = module.CommonParams()
    options.model.path, options.n_ctx, options.verbosity = str(path), 256, -1
    if "logprobs" in more:
        # Keys and values would be rounded to float16.
        options.cache_type_k = options.cache_type_v = module.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.warmup, options.cpuparams.n_threads = False, 1
    body = {"prompt": prompt, "max_tokens": length, "temperature": 0, "repeat_penalty": 1.0, **more}
    answer: dict[str, Any] = module.Server(options).handle_completions(body)["choices"][0]
    return answer


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    return tokenizers.load("char").train([CHARACTERS + TEXT])


@pytest.fixture(scope="module")
def gpt2(ranks: Path) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(ranks))
        return tokenizers.load("gpt2").train([])


@pytest.fixture(scope="module")
def pairs(root: Path) -> Tokenizer:
    pytest.importorskip("rustbpe")
    text = (root / "quill" / "data" / "harpoon.txt").read_text(encoding="utf-8")
    return tokenizers.load("bpe").train([text[:50_000] + TEXT], vocab_size=700)


@pytest.fixture(scope="module")
def learned(root: Path, request: pytest.FixtureRequest) -> Any:
    """Trained models by family and tokenizer, each made once; and what each was taught, to begin with."""
    text = (root / "quill" / "data" / "harpoon.txt").read_text(encoding="utf-8")[:2000]
    made: dict[tuple[str, str], tuple[Checkpoint, str]] = {}

    def get(family: str, kind: str) -> tuple[Checkpoint, str]:
        if (family, kind) not in made and (family, kind) == ("modern", "char"):
            made[family, kind] = load_checkpoint(Registry(root / "weights").resolve("shakespeare")), "ROMEO:"
        elif (family, kind) not in made:
            tokenizer = (
                request.getfixturevalue("gpt2") if kind == "gpt2" else tokenizers.load("char").train([text])
            )
            shape = {"bias": True} if family == "gpt2" else {}
            made[family, kind] = taught(tokenizer, text, block=family, **shape), text[:24]
        return made[family, kind]

    return get


# The container.


@pytest.mark.parametrize("dtype", GGUF.dtypes)
@pytest.mark.parametrize("shape", ["gpt2-no-qkv-bias", "modern"])
def test_the_gguf_package_reads_what_is_written(shape, dtype, characters, tmp_path):
    gguf = pytest.importorskip("gguf")
    made = model_of(characters, **SHAPES[shape])
    GGUF.write(made, tmp_path / "m.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    arch = "gpt2" if made.config.model.block == "gpt2" else "qwen3"
    assert reader.get_field("general.architecture").contents() == arch
    assert reader.get_field(f"{arch}.context_length").contents() == made.config.model.block_size
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(tokens) == len(set(tokens)) == characters.vocab_size + 1
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == characters.vocab_size
    assert reader.data_offset % 32 == 0 and all(t.data_offset % 32 == 0 for t in reader.tensors)
    found = {t.name: t for t in reader.tensors}
    weights = made.model.state_dict()
    wide = "h.0.mlp.c_fc.weight" if arch == "gpt2" else "h.0.mlp.up_proj.weight"
    for theirs, ours in {"blk.0.ffn_up.weight": wide, "output_norm.weight": "ln_f.weight"}.items():
        expected = weights[ours].numpy()
        kind = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}[dtype]
        if expected.ndim == 1:
            kind = "F32"
        elif expected.shape[-1] % 32:
            kind = "F32" if dtype == "float32" else "F16"
        assert found[theirs].tensor_type.name == kind
        assert found[theirs].shape.tolist() == list(expected.shape[::-1])
        wanted = gguf.quants.quantize(expected, found[theirs].tensor_type)
        assert np.asarray(found[theirs].data).tobytes() == wanted.tobytes()


@given(
    st.lists(st.floats(-60000, 60000, width=32), min_size=32, max_size=32),
    st.sampled_from([1.0, 2.0**-20, 2.0**-120]),
)
def test_q8_0_is_ggmls_and_off_by_half_a_step(values, scale):
    gguf = pytest.importorskip("gguf")
    row = np.array(values, "f4") * np.float32(scale)
    packed = tensor_types.quantize(row)
    if np.abs(row).max() / 127 >= np.finfo("f4").tiny:
        assert packed.tobytes() == gguf.quants.quantize(row, gguf.GGMLQuantizationType.Q8_0).tobytes()
    back = tensor_types.dequantize(np.frombuffer(packed.tobytes(), np.uint8))
    step = np.abs(row).max() / 127
    # The scale itself is a float16, of which the largest value takes 127; its smallest step is 2**-24.
    assert np.abs(back - row).max() <= step * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25


@pytest.mark.parametrize(("dtype", "value"), [("float16", 7e4), ("q8_0", 9e6), ("float16", float("nan"))])
def test_a_weight_beyond_the_type_is_refused_by_name(dtype, value, characters, tmp_path):
    made = model_of(characters)
    with torch.no_grad():
        made.model.state_dict()["h.1.self_attn.o_proj.weight"][3, 3] = value
    with pytest.raises(InputError, match=f"do not fit {dtype}") as caught:
        GGUF.write(made, tmp_path / "m.gguf", dtype)
    assert "blk.1.attn_output.weight" in caught.value.why
    assert not (tmp_path / "m.gguf").exists()


def test_a_file_is_written_a_tensor_at_a_time(characters, tmp_path):
    made = model_of(characters, n_layer=6, n_embd=256, activation="relu2")
    total = sum(p.numel() * 4 for p in made.model.parameters())
    for dtype in GGUF.dtypes:
        tracemalloc.start()
        GGUF.write(made, tmp_path / "m.gguf", dtype)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < total / 4


# Models.


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_reads_back_as_it_was(shape, characters, tmp_path):
    made = model_of(characters, **SHAPES[shape])
    config, rows = made.config.model, characters.vocab_size
    GGUF.write(made, tmp_path / "m.gguf", "float32")
    assert GGUF.recognises(tmp_path / "m.gguf")
    network, tokenizer = read(tmp_path / "m.gguf")
    assert tokenizer.to_dict() == characters.to_dict()
    if shape not in REWRITTEN:
        assert (
            network.shape == config.model_copy(update={"vocab_size": rows, "attention_scale": None}).shape()
        )
    idx = torch.randint(rows, (2, 60), generator=torch.Generator().manual_seed(1))
    assert (network.predict(idx) - made.model.predict(idx)[..., :rows]).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"block": "gpt2", "activation": "relu2"}, "no equivalent of the gpt2 block with relu2"),
        ({"activation": "gelu"}, "no equivalent of the modern block with gelu"),
        ({"activation": "relu"}, "no equivalent of the modern block with relu"),
    ],
)
def test_models_that_llama_cpp_cannot_run_are_refused(shape, why, characters):
    config = ModelConfig(vocab_size=characters.vocab_size, n_embd=32, n_head=2, **shape)
    assert why in (GGUF.refusal(config.shape(), characters) or "")


def test_notes_say_what_the_user_should_know(characters, tmp_path):
    told = " ".join(GGUF.write(model_of(characters, block="gpt2", n_embd=48), tmp_path / "m", "q8_0"))
    assert (
        "approximates GELU" in told and "<|endoftext|> was added" in told and "not a multiple of 32" in told
    )
    told = " ".join(GGUF.write(model_of(characters), tmp_path / "m", "float32"))
    assert "GELU" not in told and "32" not in told


def test_rows_of_a_rewritten_model_fit_the_blocks_of_q8_0(publish, tmp_path):
    made = load_checkpoint(publish("quillgpt", mlp_size=128))
    notes = GGUF.write(made, tmp_path / "m", "q8_0")
    assert not any("not a multiple of 32" in note for note in notes)
    assert File(tmp_path / "m").tensors["token_embd.weight"].dtype == "q8_0"
    back = GGUF.read(tmp_path / "m", Supplied())
    assert back.model.n_embd % 32 == 0 and back.model.n_embd % back.model.n_head == 0


def test_a_name_that_llama_cpp_would_misread_is_left_out(characters, tmp_path):
    GGUF.write(model_of(characters, name="my-Phi3-try"), tmp_path / "m", "float32")
    assert "general.name" not in File(tmp_path / "m")
    assert LlamaCpp(tmp_path / "m").tokenize("a")


def test_the_modelfile_samples_as_quill_does(characters):
    text = Gguf().modelfile("sea.gguf", model_of(characters, block_size=64))
    assert text.startswith('FROM ./sea.gguf\nTEMPLATE """{{ .Prompt }}"""\n')
    parameters = dict(line.split()[1:] for line in text.splitlines()[2:])
    assert parameters["num_ctx"] == "64"
    assert float(parameters["temperature"]) == SampleConfig().temperature
    assert float(parameters["repeat_penalty"]) == 1.0
    assert int(parameters["num_predict"]) == SampleConfig().max_new_tokens


# Tokenizers.


class LlamaCpp:
    """llama.cpp's view of a file's tokenizer, asked over its server's own HTTP."""

    def __init__(self, path: Path) -> None:
        module = pytest.importorskip("xllamacpp")
        options = module.CommonParams()
        options.model.path, options.n_ctx, options.verbosity = str(path), 64, -1
        options.warmup, options.n_parallel, options.cpuparams.n_threads = False, 1, 1
        self.server = module.Server(options)

    def ask(self, what: str, body: dict[str, Any]) -> Any:
        raw, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/{what}", raw, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": False}
        found: list[int] = self.ask("tokenize", body)["tokens"]
        return found

    def detokenize(self, ids: list[int]) -> str:
        return str(self.ask("detokenize", {"tokens": ids})["content"])


def vocabulary(tokenizer: Tokenizer, path: Path) -> LlamaCpp:
    GGUF.write(model_of(tokenizer, n_embd=8, n_layer=1), path, "float32")
    return LlamaCpp(path)


@pytest.fixture(scope="module")
def llama_characters(characters: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vocabulary(characters, tmp_path_factory.mktemp("gguf") / "characters.gguf")


@pytest.fixture(scope="module")
def llama_gpt2(gpt2: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vocabulary(gpt2, tmp_path_factory.mktemp("gguf") / "gpt2.gguf")


@pytest.fixture(scope="module")
def llama_pairs(pairs: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vocabulary(pairs, tmp_path_factory.mktemp("gguf") / "pairs.gguf")


def agree(llama: LlamaCpp, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert llama.tokenize(text) == ids
    assert llama.detokenize(ids) == text


@given(text=st.text(CHARACTERS, max_size=60))
def test_llama_cpp_gives_characters_the_same_ids(text, llama_characters, characters):
    agree(llama_characters, characters, text)


def test_llama_cpp_leaves_out_characters_it_does_not_know(llama_characters, characters):
    # Among them such as share their first bytes with known ones.
    text = "aêb…c\U0001f601d"
    assert llama_characters.tokenize(text) == characters.encode(text, unknown="skip")


# All assigned before the Unicode that llama.cpp's tables are of.
letters = st.one_of(st.sampled_from(CHARACTERS + " \n'sdtlvre"), st.sampled_from(TEXT))


@given(text=st.text(letters, max_size=60))
def test_llama_cpp_gives_gpt2s_tokens_the_same_ids(text, llama_gpt2, gpt2):
    agree(llama_gpt2, gpt2, text)


@given(text=st.text(letters, max_size=60))
def test_llama_cpp_gives_learnt_pairs_the_same_ids(text, llama_pairs, pairs):
    agree(llama_pairs, pairs, text)


def test_llama_cpp_gives_a_long_text_the_same_ids(root, llama_gpt2, llama_pairs, gpt2, pairs):
    text = (root / "quill" / "data" / "harpoon.txt").read_text(encoding="utf-8")[:60_000]
    agree(llama_gpt2, gpt2, text)
    agree(llama_pairs, pairs, text)


NAMES = {"<note>": 702, "</note>": 703, "<not": 704, "old": 705, "  ": 0}


@pytest.fixture(scope="module")
def named(pairs: Tokenizer) -> Tokenizer:
    """Added tokens that text is encoded to, and special tokens before the ordinary ones."""
    stored = pairs.to_dict()
    return tokenizers.read({**stored, "specials": {"<|endoftext|>": 1, "<|pad|>": 701}, "added": NAMES})


@pytest.fixture(scope="module")
def llama_named(named: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vocabulary(named, tmp_path_factory.mktemp("gguf") / "named.gguf")


@given(
    pieces=st.lists(st.sampled_from([*NAMES, "<|endoftext|>", "<|pad|>", "e>", " ", "a", "The", "1", "\n"]))
)
def test_w10_w17_llama_cpp_finds_the_same_added_tokens(pieces, llama_named, named):
    agree(llama_named, named, "".join(pieces))


def test_w10_added_tokens_that_llama_cpp_would_find_otherwise_are_refused(pairs, tmp_path):
    stored = pairs.to_dict()
    crossing = tokenizers.read({**stored, "added": {"<no": 700, "note>": 701}})
    assert "'<no' and 'note>' can overlap" in (GGUF.refusal(model_of(pairs).config.model, crossing) or "")


@pytest.mark.parametrize("kind", ["characters", "gpt2", "pairs", "named"])
def test_a_tokenizer_comes_back_whole(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    GGUF.write(model_of(tokenizer, n_embd=8, n_layer=1), tmp_path / "m.gguf", "float32")
    back = GGUF.read(tmp_path / "m.gguf", Supplied()).tokenizer
    assert back.fingerprint == tokenizer.fingerprint
    assert back.eot_id == tokenizer.eot_id


def test_tokenizers_that_llama_cpp_has_not_are_refused(characters):
    shape = model_of(characters).model.shape
    word = tokenizers.load("word").train(["a few words"])
    assert "word" in (GGUF.refusal(shape, word) or "")
    spelt = [bytes([b]) for b in range(256)]
    o200k = tokenizers.load("o200k_base")(spelt, {"<|endoftext|>": 260}, r"\w+")  # type: ignore[call-arg]
    assert "beyond ASCII" in (GGUF.refusal(shape, o200k) or "")
    own = tokenizers.load("bpe")(spelt, {}, r"\w+|\W+")  # type: ignore[call-arg]
    assert r"\\w+|\\W+" in (GGUF.refusal(shape, own) or "")


def test_ids_that_are_nobodys_keep_their_places(tmp_path):
    spelt = [bytes([b]) for b in range(256)]
    holes = tokenizers.load("cl100k_base")(spelt, {"<|endoftext|>": 259, "<|x|>": 262}, CL100K)  # type: ignore[call-arg]
    told = GGUF.write(model_of(holes, n_embd=8), tmp_path / "m.gguf", "float32")
    assert "white space" in " ".join(told)
    tokens = File(tmp_path / "m.gguf").get("tokenizer.ggml.tokens", list)
    assert len(tokens) == holes.vocab_size and tokens[259] == "<|endoftext|>" and tokens[262] == "<|x|>"
    assert read(tmp_path / "m.gguf")[1].to_dict() == holes.to_dict()


# llama.cpp.


@pytest.mark.parametrize("runtime", ["xllamacpp", "llama_cpp"])
@pytest.mark.parametrize("dtype", GGUF.dtypes)
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_computes_the_same(shape, dtype, runtime, characters, tmp_path, monkeypatch):
    pytest.importorskip(runtime)
    other = {"xllamacpp", "llama_cpp"} - {runtime}
    monkeypatch.setitem(sys.modules, other.pop(), None)
    made = model_of(characters, **SHAPES[shape])
    GGUF.write(made, tmp_path / "m.gguf", dtype)
    rows = characters.vocab_size
    idx = torch.randint(rows, (1, 64), generator=torch.Generator().manual_seed(1))
    found = GGUF.logits(tmp_path / "m.gguf", idx)
    at = list(found)
    assert at[:2] == [0, 1] and at[-1] >= 62 and len(at) >= 24
    theirs = torch.stack(list(found.values()))
    assert theirs.shape == (len(at), rows + 1) and theirs.dtype == torch.float32
    ours = made.model.predict(idx)[0, at, :rows]
    magnitude = float(ours.abs().max())
    ours, theirs = (x.log_softmax(-1).clamp(min=-80) for x in (ours, theirs[:, :rows]))
    difference = float((ours - theirs).abs().max())
    LOG.info("%s in %s differs by %.1e of %.1f", shape, dtype, difference, magnitude)
    exact = made.config.model.activation not in ("gelu", "gelu_tanh")
    limit = 5e-6 if exact and dtype == "float32" else GGUF.tolerance[dtype]
    assert difference <= limit * max(1, magnitude)


@pytest.mark.parametrize("likeliest", [b"\xf0", b"\xa9", b"<|endoftext|>", b"a"])
def test_log_probabilities_are_reported_whatever_token_is_the_likeliest(likeliest, pairs, tmp_path):
    pytest.importorskip("xllamacpp")
    made = model_of(pairs, tie_embeddings=False)
    token = [pairs.token_bytes(i) for i in range(pairs.vocab_size)].index(likeliest)
    with torch.no_grad():
        made.model.ln_f.weight[0] = 0.0
        made.model.lm_head.weight[:] *= 0.5
        made.model.lm_head.weight[token] *= 20.0
    GGUF.write(made, tmp_path / "m.gguf", "float32")
    idx = torch.randint(256, (1, 63), generator=torch.Generator().manual_seed(3))
    found = GGUF.logits(tmp_path / "m.gguf", idx)
    theirs = torch.stack(list(found.values()))[:, : pairs.vocab_size].log_softmax(-1)
    ours = made.model.predict(idx)[0, list(found)].log_softmax(-1)
    assert bool((ours.argmax(-1) == token).any())
    assert float((ours.clamp(min=-80) - theirs.clamp(min=-80)).abs().max()) < 1e-3


def test_the_added_token_has_the_mean_of_all_logits(characters, tmp_path):
    pytest.importorskip("xllamacpp")
    GGUF.write(model_of(characters, **SHAPES["modern"]), tmp_path / "m.gguf", "float32")
    found = GGUF.logits(tmp_path / "m.gguf", torch.randint(characters.vocab_size, (1, 20)))
    for values in found.values():
        assert torch.allclose(values[-1], values[:-1].mean(), atol=1e-4)


@pytest.mark.parametrize("runtime", ["llama_cpp", "xllamacpp"])
@pytest.mark.parametrize("kind", ["char", "gpt2"])
@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_llama_cpp_writes_the_same_text(family, kind, runtime, learned, tmp_path):
    made, prompt = learned(family, kind)
    GGUF.write(made, tmp_path / "m.gguf", "float32")
    (ours,) = Generator(made.model, made.tokenizer).generate(
        prompt, SampleConfig(max_new_tokens=200, temperature=0)
    )
    assert len(made.tokenizer.encode(ours)) > 100
    assert complete(runtime, tmp_path / "m.gguf", prompt, 200) == ours


@pytest.mark.parametrize("runtime", ["llama_cpp", "xllamacpp"])
def test_eight_bits_still_read_as_english(runtime, learned, tmp_path):
    made, prompt = learned("modern", "char")
    GGUF.write(made, tmp_path / "m.gguf", "q8_0")
    assert (tmp_path / "m.gguf").stat().st_size < 1.1 * sum(
        p.numel() for p in made.model.parameters()
    ) * 34 / 32
    text = complete(runtime, tmp_path / "m.gguf", prompt, 200)
    # What it wrote is as likely to the model itself as what that would have written.
    (ours,) = Generator(made.model, made.tokenizer).generate(
        prompt, SampleConfig(max_new_tokens=200, temperature=0)
    )

    def surprise(written: str) -> float:
        ids = torch.tensor([made.tokenizer.encode(prompt + written)])
        return float(loss(made.model.predict(ids[:, :-1]), ids[:, 1:]))

    LOG.info("%.3f and %.3f nats a character: %r", surprise(text), surprise(ours), text[:60])
    assert len(text) == 200 and surprise(text) < surprise(ours) + 0.05


@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_the_server_gives_every_token_the_same_probability(family, learned, tmp_path):
    made, prompt = learned(family, "char")
    GGUF.write(made, tmp_path / "m.gguf", "float32")
    rows = made.tokenizer.vocab_size
    answer = served(tmp_path / "m.gguf", prompt, 100, logprobs=rows + 1)
    ids = torch.tensor([made.tokenizer.encode(prompt + answer["text"])])
    ours = made.model.predict(ids)[0, -101:-1, :rows]
    steps = [{t["id"]: t["logprob"] for t in step["top_logprobs"]} for step in answer["logprobs"]["content"]]
    theirs = torch.tensor([[step[i] for i in range(rows)] for step in steps])
    # Theirs are shares of one token more.
    difference = float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
    LOG.info("log probabilities of %s differ by %.1e", family, difference)
    assert difference < (1e-2 if family == "gpt2" else 1e-4)
    # Which is the likeliest nowhere, and by far.
    assert all(rows in step and step[rows] < max(step.values()) - 2 for step in steps)


def test_a_file_that_llama_cpp_refuses_is_our_error(tmp_path):
    pytest.importorskip("xllamacpp")
    few = tokenizers.load("char").train(["ab"])
    GGUF.write(model_of(few, n_layer=1), tmp_path / "m.gguf", "float32")
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_no.weight"))
    with pytest.raises(CorruptError, match="cannot load"):
        GGUF.logits(tmp_path / "m.gguf", torch.zeros(1, 4, dtype=torch.long))


def test_without_a_binding_it_says_what_to_install(characters, tmp_path, monkeypatch):
    GGUF.write(model_of(characters), tmp_path / "m.gguf", "float32")
    for package in ("xllamacpp", "llama_cpp"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match="xllamacpp is not installed") as caught:
        GGUF.logits(tmp_path / "m.gguf", torch.zeros(1, 4, dtype=torch.long))
    assert caught.value.hint == "pip install 'quill-gpt[gguf]'"


# Files of others.


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_gpt2_of_another_program_is_transformers_gpt2(kind, tmp_path):
    gguf, transformers = pytest.importorskip("gguf"), pytest.importorskip("transformers")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(c) for c in range(97, 97 + 20)))
    config = transformers.GPT2Config(vocab_size=20, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    type_ = gguf.GGMLQuantizationType[kind]
    for name, value in theirs.transformer.named_parameters():
        transposed = value.detach().t() if "c_" in name and value.dim() == 2 else value.detach()
        mapped = names.get_name(f"transformer.{name}", (".weight", ".bias"))
        plain = np.ascontiguousarray(transposed.numpy())
        if plain.ndim == 1 or "wpe" in name:
            writer.add_tensor(mapped, plain)
        else:
            writer.add_tensor(mapped, gguf.quants.quantize(plain, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="does not support") as caught:
        GGUF.read(tmp_path / "m.gguf", Supplied())
    assert "tokenizer=" in caught.value.hint
    network, tokenizer = read(tmp_path / "m.gguf", str(text))
    assert tokenizer.vocab_size == 20 and network.shape.activation == "gelu_tanh"
    idx = torch.randint(20, (1, 30))
    with torch.no_grad():
        expected = theirs(idx).logits
    limit = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}[kind]
    assert (network.predict(idx) - expected).abs().max() < limit * max(1, expected.abs().max())


def with_keys(path: Path, out: Path, **keys: Any) -> None:
    """Copy a file of the architecture qwen3 and add or change keys."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "qwen3")
    stated = {name: (field.contents(), field.types) for name, field in reader.fields.items()}
    for name, value in keys.items():
        type_ = gguf.GGUFValueType.get_type(value)
        stated[name] = (value, [gguf.GGUFValueType.UINT32 if type_ == gguf.GGUFValueType.INT32 else type_])
    for name, (value, types) in stated.items():
        if name.startswith("GGUF") or name == "general.architecture":
            continue
        if types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_tokenizer_that_adds_a_token_before_a_text_is_noted(characters, tmp_path):
    GGUF.write(model_of(characters, **SHAPES["modern"]), tmp_path / "plain.gguf", "float32")
    assert GGUF.read(tmp_path / "plain.gguf", Supplied()).notes == ()
    with_keys(tmp_path / "plain.gguf", tmp_path / "m.gguf", **{"tokenizer.ggml.add_bos_token": True})
    assert "special tokens around a text" in GGUF.read(tmp_path / "m.gguf", Supplied()).notes[0]


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"rope.scaling.type": "none"}, ""),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, ""),
        ({"rope.scaling.type": "linear"}, ""),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, ""),
        ({"rope.scaling.factor": 0.0}, ""),
        ({"rope.scale_linear": 1.0}, ""),
        ({"rope.scaling.factor": 1.0, "rope.scale_linear": 4.0}, ""),
        ({"rope.scaling.attn_factor": 1.0}, ""),
        ({"rope.scaling.original_context_length": 16}, ""),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "by 4"),
        ({"rope.scaling.factor": 4.0}, "by 4"),
        ({"rope.scale_linear": 4.0}, "by 4"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "by 'yarn'"),
        ({"rope.scaling.attn_factor": 2.0}, "attn_factor"),
    ],
)
def test_rotary_positions_are_those_of_llama_cpp_or_refused(keys, refused, characters, tmp_path):
    pytest.importorskip("xllamacpp")
    made = model_of(characters, **SHAPES["modern"])
    GGUF.write(made, tmp_path / "plain.gguf", "float32")
    keys = {f"qwen3.{name}": value for name, value in keys.items()}
    with_keys(tmp_path / "plain.gguf", tmp_path / "m.gguf", **keys)
    idx = torch.randint(characters.vocab_size, (1, 63), generator=torch.Generator().manual_seed(3))
    found = GGUF.logits(tmp_path / "m.gguf", idx)
    theirs = torch.stack(list(found.values()))[:, : characters.vocab_size].log_softmax(-1)
    ours = made.model.predict(idx)[0, list(found)].log_softmax(-1)
    difference = float((ours - theirs).abs().max())
    if refused:
        assert difference > 0.01, "llama.cpp computes the same: no need to refuse"
        with pytest.raises(InputError, match="does not support") as caught:
            GGUF.read(tmp_path / "m.gguf", Supplied())
        assert refused in caught.value.why
    else:
        assert difference < 1e-4
        assert read(tmp_path / "m.gguf")[0].shape == made.model.shape


# Damage.


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, type_: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", type_) + raw


def info(name: str, dims: tuple[int, ...], type_: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)


def file_of(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: int = 64,
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 2**63
HOSTILE = {
    "magic": b"GGML" + file_of()[4:],
    "web page": b"<!doctype html><title>404</title>",
    "zeros": bytes(256),
    "counts": file_of(n_keys=HUGE, n_tensors=HUGE),
    "key count": file_of(n_keys=4000),
    "tensor count": file_of(n_tensors=60000),
    "key length": file_of((struct.pack("<Q", HUGE),)),
    "empty key": file_of((key("", 4, bytes(4)),)),
    "key no text": file_of((key(b"\xff\xfe", 4, bytes(4)),)),
    "duplicate key": file_of((key("a", 4, bytes(4)),) * 2),
    "unknown type": file_of((key("a", 13, bytes(8)),)),
    "neither true nor false": file_of((key("a", 7, b"\x02"),)),
    "string length": file_of((key("a", 8, struct.pack("<Q", HUGE)),)),
    "string beyond": file_of((key("a", 8, struct.pack("<Q", 4096)),)),
    "string no text": file_of((key("a", 8, text(b"\xc3(")),)),
    "array length": file_of((key("a", 9, struct.pack("<IQ", 4, HUGE)),)),
    "array beyond": file_of((key("a", 9, struct.pack("<IQ", 4, 4096)),)),
    "strings length": file_of((key("a", 9, struct.pack("<IQ", 8, 2**40)),)),
    "nested arrays": file_of((key("a", 9, struct.pack("<IQIQ", 9, 1, 9, 1)),)),
    "alignment 0": file_of((key("general.alignment", 4, struct.pack("<I", 0)),)),
    "alignment 48": file_of((key("general.alignment", 4, struct.pack("<I", 48)),)),
    "alignment 2^31": file_of((key("general.alignment", 4, struct.pack("<I", 2**31)),)),
    "alignment text": file_of((key("general.alignment", 8, text("32")),)),
    "tensor twice": file_of((), (info("a", (4,)), info("a", (4,), 0, 32))),
    "overlap": file_of((), (info("a", (12,)), info("b", (4,), 0, 32))),
    "beyond": file_of((), (info("a", (64,)),)),
    "offset 2^63": file_of((), (info("a", (4,), 0, HUGE),)),
    "offset askew": file_of((), (info("a", (4,), 0, 8),)),
    "dimensions": file_of((), (text("a") + struct.pack("<I", 2**31),)),
    "no dimension": file_of((), (info("a", ()),)),
    "dimension 0": file_of((), (info("a", (0, 4)),)),
    "shape overflow": file_of((), (info("a", (2**62, 2**62, 4)),)),
    "tensor type": file_of((), (info("a", (4,), 77),)),
    "blocks": file_of((), (info("a", (33,), 8),)),
    "nothing in it": file_of(),
    "architecture a number": file_of((key("general.architecture", 4, bytes(4)),)),
    "no embedding": file_of((key("general.architecture", 8, text("gpt2")),)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_f46_a_hostile_file_is_refused_at_once(case, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[case])
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(CorruptError) as caught:
        GGUF.read(path, Supplied())
    assert time.process_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert str(path) in caught.value.what and caught.value.exit_code == 5


def test_f46_a_header_without_end_is_not_followed(tmp_path):
    # Sparse: it takes no disk, and would be a billion empty strings.
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of((key("a", 9, struct.pack("<IQ", 8, 2**21)),), data=0))
    with open(path, "r+b") as file:
        file.truncate(2**33)
    started = time.monotonic()
    with pytest.raises(CorruptError):
        GGUF.read(path, Supplied())
    # Under a second; measuring coverage makes such a loop many times slower.
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (file_of(version=1), "version 1"),
        (file_of(version=4), "version 4"),
        (file_of(version=3 << 24), "big-endian"),
        (file_of((), (info("a", (256,), 12),)), "Q8_0"),
        (file_of((key("general.architecture", 8, text("llama")),)), "gpt2 and qwen3"),
    ],
)
def test_f46_what_quill_does_not_read_is_told_from_damage(raw, why, tmp_path):
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(InputError) as caught:
        GGUF.read(tmp_path / "m.gguf", Supplied())
    assert why in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small valid files."""
    folder = tmp_path_factory.mktemp("gguf")
    few = tokenizers.load("char").train(["abé\n"])
    spelt = [bytes([b]) for b in range(256)] + [b"ab"]
    many = tokenizers.load("gpt2")(spelt, {"<|endoftext|>": 257}, "[ab]+")  # type: ignore[call-arg]
    made = {
        "characters": (few, "gpt2", "q8_0"),
        "relu": (few, "gpt2-relu", "float16"),
        "pairs": (many, "modern", "float16"),
        "relu2": (few, "modern-relu2", "float32"),
    }
    for name, (tokenizer, shape, dtype) in made.items():
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 1, "mlp_size": 32, "block_size": 4, "head_size": 32}
        shaped = model_of(tokenizer, **{**SHAPES[shape], **sizes})
        GGUF.write(shaped, folder / name, dtype)
    return {name: (folder / name).read_bytes() for name in made}


def survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    try:
        incoming = GGUF.read(path, Supplied())
        for name in incoming.weights:
            incoming.weights[name].sum()
        incoming.tokenizer.token_bytes(0)
    except QuillError as e:
        assert e.exit_code in (2, 5)


@pytest.mark.parametrize("name", ["characters", "relu", "pairs", "relu2"])
def test_f46_a_file_cut_anywhere_is_refused(name, whole, tmp_path):
    raw = whole[name]
    for end in [*range(0, 2000, 37), *range(2000, len(raw) - 32, 1009)]:
        (tmp_path / "m").write_bytes(raw[:end])
        with pytest.raises(QuillError) as caught:
            GGUF.read(tmp_path / "m", Supplied())
        assert caught.value.exit_code == 5


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_f46_a_damaged_file_gives_a_model_or_our_error(data, whole, tmp_path):
    raw = bytearray(data.draw(st.sampled_from(sorted(whole.values()))))
    header = min(len(raw), 6000)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 9))
        match data.draw(st.sampled_from(["byte", "number", "cut", "double"])):
            case "byte":
                raw[at] = data.draw(st.integers(0, 255))
            case "number":
                number = data.draw(
                    st.sampled_from([0, 1, 2, 8, 9, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
                )
                raw[at : at + 8] = struct.pack("<Q", number)
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 40))]
            case "double":
                raw[at:at] = raw[at : at + data.draw(st.integers(1, 40))]
    survives(tmp_path / "m", bytes(raw))


# The values of keys that the model and its tokenizer are made of, each set to what it must not be.
WRONG: dict[str, list[tuple[int, bytes]]] = {
    "gpt2.block_count": [(4, struct.pack("<I", n)) for n in (0, 2, 2**31)] + [(5, struct.pack("<i", -1))],
    "gpt2.attention.head_count": [(4, struct.pack("<I", n)) for n in (0, 3, 2**32 - 1)],
    "gpt2.embedding_length": [(4, struct.pack("<I", n)) for n in (0, 31, 2**32 - 1)],
    "gpt2.context_length": [(4, struct.pack("<I", 0)), (10, struct.pack("<Q", 2**63))],
    "gpt2.attention.layer_norm_epsilon": [(6, struct.pack("<f", v)) for v in (float("nan"), -1.0, 0.0)],
    "quill.activation": [(8, text(a)) for a in ("swish", "swiglu", "relu", "relu2")] + [(4, bytes(4))],
    "quill.bias": [(7, b"\x00"), (4, bytes(4))],
    "quill.tokenizer.kind": [(8, text(k)) for k in ("word", "bpe", "../char", "")],
    "tokenizer.ggml.model": [(8, text("llama")), (4, bytes(4))],
    "tokenizer.ggml.tokens": [
        (9, struct.pack("<IQ", 8, 0)),
        (9, struct.pack("<IQ", 8, 2) + text("a") * 2),
        (9, struct.pack("<IQ", 4, 2) + bytes(8)),
        (8, text("a")),
    ],
    "tokenizer.ggml.token_type": [
        (9, struct.pack("<IQ", 5, 1) + bytes(4)),
        (9, struct.pack("<IQ5i", 5, 5, 3, 1, 1, 1, 1)),
    ],
}


@pytest.mark.parametrize(("name", "which"), [(n, i) for n in WRONG for i in range(len(WRONG[n]))])
def test_f46_a_wrong_value_is_refused(name, which, tmp_path):
    gguf = pytest.importorskip("gguf")
    few = tokenizers.load("char").train(["abé\n"])
    made = model_of(few, block="gpt2", bias=True, n_embd=32, n_layer=1, n_head=1, block_size=4)
    GGUF.write(made, tmp_path / "m", "float32")
    raw, reader = (tmp_path / "m").read_bytes(), gguf.GGUFReader(tmp_path / "m")
    field, last = reader.get_field(name), reader.tensors[-1].field
    start, end = field.offset, last.offset + sum(part.nbytes for part in last.parts)
    after = start + sum(part.nbytes for part in field.parts)
    registry = Registry(tmp_path / "weights")

    def imported(value: bytes) -> None:
        head = raw[:start] + value + raw[after:end]
        (tmp_path / "n").write_bytes(head + bytes(-len(head) % 32) + raw[reader.data_offset :])
        importing.import_model(str(tmp_path / "n"), registry, name="n")

    with pytest.raises(QuillError) as caught:
        imported(key(name, *WRONG[name][which]))
    assert caught.value.exit_code in (2, 5)
    assert not registry.entries()
    imported(raw[start:after])
