"""Optimizer steps: accumulation, resuming and divergence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from quill import discovery
from quill.config.settings import ModelConfig, TrainConfig
from quill.data.batches import batch
from quill.errors import DivergedError
from quill.model.gpt import GPT, loss
from quill.training import masking
from quill.training.device import Device
from quill.training.state import Trained
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


# Everything that draws for each forward pass, in a step of several.
DRAWING = {"token_dropout": 0.1, "masked_loss_weight": 0.4, "gradient_accumulation_steps": 2}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"ema_decay": 0.5},
    "token dropout": {"token_dropout": 0.3},
    "masked loss": {"masked_loss_weight": 0.4, "masked_loss_max": 0.6},
    "all": {**DRAWING, "ema_decay": 0.9, "schedule": "trapezoidal"},
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resuming_from_a_state_equals_an_uninterrupted_run(
    block: str, optimizer: str, objective: str
) -> None:
    settings = {"dropout": 0.2, "optimizer": optimizer, **OBJECTIVES[objective]}
    whole = make(block, **settings)
    losses = [whole.advance() for _ in range(6)]

    first = make(block, **settings)
    before = [first.advance() for _ in range(3)]
    tensors, facts = first.state()
    tensors = {n: t.clone() for n, t in tensors.items()}
    second = make(block, **settings)
    second.load_state(tensors, facts)
    torch.manual_seed(99)  # other draws in the meantime must not matter
    after = [second.advance() for _ in range(3)]

    assert before + after == losses
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    for name, value in whole.state()[0].items():
        assert torch.equal(value, second.state()[0][name]), name


@pytest.mark.parametrize("block", BLOCKS)
def test_accumulating_small_batches_equals_one_large_batch(block: str) -> None:
    large = make(block, batch_size=8)
    small = make(block, batch_size=2, gradient_accumulation_steps=4)
    assert small.gradients().loss == pytest.approx(large.gradients().loss, abs=1e-6)
    for (name, p), q in zip(large.model.named_parameters(), small.model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_short_text_is_memorized(block: str, optimizer: str) -> None:
    trainer = make(block, optimizer=optimizer, max_iters=200, learning_rate=1e-2, min_lr=0.0)
    trainer.train = np.arange(9, dtype=np.uint16)
    losses = [trainer.advance()[0].loss for _ in range(120)]
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


def test_the_average_is_the_exponential_moving_average_of_the_weights() -> None:
    trainer = make(ema_decay=0.3)
    assert trainer.averaged is None, "before the first step it would be the weights"
    expected = weights(trainer)
    for t in range(8):
        trainer.advance()
        decay = min(0.3, (1 + t) / (10 + t))
        for name, value in weights(trainer).items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    assert trainer.averaged is not None
    for name, value in trainer.averaged.named_parameters():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)
        assert value.dtype == torch.float32 and not value.requires_grad
    raw, average = trainer.evaluate(TOKENS[:500], 500)
    assert raw != average
    assert make().evaluate(TOKENS[:500], 500)[1:] == []


def test_a_run_in_bfloat16_evaluates_in_it_and_resumes_in_what_it_began_with() -> None:
    trainer = make(max_iters=3)
    half = Trainer(trainer.model, trainer.config, TOKENS, Device("cpu", "bfloat16", False))
    computed: list[torch.dtype] = []
    linear = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda module, given, made: computed.append(made.dtype))
    exact, rounded = (t.evaluate(TOKENS[:500], 500)[0] for t in (trainer, half))
    assert set(computed[: len(computed) // 2]) == {torch.float32}
    assert set(computed[len(computed) // 2 :]) == {torch.bfloat16}
    assert rounded != exact
    assert rounded.loss == pytest.approx(exact.loss, abs=1e-2)
    tensors, facts = half.state()
    half.load_state(tensors, facts)
    assert half.evaluate(TOKENS[:500], 500) == [rounded]
    del facts["evaluates_in"]
    half.load_state(tensors, Trained.model_validate(facts).model_dump())
    assert half.evaluate(TOKENS[:500], 500) == [exact], "as earlier versions of quill did"


def test_an_average_changes_no_step() -> None:
    plain, averaged = make(dropout=0.1), make(dropout=0.1, ema_decay=0.9)
    assert [plain.advance() for _ in range(3)] == [averaged.advance() for _ in range(3)]
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(averaged)[name]), name


def test_a_dropped_token_is_not_seen() -> None:
    for block in BLOCKS:
        model = make(block).model.eval()
        idx = torch.arange(8)[None]
        dropped = torch.zeros(1, 8, dtype=torch.bool)
        dropped[0, 3] = True
        other = idx.clone()
        other[0, 3] = 16
        assert torch.equal(model(idx, dropped=dropped), model(other, dropped=dropped))
        assert not torch.equal(model(idx), model(other))
        assert torch.equal(model(idx), model(idx, dropped=torch.zeros_like(dropped)))


def test_tokens_are_dropped_at_the_rate_that_is_set() -> None:
    mask = masking.dropped(0.2, (64, 256), (1337, 5, 0))
    assert mask.shape == (64, 256)
    assert float(mask.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(mask, masking.dropped(0.2, (64, 256), (1337, 5, 0)))
    others = [masking.dropped(0.2, (64, 256), n) for n in ((1, 5, 0), (1337, 6, 0), (1337, 5, 1))]
    assert not any(torch.equal(mask, other) for other in others)
    assert not masking.dropped(0.0, (64, 256), (1337, 5, 0)).any()


def test_each_sequence_draws_the_share_that_it_masks() -> None:
    shares = masking.masked(0.5, (2000, 512), (7, 0, 0)).float().mean(dim=1)
    assert float(shares.mean()) == pytest.approx(0.25, abs=0.01)
    # A uniform distribution over 0 to 0.5, widened by the tokens' own chance.
    assert float(shares.std()) == pytest.approx(0.5 / 12**0.5, abs=0.01)
    assert float(shares.max()) < 0.6


def test_token_dropout_hides_the_drawn_tokens_from_the_loss() -> None:
    trainer = make(token_dropout=0.4)
    x, y = batch(TOKENS, seed=1337, step=0, batch_size=8, block_size=8)
    mask = masking.dropped(0.4, (8, 8), (1337, 0, 0))
    expected = loss(trainer.model(x, dropped=mask), y).item()
    assert trainer.gradients() == pytest.approx((expected, expected))
    assert make().gradients().loss != pytest.approx(expected)


def test_the_masked_loss_is_added_to_the_objective_and_not_to_the_loss() -> None:
    trainer = make(masked_loss_weight=0.4, masked_loss_max=0.9)
    x, y = batch(TOKENS, seed=1337, step=0, batch_size=8, block_size=8)
    clean = loss(trainer.model(x), y)
    masked = loss(trainer.model(x, dropped=masking.masked(0.9, (8, 8), (1337, 0, 0))), y)
    (clean + 0.4 * masked).backward()
    expected = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    losses = trainer.gradients()
    assert losses.loss == pytest.approx(clean.item())
    assert losses.objective == pytest.approx((clean + 0.4 * masked).item())
    for p, grad in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


def test_the_passes_over_a_batch_have_different_dropout_masks() -> None:
    trainer = make(dropout=0.5, masked_loss_weight=1.0, masked_loss_max=1e-9)
    losses = trainer.gradients()
    assert losses.objective - losses.loss != pytest.approx(losses.loss, rel=1e-6)


CUT: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "odd sizes": {"dropout": 0.3, "batch_size": 7},
    "all": {**DRAWING, "dropout": 0.2},
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("settings", CUT)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_a_cut_batch_has_the_gradients_of_the_whole_one(
    block: str, settings: str, checkpointing: bool, rows: int | None
) -> None:
    whole, cut = make(block, **CUT[settings]), make(block, **CUT[settings])
    cut.device = replace(CPU, micro_batch_size=rows, checkpointing=checkpointing)
    polls: list[int] = []
    assert cut.gradients(lambda: polls.append(1)) == pytest.approx(whole.gradients(), abs=1e-5)
    for (name, p), q in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)
    c = whole.config
    parts = -(-c.batch_size // (rows or c.batch_size)) * c.gradient_accumulation_steps
    assert len(polls) == parts * (2 if c.masked_loss_weight else 1) - 1


def test_a_cut_batch_learns_from_teachers_as_the_whole_one() -> None:
    def taught(rows: int | None) -> Trainer:
        student = make(dropout=0.2)
        device = replace(CPU, micro_batch_size=rows)
        return Trainer(student.model, student.config, TOKENS, device, [make(seed=2).model.eval()])

    whole, cut = taught(None), taught(3)
    assert cut.gradients() == pytest.approx(whole.gradients(), abs=1e-5)
    for p, q in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


class _Shortage:
    """A forward pass that runs out of memory on more than so many sequences."""

    def __init__(self, trainer: Trainer, rows: int, error: type[Exception], stored: bool = True) -> None:
        self.forward, self.rows, self.error, self.stored = trainer._forward, rows, error, stored
        self.refused: list[int] = []

    def __call__(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if len(x) > self.rows or not (self.stored or kwargs["recompute"]):
            self.refused.append(len(x))
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return self.forward(x, **kwargs)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_f40_a_step_that_runs_out_of_memory_is_repeated_in_smaller_parts(error: type[Exception]) -> None:
    plain, short = make(dropout=0.2), make(dropout=0.2)
    plain.device = replace(CPU, micro_batch_size=2)
    shortage = short._forward = _Shortage(short, 3, error)
    assert [short.advance() for _ in range(3)] == [plain.advance() for _ in range(3)]
    assert shortage.refused == [8, 4]
    assert short.device == replace(CPU, micro_batch_size=2)
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(short)[name]), name


def test_f40_one_sequence_that_does_not_fit_is_recomputed_or_fails() -> None:
    short = make(batch_size=2)
    short._forward = _Shortage(short, 1, MemoryError, stored=False)
    short.advance()
    assert short.device == replace(CPU, micro_batch_size=1, checkpointing=True)
    for settings in ({"gradient_checkpointing": "off"}, {}):
        never = make(**settings)
        before = weights(never)
        never._forward = _Shortage(never, 0, MemoryError)
        with pytest.raises(MemoryError):
            never.advance()
        assert all(torch.equal(value, before[name]) for name, value in weights(never).items())
        assert all(p.grad is None for p in never.model.parameters())
