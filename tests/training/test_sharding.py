"""A divided model is trained, measured and saved as a whole one. Here it has one share, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed

from quill.checkpoint.resume_state import load_state, save_state
from quill.config import reading
from quill.config.settings import RunConfig
from quill.data.dataset import Dataset
from quill.errors import InputError, InterruptedRun
from quill.model.gpt import GPT, n_params
from quill.registry.store import Registry
from quill.training import memory, sharding
from quill.training.device import Device
from quill.training.processes import Group
from quill.training.sharding import Sharded
from quill.training.splits import Splits
from quill.training.trainer import Trainer

CPU = Device("cpu", "float32", False)
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.1, "vocab_size": 40}
EVERYTHING = {
    "optimizer": "muon",
    "muon_coefficients": "polar_express",
    "cautious_weight_decay": True,
    "ema_decay": 0.9,
    "token_dropout": 0.1,
    "masked_loss_weight": 0.5,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Group(0, 1, 0, 1)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def splits(tiny_registry: Registry) -> Splits:
    return Splits(Dataset.open(tiny_registry.root.parent / "data" / "tiny"), 0.0)


def configured(model: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    settings = {"model": MODEL | (model or {}), "train": {"batch_size": 4, "warmup_iters": 0, **train}}
    return reading.parse(settings, origin="the test")


def alone(config: RunConfig, splits: Splits, device: Device = CPU) -> Trainer:
    return Trainer(GPT(config.model.shape(), config.train.seed), config.train, splits.train, device)


def divided(config: RunConfig, splits: Splits, group: Group, device: Device = CPU) -> Sharded:
    model = GPT(config.model.shape(), config.train.seed)
    return sharding.lead(model, config.train, splits, device, (), group=group, work={}, first=0)


def assert_close(one: GPT, other: GPT, tolerance: float = 1e-6) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=tolerance), name


# A bigram table returns what it looks up.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    ("model", "train", "device"),
    [
        ({}, EVERYTHING, Device("cpu", "float32", False, micro_batch_size=3, checkpointing=True)),
        ({"block": "gpt2", "dropout": 0.0}, {"optimizer": "muon"}, CPU),
        ({"n_layer": 0}, {"optimizer": "adamw", "ema_decay": 0.9}, CPU),
    ],
    ids=["everything", "quintic", "bigram"],
)
def test_steps_and_evaluations_are_those_of_a_whole_model(
    splits: Splits, group: Group, model: dict[str, Any], train: dict[str, Any], device: Device
) -> None:
    config = configured(model, **train)
    one, other = alone(config, splits, device), divided(config, splits, group, device)
    assert_close(one.model, other.whole(), 0.0)
    for _ in range(3):
        (losses, norm), (found, found_norm) = one.advance(), other.advance()
        assert found == pytest.approx(losses, abs=1e-6)
        assert found_norm == pytest.approx(norm, rel=1e-5)
        # An evaluation changes nothing, and leaves nothing gathered behind.
        assert other.evaluate(splits.val, 1) == pytest.approx(one.evaluate(splits.val, 1), abs=1e-6)
    assert_close(one.model, other.whole())
    assert_close(one.whole(averaged=True), other.whole(averaged=True))


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_have_the_names_of_a_whole_model(splits: Splits, group: Group, tied: bool) -> None:
    whole = divided(configured({"tie_embeddings": tied}), splits, group).whole()
    assert list(whole.state_dict()) == list(GPT(whole.shape).state_dict())
    assert ("lm_head.weight" in whole.state_dict()) is not tied


@pytest.mark.parametrize(
    ("writer", "reader"), [("divided", "alone"), ("alone", "divided"), ("divided", "divided")]
)
def test_a_state_resumes_divided_or_not(
    splits: Splits, group: Group, registry: Registry, writer: str, reader: str
) -> None:
    config, draft = configured(**EVERYTHING), registry.begin("m")
    make = {"alone": lambda: alone(config, splits), "divided": lambda: divided(config, splits, group)}
    first: Trainer = make[writer]()
    for _ in range(2):
        first.advance()
    tensors, facts = first.state()
    save_state(draft, 2, tensors, {"trainer": facts}, write=first.write)
    saved = load_state(draft, read=reader == "alone")
    assert saved is not None
    assert saved.notes == []
    second: Trainer = make[reader]()
    second.restore(saved)
    assert second.step == 2
    assert second.advance()[0] == pytest.approx(first.advance()[0], rel=1e-5)
    assert_close(first.whole(), second.whole())
    assert_close(first.whole(averaged=True), second.whole(averaged=True))


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_f43_a_state_with_a_damaged_share_is_skipped(
    splits: Splits, group: Group, registry: Registry, how: str, read: bool
) -> None:
    trainer, draft = divided(configured({"n_layer": 1}), splits, group), registry.begin("m")
    for step in (1, 2):
        trainer.advance()
        folder = save_state(draft, step, trainer.state()[0], {"step": step}, write=trainer.write)
    [share] = folder.glob("*.safetensors")
    raw = bytearray(share.read_bytes())
    raw[-1] ^= 1
    share.unlink()
    if how != "remove":
        share.write_bytes(raw if how == "flip" else raw[:-1])
    saved = load_state(draft, read=read)
    assert saved is not None
    assert saved.info["step"] == 1
    assert "step-000002" in saved.notes[0]


def test_bfloat16_computes_blocks_in_bfloat16_and_keeps_weights_in_float32(
    splits: Splits, group: Group
) -> None:
    config, device = configured({"dropout": 0.0}), Device("cpu", "bfloat16", False)
    one, other = alone(config, splits, device), divided(config, splits, group, device)
    for _ in range(3):
        assert other.advance()[0].loss == pytest.approx(one.advance()[0].loss, abs=0.02)
    [expected], [found] = one.evaluate(splits.val, 1), other.evaluate(splits.val, 1)
    assert found.loss == pytest.approx(expected.loss, abs=0.02)
    assert {t.dtype for t in other.whole().state_dict().values()} == {torch.float32}


def test_an_evaluation_can_be_interrupted_and_repeated(splits: Splits, group: Group) -> None:
    trainer = divided(configured(), splits, group)
    trainer.advance()

    def poll() -> None:
        raise InterruptedRun("stopped", signum=15)

    with pytest.raises(InterruptedRun):
        trainer.evaluate(splits.val, 1, poll)
    assert trainer.evaluate(splits.val, 1) == trainer.evaluate(splits.val, 1)
    trainer.advance()


@pytest.mark.parametrize("setting", ["auto", "off", "full"])
@pytest.mark.parametrize("fits", [True, False])
def test_auto_divides_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, setting: str, fits: bool) -> None:
    config = configured({"n_layer": 64, "n_embd": 256}, sharding=setting, optimizer="adamw")
    group = Group(0, 8, 0, 1)
    weights = 16 * n_params(config.model.shape())
    monkeypatch.setattr(memory, "of_device", lambda device: 2 * weights if fits else int(0.8 * weights))
    if setting == "off" and not fits:
        with pytest.raises(InputError, match="does not fit") as caught:
            memory.check(config, "cpu", group=group)
        assert caught.value.hint == "set train.sharding=auto"
    else:
        memory.check(config, "cpu", group=group)
    expected = setting == "full" or (setting == "auto" and not fits)
    assert memory.must_divide(config, CPU, (), group) is expected
    assert memory.must_divide(config, CPU, (), None) is False


def test_shares_take_a_share_of_the_memory() -> None:
    config = configured({"n_layer": 12, "n_embd": 256}, optimizer="adamw", ema_decay=0.9)
    whole, half = (memory.need(config, CPU, (), memory.Sharing(n, 1, divided=n > 1)).of(1) for n in (1, 2))
    saved = 5 * 4 * n_params(config.model.shape()) / 2
    # Less the weights of the blocks at work.
    assert 0.6 * saved < whole - half < saved


def test_float16_is_refused_where_the_model_must_be_divided() -> None:
    config = configured(sharding="full", dtype="float16")
    with pytest.raises(InputError, match=r"'train.dtype' = 'float16'") as caught:
        memory.must_divide(config, Device("cuda", "float16", False), (), Group(0, 2, 0, 2))
    assert caught.value.hint == "set train.dtype=bfloat16"
