"""`quill bench`: what is counted, what is printed, and another program next to it."""

from __future__ import annotations

import json
import os
import statistics
from io import StringIO
from pathlib import Path

import pytest
import standin
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from quill.benchmark import flops, limits, work
from quill.cli.app import main
from quill.cli.bench import find, show
from quill.cli.options import Session
from quill.cli.output import Output
from quill.config.settings import ModelConfig
from quill.model.gpt import GPT
from quill.training.device import Device

WORKS = [work.TRAINING, *work.DECODING.values(), work.EVALUATION, work.PREPARING]
CPU = Device("cpu", "float32", False)
SMALL = {
    "name": "small",
    "model": {"block": "gpt2", "activation": "gelu", "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8},
    "train": {"batch_size": 2, "device": "cpu", "dtype": "float32", "optimizer": "adamw"},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    """Small buffers and texts; the figures mean nothing."""
    monkeypatch.setattr(limits, "_BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(limits, "_LARGEST", limits._SMALLEST)
    monkeypatch.setattr(work, "_PREPARED_BYTES", 1 << 18)
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config() -> str:
    Path("small.json").write_text(json.dumps(SMALL))
    return "small.json"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def bench(capsys, *arguments: str, rounds: int = 2) -> str:
    code = main(["bench", *arguments, "--rounds", str(rounds), "--seconds", "0.001"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.mark.parametrize("block", ["gpt2", "modern"])
@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_that_torch_counts(block, tied):
    """The products of a forward pass, as torch's counter sees them; attention is counted whole by both."""
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}
    shape = ModelConfig(block=block, tie_embeddings=tied, dropout=0.0, **settings).shape()
    model, idx = GPT(shape).eval(), torch.zeros(1, 8, dtype=torch.int64)
    # The fused kernels are not counted.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model(idx)
    assert counter.get_total_flops() == 8 * flops.forward(shape, 8)
    assert flops.training(shape) == 6 * flops.multiplied(shape) + 12 * 2 * 2 * 8 * 8


def test_a_batch_shares_the_weights_that_it_reads():
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11).shape()
    weights = 4 * flops.multiplied(shape)
    cache = 4 * 2 * 2 * 16 * 5
    assert flops.bytes_read(shape, 5, 1) == weights + cache
    assert flops.bytes_read(shape, 5, 8) == weights / 8 + cache


def test_limits_are_positive_and_leave_the_generator_alone():
    state = torch.random.get_rng_state()
    assert limits.matmul(CPU) > 1e6
    assert limits.bandwidth(CPU) > 1e6
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_document_has_every_figure_with_its_unit(config, capsys):
    found = json.loads(bench(capsys, config, "--json"))
    assert found["schema"] == "quill.bench/1"
    assert {"quill", "torch", "python", "numpy"} <= found["versions"].keys()
    assert {limit["name"]: limit["unit"] for limit in found["limits"]} == {
        "float32": "FLOP/s",
        "bfloat16": "FLOP/s",
        "memory": "bytes/s",
    }
    assert [figure["work"] for figure in found["figures"]] == WORKS
    limit = {limit["name"]: limit["median"] for limit in found["limits"]}
    for figure in found["figures"]:
        assert figure["unit"] == "tokens/s"
        assert len(figure["rounds"]) == 2
        assert figure["median"] == statistics.median(figure["rounds"])
        if figure["work"] == work.PREPARING:
            assert figure["mfu"] is figure["mbu"] is None
            continue
        wanted = figure["flops_per_token"] * figure["median"] / limit[figure["dtype"]]
        assert figure["mfu"] == pytest.approx(wanted)
        if figure["work"] in work.DECODING.values():
            wanted = figure["bytes_per_token"] * figure["median"] / limit["memory"]
            assert figure["mbu"] == pytest.approx(wanted)
    assert found["step"]["timed_sequences"] == 2
    assert not Path("weights").exists()
    assert os.listdir() == [config]


def test_a_model_is_measured_with_its_own_tokenizer(tiny_registry, capsys, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    found = json.loads(bench(capsys, "tiny", "--device", "cpu", "--json", rounds=1))
    assert (found["name"], found["model"]) == ("tiny:v1", tiny_registry.resolve("tiny").config()["model"])


def test_configs_are_found_by_name():
    session = Session(Output())
    for name in (None, "quickstart"):
        config, version = find(session, name)
        assert (config.name, version) == ("quickstart", None)
    assert find(session, "bigram")[0].model.n_layer == 0


def test_nanogpt_runs_next_to_it_and_the_screen_has_room(config, capsys, monkeypatch):
    checkout = standin.write(Path("nanoGPT"))
    before = sorted(checkout.iterdir())
    found = json.loads(bench(capsys, config, "--against", str(checkout), "--json", rounds=1))
    assert sorted(checkout.iterdir()) == before
    theirs = {f["work"]: f for f in found["figures"] if f["program"] == "nanoGPT"}
    assert list(theirs) == WORKS[:-1]
    # Two sequences of 8 tokens in 4 ms; the first two steps do not count.
    assert theirs[work.TRAINING]["rounds"] == [4000.0]
    mine = found["figures"][0]
    assert mine["program"] == "quill"
    assert theirs[work.TRAINING]["ratio"] == pytest.approx(mine["median"] / 4000)
    assert theirs[work.TRAINING]["flops_per_token"] == mine["flops_per_token"]
    assert found["against"]["parameters"] == found["parameters"]
    monkeypatch.setenv("COLUMNS", "80")
    show(Output(out=(screen := Terminal()), env={"NO_COLOR": "1"}), found)
    assert max(map(len, screen.getvalue().splitlines())) <= 80
    assert "RATIO" in screen.getvalue()
    assert "float32 products" in screen.getvalue()


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("train.py", "raise SystemExit('no luck')", "no luck"),
        ("train.py", "print('iter 0: done')", "printed no times of steps"),
        ("model.py", None, "it has no model.py"),
    ],
    ids=["fails", "silent", "absent"],
)
def test_a_checkout_that_does_not_run_is_explained(config, capsys, file, text, said):
    path = standin.write(Path("nanoGPT")) / file
    path.unlink() if text is None else path.write_text(text)
    assert main(["bench", config, "--against", "nanoGPT", "--rounds", "1", "--seconds", "0.001"]) in (2, 3)
    assert said in capsys.readouterr().err


def test_shapes_that_nanogpt_lacks_are_refused(capsys):
    odd = SMALL | {"model": SMALL["model"] | {"n_head": 3, "head_size": 4}}
    Path("odd.json").write_text(json.dumps(odd))
    standin.write(Path("nanoGPT"))
    assert main(["bench", "odd.json", "--against", "nanoGPT"]) == 2
    assert "3 heads and width 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--rounds", "0"], 2), (["--seconds", "nan"], 2), (["nobody"], 3), (["nothing.json"], 3)],
)
def test_bad_arguments_are_explained(arguments, code, capsys):
    assert main(["bench", *arguments]) == code
    assert "error: " in capsys.readouterr().err
