"""Optimizer steps: accumulation, resuming and divergence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quill import discovery
from quill.config.settings import ModelConfig, TrainConfig
from quill.errors import DivergedError
from quill.model.gpt import GPT
from quill.training.device import Device
from quill.training.trainer import Trainer

TOKENS = np.random.default_rng(0).integers(0, 17, 2000).astype(np.uint16)
CPU = Device("cpu", "float32", False)
BLOCKS = discovery.names("model.blocks")


def make(block: str = "modern", dropout: float = 0.0, **train: Any) -> Trainer:
    config = ModelConfig(
        block=block, n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=17, dropout=dropout
    )
    settings = {"batch_size": 8, "warmup_iters": 2, "max_iters": 20, **train}
    return Trainer(GPT(config.shape()), TrainConfig(**settings), TOKENS, CPU)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_from_a_state_equals_an_uninterrupted_run(block: str, optimizer: str) -> None:
    whole = make(block, dropout=0.2, optimizer=optimizer)
    losses = [whole.advance() for _ in range(6)]

    first = make(block, dropout=0.2, optimizer=optimizer)
    before = [first.advance() for _ in range(3)]
    tensors, facts = first.state()
    tensors = {n: t.clone() for n, t in tensors.items()}
    second = make(block, dropout=0.2, optimizer=optimizer)
    second.load_state(tensors, facts)
    torch.manual_seed(99)  # other draws in the meantime must not matter
    after = [second.advance() for _ in range(3)]

    assert before + after == losses
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    for name, moment in whole.optimizer.state().items():
        assert torch.equal(moment, second.optimizer.state()[name]), name


@pytest.mark.parametrize("block", BLOCKS)
def test_accumulating_small_batches_equals_one_large_batch(block: str) -> None:
    large = make(block, batch_size=8)
    small = make(block, batch_size=2, gradient_accumulation_steps=4)
    assert small.gradients() == pytest.approx(large.gradients(), abs=1e-6)
    for (name, p), q in zip(large.model.named_parameters(), small.model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_short_text_is_memorized(block: str, optimizer: str) -> None:
    trainer = make(block, optimizer=optimizer, max_iters=200, learning_rate=1e-2, min_lr=0.0)
    trainer.train = np.arange(9, dtype=np.uint16)
    losses = [trainer.advance()[0] for _ in range(120)]
    assert losses[0] > 2.0
    assert losses[-1] < 0.1


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_f39_a_nonfinite_value_is_caught_before_the_step(where: str) -> None:
    trainer = make()
    trainer.advance()
    if where == "loss":
        with torch.no_grad():
            trainer.model.wte.weight[3, 3] = float("nan")
    else:
        trainer.model.ln_f.weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore[union-attr]
    before = weights(trainer)
    with pytest.raises(DivergedError) as caught:
        trainer.advance()
    assert f"the {where} is not finite at step 2" in caught.value.what
    assert "learning rate" in caught.value.why
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    trainer = make(grad_clip=0.01)
    trainer.gradients()
    norm = trainer._clip()
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert norm > 0.01
    assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(0.01, rel=1e-3)


def test_the_seed_determines_the_run() -> None:
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    assert [a.advance() for _ in range(2)] == [b.advance() for _ in range(2)]
    assert a.advance() != c.advance()


def test_a_step_leaves_the_random_numbers_of_the_caller_alone() -> None:
    trainer = make(dropout=0.2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer.advance()
    assert torch.equal(torch.rand(3), expected)
