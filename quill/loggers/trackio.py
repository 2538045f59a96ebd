"""trackio, on this computer or where its own variables say: TRACKIO_DIR, TRACKIO_SPACE_ID and so on."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

from quill.loggers import base


class TrackioLogger(base.Logger):
    package = "trackio"

    def __init__(self, run: base.LoggedRun) -> None:
        self._trackio: Any = import_module("trackio")
        self._project = os.environ.get("TRACKIO_PROJECT") or base.PROJECT
        # It prints instructions; stdout belongs to what quill prints.
        with redirect_stdout(io.StringIO()):
            self._run = self._trackio.init(
                project=self._project,
                name=run.reference,
                config=dict(run.config),
                resume="allow" if run.resumed else "never",
                embed=False,
            )

    @property
    def where(self) -> str:
        return f"trackio show --project {self._project}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._trackio.Markdown(f"```text\n{text}\n```")}, step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            # Also what the package would finish again, and report, when the process ends.
            self._trackio.finish()
