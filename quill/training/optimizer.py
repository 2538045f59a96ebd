"""AdamW, alone or with Muon for the matrices inside the blocks.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Muon: Jordan et al. 2024, "Muon: An optimizer for
hidden layers in neural networks", as implemented by torch.optim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quill.config.settings import TrainConfig
from quill.model.gpt import GPT


class Optimizer:
    """The optimizers of a model's parameters, under one schedule.

    Args:
        model: Its parameters are grouped by role: matrices decay, vectors do not.
        config: Rates, decay and momenta.

    Attributes:
        optimizers: Those of torch, Muon before AdamW.
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._names: dict[Tensor, str] = {p: n for n, p in named.items()}
        # Muon is for maps between activations; embeddings and the head are tables.
        hidden = {p for n, p in named.items() if n.startswith("h.") and p.dim() == 2}
        if config.optimizer != "muon":
            hidden = set()
        rest = [p for p in named.values() if p not in hidden]
        groups = [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = []
        if hidden:
            self.optimizers.append(
                torch.optim.Muon(
                    [p for p in named.values() if p in hidden],
                    lr=config.muon_learning_rate,
                    weight_decay=config.weight_decay,
                    momentum=config.muon_momentum,
                )
            )
        self.optimizers.append(
            torch.optim.AdamW(
                [g for g in groups if g["params"]],
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                fused=rest[0].device.type in ("cpu", "cuda"),
            )
        )
        self._peaks = [[g["lr"] for g in o.param_groups] for o in self.optimizers]

    def at(self, rate: float) -> list[torch.optim.Optimizer]:
        """The optimizers, set to a learning rate and ready to step.

        Args:
            rate: The learning rate as a share of its peak.
        """
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
        return self.optimizers

    def state(self) -> dict[str, Tensor]:
        """Momenta and counters, by "parameter/quantity"."""
        return {
            f"{self._names[p]}/{quantity}": value
            for optimizer in self.optimizers
            for p, quantities in optimizer.state.items()
            for quantity, value in quantities.items()
            if isinstance(value, Tensor)
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        owners = {
            self._names[p]: (optimizer, p)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for key, value in state.items():
            name, _, quantity = key.rpartition("/")
            optimizer, p = owners[name]
            optimizer.state[p][quantity] = value.to(p.device, copy=True)
