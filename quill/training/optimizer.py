"""AdamW, alone or with Muon for the matrices inside the blocks.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Muon: Jordan et al. 2024, "Muon: An optimizer for
hidden layers in neural networks", as torch.optim has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor

from quill.config.settings import TrainConfig
from quill.model.gpt import GPT


class Optimizer:
    """Every parameter of a model in the optimizer that suits it, under one schedule.

    Args:
        model: Its parameters are grouped by role: matrices decay, vectors do not.
        config: Rates, decay and momenta.
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        _spare_the_compiler()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._names = {id(p): n for n, p in named.items()}
        # Embeddings and the head are tables, not maps between activations: Muon is not for them.
        hidden = [p for n, p in named.items() if n.startswith("h.") and p.dim() == 2]
        self._parts: list[torch.optim.Optimizer] = []
        taken: set[int] = set()
        if config.optimizer == "muon" and hidden:
            self._parts.append(
                torch.optim.Muon(
                    hidden,
                    lr=config.muon_learning_rate,
                    weight_decay=config.weight_decay,
                    momentum=config.muon_momentum,
                )
            )
            taken = {id(p) for p in hidden}
        rest = [p for p in named.values() if id(p) not in taken]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        fused = rest[0].device.type in ("cpu", "cuda")
        self._parts.append(
            torch.optim.AdamW(
                groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused
            )
        )
        self._peaks = [[g["lr"] for g in part.param_groups] for part in self._parts]

    def step(self, rate: float) -> None:
        """Apply the gradients and forget them.

        Args:
            rate: Share of the peak learning rate.
        """
        for part, peaks in zip(self._parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            # What stands around an optimizer's step is for torch.compile and for profilers; it imports
            # the compiler, 46 MB and most of a second, which a run without it never uses.
            with torch.no_grad():
                inspect.unwrap(type(part).step)(part)
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Momenta and counters as tensors, by "parameter/quantity"."""
        return {
            f"{self._names[id(p)]}/{key}": value
            for p, values in self._states()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up where `state` was read from an equal optimizer."""
        parts = {id(p): part for part in self._parts for g in part.param_groups for p in g["params"]}
        params = {
            self._names[id(p)]: p for part in self._parts for g in part.param_groups for p in g["params"]
        }
        for key, value in state.items():
            name, _, quantity = key.rpartition("/")
            p = params[name]
            parts[id(p)].state[p][quantity] = value.to(p.device, copy=True)

    def _states(self) -> Iterator[tuple[Tensor, dict[str, object]]]:
        for part in self._parts:
            yield from part.state.items()


def _spare_the_compiler() -> None:
    """Keep torch from importing its compiler to build an optimizer, as `Optimizer.step` does to run one.

    Methods that are kept out of compiled graphs have a wrapper whose first call imports the compiler,
    unless it finds this attribute. A torch that does not look for it is merely slower to start.
    """
    for method in vars(torch.optim.Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            setattr(plain, "__dynamo_disable", plain)
