"""The arithmetic of training: batches, gradients, clipping and optimizer steps.

A step is a pure function of the weights, the optimizer's state, the seed and the step number: the batch
and the dropout masks come from (seed, step). Weights and optimizer state are therefore all that an
interrupted run needs to resume bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from quill.checkpoint.resume_state import TENSORS, Saved
from quill.checkpoint.shards import Layout
from quill.checkpoint.weights import save_tensors
from quill.config.settings import TrainConfig
from quill.data.batches import batch
from quill.errors import DivergedError, is_out_of_memory
from quill.evaluation import measure
from quill.evaluation.temperature import Fitted
from quill.model.dropout import Rows
from quill.model.gpt import GPT, loss
from quill.training import masking, schedule, teachers
from quill.training.device import Device
from quill.training.optimizer import Optimizer
from quill.training.state import refuse_others

if TYPE_CHECKING:
    from quill.data.batches import Tokens

# float16 gradients vanish below 6e-8; the scale is halved when one overflows and grows back slowly.
_FIRST_SCALE, _GROWTH_STEPS = 2.0**15, 2000
# Added to the seed of dropout in the second pass over a batch; far from the seeds of the first passes even in
# the 32 bits that the CPU's generator takes.
_SECOND_PASS = 0x9E3779B9
# The same for a part of a batch, times its first sequence, where its masks are not those of the whole batch.
_PART = 0xC2B2AE35
# Tokens of a part from which the gate of the n-gram counts learns.
_GATE_TOKENS = 1024


class Losses(NamedTuple):
    """The losses of a step.

    Attributes:
        loss: Mean cross entropy in nats per token.
        objective: What is minimized; it differs where other losses are added.
    """

    loss: float
    objective: float


class _Part(NamedTuple):
    """Sequences of one batch that go through the model at once.

    Attributes:
        x: Inputs, (B, T).
        y: Targets, (B, T).
        dropped: Tokens hidden by token dropout, (B, T), or None.
        masked: Tokens hidden for the masked loss, (B, T), or None.
        number: Of the forward pass within the run.
        first: Index of its first sequence in the batch.
        divisor: What its mean loss is divided by to get its share of the step's.
        rows: The context in which its dropout masks are those of the whole batch.
        last: Whether nothing of the step follows.
    """

    x: Tensor
    y: Tensor
    dropped: Tensor | None
    masked: Tensor | None
    number: int
    first: int
    divisor: float
    rows: AbstractContextManager[None]
    last: bool


class Step(NamedTuple):
    """What is known of a step.

    Attributes:
        number: Steps done after it.
        losses: Its losses.
        learning_rate: AdamW's.
        norm: The gradient's norm before clipping.
    """

    number: int
    losses: Losses
    learning_rate: float
    norm: float


class Trainer:
    """A model and its optimizer at some step of a run.

    Args:
        model: On the device.
        config: Training settings.
        train: Token ids of the training split, (n,).
        device: Device, precision, compilation, and how many sequences it takes at once.
        taught_by: Models to learn from as well, on the device.

    Attributes:
        device: It takes fewer sequences at once after a step that ran out of memory.
        averaged: The model with the moving average of the weights; None before the first step, or without
            an ema_decay.
        step: Optimizer steps done.
        first: The step at which a lengthened run began again; 0 otherwise.
        horizon: The step at which time will be up, if known.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        train: Tokens,
        device: Device,
        taught_by: Sequence[GPT] = (),
    ) -> None:
        self.model, self.config, self.train, self.device = model, config, train, device
        # Losses are compared with each other, so a resumed run evaluates as before on any device.
        self.evaluates_in = replace(device, dtype="float32" if device.dtype == "float16" else device.dtype)
        self.optimizer = self._optimizer()
        self.averaged: GPT | None = None
        self._teachers = taught_by
        self.step = self.first = 0
        self.horizon: int | None = None
        self._scale = _FIRST_SCALE if device.dtype == "float16" else 1.0
        self._good_steps = 0
        # Steps whose figures are still on the device, and those whose figures nobody has asked for.
        self._queued: list[tuple[int, float, Tensor]] = []
        self._known: list[Step] = []
        self._forward: Callable[..., Tensor] = device.compile(model) if device.compiled else model
        if device.compiled and model.uses_rotations:
            # Made in a compiled pass, the table would be in the memory of its graph.
            model.rotations()
        # On a GPU the graph has the loss too; on a CPU that would change the numbers for little.
        fuses = device.compiled and device.kind != "cpu"
        self._forward_loss: Callable[..., Tensor] | None = device.compile(_forward_loss) if fuses else None
        # This process and their number, where several share the run; the config is then this one's part.
        self._rank, self._size = 0, 1

    @property
    def has_all(self) -> bool:
        """Whether this process has all weights and the whole state of the optimizer."""
        return True

    @property
    def learning_rate(self) -> float:
        """AdamW's learning rate for the next step."""
        return self.config.learning_rate * self._rate()

    def advance(self, poll: Callable[[], None] = lambda: None) -> tuple[Losses, float]:
        """Take one optimizer step, and wait for its losses and the gradient's norm before clipping.

        For arguments and errors see `enqueue`.
        """
        self.enqueue(poll)
        *_, last = self.read()
        return last.losses, last.norm

    def enqueue(self, poll: Callable[[], None] = lambda: None) -> None:
        """Take one optimizer step; a GPU may still be computing it on return.

        Args:
            poll: Called between the step's forward passes. If it raises, weights and optimizer are
                unchanged.

        Raises:
            DivergedError: The loss or the gradient is not finite; the weights are unchanged. On a GPU it is
                raised later, by whatever reads the figures or the weights first.
        """
        self.model.train()
        if self.config.ema_decay and self.averaged is None:
            self.averaged = self._copy()
        losses = self._fitting_gradients(poll)
        figures = torch.stack([*losses, self._clip()])
        self._queued.append((self.step + 1, self.learning_rate, figures))
        if not self.device.runs_ahead:
            self._settle()
        if self.device.dtype == "float16" and not math.isfinite(self._known[-1].norm):
            self._lower_scale()
        else:
            decay = schedule.weight_decay(self.step, self.config, horizon=self.horizon)
            for optimizer in self.optimizer.at(self._rate(), decay):
                optimizer.step()
            self.model.zero_grad(set_to_none=True)
            self._raise_scale()
        self._average()
        self.step += 1

    def read(self) -> list[Step]:
        """The steps since the last call, once the device has taken them.

        Raises:
            DivergedError: The loss or the gradient of one of them is not finite.
        """
        self._settle()
        steps, self._known = self._known, []
        return steps

    def _settle(self) -> None:
        """Copy the figures of queued steps from the device, all at once, and check them."""
        queued, known = self._queued, []
        if not queued:
            return
        rows = torch.stack([figures for *_, figures in queued]).tolist()
        if not self.device.runs_ahead:
            # The weights do not have the step yet; where they do, it stays here and is refused again.
            self._queued = []
        for (number, rate, _), (loss_, extra, norm) in zip(queued, rows, strict=True):
            step = Step(number, Losses(loss_, loss_ + extra), rate, norm)
            # Of float16 only the gradient overflows, which its scale is lowered for.
            if self.device.dtype != "float16" or not math.isfinite(step.losses.objective):
                _check_finite(step)
            known.append(step)
        self._queued, self._known = [], self._known + known

    def gradients(self, poll: Callable[[], None] = lambda: None) -> Losses:
        """Accumulate the gradients of one step's batches.

        Args:
            poll: Called before each forward pass except the first.

        Returns:
            The mean losses of the batches.
        """
        value, extra = torch.stack(self._accumulate(poll)).tolist()
        return Losses(value, value + extra)

    def _accumulate(self, poll: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Accumulate gradients; returns the loss and what the objective adds to it, on the device."""
        with self.device.repeatable() if self.config.deterministic else nullcontext():
            return self._pass_over(self._parts(), poll)

    def _pass_over(self, parts: Iterator[_Part], poll: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """Forward and backward passes over the parts of a step."""
        weight = self.config.masked_loss_weight
        total = torch.zeros((), device=self.device.name)
        extra = torch.zeros((), device=self.device.name)
        several = self.config.gradient_accumulation_steps > 1 or weight > 0
        if self._n_parts > 1 or (self.device.records and several):
            # Made in the first backward pass, gradients would lie between activations, and leave gaps that
            # those of the next pass do not fit; and in the memory of a recorded pass, which writes over them.
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for i, part in enumerate(parts):
            if i:
                poll()
            with part.rows:
                self._complete(part.last and part.masked is None)
                share, objective = self._losses(part)
                self._backward(objective)
                total = total + share.detach()
                if objective is not share:
                    extra = extra + (objective - share).detach()
                if part.masked is not None:
                    poll()
                    self._complete(part.last)
                    second = self._loss(part, part.masked, _SECOND_PASS) * (weight / part.divisor)
                    self._backward(second)
                    extra = extra + second.detach()
                    del second
                # Their graphs would stay in memory while the next pass builds its own.
                del share, objective
        return total, extra

    def _fitting_gradients(self, poll: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """The gradients of a step, of fewer sequences at once if it runs out of memory; none if it fails."""
        while True:
            try:
                return self._accumulate(poll)
            except BaseException as e:
                self.model.zero_grad(set_to_none=True)
                smaller = self._smaller() if is_out_of_memory(e) else None
                if smaller is None:
                    raise
            # Only now has the error let go of the tensors of the step.
            self.device = smaller
            self.device.release()

    def _smaller(self) -> Device | None:
        """The device with half as many sequences at once, or with checkpointing if it has one already."""
        c = self.config
        rows = min(self.device.micro_batch_size or c.batch_size, c.batch_size)
        if rows > 1:
            return replace(self.device, micro_batch_size=rows // 2)
        if c.gradient_checkpointing == "off" or self.device.checkpointing or self.device.compiled:
            return None
        return replace(self.device, micro_batch_size=1, checkpointing=True)

    @property
    def _n_parts(self) -> int:
        """Parts of like size that a batch is cut into."""
        return math.ceil(self.config.batch_size / (self.device.micro_batch_size or self.config.batch_size))

    def _parts(self) -> Iterator[_Part]:
        """The step's batches, each cut into as few parts of like size as the device takes at once."""
        c, n_micro, T = self.config, self.config.gradient_accumulation_steps, self.model.shape.block_size
        B, n_parts = c.batch_size, self._n_parts
        for micro in range(n_micro):
            x, y = batch(
                self.train,
                seed=c.seed,
                step=self.step,
                batch_size=B,
                block_size=T,
                micro=micro,
                n_micro=n_micro,
                rank=self._rank,
                world_size=self._size,
            )
            shape, number = (B, T), (c.seed, self.step, self._pass(micro))
            dropped = masking.dropped(c.token_dropout, shape, number) if c.token_dropout else None
            masked = masking.masked(c.masked_loss_max, shape, number) if c.masked_loss_weight else None
            is_cut = n_parts > 1 and self.model.shape.dropout and self.device.kind == "cpu"
            rows = Rows(B) if is_cut else None
            for i in range(n_parts):
                first, last = i * B // n_parts, (i + 1) * B // n_parts
                cut = slice(first, last)
                yield _Part(
                    self.device.put(x[cut]),
                    self.device.put(y[cut]),
                    None if dropped is None else self.device.put(dropped[cut]),
                    None if masked is None else self.device.put(masked[cut]),
                    self.step * n_micro * self._size + self._pass(micro),
                    0 if rows is not None else first,
                    n_micro * (B / (last - first)),
                    nullcontext() if rows is None else rows.only(first, last),
                    micro == n_micro - 1 and i == n_parts - 1,
                )

    @contextmanager
    def _masks(self, part: _Part, salt: int) -> Iterator[None]:
        """The precision and the dropout masks of a pass over a part."""
        masks: AbstractContextManager[None] = nullcontext()
        if self.model.shape.dropout:
            seed = self.config.seed * 1_000_003 + part.number + salt + part.first * _PART
            masks = self.device.seeded(seed % 2**63)
        with masks, self.device.autocast():
            yield

    def _logits(self, part: _Part, dropped: Tensor | None, salt: int = 0) -> Tensor:
        """Logits of a part in training mode, (B, T, V), in float32."""
        with self._masks(part, salt):
            logits = self._forward(part.x, dropped=dropped, recompute=self.device.checkpointing)
        return logits.float()

    def _loss(self, part: _Part, dropped: Tensor | None, salt: int = 0) -> Tensor:
        """The mean loss of a part in training mode."""
        if self._forward_loss is None:
            return loss(self._logits(part, dropped, salt), part.y)
        with self._masks(part, salt):
            return self._forward_loss(self.model, part.x, part.y, dropped, self.device.checkpointing)

    def _losses(self, part: _Part) -> tuple[Tensor, Tensor]:
        """The shares of a part in the step's loss and in its objective."""
        weight, temperature = self.config.teacher_weight, self.config.teacher_temperature
        if not self._teachers and not self.model.shape.ngram:
            share = self._loss(part, part.dropped) / part.divisor
            return share, share
        logits = self._logits(part, part.dropped)
        if self.model.shape.ngram:
            self._backward(self._gate_loss(part, logits.detach()) / part.divisor)
        share = loss(logits, part.y) / part.divisor
        if not self._teachers:
            return share, share
        apart = teachers.divergence(logits, part.x, self._teachers, temperature, self.device.autocast)
        return share, (1.0 - weight) * share + weight / part.divisor * apart

    def _gate_loss(self, part: _Part, logits: Tensor) -> Tensor:
        """The mean loss of the mixture with n-gram counts over some of the sequences: its gate is small."""
        rows = max(1, _GATE_TOKENS // part.x.shape[1])
        near = self.model.near(part.x[:rows])
        assert near is not None
        targets = part.y[:rows].flatten()
        mixed = self.model.ngram(logits[:rows].flatten(0, 1), near.flatten(0, 1), targets)
        return F.nll_loss(mixed, targets)

    def _pass(self, micro: int) -> int:
        """The number of a forward pass among those of all processes in the step."""
        return self._rank * self.config.gradient_accumulation_steps + micro

    def _complete(self, last: bool) -> None:
        """Called before each forward pass; the gradients are complete after the last one's backward pass."""

    def _backward(self, part: Tensor) -> None:
        (part * self._scale if self._scale != 1.0 else part).backward()  # type: ignore[no-untyped-call]

    def release(self) -> None:
        """Free what only further steps would need; there can be none."""
        for optimizer in self.optimizer.optimizers:
            optimizer.state.clear()
        for parameter in self.model.parameters():
            parameter.grad = None
        self._teachers = ()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts from which `load_state` restores the run exactly.

        Raises:
            DivergedError: A step since the last state has diverged.
        """
        self._settle()
        weights = {f"model/{n}": p.detach() for n, p in self.model.state_dict().items()}
        moments = {f"optimizer/{n}": t for n, t in self.optimizer.state().items()}
        if self.averaged is not None:
            weights |= {f"average/{n}": p for n, p in self.averaged.state_dict().items()}
        facts = {
            "step": self.step,
            "first": self.first,
            "scale": self._scale,
            "good_steps": self._good_steps,
            "evaluates_in": self.evaluates_in.dtype,
        }
        return {**weights, **moments}, facts

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of `state` into the folder of a resume state."""
        save_tensors(folder / TENSORS, tensors)

    def restore(self, saved: Saved) -> None:
        """Restore a resume state.

        Raises:
            CorruptError: It is of another model, or of another optimizer.
        """
        self.check({n: Layout(t.dtype, tuple(t.shape)) for n, t in saved.tensors.items()})
        self.load_state(saved.tensors, saved.info["trainer"])

    def check(self, found: Mapping[str, Layout]) -> None:
        """Check that tensors, by name, are those that `state` returns.

        Raises:
            CorruptError: They are not.
        """
        kinds = {name.partition("/")[0] for name in found} & {"average"} | {"model"}
        weights = self.model.state_dict()
        wanted = {
            f"{kind}/{n}": Layout(p.dtype, tuple(p.shape)) for kind in kinds for n, p in weights.items()
        }
        for name, quantities in self.optimizer.layouts().items():
            own = {f"optimizer/{name}/{quantity}": layout for quantity, layout in quantities.items()}
            # A parameter that has had no gradient yet has no momenta.
            if own.keys() & found.keys():
                wanted |= own
        refuse_others(found, wanted)

    def whole(self, *, averaged: bool = False) -> GPT:
        """The model with all of its weights, or with their average; not to be changed."""
        return self.averaged if averaged and self.averaged is not None else self.model

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restore what `state` returned."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.model.load_state_dict(under("model/"))
        if average := under("average/"):
            self.averaged = self._copy()
            self.averaged.load_state_dict(average)
        self.optimizer.load_state(under("optimizer/"))
        self.step, self.first, self._scale = facts["step"], facts["first"], facts["scale"]
        self._good_steps = facts["good_steps"]
        self.evaluates_in = replace(self.evaluates_in, dtype=facts["evaluates_in"])

    def evaluate(self, val: Tokens, n_bytes: int, poll: Callable[[], None] = lambda: None) -> list[Fitted]:
        """The validation loss of the weights, and after it that of their average if there is one.

        It is measured on the whole split or on eval_iters batches of it: in bfloat16 if the run trains in it,
        which takes half the time and moves a loss by about 1e-4; else in float32. With `calibrate` it is the
        lowest loss at any temperature; else the temperature is 1.

        Raises:
            DivergedError: A step before has diverged.
        """
        self._settle()
        c = self.config
        models = [self.model] if self.averaged is None else [self.model, self.averaged]
        found = [
            measure.evaluate(
                m,
                val,
                n_bytes=n_bytes,
                iters=c.eval_iters,
                seed=c.seed,
                fit=c.calibrate,
                poll=poll,
                autocast=self._evaluating,
            )
            for m in models
        ]
        return [figures.fitted or Fitted(figures.loss, 1.0) for figures in found]

    def _evaluating(self) -> AbstractContextManager[object]:
        return self.evaluates_in.autocast()

    def _optimizer(self) -> Optimizer:
        return Optimizer(self.model, self.config, self.device.dtype)

    def _rate(self) -> float:
        return schedule.rate(self.step, self.config, horizon=self.horizon, first=self.first)

    def _copy(self) -> GPT:
        return copy.deepcopy(self.model).requires_grad_(False).eval()

    def _average(self) -> None:
        """Move the average towards the weights.

        The decay rises to its value from the first step on, so that the initial weights are soon forgotten:
        min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage.
        """
        if self.averaged is None:
            return
        t = self.step - self.first
        decay = min(self.config.ema_decay, (1 + t) / (10 + t))
        move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        move(self._own(self.averaged), self._own(self.model), None)

    def _own(self, model: GPT) -> list[Tensor]:
        """The parameters of a model, as far as this process has them."""
        return [*model.parameters()]

    def _clip(self) -> Tensor:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self._scale != 1.0:
            for grad in grads:
                grad.mul_(1.0 / self._scale)
        # The gate of the n-gram counts learns beside the network and does not slow it.
        network = [p for p in self.model.network().parameters() if p.grad is not None]
        norm = self._norm([p.grad for p in network if p.grad is not None])
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(network, self.config.grad_clip, norm)
        return norm

    def _norm(self, grads: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(grads)

    def _lower_scale(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self._scale, self._good_steps = max(self._scale / 2, 1.0), 0

    def _raise_scale(self) -> None:
        if self.device.dtype != "float16":
            return
        self._good_steps += 1
        if self._good_steps >= _GROWTH_STEPS:
            self._scale, self._good_steps = self._scale * 2, 0


def _forward_loss(model: GPT, x: Tensor, y: Tensor, dropped: Tensor | None, recompute: bool) -> Tensor:
    return loss(model(x, dropped=dropped, recompute=recompute).float(), y)


def _check_finite(step: Step) -> None:
    value, norm, lr = step.losses.objective, step.norm, step.learning_rate
    if math.isfinite(value) and math.isfinite(norm):
        return
    bad = "loss" if not math.isfinite(value) else "gradient"
    raise DivergedError(
        f"the {bad} is not finite at step {step.number}",
        why=f"loss {value:g}, gradient norm {norm:g}, learning rate {lr:g}; the last saved state is kept",
        hint=f"lower train.learning_rate, for example to {lr / 3:.2g}, or raise train.warmup_iters",
    )
