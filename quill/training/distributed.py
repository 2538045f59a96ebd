"""Training in several processes by PyTorch's DistributedDataParallel: the leader commands, the others follow.

The leader is the process that carries out the run, as it would alone, with a `Leader` for its trainer. The
others repeat its steps on their share of each batch and need neither the registry's locks nor its files. The
trainers of a model that is divided among the processes are in `sharding`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from quill.config import reading
from quill.config.settings import RunConfig
from quill.data.dataset import Dataset
from quill.errors import NotFoundError
from quill.model.gpt import GPT
from quill.registry.store import Registry
from quill.training import processes, teachers
from quill.training.device import Device
from quill.training.member import Member
from quill.training.processes import Group
from quill.training.splits import Splits


class Replica(Member):
    """The trainer of a process that has the whole model, as each of the others.

    Args:
        *args: As for Trainer.
        group: The processes.
    """

    _replica: nn.Module | None = None

    def replicate(self) -> None:
        """Synchronize gradients with the other processes from now on."""
        device = torch.device(self.device.name)
        devices = [device] if device.type == "cuda" else None
        with processes.translated():
            replica = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
        self._replica = replica
        self._forward = torch.compile(replica) if self.device.compiled else replica
        # It would call the model past its replica.
        self._forward_loss = None

    def _complete(self, last: bool) -> None:
        if self._replica is not None:
            self._replica.require_backward_grad_sync = last  # type: ignore[assignment]


class Leader(Replica):
    """The trainer of the leading process.

    Args:
        *args: As for Trainer.
        group: The processes.
        work: What the others need to know, for `follow`.
    """

    def __init__(self, *args: Any, group: Group, work: dict[str, Any]) -> None:
        super().__init__(*args, group=group)
        self._work = work

    def enqueue(self, poll: Callable[[], None] = lambda: None) -> None:
        """Take one optimizer step, with the others."""
        if self._replica is None:
            self._assemble()
        self._group.command(processes.STEP, self.horizon or 0)
        super().enqueue()

    def _assemble(self) -> None:
        """Give the others work, weights and optimizer state."""
        tensors, facts = self.state()
        shared = {n: t.cpu() for n, t in tensors.items() if not n.startswith("average/")}
        layout = {n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in shared.items()}
        self._group.command(processes.WORK)
        self._group.tell(self._work | {"layout": layout, "facts": facts})
        for tensor in shared.values():
            self._group.broadcast(tensor.contiguous())
        self.replicate()


def work(
    config: RunConfig, dataset: Dataset, device: Device, taught_by: list[str], *, sharded: bool
) -> dict[str, Any]:
    """What the other processes need to know of a run.

    Args:
        config: The settled run.
        dataset: Its data.
        device: The chosen precision, compilation and number of sequences at once.
        taught_by: References of its teachers.
        sharded: Whether the model is divided among the processes.
    """
    return {
        "sharded": sharded,
        "config": config.to_dict(),
        "dataset": [str(dataset.path.absolute()), dataset.key],
        "device": asdict(device),
        "teachers": taught_by,
    }


def follow(group: Group, registry: Registry) -> None:
    """Do the leader's work until it dismisses this process.

    Args:
        group: The processes.
        registry: Where teachers are.

    Raises:
        PeerLostError: The leader has ended.
        NotFoundError: The data or a teacher is not on this computer.
        ResourceError: There is no device for this process.
    """
    trainer: Member | None = None
    while True:
        kind, value = group.command(processes.STOP)
        if kind == processes.STOP:
            return
        if kind == processes.WORK or trainer is None:
            trainer = _recruit(group, registry)
        else:
            trainer.obey(kind, value)


def _recruit(group: Group, registry: Registry) -> Member:
    """A trainer at the leader's step."""
    told = group.hear()
    config = group.part(reading.parse(told["config"], origin="the leading process"))
    settings, shape = config.train, config.model.shape()
    device = Device(**told["device"] | {"name": settings.device})
    taught_by = teachers.load([registry.resolve(name) for name in told["teachers"]], device.name)
    splits = Splits(_dataset(*told["dataset"]), settings.holdout)
    if told["sharded"]:
        from quill.training.sharding import Sharded

        sharded = Sharded(shape, settings, splits, device, taught_by, group=group, weights={})
        sharded.step = sharded.first = told["first"]
        return sharded
    # The leader alone keeps the average of the weights.
    settings = settings.model_copy(update={"ema_decay": 0.0})
    model = GPT(shape, settings.seed).to(device.name)
    trainer = Replica(model, settings, splits.train, device, taught_by, group=group)
    state: dict[str, Tensor] = {}
    for name, (dtype, *shape) in told["layout"].items():
        state[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        group.broadcast(state[name])
    trainer.load_state(state, told["facts"])
    trainer.replicate()
    return trainer


def _dataset(path: str, key: str) -> Dataset:
    """The leader's dataset, which every computer must have under the same path."""
    with suppress(NotFoundError):
        dataset = Dataset.open(Path(path))
        if dataset.key == key:
            return dataset
    raise NotFoundError(
        f"the dataset in '{path}' is not on this computer",
        why="every process reads the data itself",
        hint="put the registry and its data on a filesystem that all computers share",
    )
