"""Registries and files of a size that few have: reading them takes time in proportion, and little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from quill.checkpoint.verify import find_targets
from quill.cli.app import main
from quill.evaluation import curves
from quill.registry import folder, gc, remove
from quill.training.log import RunLog


@contextmanager
def at_most(megabytes: float) -> Iterator[None]:
    """Fail if Python allocates more memory than this at a time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
    assert peak < megabytes


@pytest.fixture
def long_run(registry, fill, monkeypatch) -> Path:
    """An unfinished run whose metrics are 12 MB; its best validation loss is 1.25, at step 61,000."""
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
    draft = registry.begin("a")
    draft.write_json("config.json", {"schema_version": 1, "name": "a"})
    draft.update_status(pid=1, step=100_000)
    with (draft.path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(
                f'{{"step": {step}, "loss": {3 - step / 1e5}, "learning_rate": 0.001, "grad_norm": 0.12'
            )
            file.write(', "tokens_per_second": 12345.5}\n')
            if step % 1000 == 0:
                loss = 1.25 if step == 61_000 else 2.0
                file.write(f'{{"step": {step}, "val_loss": {loss}}}\n')
    return draft.path


def test_f67_curves_of_any_length_take_little_memory(long_run: Path, registry, monkeypatch) -> None:
    draft = registry.unfinished("a")
    whole = curves.read(draft.metrics())
    assert (len(whole.train), len(whole.val)) == (100_000, 100)
    monkeypatch.setattr(curves, "_MOST_POINTS", 1000)
    with at_most(4):
        thin = curves.read(draft.metrics())
    assert 500 <= len(thin.train) <= 1000
    assert set(thin.train) < set(whole.train)
    assert thin.val == whole.val
    assert thin.best == curves.Point(61_000, 1.25)
    steps = [p.step for p in thin.train]
    assert steps[0] == 1 and steps[-1] > 99_000
    assert max(b - a for a, b in pairwise(steps)) < 300


def test_f67_a_long_run_is_shown_listed_and_resumed_in_little_memory(
    long_run: Path, registry, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(curves, "_MOST_POINTS", 1000)
    assert main(["list"]) == 0
    with at_most(8):
        assert main(["show", "a"]) == 0
        assert main(["list"]) == 0
        assert main(["gc", "--dry-run"]) == 0
        RunLog(registry.unfinished("a"), 1, 50_000).close()
    assert "val loss 1.2500 at step 61,000" in capsys.readouterr().out
    lines = list(curves.stream(registry.unfinished("a").metrics()))
    assert len(lines) == 50_050
    assert lines[-1] == {"step": 50_000, "val_loss": 2.0}


def test_f67_published_metrics_of_any_length_are_shown_in_little_memory(
    long_run: Path, registry, finish, monkeypatch, capsys
) -> None:
    finish(registry.unfinished("a"))
    assert main(["list"]) == 0
    capsys.readouterr()
    stored = (long_run / "metrics.jsonl").read_text()
    assert main(["show", "a", "--metrics", "-q"]) == 0
    assert capsys.readouterr().out == stored
    monkeypatch.setattr(curves, "_MOST_POINTS", 1000)
    monkeypatch.setattr(curves, "_MOST_LINE_BYTES", 100_000)
    with at_most(8):
        assert main(["show", "a", "--metrics"]) == 0
        assert main(["show", "a", "--metrics", "--json"]) == 0
        assert main(["compare", "a", "a"]) == 0
    out, err = capsys.readouterr()
    assert "one line in 128 is shown" in err
    document, _ = json.JSONDecoder().raw_decode(out[out.index("{\n") :])
    assert document["best"] == {"step": 61_000, "val_loss": 1.25}
    assert len(document["val"]) == 100
    steps = [line["step"] for line in document["train"]]
    assert steps == list(range(1, 100_001, 128))


def test_f67_a_line_without_an_end_is_read_in_pieces(registry) -> None:
    draft = registry.begin("a")
    with (draft.path / "metrics.jsonl").open("wb") as file:
        file.truncate(200 << 20)
        file.seek(0, 2)
        file.write(b'\n{"step": 7, "val_loss": 1.5}\n')
    with at_most(100):
        assert curves.read(draft.metrics()).best == curves.Point(7, 1.5)


def test_f67_a_manifest_of_100_megabytes_is_refused_unread(registry, publish, monkeypatch, capsys) -> None:
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
    publish("a")
    with (registry.root / "a" / "v1" / "manifest.json").open("ab") as file:
        file.truncate(100 << 20)
    assert main(["list"]) == 0
    with at_most(8):
        assert main(["list"]) == 0
        assert main(["show", "a"]) == 5
        assert main(["gc", "--dry-run"]) == 0
        assert main(["verify"]) == 5
    out, err = capsys.readouterr()
    assert "damaged" in out + err


@pytest.mark.parametrize(
    "act",
    [
        lambda r: gc.plan(r, older_than=0).execute(),
        lambda r: gc.plan(r, keep=1).execute(),
        lambda r: find_targets(r),
        lambda r: remove.plan(r, ["m00", "m01"]),
    ],
    ids=["gc", "gc --keep", "verify", "rm"],
)
def test_f67_the_registry_is_not_searched_once_for_every_model(
    registry, publish, monkeypatch, act: Callable[[object], object]
) -> None:
    for i in range(30):
        publish(f"m{i:02}")
    (registry.root / "m07" / ".tmp-1-0123456789ab").mkdir()
    scan, scanned = folder.scan, []

    def counted(path: Path) -> list:
        scanned.append(Path(path))
        return scan(path)

    monkeypatch.setattr(folder, "scan", counted)
    monkeypatch.setattr("quill.registry.store.folder.scan", counted)
    act(registry)
    assert scanned.count(registry.root) <= 4


def test_f67_metrics_are_cut_off_at_the_step_that_a_run_resumes_from(registry) -> None:
    draft = registry.begin("a")
    lines = [{"step": s, "loss": s / 10} for s in (1, 2, 3)]
    (draft.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"st')
    RunLog(draft, 1, 2).close()
    assert list(curves.stream(draft.metrics())) == lines[:2]
