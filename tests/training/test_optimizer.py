"""Optimizers: which parameters each one updates, how they decay, and Muon against its reference."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from quill.config.settings import ModelConfig, TrainConfig
from quill.model.gpt import GPT
from quill.training import muon, schedule
from quill.training.device import Device
from quill.training.trainer import Trainer

TOKENS = np.random.default_rng(0).integers(0, 17, 2000).astype(np.uint16)
SHAPES = [(32, 32), (48, 16), (16, 48)]


def make(dtype: str = "float32", model: dict[str, Any] | None = None, **train: Any) -> Trainer:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 17, **(model or {})}
    settings = {"batch_size": 4, "warmup_iters": 2, "max_iters": 20, "seed": 3, **train}
    return Trainer(
        GPT(ModelConfig(**sizes).shape()), TrainConfig(**settings), TOKENS, Device("cpu", dtype, False)
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def groups(trainer: Trainer) -> dict[str, tuple[str, float]]:
    """The optimizer and the weight decay of each parameter."""
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return {
        names[id(p)]: (type(optimizer).__name__, group["weight_decay"])
        for optimizer in trainer.optimizer.optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }


def reference(trainer: Trainer) -> list[torch.optim.Optimizer]:
    """The default optimizer in torch's own words."""
    c, named = trainer.config, dict(trainer.model.named_parameters())
    hidden = [p for n, p in named.items() if n.startswith("h.") and p.dim() == 2]
    rest = [p for n, p in named.items() if not (n.startswith("h.") and p.dim() == 2)]
    tables = {"params": [p for p in rest if p.dim() == 2], "weight_decay": c.weight_decay}
    vectors = {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}
    adamw = torch.optim.AdamW(
        [tables, vectors], lr=c.learning_rate, betas=(c.beta1, c.beta2), weight_decay=0.0, fused=True
    )
    decay, momentum = c.weight_decay, c.muon_momentum
    return [
        torch.optim.Muon(hidden, lr=c.muon_learning_rate, weight_decay=decay, momentum=momentum),
        adamw,
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_defaults_equal_torchs_muon_bit_for_bit(dtype: str) -> None:
    ours, torchs = make(dtype, weight_decay=0.3), make(dtype, weight_decay=0.3)
    optimizers = reference(torchs)
    for step in range(20):
        ours.advance()
        torchs.gradients()
        torchs._clip()
        rate = schedule.rate(step, torchs.config)
        for optimizer, peak in zip(optimizers, (0.02, 3e-3), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
        torchs.model.zero_grad(set_to_none=True)
        torchs.step += 1
    for name, value in weights(ours).items():
        assert torch.equal(value, weights(torchs)[name]), name


def test_the_scale_match_rms_adamw_is_torchs() -> None:
    for shape in SHAPES:
        a, b = (torch.full(shape, 0.5, requires_grad=True) for _ in range(2))
        a.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        b.grad = a.grad.clone()
        config = TrainConfig(muon_learning_rate=0.1, weight_decay=0.1, muon_scale="match_rms_adamw")
        muon.Muon([a], config, torch.float32).step()
        torch.optim.Muon([b], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
        assert torch.equal(a, b), shape


def test_every_scale_that_can_be_set_is_known() -> None:
    assert set(muon.SCALES) == set(get_args(TrainConfig.model_fields["muon_scale"].annotation))
    assert muon.SCALES["spectral"](64, 16) == 2.0
    assert muon.SCALES["spectral"](16, 64) == 0.5


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.005)])
@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_keeps_the_singular_vectors_and_evens_out_the_values(
    shape: tuple[int, int], dtype: str, tolerance: float
) -> None:
    rank, generator = min(shape), torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    # From the largest singular value down to a hundredth of it; and far from 1, which must not matter.
    x = torch.stack([u * torch.logspace(0, -2, rank) @ v * size for size in (1e-3, 1.0, 1e3)])
    made = muon.polar_express(x, getattr(torch, dtype))
    assert made.shape == x.shape and made.dtype == getattr(torch, dtype)
    for matrix in made.float():
        inside = u.T @ matrix @ v.T
        assert (inside - torch.diag(inside.diagonal())).abs().max() < tolerance
        assert inside.diagonal().min() > 0.85 and inside.diagonal().max() < 1.15


def test_a_zero_gradient_stays_zero() -> None:
    assert not muon.polar_express(torch.zeros(2, 8, 4), torch.bfloat16).any()
    assert not muon.quintic(torch.zeros(8, 4)).any()


def test_matrices_are_orthogonalized_together_as_they_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = (make(muon_coefficients="polar_express", grad_clip=0.0) for _ in range(2))
    sizes: list[int] = []
    whole = muon.polar_express
    monkeypatch.setattr(muon, "polar_express", lambda x, dtype: (sizes.append(len(x)), whole(x, dtype))[1])
    together.advance()
    assert sum(sizes) == 14 and len(sizes) == 3, "q, k, v, o; gate and up; down, of both layers"
    monkeypatch.setitem(muon._STACK_ELEMENTS, "cpu", 1)
    alone.advance()
    assert sizes[3:] == [1] * 14
    for name, value in weights(together).items():
        torch.testing.assert_close(value, weights(alone)[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_only_matrices_decay_and_only_those_in_blocks_use_muon(block: str, optimizer: str) -> None:
    trainer = make(model={"block": block, "tie_embeddings": False}, optimizer=optimizer, weight_decay=0.3)
    found = groups(trainer)
    assert set(found) == set(weights(trainer))
    for name, (kind, decay) in found.items():
        is_matrix = trainer.model.get_parameter(name).dim() == 2
        assert decay == (0.3 if is_matrix else 0.0), name
        is_hidden = is_matrix and name.startswith("h.")
        assert kind == ("Muon" if is_hidden and optimizer == "muon" else "AdamW"), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_embeddings_and_head_can_have_their_own_decay(tied: bool, optimizer: str) -> None:
    own = {"embedding_weight_decay": 1.0, "head_weight_decay": 0.0, "weight_decay": 0.3}
    trainer = make(model={"block": "gpt2", "tie_embeddings": tied}, optimizer=optimizer, **own)
    found = {n: decay for n, (_, decay) in groups(trainer).items() if "weight" in n}
    assert found["wte.weight"] == found["wpe.weight"] == 1.0
    assert found.get("lm_head.weight") == (None if tied else 0.0)
    assert found["h.0.attn.c_attn.weight"] == 0.3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cautious_decay_spares_the_weights_that_move_away_from_zero(optimizer: str) -> None:
    """Against runs without decay: a step from the same weights differs by the decay alone."""
    steps, rate = 4, 0.01
    common = {"optimizer": optimizer, "schedule": "constant", "warmup_iters": 0, "grad_clip": 0.0}
    rates = {"learning_rate": rate, "muon_learning_rate": rate}
    decaying = make(weight_decay=2.0, cautious_weight_decay=True, **common, **rates)
    for _ in range(steps):
        free = make(weight_decay=0.0, **common, **rates)
        tensors, facts = decaying.state()
        free.load_state({n: t.clone() for n, t in tensors.items()}, facts)
        before = weights(decaying)
        decaying.advance()
        free.advance()
        spared = decayed = 0
        for name, value in weights(decaying).items():
            start, other = before[name], weights(free)[name]
            if value.dim() < 2:
                assert torch.equal(value, other)
                continue
            away = (start - other) * start < 0
            expected = other - ~away * start * 2.0 * rate
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)
            spared += int(away.sum())
            decayed += int((~away).sum())
        assert decayed > 100 and spared > 100


def test_the_decay_can_fall_over_the_run() -> None:
    def course(kind: str, horizon: int | None = None) -> list[float]:
        config = TrainConfig(max_iters=100, weight_decay_schedule=kind)  # type: ignore[arg-type]
        return [schedule.weight_decay(step, config, horizon=horizon) for step in (0, 25, 50, 100, 200)]

    assert course("constant") == [1.0] * 5
    assert course("linear") == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert course("cosine") == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.0, 0.0])
    assert course("linear", horizon=50) == [1.0, 0.5, 0.0, 0.0, 0.0], "time is up at step 50"
    assert course("linear", horizon=1000) == course("linear")


@pytest.mark.parametrize("cautious", [False, True])
def test_a_step_uses_the_decay_of_its_schedule(cautious: bool) -> None:
    trainer = make(weight_decay_schedule="linear", weight_decay=0.4, cautious_weight_decay=cautious)
    for optimizer in trainer.optimizer.at(1.0, 0.25):
        for group in optimizer.param_groups:
            is_hidden_from_torch = cautious and type(optimizer) is torch.optim.AdamW
            key = "cautious_weight_decay" if is_hidden_from_torch else "weight_decay"
            assert group[key] in (0.0, 0.1)
            assert group["weight_decay"] == 0.0 or not is_hidden_from_torch
    # Of 20 steps 15 are done; and of 18, if time is up then, 9.
    for step, horizon, left in ((15, None, 0.25), (9, 18, 0.5)):
        trainer.step, trainer.horizon = step, horizon
        trainer.advance()
        assert {g["weight_decay"] for g in trainer.optimizer.optimizers[0].param_groups} == {0.4 * left}


@pytest.mark.parametrize("decay", [{}, {"cautious_weight_decay": True, "weight_decay_schedule": "cosine"}])
@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        ("float32", {"optimizer": "adamw"}),
        ("float32", {"muon_scale": "spectral"}),
        ("float32", {"muon_scale": "spectral", "muon_coefficients": "polar_express"}),
        ("bfloat16", {"muon_scale": "match_rms_adamw", "muon_coefficients": "polar_express"}),
    ],
)
def test_every_kind_of_optimizer_resumes_bit_for_bit(
    dtype: str, optimizer: dict[str, Any], decay: dict[str, Any]
) -> None:
    def trainer() -> Trainer:
        own = {"embedding_weight_decay": 1.0, "head_weight_decay": 0.02}
        return make(dtype, {"tie_embeddings": False, "dropout": 0.1}, **optimizer, **decay, **own)

    whole, first, second = trainer(), trainer(), trainer()
    losses = [whole.advance() for _ in range(6)]
    before = [first.advance() for _ in range(3)]
    tensors, facts = first.state()
    second.load_state({n: t.clone() for n, t in tensors.items()}, facts)
    assert before + [second.advance() for _ in range(3)] == losses
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_polar_express_computes_in_the_precision_of_the_run(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    apply = muon._apply
    monkeypatch.setattr(muon, "_apply", lambda p, x: (seen.add(x.dtype), apply(p, x))[1])
    make(dtype, muon_coefficients="polar_express").advance()
    assert seen == {getattr(torch, dtype)}
