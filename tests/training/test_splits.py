"""Held-out training text: not trained on, measured instead of the validation split, and named in reports."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from quill.checkpoint.load import load_checkpoint
from quill.cli.app import main
from quill.config import reading
from quill.config.settings import DataConfig, RunConfig
from quill.data import resolve
from quill.errors import InputError, InterruptedRun, RefusedError
from quill.evaluation import measure
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.training.events import Event, Started, Stepped
from quill.training.run import train
from quill.training.splits import Splits

LETTERS = "aäbcde fg\n"
LENGTH = 2000


def text(folder: Path, name: str, *, other: range = range(0)) -> Path:
    """Random letters; those in a range are others than elsewhere."""
    one, two = random.Random(1), random.Random(2)
    letters = [one.choice(LETTERS) for _ in range(LENGTH)]
    for i in other:
        letters[i] = two.choice(LETTERS)
    path = folder / name
    path.write_text("".join(letters), encoding="utf-8")
    return path


def make(source: Path, name: str = "m", **overrides: Any) -> RunConfig:
    settings = {
        "data.source": str(source), "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16,
        "model.block_size": 16, "train.batch_size": 8, "train.max_iters": 6, "train.eval_interval": 6,
        "train.warmup_iters": 2, "train.device": "cpu", "train.dtype": "float32", "train.compile": "off",
    }  # fmt: skip
    return reading.parse({"name": name}, settings | {k.replace("__", "."): v for k, v in overrides.items()})


def run(config: RunConfig, registry: Registry, **options: Any) -> Version:
    outcome = train(config, registry, registry.root.parent / "data", **options)
    assert outcome.version is not None
    return outcome.version


def test_held_out_text_is_not_trained_on(tmp_path: Path, registry: Registry) -> None:
    """The training split is the first 1,800 characters, and with a holdout of 0.2 the first 1,440."""
    plain, tail = text(tmp_path, "a.txt"), text(tmp_path, "b.txt", other=range(1440, 1800))
    one = run(make(plain, "one", train__holdout=0.2), registry)
    two = run(make(tail, "two", train__holdout=0.2), registry)
    assert one.digest == two.digest
    assert one.facts["best_val_loss"] != two.facts["best_val_loss"]
    before = text(tmp_path, "c.txt", other=range(1400, 1440))
    assert run(make(before, "before", train__holdout=0.2), registry).digest != one.digest
    seen = [run(make(t, n), registry).digest for t, n in ((plain, "three"), (tail, "four"))]
    assert seen[0] != seen[1], "without a holdout it is trained on"


def test_the_validation_split_is_not_used(tmp_path: Path, registry: Registry) -> None:
    one = run(make(text(tmp_path, "a.txt"), "one", train__holdout=0.2), registry)
    other = text(tmp_path, "b.txt", other=range(1800, 2000))
    two = run(make(other, "two", train__holdout=0.2), registry)
    assert one.digest == two.digest
    assert one.facts["best_val_loss"] == two.facts["best_val_loss"]


def test_the_loss_is_that_of_the_held_out_text(tmp_path: Path, registry: Registry) -> None:
    source = text(tmp_path, "a.txt")
    events: list[Event] = []
    version = run(make(source, train__holdout=0.1), registry, observer=events.append)
    held_out = source.read_text(encoding="utf-8")[1620:1800]
    loaded = load_checkpoint(version)
    figures = measure.evaluate(
        loaded.model,
        loaded.tokenizer.encode_array(held_out),
        n_bytes=len(held_out[1:].encode()),
    )
    assert version.facts["held_out"] == 180
    assert version.facts["best_val_loss"] == pytest.approx(figures.loss, abs=1e-6)
    assert version.facts["bits_per_byte"] == pytest.approx(figures.bits_per_byte, abs=1e-6)
    started = next(e for e in events if isinstance(e, Started))
    assert (started.train_tokens, started.val_tokens) == (1620, 180)
    card = (version.path / "README.md").read_text(encoding="utf-8")
    assert "| Held-out loss | " in card and "the last 180 tokens of the training text" in card
    assert "Validation loss" not in card
    assert run(make(source, "plain"), registry).facts["held_out"] is None


def test_a_dataset_without_a_validation_split_can_hold_out_text(tmp_path: Path, registry: Registry) -> None:
    version = run(make(text(tmp_path, "a.txt"), train__holdout=0.1, data__val_fraction=0.0), registry)
    assert version.facts["held_out"] == 200
    assert version.facts["best_val_loss"] is not None


def test_a_run_resumes_with_the_same_holdout_only(tmp_path: Path, registry: Registry) -> None:
    config = make(text(tmp_path, "a.txt"), train__holdout=0.1, train__eval_interval=2)
    whole = run(config.model_copy(update={"name": "whole"}), registry)
    steps = [0]

    def observe(event: Event) -> None:
        steps[0] = event.step if isinstance(event, Stepped) else steps[0]

    def poll() -> None:
        if steps[0] >= 3:
            raise InterruptedRun("interrupted", signum=15)

    with pytest.raises(InterruptedRun):
        run(config, registry, observer=observe, poll=poll)
    with pytest.raises(RefusedError) as caught:
        run(make(text(tmp_path, "a.txt"), train__eval_interval=2), registry)
    assert "train.holdout 0.1 -> 0.0" in caught.value.why
    assert run(config, registry, resume="must").digest == whole.digest


def test_too_little_text_is_refused(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(InputError, match=r"held-out split of .* has 2 tokens"):
        run(make(text(tmp_path, "a.txt"), train__holdout=0.001), registry)
    with pytest.raises(InputError, match=r"train split of .* has 9 tokens"):
        run(make(text(tmp_path, "a.txt"), train__holdout=0.995), registry)
    assert not registry.drafts()


def test_parts_are_read_where_they_are(tmp_path: Path) -> None:
    dataset = resolve.ensure(DataConfig(source=str(text(tmp_path, "a.txt"))), tmp_path / "data")
    splits, whole = Splits(dataset, 0.25), dataset.train[:].tolist()
    assert splits.train[:].tolist() == whole[:1350]
    assert splits.val[:].tolist() == whole[1350:]
    assert splits.val[3:5].tolist() == whole[1353:1355]
    assert splits.val.rows([0, 7], 4).tolist() == [whole[1350:1354], whole[1357:1361]]
    assert splits.train[1349:1400].tolist() == [whole[1349]]
    assert splits.val.part(10, 20)[:].tolist() == whole[1360:1370]


def test_losses_on_other_text_are_not_ranked(
    tmp_path: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    source = text(tmp_path, "a.txt")
    run(make(source, "one", train__holdout=0.1), registry)
    run(make(source, "two", train__holdout=0.1, train__seed=2), registry)
    run(make(source, "val", train__seed=3), registry)
    root = ["--registry", str(registry.root)]
    assert main(["compare", "one", "two", "--json", *root]) == 0
    assert json.loads(capsys.readouterr().out)["best"] in ("one:v1", "two:v1")
    assert main(["compare", "one", "val", "--json", *root]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["best"] is None
    assert [m["held_out"] for m in document["models"]] == [180, None]
    assert main(["compare", "one", "val", *root]) == 0
    shown = capsys.readouterr()
    assert "180 held-out tokens" in shown.out and " *" not in shown.out
    assert "not comparable" in shown.err
    assert main(["list", *root]) == 0
    assert capsys.readouterr().out.count("(held out)") == 2
    assert main(["show", "one", *root]) == 0
    assert "on 180 held-out tokens of the training split" in capsys.readouterr().out
