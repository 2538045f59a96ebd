"""Loading models: saved weights come back, and files that do not belong together are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from quill import fsio
from quill.checkpoint.load import load_checkpoint, read_config
from quill.checkpoint.weights import save_tensors, save_weights
from quill.errors import CorruptError, InputError
from quill.registry.version import Version

IDS = torch.tensor([[1, 2, 3, 4]])


def edit(path, change) -> None:
    """Change a JSON file as a person would."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def by_hand(trained, tmp_path):
    """A model folder without a manifest, so that only its own consistency protects it."""
    folder = tmp_path / "by-hand"
    trained().path.rename(folder)
    (folder / "manifest.json").unlink()
    return Version("by-hand", 1, folder)


@pytest.fixture
def rewrite(by_hand, model):
    """Write other weights next to the config, and load."""

    def load(change):
        weights = dict(model.state_dict())
        change(weights)
        save_tensors(by_hand.path / "model.safetensors", weights)
        return load_checkpoint(by_hand)

    return load


def test_a_saved_model_loads_equal(registry, trained, model):
    trained()
    found = load_checkpoint(registry.resolve("tiny"))
    assert torch.equal(found.model(IDS), model(IDS))
    assert found.model.shape == model.shape
    assert found.tokenizer.decode([0, 1, 2]) == "abc"
    assert found.version.reference == "tiny:v1"
    assert found.version.manifest["parameters"] == sum(p.numel() for p in found.model.parameters())
    assert not found.model.training
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in found.model.parameters())


def test_a_loaded_model_can_be_trained_on(registry, trained):
    trained()
    model = load_checkpoint(registry.resolve("tiny")).model.train()
    before = model.wte.weight.clone()
    model(IDS).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.wte.weight, before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_read_as_float32(trained, model, dtype):
    version = trained(dtype=dtype)
    found = load_checkpoint(version).model
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value.to(getattr(torch, dtype)).float())
    assert version.manifest["files"]["model.safetensors"]["bytes"] < 0.7 * sum(
        4 * p.numel() for p in model.parameters()
    )


def test_weights_beyond_float16_are_refused(tmp_path, model):
    import copy

    large = copy.deepcopy(model)
    with torch.no_grad():
        large.wte.weight[0, 0] = 1e6
    with pytest.raises(InputError, match="65,504"):
        save_weights(tmp_path / "x", large, "float16")
    assert not (tmp_path / "x").exists()


def test_a_hand_made_folder_loads_without_a_manifest(by_hand, model):
    found = load_checkpoint(by_hand)
    assert torch.equal(found.model(IDS), model(IDS))
    assert found.version.manifest is None


def test_an_unset_vocab_size_is_the_tokenizers(by_hand):
    edit(by_hand.path / "config.json", lambda c: c["model"].pop("vocab_size"))
    assert load_checkpoint(by_hand).config.model.vocab_size == 7


def test_f3_a_bit_flip_is_refused(trained):
    version = trained()
    path = version.path / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match="sha256"):
        load_checkpoint(version)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("wte.weight"), "wte.weight is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "'extra' is not in this model"),
        (lambda w: w.update({"wte.weight": torch.zeros(6, 16)}), "is 6x16, the config makes it 7x16"),
        (lambda w: w.update({"wte.weight": torch.zeros(16, 7)}), "wte.weight is 16x7"),
        (lambda w: w.update({"wte.weight": torch.zeros(7, 16, dtype=torch.int64)}), "wte.weight is I64"),
        (lambda w: w.update({"wte.weight": torch.zeros(7, 16, dtype=torch.float64)}), "wte.weight is F64"),
        (lambda w: w.clear(), "0 tensors"),
    ],
)  # fmt: skip
def test_f4_tensors_must_be_exactly_those_of_the_config(rewrite, change, said):
    with pytest.raises(CorruptError) as caught:
        rewrite(change)
    assert said in caught.value.why
    assert caught.value.exit_code == 5


def test_f4_the_first_three_differences_are_named(rewrite, model):
    names = list(model.state_dict())[:5]

    def change(weights):
        for name in names:
            weights[name] = torch.zeros(3)

    with pytest.raises(CorruptError) as caught:
        rewrite(change)
    assert [n in caught.value.why for n in names] == [True] * 3 + [False] * 2
    assert "and 2 more" in caught.value.why


def test_f4_a_tokenizer_larger_than_the_model_is_refused(by_hand):
    path = by_hand.path / "tokenizer.json"
    edit(path, lambda t: t.update(vocabulary="abcdefgh"))
    with pytest.raises(CorruptError, match=r"8 tokens, and the config's model\.vocab_size is 7"):
        load_checkpoint(by_hand)


def test_a_smaller_tokenizer_leaves_padding_rows(by_hand):
    edit(by_hand.path / "tokenizer.json", lambda t: t.update(vocabulary="abc"))
    assert load_checkpoint(by_hand).tokenizer.vocab_size == 3


def test_f4_a_config_with_a_million_layers_is_refused_at_once(by_hand):
    edit(by_hand.path / "config.json", lambda c: c["model"].update(n_layer=10**6))
    with pytest.raises(CorruptError, match="1000000 layers"):
        load_checkpoint(by_hand)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        (b"<!doctype html>", "web page"),
        (bytes(100), "zeros"),
        (b"[]______", ""),
        (b"{\"a\"____", ""),
    ],
)  # fmt: skip
def test_f1_each_kind_of_wrong_file_is_explained(by_hand, name, content, why):
    (by_hand.path / name).write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        load_checkpoint(by_hand)
    assert why in str(caught.value)
    assert name in str(caught.value)


def test_a_damaged_config_names_the_setting(by_hand):
    edit(by_hand.path / "config.json", lambda c: c["model"].update(n_head="two"))
    with pytest.raises(CorruptError, match=r"model\.n_head"):
        load_checkpoint(by_hand)


def test_f12_a_config_from_a_newer_quill_is_an_input_error(by_hand):
    edit(by_hand.path / "config.json", lambda c: c.update(schema_version=2))
    with pytest.raises(InputError, match="a newer quill wrote it"):
        load_checkpoint(by_hand)


def test_the_environment_does_not_change_a_stored_config(trained, monkeypatch):
    monkeypatch.setenv("QUILL_DEVICE", "nonsense")
    assert read_config(trained()).train.device == "auto"


def test_flat_configs_are_read(by_hand):
    flat = {"vocab_size": 3, "block_size": 8, "n_embd": 16, "n_head": 2, "n_layer": 1, "dropout": 0.2}
    fsio.write_json(by_hand.path / "config.json", flat)
    assert read_config(by_hand).model.block == "gpt2"
    fsio.write_json(by_hand.path / "config.json", flat | {"encode": {"a": 0}, "decode": {"0": "b"}})
    with pytest.raises(CorruptError):
        read_config(by_hand)


def test_loading_imports_no_compiler(registry, trained):
    trained()
    code = (
        "import sys, torch\n"
        # Only what quill itself imports counts.
        "own = set(sys.modules)\n"
        "from pathlib import Path\n"
        "from quill.checkpoint.load import load_checkpoint\nfrom quill.registry import store\n"
        f"load_checkpoint(store.Registry(Path({str(registry.root)!r})).resolve('tiny'))\n"
        "print(sorted({'torch._dynamo', 'sympy', 'tiktoken'} & set(sys.modules) - own))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
