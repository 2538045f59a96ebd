"""The trainer of one of several processes, whether each has the whole model or a share of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from quill.errors import DivergedError
from quill.training import processes
from quill.training.processes import Group
from quill.training.trainer import Trainer


class Member(Trainer):
    """The trainer of one process; its config is that process's part of the run.

    Args:
        *args: As for Trainer.
        group: The processes.
    """

    def __init__(self, *args: Any, group: Group) -> None:
        super().__init__(*args)
        self._group = group
        self._rank, self._size = group.rank, group.size

    def enqueue(self, poll: Callable[[], None] = lambda: None) -> None:
        """Take one optimizer step with the others; `poll` is not called, as they could not stop with it."""
        with processes.translated():
            super().enqueue()

    def obey(self, kind: int, value: int) -> None:
        """Follow a command of the leader.

        Args:
            kind: The command.
            value: Its argument.
        """
        self.horizon = value or None
        # The leader has computed the same figures, and reports them.
        with suppress(DivergedError):
            self.advance()

    def _accumulate(self, poll: Callable[[], None]) -> tuple[Tensor, Tensor]:
        own = super()._accumulate(poll)
        value, extra = torch.tensor(self._group.mean(torch.stack(own).tolist()), device=self.device.name)
        return value, extra

    def _smaller(self) -> None:
        """None: the others are in the middle of the same step and could not repeat it."""
