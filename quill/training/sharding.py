"""Training a model that is divided among processes by PyTorch's FSDP2, as `fully_shard`.

Each process has a share of the weights, their average, the gradients and the optimizer's state, and all
weights of the blocks that it is computing. What needs all of them, or writes or reads them, is done by all
processes together: the leader begins, and each of its methods calls itself in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from quill.checkpoint import shards
from quill.checkpoint.resume_state import Saved
from quill.config.settings import TrainConfig
from quill.config.shape import Shape
from quill.errors import DivergedError, QuillError
from quill.evaluation.temperature import Fitted
from quill.model.gpt import GPT, outline
from quill.training import processes
from quill.training.device import Device
from quill.training.member import Member
from quill.training.muon import Muon
from quill.training.optimizer import Optimizer
from quill.training.processes import Group
from quill.training.splits import Splits


class _Stopped(Exception):
    """The leader has stopped an evaluation."""


class Sharded(Member):
    """The trainer of one process that has a share of the run's state; its config is that process's part.

    Args:
        shape: The model's.
        config: Training settings.
        splits: The data.
        device: As for Trainer.
        taught_by: As for Trainer.
        group: The processes.
        weights: All weights to start from, on the leader; the others give none.
    """

    def __init__(
        self,
        shape: Shape,
        config: TrainConfig,
        splits: Splits,
        device: Device,
        taught_by: Iterable[GPT],
        *,
        group: Group,
        weights: Mapping[str, Tensor],
    ) -> None:
        kind = device.kind
        if kind == "cuda":
            # A mesh means the current device.
            torch.cuda.set_device(device.name)
        self._mesh = init_device_mesh(kind, (group.size,))
        model = _divided(shape, device, self._mesh)
        everything = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        with processes.translated():
            set_model_state_dict(model, dict(weights), options=everything)
        super().__init__(model, config, splits.train, device, tuple(taught_by), group=group)
        self._splits = splits
        # Blocks are compiled one by one, and compute in the precision of the weights that they are given.
        self._forward, self._forward_loss = model, None
        self.evaluates_in = device

    @property
    def has_all(self) -> bool:
        """False: the other processes have the rest."""
        return False

    def enqueue(self, poll: Callable[[], None] = lambda: None) -> None:
        """As for Member."""
        self._summon(processes.STEP, self.horizon or 0)
        super().enqueue(poll)

    def evaluate(self, val: Any, n_bytes: int, poll: Callable[[], None] = lambda: None) -> list[Fitted]:
        """As for Trainer. All processes compute the same, as each pass needs the weights of all."""
        self._summon(processes.EVALUATE)
        try:
            with processes.translated():
                return super().evaluate(val, n_bytes, lambda: self._agree(poll))
        finally:
            for model in (self.model, self.averaged):
                if model is not None:
                    # Without a backward pass, the weights outside of the blocks are still gathered.
                    cast(FSDPModule, model).reshard()

    def whole(self, *, averaged: bool = False) -> GPT:
        """The model with all of its weights on the leader's CPU; on the others without."""
        self._summon(processes.GATHER, int(averaged))
        model = super().whole(averaged=averaged)
        found = {}
        with processes.translated(), torch.no_grad():
            for name, share in model.state_dict().items():
                tensor = cast(DTensor, share).full_tensor()
                if not self._rank:
                    found[name] = tensor.cpu()
        whole = outline(model.shape).requires_grad_(False)
        if found:
            whole.load_state_dict(found, assign=True)
        return whole

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of `state`, each process its share."""
        self._summon(processes.SAVE)
        if not self._rank:
            self._group.tell(str(folder.absolute()))
        with processes.translated():
            shards.write(folder, tensors)

    def restore(self, saved: Saved) -> None:
        """Restore a resume state, each process its share."""
        self._summon(processes.LOAD)
        if not self._rank:
            self._group.tell([str(saved.folder.absolute()), saved.info["trainer"]])
        self._restore(saved.folder, saved.info["trainer"])

    def obey(self, kind: int, value: int) -> None:
        """As for Member."""
        if kind == processes.EVALUATE:
            # The leader has computed the same figures, and reports them.
            with suppress(DivergedError, _Stopped):
                self.evaluate(self._splits.val, 1)
        elif kind == processes.GATHER:
            self.whole(averaged=bool(value))
        elif kind == processes.SAVE:
            folder = Path(self._group.hear())
            # The leader raises the error of whichever process failed.
            with suppress(QuillError, OSError):
                self.write(folder, self.state()[0])
        elif kind == processes.LOAD:
            folder, facts = self._group.hear()
            self._restore(Path(folder), facts)
        else:
            super().obey(kind, value)

    def _restore(self, folder: Path, facts: dict[str, Any]) -> None:
        """Read this process's share of a state, which any number of processes has written."""
        parameters = dict(self.model.named_parameters())
        found = shards.layout(folder)
        self.check(found)
        if any(name.startswith("average/") for name in found):
            self.averaged = self._copy()
        tensors = {n: t for n, t in self.state()[0].items() if not n.startswith("optimizer/")}
        for name, (dtype, shape) in found.items():
            kind, _, quantity = name.partition("/")
            if kind == "optimizer":
                like = parameters[quantity.rpartition("/")[0]]
                # Moments are divided as their parameter is; counters are not.
                is_moment = shape == tuple(like.shape)
                tensors[name] = torch.empty_like(like) if is_moment else torch.empty(shape, dtype=dtype)
        with processes.translated():
            shards.read(folder, tensors)
        self.load_state(tensors, facts)
        self.evaluates_in = self.device

    def _summon(self, kind: int, value: int = 0) -> None:
        """On the leader, call this method in the other processes."""
        if not self._rank:
            self._group.command(kind, value)

    def _agree(self, poll: Callable[[], None]) -> None:
        """Poll, so that what stops the leader stops all processes between the same two forward passes."""
        if self._rank:
            if self._group.command(processes.STOP)[0] == processes.STOP:
                raise _Stopped
            return
        try:
            poll()
        except BaseException:
            self._group.command(processes.STOP)
            raise
        self._group.command(processes.GO)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        # Weights gathered in inference mode could not be trained with later.
        with torch.inference_mode(False), torch.no_grad(), super()._evaluating():
            yield

    def _optimizer(self) -> Optimizer:
        return Optimizer(self.model, self.config, self.device.dtype, ShardedMuon)

    def _copy(self) -> GPT:
        copy = _divided(self.model.shape, self.device, self._mesh)
        copy.load_state_dict(self.model.state_dict())
        return copy.requires_grad_(False).eval()

    def _own(self, model: GPT) -> list[Tensor]:
        return [cast(DTensor, p).to_local() for p in model.parameters()]

    def _norm(self, grads: list[Tensor]) -> Tensor:
        return cast(DTensor, super()._norm(grads)).full_tensor()


class ShardedMuon(Muon):
    """Muon on divided matrices, each of which is gathered to be orthogonalized whole."""

    def _orthogonal(self, momenta: list[Tensor]) -> Iterable[Tensor]:
        shares = cast(list[DTensor], momenta)
        for share, update in zip(shares, super()._orthogonal([s.full_tensor() for s in shares]), strict=True):
            # Every process has computed it and takes its share; nothing is sent.
            yield distribute_tensor(update, share.device_mesh, share.placements, src_data_rank=None)


def lead(
    model: GPT,
    config: TrainConfig,
    splits: Splits,
    device: Device,
    taught_by: Iterable[GPT],
    *,
    group: Group,
    work: dict[str, Any],
    first: int,
) -> Sharded:
    """The leader's trainer, once the other processes have theirs.

    Args:
        model: All weights to start from, on the CPU.
        config: Training settings of this process.
        splits: The data.
        device: As for Trainer.
        taught_by: As for Trainer.
        group: The processes.
        work: What the others need to know.
        first: The step at which a lengthened run begins again; 0 otherwise.
    """
    group.command(processes.WORK)
    group.tell(work | {"first": first})
    trainer = Sharded(model.shape, config, splits, device, taught_by, group=group, weights=model.state_dict())
    trainer.step = trainer.first = first
    return trainer


def _divided(shape: Shape, device: Device, mesh: DeviceMesh) -> GPT:
    """A model of which this process has a share, with weights that are not set."""
    model = outline(shape)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if device.dtype != "float32":
        # Autocast would keep a copy of all gathered weights for the backward pass. The residual stream, and
        # what is outside of the blocks, stay float32.
        policy = MixedPrecisionPolicy(
            getattr(torch, device.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for block in getattr(model, "h", ()):
        if device.compiled:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for method in ("hidden", "head"):
        register_fsdp_forward_method(model, method)
    model.to_empty(device=device.name)
    return model
