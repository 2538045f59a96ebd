"""Muon: a momentum whose matrices are made orthogonal before they are applied.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Polar Express: Amsel et al.
2025, arXiv:2505.16932. Scales: Liu et al. 2025, arXiv:2502.16982 (match_rms_adamw); Pethick et al. 2025,
arXiv:2502.07529 (spectral). Cautious decay: Chen et al. 2025, arXiv:2510.12402.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from quill.config.settings import TrainConfig

_Polynomials = tuple[tuple[float, float, float], ...]
_QUINTIC: _Polynomials = ((3.4445, -4.7750, 2.0315),) * 5
# As published: a bound on the singular values that leaves room for rounding.
_SAFETY = 1.01
_POLAR_EXPRESS: _Polynomials = tuple(
    (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)
_EPSILON = 1e-7
# Small matrices are faster together; on a CPU a stack of large ones would only leave the cache.
_STACK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
# Factors on the update of a matrix with so many rows (outputs) and columns (inputs).
SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
}


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized.

    With default settings the weights are those of `torch.optim.Muon`, bit for bit.

    Args:
        matrices: The parameters, each (rows, columns).
        config: Rate, momentum, decay, and how updates are orthogonalized and scaled.
        dtype: Precision in which polar_express computes; quintic computes in bfloat16.
    """

    def __init__(self, matrices: list[Tensor], config: TrainConfig, dtype: torch.dtype) -> None:
        groups = {"lr": config.muon_learning_rate, "weight_decay": config.weight_decay}
        super().__init__(matrices, {**groups, "momentum": config.muon_momentum})
        self._together = config.muon_coefficients != "quintic"
        self._dtype = dtype
        self._scale = SCALES[config.muon_scale]
        self._cautious = config.cautious_weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient."""
        for group in self.param_groups:
            lr, decay = group["lr"], group["lr"] * group["weight_decay"]
            for matrices in self._stacks(p for p in group["params"] if p.grad is not None):
                momenta = [self._momentum(p, group["momentum"]) for p in matrices]
                alpha = -lr * self._scale(*matrices[0].shape)
                for p, update in zip(matrices, self._orthogonal(momenta), strict=True):
                    shrink(p, update, decay, cautious=self._cautious)
                    p.add_(update, alpha=alpha)

    def _stacks(self, matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """The matrices, of equal shape and as many at once as are orthogonalized together."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        for shape, alike in by_shape.items():
            elements = _STACK_ELEMENTS.get(alike[0].device.type, _STACK_ELEMENTS["cpu"])
            most = max(1, elements // shape.numel()) if self._together else 1
            for i in range(0, len(alike), most):
                yield alike[i : i + most]

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        average: Tensor = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)

    def _orthogonal(self, momenta: list[Tensor]) -> Iterable[Tensor]:
        if self._together:
            return polar_express(torch.stack(momenta), self._dtype).unbind()
        return [quintic(m) for m in momenta]


def quintic(x: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular values end between 0.7 and 1.2.

    The arithmetic is that of `torch.optim.Muon`.

    Args:
        x: (rows, columns).

    Returns:
        bfloat16, of the same shape.
    """
    y = x.bfloat16()
    y = y.mT if len(y) > y.shape[1] else y
    y = _apply(_QUINTIC, y / y.norm().clamp(min=_EPSILON))
    return y.mT if len(x) > x.shape[1] else y


def polar_express(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest orthogonal matrices, by the polynomials that converge fastest in five steps.

    Args:
        x: (n, rows, columns); divided by their norms in place.
        dtype: Precision of the products.

    Returns:
        In dtype, of the same shape.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    x.div_(x.norm(dim=(-2, -1), keepdim=True) * _SAFETY + _EPSILON)
    y = _apply(_POLAR_EXPRESS, (x.mT if is_tall else x).to(dtype))
    return y.mT if is_tall else y


def shrink(p: Tensor, update: Tensor, amount: float, *, cautious: bool) -> None:
    """Decay weights in place, by a share of themselves.

    Args:
        p: The weights.
        update: What will be subtracted from them, or anything of the same signs.
        amount: The share.
        cautious: Decay only weights that the update does not move away from zero.
    """
    if cautious:
        p.addcmul_(p, (update * p).ge_(0), value=-amount)  # ge_ leaves 0 and 1 in place of the products
    else:
        p.mul_(1 - amount)


def _apply(polynomials: _Polynomials, x: Tensor) -> Tensor:
    """Apply odd polynomials to the singular values of wide matrices, one after the other."""
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
