"""A folder where processes share runs; they are started as torch's launcher starts them, but sooner."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from trainings import finish, start, start_together

from quill.evaluation import curves
from quill.registry.store import Registry

SETTINGS = (
    "--data=tiny", "--n-layer=2", "--n-head=2", "--n-embd=16", "--block-size=16", "--dropout=0",
    "--batch-size=4", "--gradient-accumulation-steps=2", "--optimizer=adamw", "--learning-rate=0.003",
    "--warmup-iters=5", "--max-iters=50", "--eval-interval=25", "--log-interval=1",
    "--device=cpu", "--dtype=float32", "--compile=off", "--json",
)  # fmt: skip
# What ends a run of processes ends it within this time.
SECONDS = 30.0
# No run takes longer unless it hangs, however busy the computer is.
_LONGEST = 400.0


class Here(NamedTuple):
    """A folder with the dataset `tiny` and a registry."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    def arguments(self, name: str, *more: str) -> list[str]:
        return ["train", f"--name={name}", f"--registry={self.weights}", *SETTINGS, *more]

    def run(self, name: str, size: int, *more: str) -> None:
        """Train in processes to the end, or to a pause."""
        said = self.folder / f"{name}-{size}"
        processes = start_together(size, self.arguments(name, *more), self.folder, said)
        assert [finish(p, _LONGEST) for p in processes] == [0] * size, self.said(said, size)

    def run_alone(self, name: str, *more: str) -> None:
        said = self.folder / name
        assert finish(start(self.arguments(name, *more), self.folder, said), _LONGEST) == 0, self.said(said)

    def said(self, said: Path, size: int = 1) -> str:
        outputs = [said, *(said.with_name(f"{said.name}-{rank}") for rank in range(1, size))]
        return "\n".join(o.with_name(f"{o.name}.err").read_text() for o in outputs)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """The losses by step, of training and of validation."""
        parsed = curves.stream(Registry(self.weights).find(name, in_progress=True).metrics())
        return [(p["step"], p.get("loss", p.get("val_loss"))) for p in parsed if "sample" not in p]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.weights / name / "v1" / "model.safetensors")


def assert_alike(curve: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [step for step, _ in curve] == [step for step, _ in expected]
    worst = max(abs(a - b) for (_, a), (_, b) in zip(curve, expected, strict=True))
    assert worst < 1e-4
