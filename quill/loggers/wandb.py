"""Weights & Biases, with its own variables: WANDB_PROJECT, WANDB_MODE=offline and so on."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from quill.loggers import base


class WandbLogger(base.Logger):
    package = "wandb"

    def __init__(self, run: base.LoggedRun) -> None:
        self._wandb: Any = import_module("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT") or base.PROJECT,
            id=run.id,
            name=run.reference,
            config=dict(run.config),
            resume="allow",
            # Neither its messages nor a copy of ours: quill's output belongs to quill.
            settings=self._wandb.Settings(silent=True, console="off"),
        )

    @property
    def where(self) -> str:
        if self._run.offline:
            return f"wandb sync {self._run.dir.removesuffix('/files')}"
        return str(self._run.url)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step=step)

    def close(self) -> None:
        self._run.finish()
