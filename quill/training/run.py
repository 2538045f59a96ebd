"""A whole run: from settings to a published version, continued where an earlier one stopped.

Repeating a run is always safe: an unfinished run of the same settings goes on, a finished one is
found, and other settings under the same name are refused.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from quill import fsio, strictjson
from quill.config import reading
from quill.config.settings import DataConfig, RunConfig, SampleConfig
from quill.data import prepare
from quill.data.batches import check_length
from quill.errors import InputError, InterruptedRun, NotFoundError, RefusedError
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
from quill.training.events import Evaluated, Finished, Notice, Observer, Saved, Started, Stepped, ignore
from quill.training.log import RunLog
from quill.training.machine import Machine
from quill.training.trainer import Trainer

if TYPE_CHECKING:
    from quill.data.shards import Dataset

Resume = Literal["auto", "never", "must"]

# Where a run computes may differ from one repetition to the next without making it another run.
_OF_THE_MACHINE = frozenset({"train.device", "train.dtype", "train.compile", "train.keep_states"})
_OF_THE_FILE = frozenset({"name", "$schema", "schema_version", "train.log_interval"})
# What stands for "the data" is its content, compared apart; where it was read from may change.
_OF_THE_DATA = frozenset({"data.source", "data.encoding", "data.text_field"})

# Compiling takes about a minute, so a run must be long enough to win it back.
_COMPILE_PAYS_AFTER_SECONDS = 600.0


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
    assert config.name
    draft = _claim(config, dataset, registry, resume, new_version)
    if isinstance(draft, Version):
        observer(Notice(f"{draft.reference} is already trained"))
        return Outcome(draft.reference, draft, "already trained")
    return _Run(config, dataset, draft, parent, observer).go(stop, clock, max_seconds)


def settle(
    config: RunConfig, data_root: Path, parent: Version | None, on_data: prepare.Observer | None = None
) -> tuple[RunConfig, Dataset]:
    """Settings and data that fit each other: the dataset prepared, the vocabulary filled in.

    Args:
        config: What was asked for.
        data_root: Where prepared datasets are.
        parent: The model to start from; its shape and tokenizer are taken over.
        on_data: Told of progress while data is prepared.

    Raises:
        InputError: The name is missing, or the data is too short for the context.
    """
    if not config.name:
        raise InputError("the run has no name", why="neither file nor flag gives one", hint="--name my-model")
    data, model = config.data, config.model
    if parent is not None:
        known = checkpoint.read_tokenizer(parent)
        model = checkpoint.read_config(parent).model.model_copy(update={"dropout": model.dropout})
        data = _with_tokenizer_of(data, known.to_dict(), parent)
    dataset = prepare.resolve(data, data_root, on_data)
    if parent is not None and dataset.tokenizer.fingerprint != known.fingerprint:
        raise InputError(
            f"'{dataset.name}' was prepared with another tokenizer than {parent.reference}'s",
            why=f"{dataset.tokenizer.kind} against {known.kind}, or other text behind the same kind",
            hint="prepare the text with the model's own tokenizer",
        )
    tokens = dataset.tokenizer.vocab_size
    if model.vocab_size is None or parent is not None:
        model = model.model_copy(update={"vocab_size": model.vocab_size or tokens})
    if model.vocab_size is not None and model.vocab_size < tokens:
        raise InputError(
            f"'model.vocab_size' = {model.vocab_size} is too small",
            why=f"the tokenizer of '{dataset.name}' has {tokens:,} tokens",
            hint="leave it unset",
        )
    check_length(dataset.count("train"), model.block_size, "train", dataset=dataset.name)
    if data.val_fraction and dataset.count("train"):
        check_length(dataset.count("val"), model.block_size, "validation", dataset=dataset.name)
    data = data.model_copy(update={"tokenizer": dataset.tokenizer.kind})
    return config.model_copy(update={"data": data, "model": model}), dataset


def _with_tokenizer_of(data: DataConfig, known: dict[str, Any], parent: Version) -> DataConfig:
    """Have the text prepared with the parent's characters rather than with its own."""
    if known.get("kind") == "char" and data.tokenizer in (None, "char"):
        characters = [c for c in known["characters"]]
        return data.model_copy(update={"tokenizer": "char", "vocabulary": characters})
    return data if data.tokenizer else data.model_copy(update={"tokenizer": known.get("kind")})


def differences(ran: RunConfig, asked: RunConfig) -> list[str]:
    """Settings in which two runs differ, as "train.batch_size 32 -> 64"."""
    before, after = _flat(ran.to_dict()), _flat(asked.to_dict())
    aside = _OF_THE_MACHINE | _OF_THE_FILE | _OF_THE_DATA
    return [
        f"{k} {before.get(k)!r} -> {after.get(k)!r}"
        for k in sorted(before | after)
        if k not in aside and before.get(k) != after.get(k)
    ]


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    return flat


def _claim(
    config: RunConfig, dataset: Dataset, registry: Registry, resume: Resume, new_version: bool
) -> Draft | Version:
    """The draft to work on, or the finished version that makes work needless."""
    name = config.name or ""
    newest, draft = registry.newest(name), registry.unfinished(name)
    if draft is not None and newest is not None and draft.number < newest.number:
        draft = None  # given up for a later run; gc removes it
    if draft is not None:
        begun = _begun(draft)
        changed = _changes(begun, config, dataset) if begun else []
        if begun and not changed and resume != "never":
            return draft
        if resume == "must" or (changed and resume == "auto" and not new_version):
            raise RefusedError(
                f"{draft.reference} is unfinished and was begun with other settings",
                why="; ".join(changed) or "its settings cannot be read",
                hint=f"--name another, or start {name} over with --resume never",
            )
        if not new_version or not begun:
            draft.discard()
    if resume == "must":
        raise NotFoundError(
            f"no unfinished run of '{name}'", why="--resume must asks for one", hint="--resume auto"
        )
    if newest is not None and not newest.damaged:
        changed = _changes(newest, config, dataset)
        if not changed and not (new_version and newest.manifest is None):
            return newest
        if not new_version:
            raise RefusedError(
                f"{newest.reference} was trained with other settings",
                why="; ".join(changed),
                hint=f"--new-version trains {name}:v{newest.number + 1}, --name another model",
            )
    draft = registry.begin(name)
    fsio.write_json(draft.path / "config.json", config.to_dict())
    fsio.write_bytes(
        draft.path / "tokenizer.json", strictjson.dumps(dataset.tokenizer.to_dict()).encode("utf-8")
    )
    draft.set_status(_status(0) | {"data_key": dataset.key})
    return draft


def _begun(draft: Draft) -> Draft | None:
    """The draft, if it got as far as having settings."""
    return draft if draft.status() and (draft.path / "config.json").exists() else None


def _changes(earlier: Draft | Version, config: RunConfig, dataset: Dataset) -> list[str]:
    if isinstance(earlier, Version):
        ran = checkpoint.read_config(earlier)
        key = ((earlier.manifest or {}).get("data") or {}).get("key")
    else:
        ran = reading.parse(strictjson.read(earlier.path / "config.json"), origin=earlier.reference)
        key = (earlier.status() or {}).get("data_key")
    changed = differences(ran, config)
    if key is not None and key != dataset.key:
        changed.append(f"the text or its preparation: {key[:12]} -> {dataset.key[:12]}")
    return changed


def _status(step: int) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
    }


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
        observer, self._watch = self._watch, lambda event: (log(event), observer(event), None)[-1]
        for note in notes:
            self._watch(Notice(note))
        self._announce(trainer)
        reason = "trained"
        while trainer.step < c.max_iters:
            self._step(trainer)
            if trainer.step % c.eval_interval == 0 or trainer.step == c.max_iters:
                self._evaluate(trainer)
                self._save(trainer)
            if c.patience and self.bad_evaluations >= c.patience:
                reason = f"no better loss in {c.patience} evaluations"
                break
            if trainer.step == c.max_iters:
                break
            self._heed(trainer, stop())
            if max_seconds is not None and time.monotonic() - clock >= max_seconds:
                self._save(trainer)
                self._watch(Notice(f"{self.draft.reference} pauses at step {trainer.step:,}: time is up"))
                return Outcome(self.draft.reference, None, "paused")
        return Outcome(self.draft.reference, self._publish(trainer, reason), "trained")

    def _trainer(self, facts: dict[str, Any]) -> Trainer:
        c = self.config
        machines.keep_memory()
        device = machines.find_device(c.train.device)
        size.check_memory(c, device)
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
        self.draft.set_status((self.draft.status() or {}) | _status(trainer.step))
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
        self._watch(
            Finished(version.reference, trainer.step, loss, self.best_step, self._seconds(), reason)
        )
        return version

    def _published_loss(self, model: GPT) -> float | None:
        """The whole split's loss of the weights as they are read back, whatever was estimated on the way."""
        c = self.config.train
        if self.best_loss is None or (c.eval_iters is None and c.weights_dtype == "float32"):
            return self.best_loss
        n_bytes = self.dataset.count("val", "bytes")
        return measure.evaluate(model, self.dataset.val, n_bytes=n_bytes).loss

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._clock


def tokens_per_step(config: RunConfig) -> int:
    """Tokens that one optimizer step sees."""
    t = config.train
    return t.batch_size * t.gradient_accumulation_steps * config.model.block_size


def choose_machine(
    model: GPT, config: RunConfig, dataset: Dataset, device: str, earlier: dict[str, Any] | None
) -> Machine:
    """Precision and compilation for a run, by timing its own first step.

    Args:
        model: On the device; its weights do not change.
        config: The run.
        dataset: Its data.
        device: Where it runs.
        earlier: What an interrupted run had chosen: to go on bit for bit is to keep to it.
    """
    c = config.train
    if earlier is not None and earlier["device"].partition(":")[0] == device.partition(":")[0]:
        return Machine(device, earlier["dtype"], earlier["compiled"])

    def trial(machine: Machine) -> Callable[[str], None]:
        trainers: dict[str, Trainer] = {}

        def step(dtype: str) -> None:
            chosen = Machine(device, dtype, machine.compiled)
            trainer = trainers.setdefault(dtype, Trainer(model, c, dataset.train, chosen))
            model.train()
            trainer.gradients()
            model.zero_grad(set_to_none=True)
            chosen.synchronize()

        return step

    dtypes = machines.candidates(device, c)
    wants_timing = len(dtypes) > 1 or (c.compile == "auto" and machines.can_compile(device))
    dtype, seconds = dtypes[0], 0.0
    if wants_timing:
        dtype, seconds = machines.fastest(dtypes, trial(Machine(device, dtypes[0], False)))
    plain = Machine(device, dtype, False)
    if c.compile == "off" or (c.compile == "auto" and not machines.can_compile(device)):
        return plain
    if c.compile == "auto" and seconds * c.max_iters < _COMPILE_PAYS_AFTER_SECONDS:
        return plain
    compiled = Machine(device, dtype, True)
    try:
        _, with_compiler = machines.fastest([dtype], trial(compiled))
    except Exception as e:  # torch's compiler fails in as many ways as there are toolchains
        if c.compile == "on":
            raise InputError(
                "torch.compile does not work here", why=str(e).splitlines()[0][:200], hint="--compile off"
            ) from e
        torch.compiler.reset()
        return plain
    return compiled if c.compile == "on" or with_compiler < 0.9 * seconds else plain
