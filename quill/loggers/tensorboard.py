"""TensorBoard: event files in runs/, or in the folder that TENSORBOARD_LOGGING_DIR names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from quill.loggers import base


class TensorBoardLogger(base.Logger):
    package = "tensorboard"

    def __init__(self, run: base.LoggedRun) -> None:
        self._root = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or "runs")
        writer: Any = import_module("torch.utils.tensorboard").SummaryWriter
        # Hides later points in the same folder: of steps that are repeated, or of a run that was removed.
        purged = run.step + 1 if run.step else 0
        self._writer = writer(str(self._root / run.reference.replace(":", "-")), purge_step=purged)
        if not run.resumed:
            self.text(run.step, "config", json.dumps(run.config, indent=2, ensure_ascii=False))

    @property
    def where(self) -> str:
        return f"tensorboard --logdir {self._root}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        # It is shown as Markdown, where an indented text stays as it is.
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.split("\n")), step)

    def close(self) -> None:
        self._writer.close()
