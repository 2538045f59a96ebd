"""A whole run: from settings to a published version, continued where an earlier one stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quill import fsio
from quill.config.settings import RunConfig, SampleConfig
from quill.data import prepare
from quill.errors import InterruptedRun
from quill.evaluation import measure
from quill.generation.generator import Generator
from quill.model.gpt import GPT
from quill.registry import checkpoint
from quill.registry.draft import Draft
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.training import machine as machines
from quill.training import size
from quill.training.card import card
from quill.training.claim import Resume, claim, status
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
from quill.training.inputs import settle
from quill.training.log import RunLog
from quill.training.plan import choose_machine, tokens_per_step
from quill.training.trainer import Trainer

if TYPE_CHECKING:
    from quill.data.shards import Dataset


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
        observer: Told what happens.
        on_data: Told of progress while data is prepared on first use.
        stop: Asked after each step; the number of the signal to end for, or None.

    Raises:
        RefusedError: The name holds a run of other settings or data.
        InterruptedRun: `stop` gave a signal; the state is saved.
        DivergedError: Loss or gradient stopped being finite; the last state is kept.
        InputError: Settings and data do not fit each other or the machine.
    """
    clock = time.monotonic()
    parent = registry.resolve(config.train.init_from) if config.train.init_from else None
    config, dataset = settle(config, data_root, parent, on_data)
    # Before a version is begun: what cannot be held leaves nothing behind.
    size.check_memory(config, machines.find_device(config.train.device))
    draft = claim(config, dataset, registry, resume, new_version)
    if isinstance(draft, Version):
        observer(Notice(f"{draft.reference} is already trained"))
        return Outcome(draft.reference, draft, "already trained")
    return _Run(config, dataset, draft, parent, observer).go(stop, clock, max_seconds)


class _Run:
    """One draft from its first or next step to its publication."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        draft: Draft,
        parent: Version | None,
        observer: Observer,
    ) -> None:
        self.config, self.dataset, self.draft, self.parent = config, dataset, draft, parent
        self._watch = observer
        self.best_loss: float | None = None
        self.best_step = 0
        self.bad_evaluations = 0
        self.seconds_before = 0.0
        self._saved = -1

    def go(self, stop: Callable[[], int | None], clock: float, max_seconds: float | None) -> Outcome:
        """Train to the end, to a signal or to the time limit."""
        c = self.config.train
        self._clock = clock
        state = checkpoint.load_state(self.draft)
        tensors, facts, notes = state if state is not None else ({}, {}, [])
        trainer = self._trainer(facts)
        if state is not None:
            trainer.load_state(tensors, facts["trainer"])
            self.best_loss, self.best_step = facts["best_val_loss"], facts["best_step"]
            self.bad_evaluations, self.seconds_before = facts["bad_evaluations"], facts["seconds"]
            self._saved = trainer.step
        log = RunLog(self.draft.path, c.log_interval, trainer.step)
        observer = self._watch

        def watch(event: Event) -> None:
            log(event)
            observer(event)

        self._watch = watch
        for note in notes:
            self._watch(Notice(note))
        self._announce(trainer)
        while not self._is_done(trainer):
            self._step(trainer)
            if trainer.step % c.eval_interval == 0 or trainer.step == c.max_iters:
                self._evaluate(trainer)
                self._save(trainer)
            if self._is_done(trainer):
                break
            self._heed(trainer, stop())
            if max_seconds is not None and time.monotonic() - clock >= max_seconds:
                self._save(trainer)
                self._watch(Notice(f"{self.draft.reference} pauses at step {trainer.step:,}: time is up"))
                return Outcome(self.draft.reference, None, "paused")
        early = trainer.step < c.max_iters
        reason = f"no better loss in {c.patience} evaluations" if early else "trained"
        return Outcome(self.draft.reference, self._publish(trainer, reason), "trained")

    def _is_done(self, trainer: Trainer) -> bool:
        """Whether nothing is left to do but to publish, also right after resuming."""
        c = self.config.train
        tired = c.patience is not None and self.bad_evaluations >= c.patience
        return tired or trainer.step >= c.max_iters

    def _trainer(self, facts: dict[str, Any]) -> Trainer:
        c = self.config
        machines.keep_memory()
        device = machines.find_device(c.train.device)
        model = GPT(c.model, c.train.seed)
        fsio.require_space(
            self.draft.path,
            4 * sum(p.numel() for p in model.parameters()) * (1 + 3 * c.train.keep_states),
            f"the weights and {c.train.keep_states} resume states",
        )
        if self.parent is not None and not facts:
            model.load_state_dict(checkpoint.load(self.parent).model.state_dict())
        model.to(device)
        machine = choose_machine(model, c, self.dataset, device, facts.get("machine"))
        return Trainer(model, c.train, self.dataset.train, machine)

    def _announce(self, trainer: Trainer) -> None:
        c, m = self.config, trainer.machine
        self._watch(
            Started(
                reference=self.draft.reference,
                parameters=sum(p.numel() for p in trainer.model.parameters()),
                tokens_per_step=tokens_per_step(c),
                device=m.device,
                dtype=m.dtype,
                compiled=m.compiled,
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
        value, norm = trainer.advance()
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
            return
        loss = trainer.evaluate(self.dataset.val, self.dataset.count("val", "bytes")).loss
        better = self.best_loss is None or loss < self.best_loss
        if better:
            self.best_loss, self.best_step, self.bad_evaluations = loss, trainer.step, 0
            self._keep_weights(trainer)
        else:
            self.bad_evaluations += 1
        best = self.best_loss if self.best_loss is not None else math.nan
        now = time.monotonic()
        self._watch(Evaluated(trainer.step, loss, better, best, self.best_step, now - start))
        self._lap = time.monotonic()

    def _keep_weights(self, trainer: Trainer) -> None:
        path = self.draft.path / checkpoint.WEIGHTS
        checkpoint.save_weights(path, trainer.model, self.config.train.weights_dtype)

    def _save(self, trainer: Trainer) -> None:
        if self._saved == trainer.step:
            return
        tensors, facts = trainer.state()
        m = trainer.machine
        info = {
            "trainer": facts,
            "machine": {"device": m.device, "dtype": m.dtype, "compiled": m.compiled},
            "best_val_loss": self.best_loss,
            "best_step": self.best_step,
            "bad_evaluations": self.bad_evaluations,
            "seconds": self._seconds(),
        }
        keep = self.config.train.keep_states
        path = checkpoint.save_state(self.draft, trainer.step, tensors, info, keep)
        self.draft.set_status((self.draft.status() or {}) | status(trainer.step))
        self._saved = trainer.step
        self._watch(Saved(trainer.step, str(path)))
        self._lap = time.monotonic()

    def _heed(self, trainer: Trainer, signum: int | None) -> None:
        if signum is None:
            return
        self._save(trainer)
        raise InterruptedRun(
            f"{self.draft.reference} was interrupted at step {trainer.step:,}; its state is saved",
            signum=signum,
            why=f"signal {signum}",
            hint="repeat the command to go on",
        )

    def _publish(self, trainer: Trainer, reason: str) -> Version:
        """Measure what is published, describe it, and make it a version."""
        if not (self.draft.path / checkpoint.WEIGHTS).exists():
            self._keep_weights(trainer)
        held = Version(self.draft.name, self.draft.number, self.draft.path)
        best = checkpoint.load(held, trainer.machine.device)
        published_loss = self._published_loss(best.model)
        facts: dict[str, Any] = {
            "parameters": sum(p.numel() for p in best.model.parameters()),
            "data": {
                "name": self.dataset.name,
                "key": self.dataset.key,
                "sha256": self.dataset.manifest["source"]["sha256"],
                "tokens": self.dataset.count("train") + self.dataset.count("val"),
                "tokenizer": self.dataset.tokenizer.kind,
                "tokenizer_sha256": self.dataset.tokenizer.fingerprint,
            },
            "parent": {"reference": self.parent.reference, "digest": self.parent.digest}
            if self.parent
            else None,
            "seeds": {"train": self.config.train.seed},
            "device": trainer.machine.device,
            "dtype": trainer.machine.dtype,
            "compiled": trainer.machine.compiled,
            "steps": trainer.step,
            "best_step": self.best_step,
            "best_val_loss": published_loss,
            "seconds": round(self._seconds(), 1),
        }
        drawn = SampleConfig(max_new_tokens=300, seed=self.config.train.seed)
        sample = Generator(best.model, best.tokenizer).generate("", drawn)[0]
        text = card(self.draft.reference, self.config, facts, sample)
        fsio.write_bytes(self.draft.path / "README.md", text.encode("utf-8", "replace"))
        version = self.draft.finish(**facts)
        loss = published_loss if published_loss is not None else math.nan
        self._watch(Finished(version.reference, trainer.step, loss, self.best_step, self._seconds(), reason))
        return version

    def _published_loss(self, model: GPT) -> float | None:
        """The whole split's loss of the weights as they are read back, whatever was estimated on the way."""
        c = self.config.train
        if self.best_loss is None or (c.eval_iters is None and c.weights_dtype == "float32"):
            return self.best_loss
        n_bytes = self.dataset.count("val", "bytes")
        return float(measure.evaluate(model, self.dataset.val, n_bytes=n_bytes).loss)

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._clock
