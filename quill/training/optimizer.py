"""AdamW, alone or with Muon for the matrices inside the blocks.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101, as implemented by torch.optim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quill.checkpoint.shards import Layout
from quill.config.settings import TrainConfig
from quill.model.gpt import GPT
from quill.training.muon import Muon, shrink

# The weight decay of a group of AdamW's parameters, if it is cautious.
_CAUTIOUS = "cautious_weight_decay"


class Optimizer:
    """The optimizers of a model's parameters, under one schedule.

    Args:
        model: Its parameters are grouped by role: matrices decay, vectors do not.
        config: Rates, decay and momenta.
        dtype: Precision of the run, in which Muon may compute.
        muon: The class of Muon.

    Attributes:
        optimizers: Muon before AdamW.
    """

    def __init__(self, model: GPT, config: TrainConfig, dtype: str, muon: type[Muon] = Muon) -> None:
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._names: dict[Tensor, str] = {p: n for n, p in named.items()}
        is_muon = config.optimizer == "muon"
        hidden = {n: p for n, p in named.items() if is_muon and is_hidden(n, p)}
        rest = {n: p for n, p in named.items() if n not in hidden}
        self._hidden = set(hidden.values())
        for_hidden = [muon(list(hidden.values()), config, getattr(torch, dtype))] if hidden else []
        self.optimizers: list[torch.optim.Optimizer] = [*for_hidden, _adamw(rest, config)]
        self._peaks = [(g, g["lr"], g[_decay_key(g)]) for o in self.optimizers for g in o.param_groups]

    def at(self, rate: float, decay: float = 1.0) -> list[torch.optim.Optimizer]:
        """The optimizers, set to a learning rate and ready to step.

        Args:
            rate: The learning rate as a share of its peak.
            decay: The weight decay as a share of its setting.
        """
        for group, peak, full in self._peaks:
            group["lr"], group[_decay_key(group)] = peak * rate, full * decay
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

    def layouts(self) -> dict[str, dict[str, Layout]]:
        """What `state` has of each parameter after its first step: momenta like it, and a counter."""
        counter = Layout(torch.float32, ())
        found = {}
        for p, name in self._names.items():
            like, is_muon = Layout(p.dtype, tuple(p.shape)), p in self._hidden
            found[name] = (
                {"momentum_buffer": like}
                if is_muon
                else {"step": counter, "exp_avg": like, "exp_avg_sq": like}
            )
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        owners = {
            self._names[p]: (optimizer, p, bool(group.get("fused")))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for key, value in state.items():
            name, _, quantity = key.rpartition("/")
            optimizer, p, is_fused = owners[name]
            # As in torch: without a fused step the counter is read on the CPU, in every step.
            on_cpu = quantity == "step" and not is_fused
            optimizer.state[p][quantity] = value.to("cpu" if on_cpu else p.device, copy=True)


def is_hidden(name: str, p: Tensor) -> bool:
    """Whether a parameter maps between activations, as Muon requires; embeddings and the head are tables."""
    return name.startswith("h.") and p.dim() == 2


def _adamw(named: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, with a group of parameters for each weight decay."""
    groups: dict[float, list[Tensor]] = {}
    for name, p in named.items():
        groups.setdefault(_decay(name, p, config), []).append(p)
    # PyTorch's own decay spares no weight, so a cautious one is done before its step.
    key = _CAUTIOUS if config.cautious_weight_decay else "weight_decay"
    adamw = torch.optim.AdamW(
        [{"params": alike, "weight_decay": 0.0, key: decay} for decay, alike in groups.items()],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=next(iter(named.values())).device.type in ("cpu", "cuda"),
    )
    if config.cautious_weight_decay:
        adamw.register_step_pre_hook(_decay_cautiously)
    return adamw


def _decay(name: str, p: Tensor, config: TrainConfig) -> float:
    if p.dim() < 2:
        return 0.0
    own = None
    if name.startswith("lm_head."):
        own = config.head_weight_decay
    elif not name.startswith("h."):
        own = config.embedding_weight_decay
    return config.weight_decay if own is None else own


def _decay_key(group: dict[str, Any]) -> str:
    return _CAUTIOUS if _CAUTIOUS in group else "weight_decay"


@torch.no_grad()
def _decay_cautiously(adamw: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Decay as AdamW does, except for the weights that its next step moves away from zero."""
    for group in adamw.param_groups:
        amount = group["lr"] * group[_CAUTIOUS]
        for p in group["params"] if amount else ():
            if p.grad is not None:
                # The sign of a step is that of the mean gradient, which this one is about to join.
                before = adamw.state[p].get("exp_avg")
                mean = p.grad if before is None else before.lerp(p.grad, 1 - group["betas"][0])
                shrink(p, mean, amount, cautious=True)
