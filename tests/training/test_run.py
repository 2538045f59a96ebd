"""A whole run: published, found again, refused under changed settings, resumed bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crashing import power_loss

from quill import fsio
from quill.checkpoint.load import load_checkpoint
from quill.checkpoint.resume_state import load_state
from quill.config import reading
from quill.config.settings import DataConfig, RunConfig
from quill.data import prepare as preparing
from quill.data import resolve
from quill.data.dataset import Dataset
from quill.errors import (
    DivergedError,
    InputError,
    InterruptedRun,
    LockedError,
    NotFoundError,
    RefusedError,
)
from quill.evaluation import measure
from quill.evaluation.curves import stream
from quill.formats.exporting import export
from quill.formats.importing import import_model
from quill.generation.generator import Generator
from quill.model import fused, gpt
from quill.model.blocks.modern import block as modern
from quill.model.gpt import n_params
from quill.registry import locks
from quill.registry.store import Registry
from quill.training import memory, resume
from quill.training.device import Device
from quill.training.events import Evaluated, Event, Finished, Notice, Sampled, Saved, Started, Stepped
from quill.training.inputs import settle
from quill.training.optimizer import is_hidden
from quill.training.plan import plan
from quill.training.run import Outcome, train
from quill.training.trainer import Trainer

CPU = Device("cpu", "float32", False)
# Files of a run that are written without a sync.
UNSYNCED = ("status.json", "metrics.jsonl", "run.log")


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    path = tmp_path / "tide.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


@pytest.fixture
def config(text: Path) -> RunConfig:
    return make(text)


def make(text: Path, **overrides: Any) -> RunConfig:
    settings = {
        "data.source": str(text),
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 16,
        "model.block_size": 16,
        "model.dropout": 0.1,
        "train.batch_size": 4,
        "train.max_iters": 12,
        "train.eval_interval": 4,
        "train.log_interval": 1,
        "train.warmup_iters": 2,
        "train.device": "cpu",
        "train.dtype": "float32",
        "train.compile": "off",
        **{k.replace("__", "."): v for k, v in overrides.items()},
    }
    return reading.parse({"name": "tide"}, settings)


def run(config: RunConfig, registry: Registry, *, stop_after: int | None = None, **options: Any) -> Outcome:
    """Train; after `stop_after` steps a signal arrives."""
    watch, steps = options.pop("observer", lambda event: None), [0]

    def observe(event: Event) -> None:
        steps[0] = event.step if isinstance(event, Stepped) else steps[0]
        watch(event)

    if stop_after is not None:

        def poll() -> None:
            if steps[0] >= stop_after:
                raise InterruptedRun("interrupted", signum=signal.SIGTERM)

        options["poll"] = poll
    return train(config, registry, registry.root.parent / "data", observer=observe, **options)


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name in ("model.safetensors", "tokenizer.json", "config.json", "metrics.jsonl")
    }


def test_a_run_publishes_a_version_that_loads(config: RunConfig, registry: Registry) -> None:
    events: list[Event] = []
    outcome = run(config, registry, observer=events.append)
    assert (outcome.reference, outcome.reason) == ("tide:v1", "trained")
    version = registry.resolve("tide")
    loaded = load_checkpoint(version)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("3 bells")) == "3 bells"
    assert version.manifest is not None
    assert version.manifest["steps"] == 12
    assert version.manifest["data"]["tokenizer_sha256"] == loaded.tokenizer.fingerprint
    assert loaded.config.model.vocab_size == loaded.tokenizer.vocab_size
    assert not (version.path / "state").exists()
    assert (version.path / "README.md").read_text(encoding="utf-8").startswith("# tide:v1")
    kinds = [type(e) for e in events]
    assert kinds[0] is Started
    assert kinds[-1] is Finished
    assert [e.step for e in events if isinstance(e, Evaluated)] == [4, 8, 12]


def test_metrics_have_a_line_for_every_step_and_evaluation(config: RunConfig, registry: Registry) -> None:
    lines = list(stream(run(config, registry).version.metrics()))  # type: ignore[union-attr]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8, 12]


def test_the_best_weights_are_published(text: Path, registry: Registry) -> None:
    wild = make(text, train__learning_rate=30.0, train__min_lr=30.0, train__optimizer="adamw")
    events: list[Event] = []
    version = run(wild, registry, observer=events.append).version
    losses = {e.step: e.val_loss for e in events if isinstance(e, Evaluated)}
    best = min(losses, key=lambda step: losses[step])
    assert best != 12, "the run was meant to get worse"
    assert version is not None
    assert version.manifest is not None
    assert version.manifest["best_step"] == best
    assert version.manifest["best_val_loss"] == pytest.approx(losses[best])


def test_the_optimizer_is_freed_before_the_weights_are_loaded_to_be_published(
    config: RunConfig, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a limit on memory there was room for training, but none for a second copy of the weights."""
    trainers: list[Trainer] = []
    begin, load = Trainer.__init__, load_checkpoint
    seen = []

    def remember(self: Trainer, *arguments: Any) -> None:
        trainers.append(self)
        begin(self, *arguments)

    def measure_first(*arguments: Any) -> Any:
        (trainer,) = trainers
        assert (trainer.step, trainer.optimizer.state()) == (12, {})
        seen.extend(p.grad for p in trainer.model.parameters())
        return load(*arguments)

    monkeypatch.setattr(Trainer, "__init__", remember)
    monkeypatch.setattr("quill.training.publish.load_checkpoint", measure_first)
    assert run(config, registry).version is not None
    assert set(seen) == {None}


def test_the_published_loss_of_a_run_in_bfloat16_is_measured_in_float32(
    text: Path, registry: Registry
) -> None:
    events: list[Event] = []
    version = run(make(text, train__dtype="bfloat16"), registry, observer=events.append).version
    assert version is not None
    loaded, tokens = load_checkpoint(version), opened(text, registry)
    exact = measure.evaluate(loaded.model, tokens.val, n_bytes=tokens.count("val", "bytes")).loss
    assert version.facts["best_val_loss"] == exact
    estimate = min(e.val_loss for e in events if isinstance(e, Evaluated))
    assert estimate != exact
    assert estimate == pytest.approx(exact, abs=1e-2)
    assert [e.val_loss for e in events if isinstance(e, Finished)] == [exact]


@pytest.mark.parametrize("steps", [(1,), (4,), (7,), (2, 3, 1)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    steps: tuple[int, ...], config: RunConfig, tmp_path: Path
) -> None:
    whole, broken = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    run(config, whole)
    for step in steps:
        with pytest.raises(InterruptedRun) as caught:
            run(config, broken, stop_after=step)
        assert caught.value.exit_code == 143
        assert registry_is_empty(broken)
    assert run(config, broken, resume="must").reason == "trained"
    a, b = (digests(r.resolve("tide").path) for r in (whole, broken))
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert a[file] == b[file], file
    first, second = (stream(r.resolve("tide").metrics()) for r in (whole, broken))
    assert [untimed(line) for line in first] == [untimed(line) for line in second]


@pytest.mark.parametrize("damage", ["missing", "empty", "zeros", "cut off", "of the first save"])
def test_f54_a_run_whose_unsynced_files_were_lost_resumes(
    damage: str, config: RunConfig, tmp_path: Path
) -> None:
    whole, broken = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    run(config, whole)
    early: dict[str, bytes] = {}

    def keep(event: Event) -> None:
        if isinstance(event, Saved) and not early:
            early.update({n: (folder / n).read_bytes() for n in UNSYNCED})

    folder = broken.root / "tide" / "v1"
    with pytest.raises(InterruptedRun):
        run(config, broken, stop_after=9, observer=keep)
    for name in UNSYNCED:
        raw = (folder / name).read_bytes()
        lost = {"empty": b"", "zeros": bytes(len(raw)), "cut off": raw[:-7], "of the first save": early[name]}
        (folder / name).unlink()
        if damage != "missing":
            (folder / name).write_bytes(lost[damage])
    assert [d.step for d in broken.drafts()] == [4 if damage == "of the first save" else 9]
    steps: list[int] = []
    outcome = run(
        config, broken, resume="must", observer=lambda e: steps.append(e.step) if type(e) is Stepped else None
    )
    assert (outcome.reference, steps) == ("tide:v1", [10, 11, 12])
    a, b = (r.resolve("tide") for r in (whole, broken))
    assert a.digest == b.digest
    assert a.manifest is not None
    assert b.manifest is not None
    assert [a.manifest[k] for k in ("data", "parent", "steps")] == [
        b.manifest[k] for k in ("data", "parent", "steps")
    ]


def test_f54_a_run_on_other_data_is_refused_without_its_status(config: RunConfig, registry: Registry) -> None:
    with pytest.raises(InterruptedRun):
        run(config, registry, stop_after=5)
    (registry.root / "tide" / "v1" / "status.json").unlink()
    source = Path(str(config.data.source))
    source.write_text(source.read_text(encoding="utf-8") + "and more\n", encoding="utf-8")
    with pytest.raises(RefusedError, match="started with other settings") as caught:
        run(config, registry)
    assert "the text or its preparation" in caught.value.why


@pytest.mark.slow
def test_f29_f54_a_run_resumes_from_its_states_whatever_a_power_cut_leaves(
    text: Path, registry: Registry, tmp_path: Path, injections: Any
) -> None:
    """After every operation of a run: whatever state is whole is where the run resumes."""
    config = make(text, train__max_iters=4, train__eval_interval=2, model__n_layer=1, model__n_embd=8)
    fsio.make_dir(registry.root)
    saved, resumed = [0], 0

    def note(event: Event) -> None:
        if isinstance(event, Saved):
            saved[0] = event.step

    def then(found: Registry, outcome: Any) -> None:
        nonlocal resumed
        draft = found.unfinished("tide")
        if draft is None or draft.is_published or not (whole := load_state(draft)):
            assert not saved[0] or found.entries()
            return
        assert whole[1]["trainer"]["step"] >= saved[0], "what was reported as saved is saved"
        earlier = resume.find(inputs, found, "must", False)
        assert earlier.draft is not None
        assert earlier.draft.number == draft.number
        assert load_state(earlier.draft) is not None
        resumed += 1

    inputs = settle(config, registry.root.parent / "data", None)
    states = power_loss(registry, lambda r: run(config, r, observer=note), then, tmp_path / "lost", draws=1)
    injections.add("train", "power loss", states)
    assert resumed > 100


@pytest.mark.parametrize("stop", [0, 1, 6, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.9},
        {"ema_decay": 0.9, "eval_iters": 2, "weights_dtype": "bfloat16"},
        {"token_dropout": 0.1, "masked_loss_weight": 0.4, "schedule": "trapezoidal"},
        {"ema_decay": 0.5, "token_dropout": 0.2, "masked_loss_weight": 1.0, "gradient_accumulation_steps": 2},
        {"ema_decay": 0.5, "model.ngram": 3, "micro_batch_size": 2},
    ],
)
def test_a_resumed_run_with_another_objective_equals_an_uninterrupted_one(
    settings: dict[str, Any], stop: int, text: Path, tmp_path: Path
) -> None:
    config = make(text, **{k if "." in k else f"train.{k}": v for k, v in settings.items()})
    whole, broken = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    run(config, whole)
    with pytest.raises(InterruptedRun):
        run(config, broken, stop_after=stop)
    assert run(config, broken, resume="must").reason == "trained"
    a, b = (r.resolve("tide") for r in (whole, broken))
    assert digests(a.path)["model.safetensors"] == digests(b.path)["model.safetensors"]
    lines = [[untimed(x) for x in stream(v.metrics())] for v in (a, b)]
    assert lines[0] == lines[1]
    assert a.facts["averaged"] == b.facts["averaged"]


def test_the_better_of_the_weights_and_their_average_is_published(text: Path, registry: Registry) -> None:
    """At a high constant rate the weights jump around what their average stays close to."""
    wild = {"train__learning_rate": 0.3, "train__schedule": "constant", "train__optimizer": "adamw"}
    events: list[Event] = []
    averaging = make(text, train__ema_decay=0.95, train__max_iters=40, **wild)
    version = run(averaging, registry, observer=events.append).version
    assert version is not None
    evaluated = [e for e in events if isinstance(e, Evaluated)]
    for e in evaluated:
        assert e.raw_val_loss is not None and e.averaged_val_loss is not None
        assert e.val_loss == min(e.raw_val_loss, e.averaged_val_loss)
        assert e.averaged == (e.averaged_val_loss < e.raw_val_loss)
    best = min(evaluated, key=lambda e: e.val_loss)
    assert best.averaged and evaluated[-1].best_averaged and version.facts["averaged"] is True
    assert version.facts["best_val_loss"] == best.val_loss
    loaded, tokens = load_checkpoint(version), opened(text, registry)
    measured = measure.evaluate(loaded.model, tokens.val, n_bytes=tokens.count("val", "bytes")).loss
    assert measured == pytest.approx(best.averaged_val_loss, abs=1e-6)
    lines = [x for x in stream(version.metrics()) if "val_loss" in x]
    assert [x["averaged"] for x in lines] == [e.averaged for e in evaluated]
    assert [x["averaged_val_loss"] for x in lines] == [e.averaged_val_loss for e in evaluated]
    assert "a moving average of the weights" in (version.path / "README.md").read_text(encoding="utf-8")
    raw = run(make(text, train__max_iters=40, **wild), registry, new_version=True).version
    assert raw is not None and raw.facts["averaged"] is False
    assert raw.facts["best_val_loss"] > best.val_loss
    assert "moving average" not in (raw.path / "README.md").read_text(encoding="utf-8")


def test_a_calibrated_run_publishes_its_weights_at_the_best_temperature(
    text: Path, registry: Registry, tmp_path: Path
) -> None:
    events: list[Event] = []
    plain = run(make(text, train__ema_decay=0.9), registry).version
    calibrated, others = make(text, train__ema_decay=0.9, train__calibrate=True), Registry(tmp_path / "b")
    with pytest.raises(InterruptedRun):
        run(calibrated, others, stop_after=7)
    version = run(calibrated, others, observer=events.append).version
    whole = run(calibrated, Registry(tmp_path / "c")).version
    assert plain is not None and version is not None and whole is not None
    assert digests(version.path)["model.safetensors"] == digests(whole.path)["model.safetensors"]
    assert plain.facts["temperature"] is None
    temperature, last = version.facts["temperature"], [e for e in events if isinstance(e, Evaluated)][-1]
    assert last.best and temperature is not None
    assert temperature == pytest.approx(last.temperature, abs=1e-4) and temperature != 1
    assert [x["temperature"] for x in stream(version.metrics()) if "val_loss" in x][-1] == temperature
    assert "logits divided by" in (version.path / "README.md").read_text(encoding="utf-8")
    # The steps are those of the plain run, and the last norm has the temperature.
    before, after = (load_checkpoint(v).model.state_dict() for v in (plain, version))
    for name, weight in before.items():
        divisor = temperature if name.startswith("ln_f.") else 1.0
        torch.testing.assert_close(after[name], weight / divisor, atol=0.0, rtol=1e-4, msg=name)
    tokens = opened(text, registry)
    measured = measure.evaluate(
        load_checkpoint(version).model, tokens.val, n_bytes=tokens.count("val", "bytes")
    )
    assert version.facts["best_val_loss"] == measured.loss < plain.facts["best_val_loss"]


def opened(text: Path, registry: Registry) -> Dataset:
    return resolve.ensure(DataConfig(source=str(text)), registry.root.parent / "data")


def test_the_objective_is_logged_beside_the_loss(text: Path, registry: Registry) -> None:
    events: list[Event] = []
    version = run(make(text, train__masked_loss_weight=0.5), registry, observer=events.append).version
    assert version is not None
    steps = [e for e in events if isinstance(e, Stepped)]
    assert all(e.objective is not None and e.objective > 1.3 * e.loss for e in steps)
    lines = [x for x in stream(version.metrics()) if "loss" in x]
    assert [x["objective"] for x in lines] == [pytest.approx(e.objective, abs=1e-6) for e in steps]
    plain = run(make(text), registry, new_version=True).version
    assert plain is not None
    assert not any("objective" in x for x in stream(plain.metrics()))


@pytest.mark.parametrize(
    "setting",
    [{"ema_decay": 0.9}, {"token_dropout": 0.1}, {"masked_loss_weight": 0.4}, {"schedule": "trapezoidal"}],
)
def test_another_objective_is_another_run(setting: dict[str, Any], text: Path, registry: Registry) -> None:
    with pytest.raises(InterruptedRun):
        run(make(text), registry, stop_after=3)
    with pytest.raises(RefusedError, match="unfinished") as caught:
        run(make(text, **{f"train.{k}": v for k, v in setting.items()}), registry)
    assert f"train.{next(iter(setting))} " in caught.value.why


def test_the_average_is_counted_in_memory_and_on_disk(text: Path) -> None:
    plain, averaged = make(text), make(text, train__ema_decay=0.9)
    parameters = n_params(plain.model.shape(2))
    assert memory.check(averaged, "cpu") - memory.check(plain, "cpu") == 4 * parameters


def test_a_lengthened_run_starts_a_new_average(text: Path, registry: Registry) -> None:
    run(make(text, train__ema_decay=0.9), registry)
    long = make(text, train__ema_decay=0.9, train__max_iters=24)
    events: list[Event] = []
    with pytest.raises(InterruptedRun):
        run(long, registry, stop_after=17, observer=events.append)
    version = run(long, registry, observer=events.append).version
    assert version is not None and version.reference == "tide:v2"
    first, *later = [e for e in events if isinstance(e, Evaluated)]
    assert first.step == 12 and first.averaged_val_loss is None
    assert all(e.averaged_val_loss is not None for e in later)


def test_f34_a_signal_at_any_moment_saves_a_state_that_resumes_exactly(text: Path, tmp_path: Path) -> None:
    """Between steps, between the batches of a step and of an evaluation, and while publishing."""
    settings = {"train__gradient_accumulation_steps": 2, "train__max_iters": 4, "train__eval_interval": 2}
    config = make(text, model__n_layer=1, model__n_embd=8, **settings)
    whole, asked = Registry(tmp_path / "whole" / "weights"), [0]

    def count() -> None:
        asked[0] += 1

    run(config, whole, poll=count)
    total = asked[0]
    # 4 looks before steps and 4 within, 2 evaluations, and one for each character of the card's sample.
    assert total > 300
    for nth in [*range(1, 13), total // 2, total]:
        registry, left = Registry(tmp_path / str(nth) / "weights"), iter(range(1, 10_000))

        def poll(left: Any = left, nth: int = nth) -> None:
            if next(left) == nth:
                raise InterruptedRun("interrupted", signum=signal.SIGHUP)

        with pytest.raises(InterruptedRun) as caught:
            run(config, registry, poll=poll)
        assert caught.value.exit_code == 129
        assert registry_is_empty(registry)
        assert run(config, registry, resume="must").reason == "trained"
        first, second = (r.resolve("tide") for r in (whole, registry))
        assert digests(first.path)["model.safetensors"] == digests(second.path)["model.safetensors"], nth
        lines = [[untimed(x) for x in stream(v.metrics())] for v in (first, second)]
        assert lines[0] == lines[1], nth


def test_f30_a_name_is_locked_while_it_is_trained(config: RunConfig, registry: Registry) -> None:
    registry.root.mkdir(parents=True)
    with locks.hold(registry.root, "tide"):
        with pytest.raises(LockedError, match="working on 'tide'") as caught:
            run(config, registry)
        assert caught.value.exit_code == 75
        assert f"pid {os.getpid()}" in caught.value.why
    assert run(config, registry).reason == "trained"


def test_f30_a_second_run_can_wait_for_the_first(config: RunConfig, registry: Registry) -> None:
    began = threading.Event()

    def first() -> None:
        with locks.hold(registry.root, "tide"):
            began.set()
            time.sleep(1.5)

    thread = threading.Thread(target=first)
    thread.start()
    began.wait(10)
    started = time.monotonic()
    assert run(config, registry, wait=60).reason == "trained"
    assert time.monotonic() - started > 1
    thread.join()


@pytest.mark.parametrize("step", [1, 5, 12])
def test_f32_a_run_that_was_taken_over_ends_and_the_other_continues(
    step: int, config: RunConfig, registry: Registry
) -> None:
    """As where locks do nothing: the second finds no lock, takes the draft and leaves its mark."""

    def take_over(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            draft = registry.unfinished("tide")
            assert draft is not None
            draft.take()

    with pytest.raises(LockedError, match="taken over"):
        run(config, registry, observer=take_over)
    assert registry_is_empty(registry)
    assert run(config, registry).reason == "trained"
    version = registry.resolve("tide")
    assert version.manifest is not None
    assert all(version.read_file(name) for name in version.manifest["files"])


def registry_is_empty(registry: Registry) -> bool:
    return not registry.entries()


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k != "tokens_per_second"}


def test_repeating_a_finished_run_does_nothing(config: RunConfig, registry: Registry) -> None:
    first = run(config, registry)
    before = digests(registry.resolve("tide").path)
    again = run(config, registry)
    assert (again.reference, again.reason) == (first.reference, "already trained")
    assert digests(registry.resolve("tide").path) == before
    assert len(registry.entries(all_versions=True)) == 1


def test_another_config_under_the_same_name_is_refused(text: Path, registry: Registry) -> None:
    run(make(text), registry)
    with pytest.raises(RefusedError) as caught:
        run(make(text, train__learning_rate=0.5), registry)
    assert "train.learning_rate 0.003 -> 0.5" in caught.value.why
    assert "new_version=True" in caught.value.hint
    other = make(text, train__learning_rate=0.5)
    assert run(other, registry, new_version=True).reference == "tide:v2"
    assert run(other, registry).reason == "already trained"


def test_the_device_is_not_part_of_a_runs_identity(text: Path, registry: Registry) -> None:
    run(make(text), registry)
    assert run(make(text, train__device="auto", train__keep_states=5), registry).reason == "already trained"


def test_f43_a_run_is_not_resumed_with_other_settings_or_text(
    text: Path, config: RunConfig, registry: Registry
) -> None:
    with pytest.raises(InterruptedRun):
        run(config, registry, stop_after=3)
    with pytest.raises(RefusedError, match="unfinished") as caught:
        run(make(text, train__batch_size=5), registry)
    assert "train.batch_size 4 -> 5" in caught.value.why
    text.write_text(text.read_text() + "One more bell.\n" * 20)
    with pytest.raises(RefusedError) as caught:
        run(config, registry)
    assert "the text" in caught.value.why
    assert run(config, registry, resume="never").reason == "trained"


def test_settings_of_the_optimizer_belong_to_a_run_which_resumes_exactly_with_them(
    text: Path, tmp_path: Path
) -> None:
    settings = {
        "train__muon_coefficients": "polar_express",
        "train__muon_scale": "spectral",
        "train__embedding_weight_decay": 1.0,
        "train__head_weight_decay": 0.02,
        "train__cautious_weight_decay": True,
        "train__weight_decay_schedule": "cosine",
    }
    config = make(text, model__tie_embeddings=False, **settings)
    whole, broken = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    run(config, whole)
    with pytest.raises(InterruptedRun):
        run(config, broken, stop_after=6)
    for name, value in settings.items():
        others = {k: v for k, v in settings.items() if k != name}
        with pytest.raises(RefusedError) as caught:
            run(make(text, model__tie_embeddings=False, **others), broken)
        assert f"{name.replace('__', '.')} {value!r} -> " in caught.value.why
    run(config, broken)
    a, b = (digests(r.resolve("tide").path) for r in (whole, broken))
    assert a["model.safetensors"] == b["model.safetensors"]


def test_f43_a_damaged_newest_state_is_skipped(config: RunConfig, registry: Registry) -> None:
    with pytest.raises(InterruptedRun):
        run(config, registry, stop_after=6)
    draft = registry.unfinished("tide")
    assert draft is not None
    states = sorted((draft.path / "state").glob("step-*"))
    assert len(states) == 2
    newest = states[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x55")
    events: list[Event] = []
    assert run(config, registry, observer=events.append).reason == "trained"
    started = next(e for e in events if isinstance(e, Started))
    assert started.step == 4
    assert any("damaged" in getattr(e, "message", "") for e in events)


def test_resuming_without_an_unfinished_run_is_refused(config: RunConfig, registry: Registry) -> None:
    with pytest.raises(NotFoundError):
        run(config, registry, resume="must")


def test_the_time_limit_pauses_with_the_state_saved(config: RunConfig, registry: Registry) -> None:
    outcome = run(config, registry, max_seconds=0.0, publish=False)
    assert (outcome.reason, outcome.version) == ("paused", None)
    assert run(config, registry).reason == "trained"


def test_patience_ends_a_run_that_stops_improving(text: Path, registry: Registry) -> None:
    events: list[Event] = []
    wild = make(
        text,
        train__learning_rate=3.0,
        train__min_lr=3.0,
        train__optimizer="adamw",
        train__eval_interval=1,
        train__patience=2,
        train__max_iters=200,
    )
    run(wild, registry, observer=events.append)
    finished = next(e for e in events if isinstance(e, Finished))
    assert finished.step < 200
    assert finished.step == finished.best_step + 2


def test_a_run_killed_before_publishing_publishes_on_resume(
    config: RunConfig, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("quill.training.run.Run.publish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, registry)
    assert not registry.entries()
    events: list[Event] = []
    assert run(config, registry, observer=events.append).reason == "trained"
    assert not any(isinstance(e, Evaluated) for e in events), "every step had been done"
    assert registry.resolve("tide").manifest["steps"] == 12  # type: ignore[index]


def test_f39_a_diverged_run_keeps_its_last_state(text: Path, registry: Registry) -> None:
    config = make(text, train__max_iters=8)
    with pytest.raises(InterruptedRun):
        run(config, registry, stop_after=4)
    draft = registry.unfinished("tide")
    assert draft is not None
    before = sorted(p.name for p in (draft.path / "state").glob("step-*"))

    def sabotage(event: Event) -> None:
        if isinstance(event, Started):
            torch.nn.functional.cross_entropy = lambda *a, **k: real(*a, **k) * float("nan")

    real = torch.nn.functional.cross_entropy
    try:
        with pytest.raises(DivergedError):
            run(config, registry, observer=sabotage)
    finally:
        torch.nn.functional.cross_entropy = real
    assert sorted(p.name for p in (draft.path / "state").glob("step-*")) == before
    assert run(config, registry).reason == "trained"


def test_published_weights_can_be_float16(text: Path, registry: Registry) -> None:
    version = run(make(text, train__weights_dtype="float16"), registry).version
    assert version is not None
    header = (version.path / "model.safetensors").read_bytes()[8:2000]
    assert b'"F16"' in header
    assert b'"F32"' not in header


def test_the_network_learns_beside_n_gram_counts_as_without_them(text: Path, registry: Registry) -> None:
    losses, networks = [], []
    for n_gram in (0, 3):
        version = run(make(text, model__ngram=n_gram), registry, new_version=True).version
        assert version is not None
        losses.append(version.facts["best_val_loss"])
        networks.append(load_checkpoint(version).model.network().state_dict())
    assert losses[1] < losses[0] - 0.5
    for name, p in networks[0].items():
        assert torch.equal(p, networks[1][name]), name


def test_n_gram_counts_are_stored_as_they_are_and_left_out_of_exports(text: Path, registry: Registry) -> None:
    version = run(make(text, model__ngram=3, train__weights_dtype="float16"), registry).version
    assert version is not None
    model = load_checkpoint(version).model
    assert model.ngram.grams.dtype == torch.int64
    assert int(model.ngram.counts.sum()) == opened(text, registry).count("train") - 3
    out = registry.root / "out"
    exported = export(version, "hf", out)
    assert any("without the n-gram counts" in note for note in exported.notes)
    back = load_checkpoint(import_model(str(out), registry, name="back")).model
    idx = torch.arange(16)[None]
    torch.testing.assert_close(back.predict(idx), model.network().predict(idx))


def test_a_model_with_n_gram_counts_starts_another_on_a_text_with_new_characters(
    text: Path, registry: Registry, tmp_path: Path
) -> None:
    run(make(text, model__ngram=2), registry)
    other = tmp_path / "other.txt"
    other.write_text("zebras & quaggas, Ångström! " * 300, encoding="utf-8")
    losses = []
    for name, n_gram in (("without", 0), ("counted", 2)):
        config = make(other, model__ngram=n_gram, train__init_from="tide").model_copy(update={"name": name})
        version = run(config, registry).version
        assert version is not None
        losses.append(version.facts["best_val_loss"])
    assert losses[1] < losses[0] - 0.5


def test_n_gram_counts_that_cannot_be_made_are_refused(text: Path, registry: Registry) -> None:
    with pytest.raises(InputError, match=r"'model\.ngram' = 16 is too many") as caught:
        run(make(text, model__ngram=16), registry)
    longest = int(caught.value.hint.rpartition("=")[2])
    assert run(make(text, model__ngram=longest, train__max_iters=1), registry).version is not None


def test_a_model_starts_from_another(text: Path, registry: Registry) -> None:
    parent = run(make(text), registry).version
    assert parent is not None
    tuned = make(text, train__init_from="tide", train__max_iters=4).model_copy(update={"name": "tuned"})
    version = run(tuned, registry).version
    assert version is not None
    assert version.manifest is not None
    assert version.manifest["parent"] == {"reference": "tide:v1", "digest": parent.digest}
    assert parent.manifest is not None
    assert version.manifest["best_val_loss"] < parent.manifest["best_val_loss"] + 0.1


def test_a_changed_parent_makes_it_another_run(text: Path, registry: Registry) -> None:
    run(make(text), registry)
    tuned = make(text, train__init_from="tide", train__max_iters=4).model_copy(update={"name": "tuned"})
    run(tuned, registry)
    assert run(tuned, registry).reason == "already trained"
    run(make(text, train__seed=2), registry, new_version=True)
    with pytest.raises(RefusedError, match="other settings") as caught:
        run(tuned, registry)
    assert "tide:v1 -> tide:v2" in caught.value.why
    assert run(tuned, registry, new_version=True).reference == "tuned:v2"


def test_a_run_resumes_after_its_parent_was_removed(text: Path, registry: Registry) -> None:
    parent = run(make(text), registry).version
    assert parent is not None
    tuned = make(text, train__init_from="tide", train__max_iters=8).model_copy(update={"name": "tuned"})
    with pytest.raises(InterruptedRun):
        run(tuned, registry, stop_after=5)
    shutil.rmtree(registry.root / "tide")
    version = run(tuned, registry).version
    assert version is not None and version.manifest is not None
    assert version.manifest["parent"] == {"reference": "tide:v1", "digest": parent.digest}
    fresh = tuned.model_copy(update={"name": "fresh"})
    with pytest.raises(NotFoundError, match="tide"):
        run(fresh, registry)


def prepare(text: str, folder: Path, name: str) -> None:
    """A dataset of that name, with characters of its own."""
    path = folder / f"{name}.txt"
    path.write_text(text + "Zounds!\n")
    preparing.prepare(DataConfig(source=str(path)), folder / "data", name=name)


@pytest.mark.parametrize(("kind", "vocab_size"), [("char", None), ("word", 60), ("bpe", 270)])
def test_fine_tuning_reads_another_text_with_the_parents_tokenizer(
    kind: str, vocab_size: int | None, text: Path, tmp_path: Path, registry: Registry
) -> None:
    if kind == "bpe":
        pytest.importorskip("rustbpe")
    parent = run(make(text, data__tokenizer=kind, data__vocab_size=vocab_size), registry).version
    assert parent is not None
    other = tmp_path / "log.txt"
    other.write_text("tide is 4 feet, and 3 bells, and the bells and the feet\n" * 30)
    tuned = make(other, train__init_from="tide", train__max_iters=4).model_copy(update={"name": "tuned"})
    version = run(tuned, registry).version
    assert version is not None
    assert digests(version.path)["tokenizer.json"] == digests(parent.path)["tokenizer.json"]
    assert run(tuned, registry).reason == "already trained"
    prepare(other.read_text(), tmp_path, "theirs")
    odd = tuned.model_copy(update={"data": tuned.data.model_copy(update={"source": "theirs"})})
    with pytest.raises(InputError, match="dataset 'theirs' has") as caught:
        run(odd, registry)
    assert caught.value.hint == f'set data.source="{tmp_path / "theirs.txt"}"'
    odd = tuned.model_copy(update={"data": tuned.data.model_copy(update={"tokenizer": "o200k_base"})})
    with pytest.raises(InputError, match="is not the tokenizer of tide:v1"):
        run(odd, registry)


def test_f16_text_too_short_for_the_context(text: Path, registry: Registry) -> None:
    with pytest.raises(InputError, match="split of") as caught:
        run(make(text, model__block_size=5000), registry)
    assert "5,001" in caught.value.why
    assert not registry.entries() and not registry.drafts()


@pytest.mark.parametrize(
    "shape", [{"model__n_layer": 10**6}, {"model__n_embd": 2**20, "model__mlp_size": 2**20}]
)
def test_f11_a_model_that_does_not_fit_is_refused_before_it_is_allocated(
    shape: dict[str, int], text: Path, registry: Registry
) -> None:
    huge = make(text, **shape, **({"model__n_embd": 1024} if "model__n_layer" in shape else {}))
    with pytest.raises(InputError, match="does not fit") as caught:
        run(huge, registry)
    assert "TB" in caught.value.why
    assert not registry.entries() and not registry.drafts()


def test_memory_is_that_of_the_computer() -> None:
    assert 10**8 < memory.of_device("cpu") < 10**15


def test_a_model_with_counts_is_planned_before_they_are_made(config: RunConfig, registry: Registry) -> None:
    counted = config.model_copy(update={"model": config.model.model_copy(update={"ngram": 3})})
    made = plan(counted, registry, registry.root.parent / "data")
    assert made.config["model"]["ngram"] == 3
    assert made.seconds_total


def test_a_plan_is_measured_and_leaves_nothing_behind(config: RunConfig, registry: Registry) -> None:
    made = plan(config, registry, registry.root.parent / "data")
    assert made.tokens_per_step == 64
    attention, mlp, norms = 4 * 16 * 16, 3 * 16 * 64, 2 * 16 + 2 * 8
    assert made.parameters == 25 * 16 + 2 * (attention + mlp + norms) + 16
    assert made.seconds_per_step
    assert made.seconds_total
    assert made.seconds_total >= 12 * made.seconds_per_step
    assert made.memory_bytes > 16 * made.parameters
    assert json.dumps(made.config)
    assert not registry.entries() and not registry.drafts()


def test_states_are_saved_with_every_evaluation(config: RunConfig, registry: Registry) -> None:
    events: list[Event] = []
    run(config, registry, observer=events.append)
    assert [e.step for e in events if isinstance(e, Saved)] == [4, 8, 12]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_interrupted_under_version_0_1_0_resumes(
    optimizer: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafts in fixtures/ were stopped at step 6 of 12; the final weights are those of a whole run.

    Version 0.1.0 drew its dropout masks with torch's own dropout and knew no fused formulas.
    """
    monkeypatch.setattr(fused, "suits", lambda x: False)
    monkeypatch.setattr(modern, "dropout", torch.nn.functional.dropout)
    monkeypatch.setattr(gpt, "dropout", torch.nn.functional.dropout)
    folder = Path(__file__).with_name("fixtures") / optimizer
    settings = {"model__n_layer": 1, "model__n_embd": 8, "train__optimizer": optimizer}
    config = make(text, **settings).model_copy(update={"name": optimizer})
    old, new = Registry(tmp_path / "old" / "weights"), Registry(tmp_path / "new" / "weights")
    shutil.copytree(folder, old.root / optimizer)
    events: list[Event] = []
    resumed = run(config, old, observer=events.append, resume="must").version
    whole = run(config, new).version
    assert [e.step for e in events if isinstance(e, Stepped)] == list(range(7, 13))
    assert resumed is not None and whole is not None
    a, b = (load_checkpoint(v).model.state_dict() for v in (resumed, whole))
    for name, value in a.items():
        # Equal bit for bit where the processor is the one that wrote the fixture. In bfloat16 Muon magnifies
        # the rounding of another to 4e-4; a momentum that is lost moves its matrices by more than 1e-2.
        atol = 1e-3 if optimizer == "muon" and is_hidden(name, value) else 1e-5
        torch.testing.assert_close(value, b[name], rtol=1e-5, atol=atol, msg=name)
    lines = [[untimed(x) for x in stream(v.metrics())] for v in (resumed, whole)]
    assert [x["step"] for x in lines[0]] == [x["step"] for x in lines[1]]


def test_a_time_limit_publishes_a_model_whose_rate_has_decayed(text: Path, registry: Registry) -> None:
    endless = make(text, train__max_iters=10**8, train__eval_interval=10**8, train__warmup_iters=5)
    events: list[Event] = []
    began = time.monotonic()
    outcome = run(endless, registry, observer=events.append, max_seconds=3.0)
    assert time.monotonic() - began < 30
    assert (outcome.reference, outcome.reason) == ("tide:v1", "trained")
    manifest = registry.resolve("tide").manifest
    assert manifest is not None
    steps = [e for e in events if isinstance(e, Stepped)]
    assert manifest["ended"] == "time limit"
    assert manifest["steps"] == steps[-1].step > 20
    assert manifest["best_val_loss"] < 3.0
    peak = max(e.learning_rate for e in steps)
    assert peak > 0.5 * endless.train.learning_rate
    assert steps[-1].learning_rate < 0.1 * peak
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.reason == "time limit reached"
    assert finished.path.endswith("v1") and finished.next == "quill sample tide"
    assert run(endless, registry).reason == "already trained"


def test_an_unreached_time_limit_changes_no_bit(config: RunConfig, tmp_path: Path) -> None:
    free, limited = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    a, b = run(config, free).version, run(config, limited, max_seconds=600.0).version
    assert a is not None and b is not None
    assert digests(a.path)["model.safetensors"] == digests(b.path)["model.safetensors"]


def test_an_unfinished_run_can_be_lengthened(text: Path, tmp_path: Path) -> None:
    whole, grown = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    long = make(text, train__max_iters=24, train__schedule="constant")
    run(long, whole)
    with pytest.raises(InterruptedRun):
        run(make(text, train__schedule="constant"), grown, stop_after=6)
    with pytest.raises(RefusedError, match="unfinished"):
        run(make(text, train__schedule="constant", train__max_iters=8), grown)
    version = run(long, grown).version
    assert version is not None and version.manifest is not None
    assert version.manifest["steps"] == 24
    assert load_checkpoint(version).config.train.max_iters == 24
    # With a constant rate nothing is restated, and the run is the same bit for bit.
    a, b = (digests(r.resolve("tide").path) for r in (whole, grown))
    assert a["model.safetensors"] == b["model.safetensors"]


def test_settings_outside_the_arithmetic_may_change_on_resume(text: Path, registry: Registry) -> None:
    with pytest.raises(InterruptedRun):
        run(make(text), registry, stop_after=5)
    changed = {"eval_interval": 3, "patience": 50, "log_interval": 2, "keep_states": 3, "sample_every": 4}
    events: list[Event] = []
    other = make(text, **{f"train__{k}": v for k, v in changed.items()})
    version = run(other, registry, observer=events.append).version
    assert version is not None
    assert [e.step for e in events if isinstance(e, Evaluated)] == [6, 9, 12]
    train = load_checkpoint(version).config.train
    assert {k: getattr(train, k) for k in changed} == changed


def test_samples_change_no_bit_of_a_run(text: Path, tmp_path: Path) -> None:
    runs = {}
    for every in (None, 3):
        registry, events = Registry(tmp_path / str(every) / "weights"), list[Event]()
        torch.manual_seed(5)
        version = run(make(text, train__sample_every=every), registry, observer=events.append).version
        assert version is not None
        lines = [untimed(line) for line in stream(version.metrics())]
        others = [line for line in lines if "sample" not in line]
        weights = digests(version.path)["model.safetensors"]
        runs[every] = weights, others, torch.rand(1).item()
        samples = [e for e in events if isinstance(e, Sampled)]
        assert [e.step for e in samples] == ([] if every is None else [3, 6, 9, 12])
        assert [{"step": e.step, "sample": e.text} for e in samples] == [x for x in lines if "sample" in x]
    assert runs[None] == runs[3], "weights, metrics and the caller's random numbers"
    checkpoint = load_checkpoint(version)
    assert version.facts["best_step"] == 12
    expected = Generator(checkpoint.model, checkpoint.tokenizer).generate(seed=1, max_new_tokens=150)
    assert [samples[-1].text] == expected
    log = (version.path / "run.log").read_text(encoding="utf-8").split("\n")
    at = log.index("step 12: sample")
    quoted = "\n".join(line.removeprefix("    ") for line in log[at + 1 :])
    assert quoted.startswith(samples[-1].text.strip("\n"))


@pytest.mark.parametrize("stop_after", [6, 7])
def test_a_resumed_run_has_each_sample_once(text: Path, tmp_path: Path, stop_after: int) -> None:
    whole, broken = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    config = make(text, train__sample_every=3)
    run(config, whole)
    with pytest.raises(InterruptedRun):
        run(config, broken, stop_after=stop_after)
    run(config, broken)
    lines = [stream(r.resolve("tide").metrics()) for r in (whole, broken)]
    assert [untimed(x) for x in lines[0]] == [untimed(x) for x in lines[1]]


def test_the_time_of_samples_is_not_that_of_steps(
    text: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Generator.generate

    def slow(*arguments: Any, **settings: Any) -> Any:
        time.sleep(1.0)
        return generate(*arguments, **settings)

    monkeypatch.setattr(Generator, "generate", slow)
    events: list[Event] = []
    run(make(text, train__sample_every=6), registry, observer=events.append)
    after = next(e for e in events if isinstance(e, Stepped) and e.step == 7)
    assert after.tokens_per_second > 4 * 16 / 1.0
    assert all(e.seconds >= 1.0 for e in events if isinstance(e, Sampled))


def test_a_model_that_cannot_be_sampled_is_trained_on(
    text: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*_: object) -> None:
        raise DivergedError("the model's logits contain NaN or infinity")

    monkeypatch.setattr(Generator, "generate", diverged)
    events: list[Event] = []
    assert run(make(text, train__sample_every=1), registry, observer=events.append).reason == "trained"
    assert not any(isinstance(e, Sampled) for e in events)


@pytest.mark.parametrize("stop_after", [None, 13, 17])
def test_a_finished_run_can_be_lengthened(text: Path, registry: Registry, stop_after: int | None) -> None:
    first = run(make(text), registry).version
    assert first is not None and first.manifest is not None
    long = make(text, train__max_iters=24)
    events: list[Event] = []
    if stop_after is not None:
        with pytest.raises(InterruptedRun):
            run(long, registry, stop_after=stop_after, observer=events.append)
    version = run(long, registry, observer=events.append).version
    assert version is not None and version.manifest is not None
    assert version.reference == "tide:v2"
    assert version.manifest["steps"] == 24
    assert version.manifest["extends"] == {"reference": "tide:v1", "digest": first.digest}
    assert version.manifest["best_val_loss"] <= first.manifest["best_val_loss"]
    assert [e.step for e in events if isinstance(e, Stepped)] == list(range(13, 25))
    assert [e.step for e in events if isinstance(e, Evaluated)] == [12, 16, 20, 24]
    steps = [line["step"] for line in stream(version.metrics()) if "loss" in line]
    assert steps == list(range(1, 25)), "the course of the run is whole"
    assert run(long, registry).reason == "already trained"
    assert run(make(text, train__max_iters=24), registry).reference == "tide:v2"


def test_more_patience_continues_a_run_that_it_ended(text: Path, registry: Registry) -> None:
    wild = {
        "train__learning_rate": 3.0, "train__min_lr": 3.0, "train__optimizer": "adamw",
        "train__eval_interval": 1, "train__max_iters": 20,
    }  # fmt: skip
    version = run(make(text, train__patience=2, **wild), registry).version
    assert version is not None and version.manifest is not None
    assert version.manifest["ended"] == "patience"
    again = run(make(text, train__patience=100, **wild), registry).version
    assert again is not None and again.manifest is not None
    assert (again.reference, again.manifest["steps"]) == ("tide:v2", 20)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"train__batch_size": 10**9}, "a step of 1,000,000,000 sequences"),
        ({"train__gradient_accumulation_steps": 2**31 - 1}, "a step of 2,147,483,647 times 4 sequences"),
        ({"model__n_layer": 100_000, "model__n_embd": 2, "model__n_head": 1}, "too deep"),
        ({"train__eval_iters": 2**31 - 1}, "too many"),
        ({"train__batch_size": 2**31 - 1, "train__eval_iters": 2**31 - 1}, "a step of 2,147,483,647"),
        ({"train__batch_size": 2**31 - 1, "model__n_layer": 100_000}, "layers|too deep|a step of"),
    ],
)
def test_f11_f60_what_cannot_run_is_refused_at_once(
    settings: dict[str, int], what: str, text: Path, registry: Registry
) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=what):
        run(make(text, **settings), registry)
    assert time.monotonic() - began < 10
    assert not registry.entries() and not registry.drafts()
    if list(settings) != ["train__eval_iters"]:
        assert not (registry.root.parent / "data").exists(), "refused before the data is prepared"


def test_f11_a_batch_is_cut_or_refused_before_the_first_step(
    text: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = make(text, train__batch_size=64, model__n_layer=3)
    needed = memory.need(settle(wide, registry.root.parent / "data", None).config, CPU)
    monkeypatch.setattr(memory, "of_device", lambda device: needed.of(4))
    whole = make(text, train__batch_size=64, model__n_layer=3, train__micro_batch_size=64)
    with pytest.raises(InputError, match="64 sequences of 16 tokens do not fit") as caught:
        run(whole, registry)
    assert "training needs about" in caught.value.why
    assert caught.value.hint == "leave train.micro_batch_size unset"
    events: list[Event] = []
    with pytest.raises(InterruptedRun):
        run(wide, registry, stop_after=3, observer=events.append)
    [note] = [e.message for e in events if isinstance(e, Notice)]
    assert re.fullmatch(r"computing each batch of 64 sequences in parts of at most [234] sequences", note)
    monkeypatch.undo()
    version = run(wide, registry, observer=events.append).version
    assert version is not None and str(version.facts["micro_batch_size"]) in note, "a resumed run keeps it"
    assert version.facts["gradient_checkpointing"] is False


def test_activations_are_recomputed_where_one_sequence_does_not_fit(
    text: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = make(text, model__n_layer=6)
    settled = settle(deep, registry.root.parent / "data", None).config
    stored, recomputed = (memory.need(settled, replace(CPU, checkpointing=on)).of(1) for on in (False, True))
    monkeypatch.setattr(memory, "of_device", lambda device: (stored + recomputed) // 2)
    version = run(deep, registry).version
    assert version is not None
    assert version.facts["gradient_checkpointing"] is True
    off = make(text, name="off", model__n_layer=6, train__gradient_checkpointing="off")
    with pytest.raises(InputError, match="one sequence of 16 tokens does not fit") as caught:
        run(off, registry)
    assert caught.value.hint == "lower model.block_size"


def test_f40_a_step_that_runs_out_of_memory_is_announced_and_kept(
    text: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = Trainer._accumulate

    def short(trainer: Trainer, *args: Any) -> Any:
        if trainer.step >= 2 and (trainer.device.micro_batch_size or 4) > 1:
            raise MemoryError
        return accumulate(trainer, *args)

    monkeypatch.setattr(Trainer, "_accumulate", short)
    events: list[Event] = []
    with pytest.raises(InterruptedRun):
        run(make(text), registry, stop_after=3, observer=events.append)
    monkeypatch.undo()
    said = [e.message for e in events if isinstance(e, Notice)]
    assert said[0] == "step 3 ran out of memory and was repeated"
    assert said[1] == "computing each batch of 4 sequences in parts of at most 1 sequence"
    version = run(make(text), registry).version
    assert version is not None and version.facts["micro_batch_size"] == 1


def test_the_limits_of_the_process_are_the_memory_of_the_cpu() -> None:
    free = memory.of_device("cpu")
    limited = subprocess.run(
        [
            sys.executable,
            "-c",
            "import resource, torch; from quill.training import memory;"
            "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)); print(memory.of_device('cpu'))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1 << 30 < int(limited.stdout) < min(free + 1, 8 << 30)
