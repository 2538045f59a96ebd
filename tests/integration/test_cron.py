"""The nightly script of the manual, as cron runs it: no environment, no terminal, no input, from /.

The script is that of the page on nightly training, word for word but for its folder, the size of the
model, and how many versions of it are kept.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trainings import result

from quill.cli.app import main
from quill.registry.store import Registry

pytestmark = pytest.mark.slow

SMALL = (
    "--n-layer=1 --n-head=1 --n-embd=16 --block-size=16 --batch-size=4 --warmup-iters=0 --eval-interval=20"
)
KEEP = 2


@pytest.fixture
def script(root: Path) -> str:
    """The script in the manual that trains every night."""
    found = re.findall(
        r"```sh\n(#!/bin/sh\n.*?)```",
        (root / "quill" / "docs" / "nightly.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert len(found) == 1
    return found[0]


@pytest.fixture
def nightly(script: str, tmp_path: Path):
    """The script in a folder of the test's own, with a model that is trained in a moment."""
    folder = re.search(r"^# (\S+)/nightly", script, re.MULTILINE)
    assert folder
    place = tmp_path / "srv"
    program = place / ".venv" / "bin" / "quill"
    program.parent.mkdir(parents=True)
    # What an install puts there, and the settings of a model that is small.
    program.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = train ]; then set -- "$@" {SMALL} $(cat {shlex.quote(str(place))}/more); fi\n'
        f'exec {shlex.quote(sys.executable)} -m quill "$@"\n'
    )
    assert f"--keep {KEEP}" not in script and "--keep 7" in script
    text = script.replace(folder[1], str(place)).replace("--keep 7", f"--keep {KEEP}")
    (place / "nightly").write_text(text)
    for path in (program, place / "nightly"):
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (place / "more").write_text("--max-iters=40")
    write_notes(place, 1)
    return place


def write_notes(place: Path, night: int) -> None:
    lines = [
        f"Night {n % 7}: the tide was {n * 7 % 12} feet, and it was cold – ü ☃.\n" for n in range(60 * night)
    ]
    (place / "notes.txt").write_text("".join(lines), encoding="utf-8")


def run(place: Path) -> subprocess.Popen[bytes]:
    """As `15 3 * * *` runs it, but with less: no HOME, no SHELL, no input at all, no terminal."""
    command = [
        "env",
        "-i",
        "PATH=/usr/bin:/bin",
        "/bin/sh",
        "-c",
        f"exec {shlex.quote(str(place))}/nightly <&-",
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", start_new_session=True
    )


def mail(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit code, and what cron would send."""
    out, err = process.communicate(timeout=120)
    return process.returncode, (out + err).decode()


def test_f49_the_nightly_script_trains_samples_and_keeps_the_newest(nightly):
    for night in (1, 2, 3):
        write_notes(nightly, night)
        assert mail(run(nightly)) == (0, ""), "what cron would send"
        assert (nightly / "trained.txt").read_text() == f"notes:v{night}\n"
        text = (nightly / "today.txt").read_text(encoding="utf-8")
        assert len(text) > 100
        registry = Registry(nightly / "weights")
        kept = [v.number for v in registry.entries(all_versions=True)]
        assert kept == list(range(max(1, night - KEEP + 1), night + 1))
    before = sorted((p, p.stat().st_mtime_ns) for p in (nightly / "weights" / "notes").rglob("*"))
    assert mail(run(nightly)) == (0, ""), "text that did not change trains nothing"
    assert sorted((p, p.stat().st_mtime_ns) for p in (nightly / "weights" / "notes").rglob("*")) == before
    assert (nightly / "trained.txt").read_text() == "notes:v3\n"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 240
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_f30_f49_last_nights_run_is_still_at_it(nightly):
    (nightly / "more").write_text("--max-iters=100000000 --eval-interval=5")
    first = run(nightly)
    try:
        wait_for(nightly / "weights" / "notes" / "v1" / "state" / "step-*")
        code, sent = mail(run(nightly))
        assert code == 75
        assert re.search(r"another process is working on 'notes'\n.*pid \d+ on \S+ since", sent), sent
        assert "Traceback" not in sent
    finally:
        # As a restart of the machine ends it.
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    (nightly / "more").write_text("--max-iters=100000000 --eval-interval=5 --max-minutes=0.02")
    saved = max(p.name for p in (nightly / "weights" / "notes" / "v1" / "state").glob("step-*"))
    assert mail(run(nightly)) == (0, "")
    # It resumed, and when its time was up it published what it had reached.
    assert (nightly / "trained.txt").read_text() == "notes:v1\n"
    [version] = Registry(nightly / "weights").entries(all_versions=True)
    assert version.facts["ended"] == "time limit"
    assert (version.facts["steps"] or 0) > int(saved.removeprefix("step-"))


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "</dev/null >/dev/full 2>&1"])
def test_f36_a_training_without_streams_outlives_its_terminal(place, streams):
    """As `nohup setsid quill train ... &`: its output is not read, and it ignores the hangup."""
    quill = shlex.join([sys.executable, "-m", "quill", *place.arguments("m")])
    command = f"trap '' HUP; exec {quill} {streams}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        ["/bin/sh", "-c", command], cwd=place.folder, env=environment, start_new_session=True
    )
    if "full" not in streams:
        wait_for(place.weights / "m" / "v1" / "status.json")
        os.kill(process.pid, signal.SIGHUP)
    code = process.wait(timeout=60)
    if "full" in streams:
        # It cannot write its output, so it ends, and resumes when it is repeated.
        assert code in (0, 7)
        command = command.replace("/dev/full", "/dev/null")
        assert subprocess.run(["/bin/sh", "-c", command], cwd=place.folder, env=environment).returncode == 0
    else:
        assert code == 0
    assert result(Registry(place.weights).resolve("m").path) == place.whole


def test_ten_nights_of_growing_text_make_ten_versions(tmp_path, monkeypatch, capsys):
    """The training line of the nightly script, each night from the model of the night before."""
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    line = ["train", "--data=notes.txt", "--name=notes", "--from=notes", "--new-version", "--keep=7", "-q"]
    small = [*SMALL.split(), "--max-iters=60", "--device=cpu", "--dtype=float32", "--compile=off"]
    losses = []
    for night in range(1, 11):
        write_notes(tmp_path, night)
        if night == 6:
            with (tmp_path / "notes.txt").open("a", encoding="utf-8") as file:
                file.write("Ännu en natt: ingen måne, bara köld.\n" * 5)
        assert main([*line, *small]) == 0
        out, err = capsys.readouterr()
        assert out == f"notes:v{night}\n"
        assert ("8 new characters are added" in err) if night == 6 else (err == "")
        version = Registry(tmp_path / "weights").resolve("notes")
        assert version.number == night
        before = version.facts["parent"]
        assert (before["reference"] if before else None) == (f"notes:v{night - 1}" if night > 1 else None)
        assert main([*line, *small]) == 0, "the same text again"
        assert capsys.readouterr() == (f"notes:v{night}\n", "")
        losses.append(version.facts["best_val_loss"])
    kept = [v.number for v in Registry(tmp_path / "weights").entries(all_versions=True)]
    assert kept == list(range(4, 11))
    assert losses[4] < losses[0], "it was meant to learn from night to night"
    assert max(losses[1:5]) < losses[0] + 0.1
    assert max(losses[6:]) < losses[5] + 0.1, "new characters cost one night"
    (tmp_path / "notes.txt").write_text("x" * 5000)
    assert main([*line, *small]) == 2, "text that teaches nothing fails loudly"
    assert "repeats one character" in capsys.readouterr().err
    (tmp_path / "notes.txt").unlink()
    assert main([*line, *small]) == 3
