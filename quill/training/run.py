"""A run: from settings to a published version, resumed where an earlier call stopped."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from quill import fsio, threads
from quill.checkpoint.load import WEIGHTS, load_checkpoint
from quill.checkpoint.resume_state import load_state, save_state
from quill.checkpoint.weights import save_weights
from quill.config.settings import RunConfig, SampleConfig, TrainConfig
from quill.data import prepare
from quill.errors import (
    CorruptError,
    DivergedError,
    InputError,
    InterruptedRun,
    RefusedError,
    ResourceError,
)
from quill.evaluation import measure
from quill.generation.generator import Generator
from quill.loggers.base import LoggedRun
from quill.model.gpt import GPT
from quill.registry import gc, locks
from quill.registry.draft import Draft
from quill.registry.folder import Folder
from quill.registry.names import check_name
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.training import autotune, distributed, finetune, loggers, memory, processes, teachers
from quill.training.device import Device, find_device
from quill.training.events import (
    Evaluated,
    Event,
    Finished,
    Notice,
    Observer,
    Sampled,
    Saved,
    Stage,
    Started,
    Stepped,
    ignore,
)
from quill.training.inputs import Inputs, parent_of, settle
from quill.training.log import RunLog
from quill.training.plan import forward_passes, tokens_per_step
from quill.training.processes import Group, PeerLostError
from quill.training.publish import describe, publish
from quill.training.resume import Found, Resume, begin, find, progress
from quill.training.schedule import Budget
from quill.training.state import parse
from quill.training.trainer import Trainer
from quill.units import plural

# Few enough to be generated within a second or two: a signal waits for them.
_SAMPLE = SampleConfig(max_new_tokens=150, seed=1)
# Seconds after which steps on a GPU are reported, also between the lines of metrics.
_LONGEST_SILENCE = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        reference: The version that was trained, or that is unfinished if the run paused.
        version: The published version; None if the run paused or another process leads.
        reason: "trained", "already trained", "paused" at the time limit with its state saved, or "followed"
            in a process that does not lead, which has no reference.
    """

    reference: str
    version: Version | None
    reason: Literal["trained", "already trained", "paused", "followed"]


def train(
    config: RunConfig,
    registry: Registry,
    data_root: Path,
    *,
    resume: Resume = "auto",
    new_version: bool = False,
    max_seconds: float | None = None,
    publish: bool = True,
    wait: float = 0.0,
    keep: int | None = None,
    log_to: Sequence[str] = (),
    observer: Observer = ignore,
    on_data: prepare.Observer | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train a model and publish it, or resume a run that was interrupted.

    Processes that torch's launcher has started share each step's batch, and the first of them leads.

    Args:
        config: The run; its name is the model's.
        registry: Where the model is stored.
        data_root: Where prepared datasets are.
        resume: Resume an unfinished run if there is one (auto), never, or fail without one (must).
        new_version: Train another version next to a finished one with other settings instead of refusing.
        max_seconds: The time for this call. If it does not suffice for max_iters, the learning rate decays to
            the end of the time instead, and what was reached is published.
        publish: Publish at the end of the time; False leaves the schedule alone, saves the state and pauses.
        wait: Seconds to wait for another process that is training this name.
        keep: After training, remove all but this many of the newest versions; aliased ones stay.
        log_to: Names of loggers, which copy the run's figures to other programs.
        observer: Receives the run's events.
        on_data: Receives the progress of preparing the data.
        poll: Called between forward passes; raises InterruptedRun to save the state and stop.

    Raises:
        RefusedError: The name belongs to a run with other settings or data.
        LockedError: Another process is training this name.
        InterruptedRun: `poll` raised it; the state is saved.
        DivergedError: The loss or the gradient is not finite; the last saved state is kept.
        InputError: The settings do not fit the data, the parent, the device or the number of processes.
        PeerLostError: Another process of the run has ended; the state is saved.
    """
    if not config.name:
        raise InputError("the run has no name", why="the model is stored under it", hint="set name")
    check_name(config.name)
    group = processes.join(config.train.device)
    if group is not None and group.rank > 0:
        distributed.follow(group, registry)
        return Outcome("", None, "followed")
    with processes.leading(group, to_the_end=False):
        loggers.check(log_to)
        part = processes.part(config, group)
        device = find_device(part.train.device)
        # What cannot fit is refused before anything is downloaded, prepared or begun.
        memory.check(part, device, group=group)
        parent = parent_of(config, registry, lambda message: observer(Notice(message)))
        taught_by = teachers.find(
            config,
            registry,
            lambda message: observer(Notice(message)),
            start_over=resume == "never",
            new_version=new_version,
        )
    with processes.leading(group), locks.hold(registry.root, config.name, wait):
        clock = time.monotonic()
        inputs = settle(config, data_root, parent, on_data)
        teachers.check(taught_by, inputs.config, inputs.dataset)
        memory.check(processes.part(inputs.config, group), device, teachers.shapes(taught_by), group)
        memory.check_evaluation(inputs.config, inputs.tokens.val_tokens)
        found = find(inputs, registry, resume, new_version, parent, taught_by)
        if found.done is not None:
            observer(Notice(f"{found.done.reference} is already trained"))
            outcome = Outcome(found.done.reference, found.done, "already trained")
        else:
            draft = found.draft or begin(found.config, inputs, registry, parent, found.longer, taught_by)
            draft.take()
            budget = None if max_seconds is None else _budget(max_seconds, clock, inputs, publish)
            with Run(
                found, inputs, draft, parent, taught_by, budget, publish, log_to, observer, poll, clock, group
            ) as run:
                try:
                    run.start()
                    while not run.is_done and not run.is_late:
                        run.step()
                        if run.is_sample_due:
                            run.sample()
                        if run.is_evaluation_due:
                            run.evaluate()
                            run.save()
                    outcome = run.publish() if run.is_done or publish else run.pause()
                except InterruptedRun as e:
                    run.save()
                    raise run.interrupted(e.signum) from None
                except PeerLostError:
                    if run.trainer.has_all:
                        run.save()
                    raise
        if keep is not None and outcome.version is not None:
            for removed in gc.prune(registry, outcome.version.name, keep):
                observer(Notice(f"{removed.reference} was removed; the newest {keep} are kept"))
        return outcome


def _budget(seconds: float, clock: float, inputs: Inputs, publishes: bool) -> Budget:
    """The budget of a call, with evaluations estimated from the tokens that they read."""
    if not publishes:
        return Budget(seconds, clock)
    c, whole = inputs.config.train, inputs.tokens.val_tokens
    read = (
        whole
        if c.eval_iters is None
        else c.eval_iters * measure.ROWS_OF_ESTIMATE * inputs.config.model.block_size
    )
    # The published weights are measured on the whole split if the evaluations of the run were not exact.
    is_exact = c.eval_iters is None and c.weights_dtype == "float32" and c.dtype == "float32"
    read *= 2 if c.ema_decay else 1
    cost = read / tokens_per_step(inputs.config) / forward_passes(c)
    return Budget(seconds, clock, c.eval_interval, cost, 1 + (0 if is_exact else whole / max(read, 1)))


def _how_it_fits(config: RunConfig, device: Device, sharing: memory.Sharing = memory.ALONE) -> list[str]:
    """What is done so that a step fits in memory, a sentence each."""
    rows, B = device.micro_batch_size, config.train.batch_size
    notes = []
    if sharing.divided:
        divided = "weights, gradients and optimizer state"
        notes.append(f"dividing {divided} among {sharing.processes} processes")
    if rows is not None and rows < B:
        notes.append(
            f"computing each batch of {B:,} sequences in parts of at most {plural(rows, 'sequence')}"
        )
    if device.checkpointing:
        notes.append("recomputing activations for the backward pass instead of storing them")
    return notes


class Run:
    """One draft, from its first or next step to its publication.

    Args:
        found: The settled config, and the version to train for more steps.
        inputs: The data.
        draft: Where it is written, taken by this process.
        parent: The model it starts from.
        taught_by: The models it learns from.
        budget: The time for this call.
        fit: Whether the schedule follows the budget.
        log_to: Names of loggers.
        observer: Receives its events.
        poll: Called wherever work can be interrupted; what it raises passes through.
        clock: The monotonic time at which this call began, in seconds.
        group: The processes that share the run, if there are several.
    """

    def __init__(
        self,
        found: Found,
        inputs: Inputs,
        draft: Draft,
        parent: Folder | None,
        taught_by: Sequence[Folder],
        budget: Budget | None,
        fit: bool,
        log_to: Sequence[str],
        observer: Observer,
        poll: Callable[[], None],
        clock: float,
        group: Group | None = None,
    ) -> None:
        self.config, self.dataset, self.draft = found.config, inputs.dataset, draft
        self._parent, self._longer, self._notes = parent, found.longer, list(inputs.notes)
        self._taught_by, self._tokens = taught_by, inputs.tokens
        self._budget, self._fit = budget, fit
        self._observer, self._poll, self._clock, self._group = observer, poll, clock, group
        status = draft.status()
        self._starts_trained = status is not None and bool(status["parent"] or status["extends"])
        if draft.read_object("config.json") != self.config.to_dict():
            draft.write_json("config.json", self.config.to_dict())
        self._best_loss: float | None = None
        self._best_step = 0
        self._best_averaged = False
        self._best_temperature = 1.0
        self._bad_evaluations = 0
        self._seconds_before = 0.0
        self._id = secrets.token_hex(8)
        self._evaluated = -1
        self._saved: tuple[int, bool] | None = None
        self.trainer = self._resume()
        self._first_step = self.trainer.step
        logged = LoggedRun(
            self._id, draft.reference, self.config.to_dict(), self._first_step, self._saved is not None
        )
        self._loggers = loggers.Loggers(log_to, logged, self.config.train.log_interval)
        self._log = RunLog(draft, self.config.train.log_interval, self.trainer.step)
        self._pace = threads.best_waiting("none" if group else self.trainer.device.kind)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pace.close()
        for warning in self._loggers.close():
            self._emit(Notice(warning))
        self._log.close()
        if isinstance(error, CorruptError | RefusedError | ResourceError):
            # It may have failed because another process has taken the draft over; that is the better message.
            self.draft.check_owner()

    def start(self) -> None:
        """Announce the run, and make up for an evaluation that was interrupted."""
        for note in self._notes:
            self._emit(Notice(note))
        if self._tokens.held_out:
            held_out = f"the last {self._tokens.held_out:,} tokens of the training split"
            self._emit(Notice(f"measuring the loss on {held_out}, which are not trained on"))
        if self._taught_by:
            names = ", ".join(t.reference for t in self._taught_by)
            self._emit(Notice(f"{self.draft.reference} learns from {names}"))
        for name, where in self._loggers.where.items():
            self._emit(Notice(f"logging to {name}: {where}"))
        config, device = self.config, self.trainer.device
        self._emit(
            Started(
                reference=self.draft.reference,
                parameters=sum(p.numel() for p in self.trainer.model.parameters()),
                tokens_per_step=tokens_per_step(config),
                device=device.name,
                dtype=device.dtype,
                compiled=device.compiled,
                step=self.trainer.step,
                max_iters=config.train.max_iters,
                dataset=self.dataset.name,
                train_tokens=self._tokens.train_tokens,
                val_tokens=self._tokens.val_tokens,
            )
        )
        self._lap = time.monotonic()
        if self.is_evaluation_due:
            self.evaluate()
            self.save()

    def step(self) -> None:
        """Take one optimizer step."""
        self._poll()
        if self._budget is not None and self._fit:
            self.trainer.horizon = self._budget.horizon(self.trainer.step)
        device = self.trainer.device
        with self._pace.piece():
            self.trainer.enqueue(self._poll)
        if self.trainer.device != device:
            self._emit(Notice(f"step {self.trainer.step:,} ran out of memory and was repeated"))
            for note in _how_it_fits(self.config, self.trainer.device):
                self._emit(Notice(note))
        is_logged = self.trainer.step % self.config.train.log_interval == 0
        is_slow = time.monotonic() - self._lap > _LONGEST_SILENCE
        if is_logged or is_slow or not self.trainer.device.runs_ahead:
            self.report()

    def report(self) -> None:
        """Announce the steps that were taken since the last report."""
        steps = self.trainer.read()
        if not steps:
            return
        now = time.monotonic()
        seconds = (now - self._lap) / len(steps)
        for step in steps:
            self._emit(
                Stepped(
                    step=step.number,
                    max_iters=self.config.train.max_iters,
                    loss=step.losses.loss,
                    learning_rate=step.learning_rate,
                    grad_norm=step.norm,
                    tokens_per_second=tokens_per_step(self.config) / max(seconds, 1e-9),
                    seconds=self._seconds(),
                    objective=None if step.losses.objective == step.losses.loss else step.losses.objective,
                )
            )
            if self._budget is not None:
                self._budget.stepped(seconds)
        self._lap = now

    @property
    def is_sample_due(self) -> bool:
        """Whether a sample follows this step."""
        every = self.config.train.sample_every
        return every is not None and self.trainer.step % every == 0

    def sample(self) -> None:
        """Generate a short text with the current weights; the run's arithmetic does not notice."""
        self.report()
        start = time.monotonic()
        generator = Generator(self.trainer.whole(), self.dataset.tokenizer)
        # Of weights that have diverged, the next step or evaluation says what to do.
        with suppress(DivergedError):
            [text] = generator.generate("", _SAMPLE)
            seconds = time.monotonic() - start
            self._emit(Sampled(self.trainer.step, text, seconds))
            if self._budget is not None:
                self._budget.sampled(seconds)
        self._lap = time.monotonic()

    @property
    def is_evaluation_due(self) -> bool:
        """Whether an evaluation follows this step and has not happened yet."""
        c, step = self.config.train, self.trainer.step
        due = step > 0 and (step % c.eval_interval == 0 or step == c.max_iters)
        # A trained model is measured before it is trained on, so that training can only improve it.
        due = due or (self._starts_trained and step == self.trainer.first)
        return due and self._evaluated != step

    @property
    def is_done(self) -> bool:
        """Whether only publishing remains."""
        c = self.config.train
        exhausted = c.patience is not None and self._bad_evaluations >= c.patience
        return exhausted or self.trainer.step >= c.max_iters

    @property
    def is_late(self) -> bool:
        """Whether the time is up; each call takes at least one step."""
        return self._budget is not None and self.trainer.step > self._first_step and self._budget.left <= 0

    def evaluate(self) -> None:
        """Measure the validation loss and write the weights if they are the best so far."""
        self.report()
        start, step = time.monotonic(), self.trainer.step
        if not self._tokens.val_tokens:
            # Without a loss to compare, the average is what was asked for.
            self._best_averaged = self.trainer.averaged is not None
            self._write_weights()
            self._evaluated = step
            return
        raw, *rest = self.trainer.evaluate(self._tokens.val, self._tokens.val_bytes, self._poll)
        chosen = min([raw, *rest], key=lambda fitted: fitted.loss)
        loss, temperature = chosen.loss, chosen.temperature
        is_best = self._best_loss is None or loss < self._best_loss
        if is_best:
            self._best_loss, self._best_step, self._bad_evaluations = loss, step, 0
            self._best_averaged, self._best_temperature = loss < raw.loss, temperature
            self._write_weights()
        else:
            self._bad_evaluations += 1
        self._evaluated = step
        best = self._best_loss if self._best_loss is not None else math.nan
        seconds = time.monotonic() - start
        self._emit(
            Evaluated(
                step,
                loss,
                is_best,
                best,
                self._best_step,
                seconds,
                averaged=loss < raw.loss,
                best_averaged=self._best_averaged,
                raw_val_loss=raw.loss if rest else None,
                averaged_val_loss=rest[0].loss if rest else None,
                temperature=temperature if self.config.train.calibrate else None,
            )
        )
        if self._budget is not None and self._fit:
            self._budget.evaluated(seconds)
        self._lap = time.monotonic()

    def save(self) -> None:
        """Write a resume state, unless this step's is on disk."""
        step, device = self.trainer.step, self._device
        reached = (step, not self.is_evaluation_due)
        if self._saved == reached:
            return
        self.report()
        tensors, trained = self.trainer.state()
        info = {
            "trainer": trained,
            "machine": {
                "device": device.name,
                "dtype": device.dtype,
                "compiled": device.compiled,
                "micro_batch_size": device.micro_batch_size,
                "gradient_checkpointing": device.checkpointing,
            },
            "best_val_loss": self._best_loss,
            "best_step": self._best_step,
            "best_averaged": self._best_averaged,
            "best_temperature": self._best_temperature,
            "bad_evaluations": self._bad_evaluations,
            "evaluated": reached[1],
            "seconds": self._seconds(),
            "id": self._id,
        }
        facts = progress(step) | {"facts": self._facts()}
        keep = self.config.train.keep_states
        path = save_state(self.draft, step, tensors, info, keep, facts, self.trainer.write)
        self._saved = reached
        self._emit(Saved(step, str(path)))
        self._lap = time.monotonic()

    def pause(self) -> Outcome:
        """Save the state and leave the rest of the run to the next call."""
        self.save()
        self._emit(Notice(f"{self.draft.reference}: paused at step {self.trainer.step:,}, the time is up"))
        return Outcome(self.draft.reference, None, "paused")

    def publish(self) -> Outcome:
        """Make the best weights a version."""
        self.report()
        step, c = self.trainer.step, self.config.train
        ended = "max_iters" if step >= c.max_iters else "patience" if self.is_done else "time limit"
        if ended == "time limit" and self._evaluated != step:
            self.evaluate()
        if not self.draft.has(WEIGHTS):
            self._write_weights()
        # The weights are loaded once more to be measured, which may need the memory.
        self.save()
        self.trainer.release()
        version = publish(
            self.config,
            self._tokens,
            self.draft,
            self._device,
            steps=step,
            best_step=self._best_step,
            best_loss=self._best_loss,
            exact=self.trainer.evaluates_in.dtype == "float32",
            fits=self.trainer.has_all or self.trainer.device.kind == "cpu",
            averaged=self._best_averaged,
            temperature=self._best_temperature,
            ended=ended,
            elapsed=self._seconds,
            poll=self._poll,
        )
        loss = version.facts["best_val_loss"]
        is_unchanged = self._best_loss is not None and step > self._best_step == self.trainer.first
        if self._starts_trained and is_unchanged:
            origin = version.facts["extends"] or version.facts["parent"]
            name = origin["reference"] if origin else "the model it started from"
            self._emit(Notice(f"warning: training did not improve {name}; its own weights are published"))
        reason = {
            "max_iters": "trained",
            "patience": f"no better loss in {c.patience} evaluations",
            "time limit": "time limit reached",
        }[ended]
        self._emit(
            Finished(
                version.reference,
                step,
                loss,
                self._best_step,
                self._seconds(),
                reason,
                path=str(version.path),
                next=f"quill sample {version.name}",
                averaged=self._best_averaged,
            )
        )
        return Outcome(version.reference, version, "trained")

    def interrupted(self, signum: int) -> InterruptedRun:
        """The error for a run that a signal ended after its state was saved."""
        return InterruptedRun(
            f"{self.draft.reference} was interrupted at step {self.trainer.step:,}; its state is saved",
            signum=signum,
            why=f"signal {signum}",
            hint="repeat the command to resume",
        )

    def _resume(self) -> Trainer:
        """A trainer at the last saved step, or at the first."""
        divided = self._is_divided()
        state = load_state(self.draft, read=not divided, parse=parse)
        if state is None:
            return self._trainer({}, divided)
        facts = state.info
        self._notes = state.notes
        trainer = self._trainer(facts, divided)
        trainer.restore(state)
        self._best_loss, self._best_step = facts["best_val_loss"], facts["best_step"]
        self._best_averaged = facts["best_averaged"]
        self._best_temperature = facts["best_temperature"]
        self._bad_evaluations, self._seconds_before = facts["bad_evaluations"], facts["seconds"]
        self._id = facts["id"] or self._id
        # A run interrupted during an evaluation is evaluated again.
        evaluated = facts["evaluated"]
        self._evaluated = trainer.step if evaluated else -1
        self._saved = (trainer.step, evaluated)
        return trainer

    def _is_divided(self) -> bool:
        """Whether the processes divide the weights among them."""
        c = processes.part(self.config, self._group)
        name = find_device(c.train.device)
        device = Device(name, autotune.candidates(name, c.train)[0], False)
        return memory.must_divide(c, device, teachers.shapes(self._taught_by), self._group)

    def _trainer(self, facts: dict[str, Any], divided: bool) -> Trainer:
        c = processes.part(self.config, self._group)
        device = find_device(c.train.device)
        model = GPT(c.model.shape(), c.train.seed)
        if c.model.ngram:
            model.ngram.count(self._tokens.train[:])
        fsio.require_space(
            self.draft.path,
            4
            * sum(p.numel() for p in model.parameters())
            * (1 + (4 if c.train.ema_decay else 3) * c.train.keep_states),
            f"the weights and {c.train.keep_states} resume states",
        )
        first = 0
        if self._longer is not None and not facts:
            model.load_state_dict(load_checkpoint(self._longer).model.state_dict())
            facts_before = self._longer.facts
            first, self._seconds_before = facts_before["steps"] or 0, facts_before["seconds"] or 0.0
            self._notes.append(
                f"{self.draft.reference} continues {self._longer.reference} at step {first:,} with a fresh "
                f"optimizer; the learning rate decays until step {c.train.max_iters:,}"
            )
        elif self._parent is not None and not facts:
            parent = load_checkpoint(self._parent)
            tokens = self.dataset.tokenizer.vocab_size
            finetune.copy_weights(parent.model, model, parent.tokenizer.vocab_size, tokens)
        if not divided:
            model.to(device)
        sharing = memory.sharing_of(self._group, divided=divided)
        taught_by, earlier = teachers.shapes(self._taught_by), facts.get("machine")
        chosen = autotune.choose(model, c, self.dataset, device, earlier, self._stage, taught_by, sharing)
        self._notes += _how_it_fits(c, chosen, sharing)
        trainer = self._with_others(model, c.train, chosen, divided, first)
        trainer.step = trainer.first = first
        return trainer

    def _with_others(
        self, model: GPT, config: TrainConfig, device: Device, divided: bool, first: int
    ) -> Trainer:
        """A trainer of this process, with those of the others if there are any."""
        loaded = teachers.load(self._taught_by, device.name)
        if self._group is None:
            return Trainer(model, config, self._tokens.train, device, loaded)
        names = [t.reference for t in self._taught_by]
        work = distributed.work(self.config, self.dataset, device, names, sharded=divided)
        if divided:
            from quill.training import sharding

            return sharding.lead(
                model, config, self._tokens, device, loaded, group=self._group, work=work, first=first
            )
        return distributed.Leader(
            model, config, self._tokens.train, device, loaded, group=self._group, work=work
        )

    def _stage(self, name: str) -> None:
        self._observer(Stage(name, time.monotonic() - self._clock))

    def _write_weights(self) -> None:
        model, dtype = self.trainer.whole(averaged=self._best_averaged), self.config.train.weights_dtype
        temperature = self._best_temperature
        self.draft.write_weights(lambda path: save_weights(path, model, dtype, temperature), self._facts())

    def _facts(self) -> dict[str, Any]:
        """What the manifest would say if the best weights so far were published."""
        facts = describe(
            self.config,
            self._tokens,
            self.draft,
            self._device,
            steps=self.trainer.step,
            best_step=self._best_step,
            loss=self._best_loss,
            averaged=self._best_averaged,
            temperature=self._best_temperature,
        )
        facts["parameters"] = sum(p.numel() for p in self.trainer.model.parameters())
        return facts | {"seconds": round(self._seconds(), 1)}

    def _emit(self, event: Event) -> None:
        self._log(event)
        self._observer(event)
        for warning in self._loggers(event):
            self._emit(Notice(warning))

    @property
    def _device(self) -> Device:
        """How the run computes, as it is recorded: a whole share of a batch at once is the batch at once."""
        device, share = self.trainer.device, self.trainer.config.batch_size
        if device.micro_batch_size != share:
            return device
        return replace(device, micro_batch_size=self.config.train.batch_size)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._clock
