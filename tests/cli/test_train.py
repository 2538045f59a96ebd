"""`quill train`: what is printed, what a signal does, what repeating it does."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import quill
from quill.cli import _training_display as display
from quill.cli._signals import Interrupted, Signals
from quill.cli.app import main
from quill.cli.output import Output
from quill.errors import InterruptedRun
from quill.evaluation.curves import Curves, Point
from quill.training import events

PACKAGE = Path(quill.__file__).parent
RUN = [sys.executable, "-c", "from quill.cli.app import run; run()"]
SHAPE = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=16", "--batch-size=4", "--warmup-iters=0"]
MACHINE = ["--device=cpu", "--dtype=float32", "--compile=off"]

STARTED = events.Started("m:v1", 8_100_000, 4096, "cpu", "float32", False, 0, 100, "harpoon", 150_000, 15_000)


def stepped(step: int, seconds: float = 1.0, loss: float = 2.5) -> events.Stepped:
    return events.Stepped(step, 100, loss, 3e-3, 0.7, 54_321.0, seconds)


@pytest.fixture
def place(tiny_registry, tmp_path, monkeypatch) -> Path:
    """A folder with the dataset `tiny` and an empty registry, where commands run."""
    shutil.copytree(tiny_registry.root.parent / "data", tmp_path / "data")
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*arguments: str, iters: int = 4) -> int:
    return main(
        ["train", "--data=tiny", f"--max-iters={iters}", "--eval-interval=2", *SHAPE, *MACHINE, *arguments]
    )


def test_the_reference_alone_on_stdout_and_the_run_on_stderr(place, capsys):
    assert train("--name=a") == 0
    out, err = capsys.readouterr()
    assert out == "a:v1\n"
    lines = err.splitlines()
    assert lines[0].startswith("a:v1")
    assert [line.split(": ")[0] for line in lines if "val loss" in line] == ["step 2", "step 4", "a:v1"]
    assert main(["show", "a", "-q"]) == 0


def test_repeating_is_safe(place, capsys):
    assert train("--name=a") == 0
    capsys.readouterr()
    assert train("--name=a") == 0
    out, err = capsys.readouterr()
    assert out == "a:v1\n"
    assert "already trained" in err
    assert train("--name=a", iters=3) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "--max-iters 4 -> 3" in err
    assert "--new-version" in err
    assert train("--name=a", "--new-version", "-q", iters=3) == 0
    assert capsys.readouterr() == ("a:v2\n", "")


def test_json_is_one_event_a_line(place, capsys):
    assert train("--name=a", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {e["schema"] for e in found} == {display.SCHEMA}
    kinds = [e["event"] for e in found]
    assert kinds[:2] == ["stage", "started"]
    assert kinds[-2:] == ["finished", "result"]
    assert [e["step"] for e in found if e["event"] == "stepped"] == [1, 2, 3, 4]
    assert found[-1]["reference"] == "a:v1"
    assert found[-1]["reason"] == "trained"
    assert found[-1]["manifest"]["steps"] == 4


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="there is no /dev/fd here")
def test_a_config_without_a_name_from_a_pipe_is_named_after_the_data(place, capsys):
    read, write = os.pipe()
    os.write(write, b'{"train": {"min_lr": 0.0001}}')
    os.close(write)
    try:
        assert train(f"--config=/dev/fd/{read}", "-q") == 0
    finally:
        os.close(read)
    assert capsys.readouterr().out == "tiny:v1\n"


def test_a_config_file_and_flags_that_win(place, capsys):
    settings = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16}
    fit = {"batch_size": 4, "max_iters": 99, "warmup_iters": 0, "device": "cpu", "dtype": "float32"}
    (place / "mine.json").write_text(
        json.dumps({"data": {"source": "tiny"}, "model": settings, "train": fit})
    )
    assert main(["train", "--config", "mine.json", "--max_iters=2"]) == 0
    assert capsys.readouterr().out == "mine:v1\n"
    assert main(["config", "show", "mine"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["train"]["max_iters"] == 2
    assert stored["train"]["batch_size"] == 4


def test_samples_during_training_go_to_stderr_to_the_log_and_to_json(place, capsys):
    assert train("--name=a", "--sample-every=2") == 0
    out, err = capsys.readouterr()
    assert out == "a:v1\n"
    assert [line for line in err.splitlines() if "sample" in line][:2] == ["step 2: sample", "step 4: sample"]
    assert main(["logs", "a"]) == 0
    assert "step 4: sample\n    " in capsys.readouterr().out
    assert train("--name=b", "--sample-every=4", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    [sample] = [e for e in found if e["event"] == "sampled"]
    assert (sample["step"], len(sample["text"])) == (4, 150)


def test_a_dry_run_prints_size_and_time_and_creates_no_model(place, capsys):
    assert train("--name=a", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["schema"] == "quill.plan/1"
    assert plan["tokens_per_step"] == 64
    assert plan["config"]["train"]["max_iters"] == 4
    assert plan["parameters"] > 0
    assert plan["seconds_total"] > 0
    assert train("--name=a", "--dry-run") == 0
    out = capsys.readouterr().out
    assert '"max_iters": 4' in out
    assert f"{plan['parameters']:,}" in out
    assert not (place / "weights" / "a").exists()


def test_a_time_limit_publishes_what_was_reached(place, capsys):
    assert train("--name=a", "--max-minutes=1e-9", iters=1000) == 0
    out, err = capsys.readouterr()
    assert out == "a:v1\n"
    assert "time limit reached" in err
    assert train("--name=a", iters=1000) == 0
    assert "already trained" in capsys.readouterr().err


def test_a_time_limit_without_publishing_saves_prints_nothing_and_resumes(place, capsys):
    assert train("--name=a", "--max-minutes=1e-9", "--no-publish") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "time is up" in err
    assert train("--name=a", "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (found[0]["event"], found[0]["name"]) == ("stage", "loading torch")
    assert (found[1]["event"], found[1]["step"]) == ("started", 1)
    assert found[-1]["reference"] == "a:v1"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_an_invalid_time_limit_is_refused(minutes, place, capsys):
    assert train("--name=a", f"--max-minutes={minutes}") == 2
    assert "--max-minutes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "A", "", "con", "a/b", "x" * 65])
def test_f13_an_invalid_name_creates_nothing(name, place, capsys):
    assert train(f"--name={name}") == 2
    assert not (place / "weights").exists()
    assert sorted(p.name for p in place.iterdir()) == ["data"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_f34_a_signal_saves_and_sets_the_exit_code(number, code, place):
    arguments = ["train", "--data=tiny", "--name=a", "--max-iters=1000000", "--eval-interval=1000000"]
    process = subprocess.Popen(
        [*RUN, *arguments, *SHAPE, *MACHINE, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "stepped":
            break
    start = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - start < 20
    assert b"Traceback" not in err
    assert json.loads(out.splitlines()[-1])["event"] == "saved"
    assert list((place / "weights" / "a" / "v1" / "state").glob("step-*"))


def test_f34_a_signal_before_the_first_step_ends_it_at_once():
    with Signals() as signals:
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        with pytest.raises(InterruptedRun) as asked:
            signals.poll()
        assert asked.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_f35_the_second_signal_has_its_default_effect():
    with Signals() as signals:
        signals.notice(STARTED)
        signals.poll()
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(InterruptedRun) as asked:
            signals.poll()
        assert asked.value.signum == signal.SIGHUP
        assert {signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)} == {
            signal.SIG_DFL
        }


def test_f36_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.poll()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_plain_lines_are_one_for_each_evaluation_and_one_every_thirty_seconds():
    now, err = [0.0], io.StringIO()
    lines = display.Lines(Output(out=io.StringIO(), err=err, env={}, clock=lambda: now[0]))
    lines(STARTED)
    for step in range(1, 101):
        now[0] = float(step)
        lines(stepped(step, seconds=step))
        if step % 50 == 0:
            lines(events.Evaluated(step, 2.0, True, 2.0, step, 0.1))
            lines(events.Saved(step, "x"))
    shown = err.getvalue().splitlines()
    assert [line.split(":")[0] for line in shown[1:]] == [
        "step 30/100", "step 50", "step 60/100", "step 90/100", "step 100"
    ]  # fmt: skip
    assert "loss 2.5000, rate 3.00e-03, 54.3k tokens/s" in shown[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def live(monkeypatch, columns: int, lines: int, history=lambda reference: Curves((), ())):
    """A live display on a terminal of that size: its clock, its stream, and the display."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    monkeypatch.setenv("TERM", "xterm")
    now, err = [0.0], Terminal()
    env = {"TERM": "xterm", "LANG": "C.UTF-8"}
    output = Output(out=io.StringIO(), err=err, env=env, clock=lambda: now[0])
    return now, err, display.watch(output, history)


def test_the_live_display_shows_chart_loss_rate_speed_and_time(monkeypatch):
    now, err, watched = live(monkeypatch, 100, 30)
    with watched as observer:
        assert isinstance(observer, display.Live)
        observer(STARTED)
        for step in range(1, 51):
            now[0] = float(step)
            observer(stepped(step, seconds=2.0 * step, loss=4 - step / 25))
        observer(events.Evaluated(50, 1.9, True, 1.9, 50, 0.5))
        now[0] = 60.0
        observer(stepped(51, seconds=102.0))
        observer(events.Finished("m:v1", 100, 1.9, 50, 200.0, "trained"))
    shown = err.getvalue()
    for words in (
        "step 51/100",
        "rate 3.00e-03",
        "54.3k tokens/s",
        "51%",
        "1m 42s elapsed",
        "1m 38s left",
        "best val 1.9000 at 50",
        "loss, nats per token",
        "best: 1.9000 at step 50",
    ):
        assert words in shown, words
    screen = [line for line in on_screen(shown) if line]
    assert screen[0].startswith("m:v1: training")
    assert [line.split(":")[0] for line in screen[2:]] == ["step 50", "m"]


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (40, 15), (20, 10), (300, 100)])
def test_the_live_display_fits_its_terminal(columns, lines, monkeypatch):
    now, _, watched = live(monkeypatch, columns, lines)
    with watched as observer:
        observer(STARTED)
        for step in range(1, 40):
            now[0] = float(step)
            observer(stepped(step, seconds=2.0 * step, loss=4 - step / 25))
            if step == 20:
                observer(events.Evaluated(20, 1.9, True, 1.9, 20, 0.5))
        panel = observer._draw(stepped(40, seconds=99.0), 12.0, columns, lines)
        console = Console(width=columns, file=io.StringIO(), force_terminal=False)
        console.print(panel)
        drawn = console.file.getvalue().splitlines()
    assert len(drawn) <= lines
    assert max(map(len, drawn)) <= columns


def test_a_resumed_run_shows_the_losses_before_it(monkeypatch):
    before = Curves(tuple(Point(s, 5.0) for s in range(1, 50)), (Point(40, 4.5),))
    now, err, watched = live(monkeypatch, 100, 30, lambda reference: before)
    with watched as observer:
        observer(replace(STARTED, step=50))
        now[0] = 10.0
        observer(stepped(51, seconds=1.0))
    assert "validation: 4.5000 at step 40" in err.getvalue()


def test_a_sample_stays_above_the_live_display_and_is_folded(monkeypatch):
    now, err, watched = live(monkeypatch, 40, 24)
    text = "\nThe captain said to the mate that the tide was in.\n\nMATE: Aye.\x1b[2J"
    with watched as observer:
        observer(STARTED)
        for step in (1, 2):
            now[0] = float(step)
            observer(stepped(step))
        observer(events.Sampled(2, text, 0.1))
        observer(stepped(3))
    shown = on_screen(err.getvalue())
    at = shown.index("step 2: sample")
    assert shown[at + 1 : at + 5] == [
        "    The captain said to the mate that",
        "    the tide was in.",
        "",
        r"    MATE: Aye.\x1b[2J",
    ]


def test_a_long_series_keeps_its_shape_in_bounded_memory():
    series = display.Series()
    for step in range(1, 100_001):
        series.add(step, 5 - step / 25_000)
    points = series.points()
    assert 500 < len(points) <= 1025
    assert [p.step for p in points] == sorted(p.step for p in points)
    assert points[-1].step == 100_000
    assert all(abs(p.loss - (5 - p.step / 25_000)) < 0.01 for p in points)
    series.add(50_000, 1.0)
    assert series.points()[-1].step == 50_000
    series.add(50_001, float("nan"))
    assert series.points()[-1].step == 50_000


def on_screen(written: str) -> list[str]:
    """What a terminal shows in the end: of its control sequences, those that move a panel."""
    rows, at = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", written):
        if part == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif part == "\x1b[2K":
            rows[at] = ""
        elif part == "\x1b[1A":
            at -= 1
        elif part and part[0] not in "\x1b\r":
            rows[at] += part
    return rows


@pytest.mark.parametrize("flags", [["--wait=-1"], ["--wait=nan"], ["--keep=0"], ["--keep=-3"]])
def test_wait_and_keep_are_validated(flags, place, capsys):
    assert train("--name=a", *flags) == 2
    assert flags[0].partition("=")[0] in capsys.readouterr().err
    assert not (place / "weights" / "a").exists()


def test_keep_leaves_the_newest_versions_and_those_with_an_alias(place, capsys):
    assert train("--name=a") == 0
    assert main(["alias", "set", "a:v1", "first"]) == 0
    for seed in (2, 3, 4):
        assert train("--name=a", f"--seed={seed}", "--new-version", "--keep=2") == 0
    capsys.readouterr()
    assert main(["list", "--all-versions", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["a:v1", "a:v3", "a:v4"]


def test_a_run_without_a_validation_split_shows_no_nan(tmp_path, tiny_text, monkeypatch, capsys):
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.setenv("QUILL_DATA", str(tmp_path / "data"))
    text = tmp_path / "tide.txt"
    text.write_text(tiny_text)
    assert main(["prepare", str(text), "--name=whole", "--val-fraction=0", "-q"]) == 0
    shape = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--batch-size=2", "--max-iters=3"]
    fixed = ["--eval-interval=2", "--device=cpu", "--dtype=float32", "--compile=off"]
    assert main(["train", "--data=whole", "--name=whole", *shape, *fixed]) == 0
    assert main(["show", "whole"]) == main(["show", "whole", "--json"]) == main(["list"]) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "weights" / "whole" / "v1"
    written = (folder / "run.log").read_text() + (folder / "README.md").read_text()
    assert "whole:v1: trained after 3 steps" in err
    assert not re.search(r"\bnan\b", (out + err + written).lower())


def test_a_journey_to_the_optimizer_is_eight_calls(place, monkeypatch):
    """From the console script: run, main, dispatch, the options, the command, train, the run, the trainer."""
    journeys = []
    step = torch.optim.AdamW.step

    def traced(self, closure=None):
        frames = traceback.extract_stack()
        journeys.append([f.name for f in frames if Path(f.filename).is_relative_to(PACKAGE)])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", traced)
    assert train("--name=a", iters=1) == 0
    assert journeys[0][-3:] == ["train", "step", "enqueue"]
    assert len(["run", *journeys[0]]) <= 8, journeys[0]
