"""A whole run: from settings to a published version, continued where an earlier one stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quill import fsio
from quill.checkpoint import load as checkpoint
from quill.config.settings import RunConfig
from quill.data import prepare
from quill.errors import CorruptError, InputError, InterruptedRun, RefusedError, ResourceError
from quill.model.gpt import GPT
from quill.registry import gc as cleaning
from quill.registry import locks
from quill.registry.draft import Draft
from quill.registry.names import check_name
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.training import autotune, memory
from quill.training.device import find_device, keep_memory
from quill.training.events import (
    Evaluated,
    Event,
    Finished,
    Notice,
    Observer,
    Saved,
    Started,
    Stepped,
    ignore,
)
from quill.training.inputs import parent_of, settle
from quill.training.log import RunLog
from quill.training.plan import tokens_per_step
from quill.training.publish import publish
from quill.training.resume import Resume, claim, status
from quill.training.trainer import Trainer

if TYPE_CHECKING:
    from quill.data.store import Dataset


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        reference: The version that was trained, or that is still in progress when paused.
        version: The published version; None when paused.
        reason: "trained", "already trained", or "paused" at the time limit with its state saved.
    """

    reference: str
    version: Version | None
    reason: Literal["trained", "already trained", "paused"]


def train(
    config: RunConfig,
    registry: Registry,
    data_root: Path,
    *,
    resume: Resume = "auto",
    new_version: bool = False,
    max_seconds: float | None = None,
    wait: float = 0.0,
    keep: int | None = None,
    observer: Observer = ignore,
    on_data: prepare.Observer | None = None,
    stop: Callable[[], int | None] = lambda: None,
) -> Outcome:
    """Train a model and publish it, or go on with a run that was interrupted.

    Args:
        config: The run; its name is the model's.
        registry: Where the model is kept.
        data_root: Where prepared datasets are.
        resume: Go on with an unfinished run if there is one (auto), never, or only then (must).
        new_version: Train beside a finished version of the same name instead of refusing.
        max_seconds: Stop with the state saved after so long.
        wait: Seconds to wait for another process that is at work on the name.
        keep: Once there is a finished version, remove all but this many of the newest; aliased ones stay.
        observer: Told what happens.
        on_data: Told of progress while data is prepared on first use.
        stop: Asked between forward passes; the number of the signal to end for, or None.

    Raises:
        RefusedError: The name holds a run of other settings or data.
        LockedError: Another process is at work on the name.
        InterruptedRun: `stop` gave a signal; the state is saved.
        DivergedError: Loss or gradient stopped being finite; the last state is kept.
        InputError: Settings and data do not fit each other or the machine.
    """
    if not config.name:
        raise InputError("the run has no name", why="neither file nor flag gives one", hint="--name my-model")
    parent = parent_of(config, registry, lambda message: observer(Notice(message)))
    with locks.hold(registry.root, check_name(config.name), wait):
        clock = time.monotonic()
        config, dataset = settle(config, data_root, parent, on_data)
        # Before a version is begun: what cannot be held leaves nothing behind.
        memory.check(config, find_device(config.train.device))
        draft = claim(config, dataset, registry, resume, new_version, parent)
        if isinstance(draft, Version):
            observer(Notice(f"{draft.reference} is already trained"))
            outcome = Outcome(draft.reference, draft, "already trained")
        else:
            draft.take()
            outcome = _Run(config, dataset, draft, parent, observer, stop).go(clock, max_seconds)
        if keep is not None and outcome.version is not None:
            for removed in cleaning.prune(registry, outcome.version.name, keep):
                observer(Notice(f"{removed.reference} is removed, {keep} are kept"))
        return outcome


class _Stopped(Exception):
    """A signal came in the middle of something that can be begun again; its number."""


class _Run:
    """One draft from its first or next step to its publication."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        draft: Draft,
        parent: Version | None,
        observer: Observer,
        stop: Callable[[], int | None],
    ) -> None:
        self.config, self.dataset, self.draft, self.parent = config, dataset, draft, parent
        self._watch, self._stop = observer, stop
        self.best_loss: float | None = None
        self.best_step = 0
        self.bad_evaluations = 0
        self.seconds_before = 0.0
        self._evaluated = -1
        self._saved: tuple[int, bool] | None = None

    def go(self, clock: float, max_seconds: float | None) -> Outcome:
        """Train to the end, to a signal or to the time limit."""
        self._clock = clock
        trainer, notes = self._resumed()
        interval = self.config.train.log_interval
        log = RunLog(self.draft, interval, trainer.step)
        observer = self._watch

        def watch(event: Event) -> None:
            log(event)
            observer(event)

        self._watch = watch
        for note in notes:
            self._watch(Notice(note))
        try:
            return self._run(trainer, clock, max_seconds)
        except (CorruptError, RefusedError, ResourceError):
            # What failed may have failed because another process has taken the draft over.
            self.draft.check_owner()
            raise
        finally:
            log.close()

    def _run(self, trainer: Trainer, clock: float, max_seconds: float | None) -> Outcome:
        self._announce(trainer)
        first = trainer.step
        try:
            while True:
                if self._owes_evaluation(trainer):
                    self._evaluate(trainer)
                    self._save(trainer)
                if self._is_done(trainer):
                    break
                self._check()
                # However short the time, each call gets a step further.
                late = max_seconds is not None and time.monotonic() - clock >= max_seconds
                if late and trainer.step > first:
                    self._save(trainer)
                    self._watch(Notice(f"{self.draft.reference} pauses at step {trainer.step:,}: time is up"))
                    return Outcome(self.draft.reference, None, "paused")
                self._step(trainer)
            early = trainer.step < self.config.train.max_iters
            reason = f"no better loss in {self.config.train.patience} evaluations" if early else "trained"
            return Outcome(self.draft.reference, self._publish(trainer, reason), "trained")
        except _Stopped as e:
            self._save(trainer)
            signum = int(e.args[0])
            raise InterruptedRun(
                f"{self.draft.reference} was interrupted at step {trainer.step:,}; its state is saved",
                signum=signum,
                why=f"signal {signum}",
                hint="repeat the command to go on",
            ) from None

    def _resumed(self) -> tuple[Trainer, list[str]]:
        """A trainer at the run's last saved step, or at its first; and what to say of damaged states."""
        state = checkpoint.load_state(self.draft)
        if state is None:
            return self._trainer({}), []
        tensors, facts, notes = state
        trainer = self._trainer(facts)
        trainer.load_state(tensors, facts["trainer"])
        self.best_loss, self.best_step = facts["best_val_loss"], facts["best_step"]
        self.bad_evaluations, self.seconds_before = facts["bad_evaluations"], facts["seconds"]
        # A run stopped while it was being evaluated is evaluated again.
        self._evaluated = trainer.step if facts.get("evaluated", True) else -1
        self._saved = (trainer.step, not self._owes_evaluation(trainer))
        return trainer, notes

    def _check(self) -> None:
        """Stop for a signal; called wherever what is under way can be begun again."""
        signum = self._stop()
        if signum is not None:
            raise _Stopped(signum)

    def _owes_evaluation(self, trainer: Trainer) -> bool:
        """Whether this step is one to evaluate after, and that has not been done."""
        c, step = self.config.train, trainer.step
        due = step > 0 and (step % c.eval_interval == 0 or step == c.max_iters)
        return due and self._evaluated != step

    def _is_done(self, trainer: Trainer) -> bool:
        """Whether nothing is left to do but to publish, also right after resuming."""
        c = self.config.train
        tired = c.patience is not None and self.bad_evaluations >= c.patience
        return tired or trainer.step >= c.max_iters

    def _trainer(self, facts: dict[str, Any]) -> Trainer:
        c = self.config
        keep_memory()
        device = find_device(c.train.device)
        model = GPT(c.model, c.train.seed)
        fsio.require_space(
            self.draft.path,
            4 * sum(p.numel() for p in model.parameters()) * (1 + 3 * c.train.keep_states),
            f"the weights and {c.train.keep_states} resume states",
        )
        if self.parent is not None and not facts:
            model.load_state_dict(checkpoint.load(self.parent).model.state_dict())
        model.to(device)
        chosen = autotune.choose(model, c, self.dataset, device, facts.get("machine"))
        return Trainer(model, c.train, self.dataset.train, chosen)

    def _announce(self, trainer: Trainer) -> None:
        c, device = self.config, trainer.device
        self._watch(
            Started(
                reference=self.draft.reference,
                parameters=sum(p.numel() for p in trainer.model.parameters()),
                tokens_per_step=tokens_per_step(c),
                device=device.name,
                dtype=device.dtype,
                compiled=device.compiled,
                step=trainer.step,
                max_iters=c.train.max_iters,
                dataset=self.dataset.name,
                train_tokens=self.dataset.count("train"),
                val_tokens=self.dataset.count("val"),
            )
        )
        self._lap = time.monotonic()

    def _step(self, trainer: Trainer) -> None:
        rate = trainer.learning_rate
        value, norm = trainer.advance(self._check)
        now = time.monotonic()
        self._watch(
            Stepped(
                step=trainer.step,
                max_iters=self.config.train.max_iters,
                loss=value,
                learning_rate=rate,
                grad_norm=norm,
                tokens_per_second=tokens_per_step(self.config) / max(now - self._lap, 1e-9),
                seconds=self._seconds(),
            )
        )
        self._lap = now

    def _evaluate(self, trainer: Trainer) -> None:
        """Measure, and keep the weights if they are the best so far."""
        start = time.monotonic()
        if not self.dataset.count("val"):
            self._keep_weights(trainer)
            self._evaluated = trainer.step
            return
        figures = trainer.evaluate(self.dataset.val, self.dataset.count("val", "bytes"), self._check)
        loss = figures.loss
        better = self.best_loss is None or loss < self.best_loss
        if better:
            self.best_loss, self.best_step, self.bad_evaluations = loss, trainer.step, 0
            self._keep_weights(trainer)
        else:
            self.bad_evaluations += 1
        self._evaluated = trainer.step
        best = self.best_loss if self.best_loss is not None else math.nan
        now = time.monotonic()
        self._watch(Evaluated(trainer.step, loss, better, best, self.best_step, now - start))
        self._lap = time.monotonic()

    def _keep_weights(self, trainer: Trainer) -> None:
        kind = self.config.train.weights_dtype
        self.draft.write_file(
            checkpoint.WEIGHTS, lambda path: checkpoint.save_weights(path, trainer.model, kind)
        )

    def _save(self, trainer: Trainer) -> None:
        reached = (trainer.step, not self._owes_evaluation(trainer))
        if self._saved == reached:
            return
        tensors, facts = trainer.state()
        device = trainer.device
        info = {
            "trainer": facts,
            "machine": {"device": device.name, "dtype": device.dtype, "compiled": device.compiled},
            "best_val_loss": self.best_loss,
            "best_step": self.best_step,
            "bad_evaluations": self.bad_evaluations,
            "evaluated": reached[1],
            "seconds": self._seconds(),
        }
        keep = self.config.train.keep_states
        path = checkpoint.save_state(self.draft, trainer.step, tensors, info, keep)
        self.draft.update_status(**status(trainer.step))
        self._saved = reached
        self._watch(Saved(trainer.step, str(path)))
        self._lap = time.monotonic()

    def _publish(self, trainer: Trainer, reason: str) -> Version:
        """Make the best weights a version."""
        if not self.draft.has(checkpoint.WEIGHTS):
            self._keep_weights(trainer)
        version = publish(
            self.config,
            self.dataset,
            self.draft,
            trainer.device,
            steps=trainer.step,
            best_step=self.best_step,
            best_loss=self.best_loss,
            elapsed=self._seconds,
            between=self._check,
        )
        loss = (version.manifest or {}).get("best_val_loss")
        loss = math.nan if loss is None else loss
        self._watch(Finished(version.reference, trainer.step, loss, self.best_step, self._seconds(), reason))
        return version

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._clock
