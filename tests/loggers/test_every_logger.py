"""Each logger's own program reads back what a run has logged, also across a resume; all of it offline."""

from __future__ import annotations

import html
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from quill import discovery
from quill.config import reading
from quill.errors import InputError, ResourceError
from quill.loggers import base
from quill.registry.store import Registry
from quill.training.events import Event, Notice
from quill.training.run import train

Quill = Callable[..., "subprocess.CompletedProcess[bytes]"]
NAMES = discovery.names("loggers")
# The numbers and the samples that were logged, each by name and step.
Logged = tuple[dict[str, dict[int, float]], dict[int, str]]


def _environment(folder: Path) -> dict[str, str]:
    """What keeps every program offline and in a folder."""
    return {
        "TENSORBOARD_LOGGING_DIR": str(folder / "tb"),
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }


def tensorboard(folder: Path) -> Logged:
    accumulators: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    # Every point, also of files that a later one of the same run follows.
    found = accumulators.EventAccumulator(str(folder / "tb" / "tide-v1"), {"scalars": 0, "tensors": 0})
    found.Reload()
    scalars = {n: {s.step: s.value for s in found.Scalars(n)} for n in found.Tags()["scalars"]}
    texts = found.Tensors("sample/text_summary")
    return scalars, {t.step: t.tensor_proto.string_val[0].decode() for t in texts}


def _records(log: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format behind seven bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        parts += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb(folder: Path) -> Logged:
    records: Any = import_module("wandb.proto.wandb_internal_pb2")
    numbers: dict[str, dict[int, float]] = {}
    texts: dict[int, str] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in _records(path.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            items = record.history.item
            pairs = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            step = record.history.step.num
            for name, value in pairs.items():
                if name == "sample.path":
                    texts[step] = (path.parent / "files" / value).read_text(encoding="utf-8")
                elif "/" in name:
                    numbers.setdefault(name, {})[step] = value
    return numbers, texts


def trackio(folder: Path) -> Logged:
    # In a process of its own: the package finds its folder when it is imported.
    code = (
        "import json, trackio.sqlite_storage as s;"
        f"print(json.dumps(s.SQLiteStorage.get_logs({base.PROJECT!r}, 'tide:v1')))"
    )
    environment = {**os.environ, **_environment(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    numbers: dict[str, dict[int, float]] = {}
    texts: dict[int, str] = {}
    for line in json.loads(done.stdout):
        for name, value in line.items():
            if name == "sample":
                texts[line["step"]] = str(value)
            elif "/" in name:
                numbers.setdefault(name, {})[line["step"]] = value
    return numbers, texts


def mlflow(folder: Path) -> Logged:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = import_module("mlflow").MlflowClient(_environment(folder)["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name(base.PROJECT).experiment_id
    [found] = client.search_runs([experiment])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.batch_size"] == "4"
    history = {n: client.get_metric_history(found.info.run_id, n) for n in found.data.metrics}
    numbers = {n: {m.step: m.value for m in metrics} for n, metrics in history.items()}
    samples = Path(found.info.artifact_uri.removeprefix("file://")) / "sample"
    return numbers, {int(p.stem.rpartition("-")[2]): p.read_text("utf-8") for p in samples.iterdir()}


READERS: Mapping[str, Callable[[Path], Logged]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
    "mlflow": mlflow,
}

TINY = [
    "--n-layer=1", "--n-head=1", "--n-embd=16", "--block-size=16", "--batch-size=4", "--max-iters=8",
    "--eval-interval=4", "--log-interval=2", "--sample-every=4", "--warmup-iters=0", "--device=cpu",
    "--dtype=float32",
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    path = tmp_path / "tide.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_read_back_whole(name: str, text: Path, tmp_path: Path, quill: Quill) -> None:
    try:
        base.find(name)
    except InputError as e:
        pytest.skip(e.what)
    command = ["train", text.name, *TINY, "--log-to", name]
    paused = quill(*command, "--no-publish", "--max-minutes", "0.00001", env=_environment(tmp_path))
    assert (paused.returncode, paused.stdout) == (0, b""), paused.stderr.decode()
    done = quill(*command, env=_environment(tmp_path))
    assert (done.returncode, done.stdout) == (0, b"tide:v1\n"), done.stderr.decode()
    assert b"resuming at step 1 " in done.stderr
    assert f"logging to {name}: " in done.stderr.decode()
    assert "warning" not in done.stderr.decode().lower()

    numbers, samples = READERS[name](tmp_path)
    raw = (tmp_path / "weights" / "tide" / "v1" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in raw.splitlines()]
    for own, logged in (("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("val_loss", "val/loss")):
        expected = {line["step"]: line[own] for line in lines if own in line}
        assert numbers[logged] == pytest.approx(expected, rel=1e-4), logged
    assert "train/objective" not in numbers
    texts = {line["step"]: line["sample"] for line in lines if "sample" in line}
    assert set(samples) == set(texts) == {4, 8}
    for step, sample in texts.items():
        shown = html.unescape(samples[step]).encode("utf-8").decode("unicode_escape", "ignore")
        assert max(sample.split(), key=len) in shown


def small(text: Path) -> Any:
    settings = {
        "data.source": str(text), "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16,
        "model.block_size": 16, "train.batch_size": 4, "train.max_iters": 6, "train.eval_interval": 3,
        "train.log_interval": 1, "train.warmup_iters": 0, "train.device": "cpu", "train.dtype": "float32",
        "train.compile": "off",
    }  # fmt: skip
    return reading.parse({"name": "tide"}, settings)


class Recorder(base.Logger):
    """Keeps what it is given, and fails when it has been given enough."""

    package = "json"
    enough = 1000
    opened: list[Recorder] = []  # noqa: RUF012

    def __init__(self, run: base.LoggedRun) -> None:
        self.run, self.seen, self.closed = run, [], False
        self.opened.append(self)

    @property
    def where(self) -> str:
        return "memory"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        if len(self.seen) == self.enough:
            raise ConnectionError("the network is gone")
        self.seen.append(step)

    def text(self, step: int, name: str, text: str) -> None:
        self.seen.append(step)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    class Mine(Recorder):
        opened: list[Recorder] = []  # noqa: RUF012

    monkeypatch.setattr(base, "find", lambda name: Mine)
    return Mine


def test_a_logger_that_fails_is_a_warning_and_the_run_is_the_same(
    recorder: type[Recorder], text: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    recorder.enough = 3
    plain, logged = Registry(tmp_path / "a" / "weights"), Registry(tmp_path / "b" / "weights")
    data = tmp_path / "data"
    train(small(text), plain, data)
    train(small(text), logged, data, log_to=["memory"], observer=events.append)
    warnings = [e.message for e in events if isinstance(e, Notice) and "warning" in e.message]
    assert warnings == ["warning: logging to memory has ended: ConnectionError: the network is gone"]
    assert (recorder.opened[0].seen, recorder.opened[0].closed) == ([1, 2, 3], True)
    assert plain.resolve("tide").digest == logged.resolve("tide").digest


def test_a_resumed_run_has_its_id_and_another_run_another(
    recorder: type[Recorder], text: Path, tmp_path: Path
) -> None:
    registry, data = Registry(tmp_path / "weights"), tmp_path / "data"
    for options in ({"max_seconds": 1e-6, "publish": False}, {}, {"new_version": True}):
        config = small(text)
        if "new_version" in options:
            config = config.model_copy(update={"train": config.train.model_copy(update={"seed": 2})})
        train(config, registry, data, log_to=["memory"], **options)  # type: ignore[arg-type]
    first, second, other = (each.run for each in recorder.opened)
    assert first.id == second.id != other.id
    assert [(r.step, r.resumed) for r in (first, second, other)] == [(0, False), (1, True), (0, False)]
    assert second.reference == "tide:v1"
    assert second.config["train"]["batch_size"] == 4


def test_a_logger_that_cannot_be_opened_ends_the_call_before_its_first_step(
    recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    def fail(self: Recorder, run: base.LoggedRun) -> None:
        raise PermissionError("no API key")

    monkeypatch.setattr(recorder, "__init__", fail)
    events: list[Event] = []
    with pytest.raises(ResourceError) as caught:
        train(
            small(text), Registry(tmp_path / "weights"), tmp_path, log_to=["memory"], observer=events.append
        )
    assert str(caught.value) == "cannot log to memory: PermissionError: no API key"
    assert not [e for e in events if type(e).__name__ == "Stepped"]


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, text: Path, quill: Quill) -> None:
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    for name in NAMES:
        with pytest.raises(InputError) as caught:
            base.find(name)
        assert caught.value.hint == f"pip install 'quill-gpt[{name}]'"
    done = quill("train", str(text), "--log-to", "logbook")
    assert done.returncode == 2
    assert f"choose from {', '.join(NAMES)}" in done.stderr.decode()
