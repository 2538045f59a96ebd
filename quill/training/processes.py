"""The processes that share a run, started by torch's launcher: how they meet, and what each does.

The first process leads: it alone reads and writes the registry, logs, reports and decides; the others
compute.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from quill.errors import InputError, QuillError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

    from quill.config.settings import RunConfig, TrainConfig

# The commands of the leader.
STOP, WORK, STEP, EVALUATE, GATHER, SAVE, LOAD, GO = range(8)
# What torch's launcher and every other one sets.
_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# What torch's launcher sets besides: this process among those of its computer, and their number.
_LOCAL = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
# The others wait while the first prepares data or evaluates; the launcher ends them if it dies.
_PATIENCE = timedelta(days=7)
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")


class PeerLostError(ResourceError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Group:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: This process; the leader is 0.
        size: Number of processes.
        local_rank: This process among those of its computer.
        local_size: Number of processes on its computer.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    def part(self, config: RunConfig) -> RunConfig:
        """As the function of this name."""
        own = {**_share(config.train, self.size), "device": self._device(config.train.device)}
        return config.model_copy(update={"train": config.train.model_copy(update=own)})

    def command(self, kind: int, value: int = 0) -> tuple[int, int]:
        """Send a command and its argument to the others, or receive them from the leader."""
        import torch

        both = torch.tensor([kind, value])
        self.broadcast(both)
        return int(both[0]), int(both[1])

    def tell(self, message: Any) -> None:
        """Send JSON to the others, who `hear` it."""
        import torch

        raw = bytearray(json.dumps(message).encode())
        self.broadcast(torch.tensor([len(raw)]))
        self.broadcast(torch.frombuffer(raw, dtype=torch.uint8))

    def hear(self) -> Any:
        """Receive what the leader tells."""
        import torch

        length = torch.zeros(1, dtype=torch.int64)
        self.broadcast(length)
        raw = torch.zeros(int(length), dtype=torch.uint8)
        self.broadcast(raw)
        return json.loads(raw.numpy().tobytes())

    def broadcast(self, tensor: Tensor) -> None:
        """Copy a tensor of the leader's, on the CPU, into the others'."""
        from torch import distributed

        with translated():
            distributed.broadcast(tensor, 0)

    def mean(self, values: list[float]) -> list[float]:
        """The means of values over all processes."""
        import torch
        from torch import distributed

        total = torch.tensor(values, dtype=torch.float64)
        with translated():
            distributed.all_reduce(total)
        return [float(v) / self.size for v in total]

    def _device(self, wanted: str) -> str:
        import torch

        from quill.training.device import find_device

        found = find_device(wanted)
        if found == "cpu":
            return found
        present = torch.cuda.device_count() if found == "cuda" else 1
        if found != "cuda" or self.local_rank >= present:
            raise ResourceError(
                f"process {self.local_rank + 1} of this computer has no device",
                why=f"each process needs its own, and train.device={wanted} has {present}",
                hint="start fewer processes, or set train.device=cpu",
            )
        return f"cuda:{self.local_rank}"


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several that share a run."""
    return env.keys() >= _VARIABLES and env["WORLD_SIZE"] != "1"


def is_leader(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process writes and reports, as the only one or the first of several."""
    return not is_launched(env) or env["RANK"] == "0"


def have_met() -> bool:
    """Whether the processes of a run are connected, so that the leader decides when they end."""
    # A signal may arrive while torch is being imported.
    distributed = sys.modules.get("torch.distributed")
    return bool(getattr(distributed, "is_initialized", lambda: False)())


def join(device: str) -> Group | None:
    """Connect to the other processes of the run.

    Args:
        device: The run's setting.

    Returns:
        None if this process is the only one; torch.distributed is not used then.

    Raises:
        ResourceError: They do not find each other.
    """
    if not is_launched():
        return None
    from torch import distributed

    from quill.training.device import find_device

    backend = "cpu:gloo,cuda:nccl" if find_device(device).startswith("cuda") else "gloo"
    try:
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise ResourceError(
            "the processes of the run did not find each other",
            why=str(e).partition("\n")[0][:200],
            hint="quill help many-devices",
        ) from e
    rank, size = distributed.get_rank(), distributed.get_world_size()
    local = (int(os.environ.get(name, default)) for name, default in _LOCAL.items())
    return Group(rank, size, *local)


@contextmanager
def leading(group: Group | None, *, to_the_end: bool = True) -> Iterator[None]:
    """Dismiss the other processes at the end, and after an error that leaves them waiting for a command.

    Args:
        group: The processes.
        to_the_end: Whether nothing follows; if more does, only an error dismisses them.
    """
    try:
        yield
    except PeerLostError:
        raise
    except (QuillError, KeyboardInterrupt):
        _dismiss(group)
        raise
    if to_the_end:
        _dismiss(group)


def part(config: RunConfig, group: Group | None) -> RunConfig:
    """The run as this process computes it: its share of a step, on its own device.

    Raises:
        InputError: The sequences of a step cannot be divided among the processes.
        ResourceError: There is no device for this process.
    """
    if group is not None and config.model.ngram:
        raise InputError(
            "'model.ngram' cannot be set for a run of several processes",
            why="the gate between counts and network learns in one process",
            hint="set model.ngram=0, or train in one process",
        )
    return config if group is None else group.part(config)


@contextmanager
def translated() -> Iterator[None]:
    """Turn torch's errors about a process that has ended into PeerLostError.

    Raises:
        PeerLostError: A connection to another process was closed.
    """
    try:
        yield
    except RuntimeError as e:
        if not any(word in str(e).lower() for word in _LOST):
            raise
        raise PeerLostError(
            "another process of the run has ended",
            why=str(e).partition("\n")[0][:200],
            hint="repeat the command to resume",
        ) from e


def _dismiss(group: Group | None) -> None:
    """Tell the others that nothing follows; one that has ended already need not hear it."""
    if group is not None:
        with suppress(PeerLostError):
            group.command(STOP)


def _share(train: TrainConfig, size: int) -> dict[str, int]:
    """The batch size and number of forward passes of a process, each pass as large as possible."""
    sequences = train.batch_size * train.gradient_accumulation_steps
    if sequences % size:
        raise InputError(
            f"a step of {sequences:,} sequences cannot be divided among {size} processes",
            why="it has train.batch_size times train.gradient_accumulation_steps sequences",
            hint=f"set train.batch_size={math.ceil(train.batch_size / size) * size}",
        )
    rows = sequences // size
    passes = next(n for n in range(math.ceil(rows / train.batch_size), rows + 1) if rows % n == 0)
    return {"batch_size": rows // passes, "gradient_accumulation_steps": passes}
