"""A resume state whose files are whole and whose content is not that of its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quill.checkpoint.resume_state import load_state, save_state
from quill.config import reading
from quill.config.settings import RunConfig
from quill.errors import CorruptError, InterruptedRun
from quill.registry.draft import Draft
from quill.registry.store import Registry
from quill.training.events import Event, Stepped
from quill.training.run import train
from quill.training.state import parse

Info = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def run(config: RunConfig, registry: Registry, stop_after: int = 99) -> list[int]:
    """Train until a signal arrives; the steps done."""
    steps: list[int] = []

    def poll() -> None:
        if len(steps) >= stop_after:
            raise InterruptedRun("interrupted", signum=15)

    def observe(event: Event) -> None:
        if isinstance(event, Stepped):
            steps.append(event.step)

    try:
        train(config, registry, registry.root.parent / "data", observer=observe, poll=poll)
    except InterruptedRun:
        assert len(steps) == stop_after
    return steps


@pytest.fixture
def config(tmp_path: Path, tiny_text: str) -> RunConfig:
    (tmp_path / "tide.txt").write_text(tiny_text, encoding="utf-8")
    model = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8}
    settings = {"max_iters": 9, "batch_size": 2, "device": "cpu", "dtype": "float32", "compile": "off"}
    data = {"source": str(tmp_path / "tide.txt")}
    named = {"model": model, "train": settings | {"optimizer": "muon", "ema_decay": 0.9}, "data": data}
    return reading.check(RunConfig, {"name": "tide", **named}, origin="the test")


@pytest.fixture
def draft(config: RunConfig, registry: Registry) -> Draft:
    """A run that was interrupted at step 3."""
    assert run(config, registry, stop_after=3) == [1, 2, 3]
    draft = registry.unfinished("tide")
    assert draft is not None
    return draft


def without(*path: str) -> Callable[[Info], object]:
    """Remove a value of state.json."""

    def change(info: Info) -> None:
        for key in path[:-1]:
            info = info[key]
        del info[path[-1]]

    return change


WRONG_FACTS: dict[str, Callable[[Info], object]] = {
    "empty": dict.clear,
    "no trainer": without("trainer"),
    "no step": without("trainer", "step"),
    "no seconds": without("seconds"),
    "no best step": without("best_step"),
    "no device": without("machine", "device"),
    "a list": lambda info: info.update(trainer=[]),
    "a text": lambda info: info["trainer"].update(step="3"),
    "negative": lambda info: info["trainer"].update(step=-1),
    "huge": lambda info: info["trainer"].update(step=10**30),
    "no such dtype": lambda info: info["machine"].update(dtype="int8"),
    "true": lambda info: info.update(bad_evaluations=True),
}
WRONG_TENSORS: dict[str, Callable[[Tensors], object]] = {
    "empty": dict.clear,
    "no weight": lambda t: t.pop("model/wte.weight"),
    "no average": lambda t: t.pop("average/wte.weight"),
    "no momentum": lambda t: t.pop("optimizer/wte.weight/exp_avg"),
    "no counter": lambda t: t.pop("optimizer/wte.weight/step"),
    "another's momentum": lambda t: t.update({"optimizer/wte.weight/momentum_buffer": torch.zeros(3)}),
    "no such parameter": lambda t: t.update({"optimizer/x/step": torch.zeros(())}),
    "no such kind": lambda t: t.update({"x": torch.zeros(())}),
    "a shape": lambda t: t.update({"model/wte.weight": torch.zeros(2)}),
    "a shape of a momentum": lambda t: t.update({"optimizer/wte.weight/exp_avg": torch.zeros(2)}),
    "integers": lambda t: t.update({n: p.long() for n, p in t.items() if n.endswith("/exp_avg")}),
}


@pytest.mark.parametrize("wrong", WRONG_FACTS)
def test_f71_a_state_that_says_the_impossible_is_skipped_for_the_one_before(
    draft: Draft, config: RunConfig, registry: Registry, wrong: str
) -> None:
    saved = load_state(draft)
    assert saved is not None
    WRONG_FACTS[wrong](info := {**saved.info, "trainer": {**saved.info["trainer"]}})
    save_state(draft, 4, saved.tensors, info)
    assert run(config, registry, stop_after=1) == [4]


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_f71_a_state_of_another_model_or_optimizer_is_refused(
    draft: Draft, config: RunConfig, registry: Registry, wrong: str
) -> None:
    saved = load_state(draft)
    assert saved is not None
    WRONG_TENSORS[wrong](saved.tensors)
    save_state(draft, 4, saved.tensors, saved.info)
    with pytest.raises(CorruptError, match="tensors are not those of the run") as caught:
        run(config, registry)
    assert caught.value.hint == 'pass resume="never" to start over'
    assert len(str(caught.value)) < 500


def test_what_a_run_saves_is_all_that_it_reads(draft: Draft) -> None:
    saved = load_state(draft)
    assert saved is not None
    assert parse(saved.info) == saved.info


def test_a_state_of_an_earlier_quill_is_completed(
    draft: Draft, config: RunConfig, registry: Registry
) -> None:
    saved = load_state(draft)
    assert saved is not None
    trained = {k: saved.info["trainer"][k] for k in ("step", "scale", "good_steps")}
    known = ("best_val_loss", "best_step", "bad_evaluations", "seconds")
    save_state(draft, 4, saved.tensors, {"trainer": trained} | {k: saved.info[k] for k in known})
    assert run(config, registry, stop_after=1) == [4]
