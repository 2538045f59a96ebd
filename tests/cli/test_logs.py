"""`quill logs`: a run's log, whole, its end, or as it grows."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from quill.cli import logs
from quill.cli.app import main
from quill.cli.output import Output
from quill.registry import locks

RUN = [sys.executable, "-c", "from quill.cli.app import run; run()"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def logged(publish):
    """Publish a version that has a log of three lines."""

    def make(name: str):
        version = publish(name)
        (version.path / "run.log").write_bytes(f"{name} starts\nstep 1\n{name} é done\n".encode())
        return version

    return make


@pytest.fixture
def follower(registry):
    """Follow a log in a process of its own: follower("a"); killed at the end of the test."""
    started = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "QUILL_REGISTRY": str(registry.root)}
        process = subprocess.Popen(
            [*RUN, "logs", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def append(folder, text: str) -> None:
    with (folder / "run.log").open("a") as log:
        log.write(text)


def test_a_log_in_its_three_forms(logged, capsys):
    logged("a")
    assert run(capsys, "logs", "a") == (0, "a starts\nstep 1\na é done\n", "")
    assert run(capsys, "logs", "a:v1", "-q")[1] == "a starts\nstep 1\na é done\n"
    documents = [json.loads(line) for line in run(capsys, "logs", "a", "--json")[1].splitlines()]
    assert {d["schema"] for d in documents} == {"quill.log/1"}
    assert [d["line"] for d in documents] == ["a starts", "step 1", "a é done"]
    assert documents[0]["reference"] == "a:v1"


@pytest.mark.parametrize(("n", "expected"), [("0", ""), ("1", "a é done\n"), ("2", "step 1\na é done\n")])
def test_only_the_last_lines(n, expected, logged, capsys):
    logged("a")
    assert run(capsys, "logs", "a", "-n", n)[1] == expected
    assert run(capsys, "logs", "a", "--lines", "99")[1].count("\n") == 3


def test_a_negative_number_of_lines_is_refused(logged, capsys):
    logged("a")
    assert run(capsys, "logs", "a", "-n", "-1")[0] == 2


def test_a_name_means_the_unfinished_run_if_it_is_newer(logged, registry, capsys):
    logged("a")
    draft = registry.begin("a")
    append(draft.path, "goes on\n")
    assert run(capsys, "logs", "a")[1] == "goes on\n"
    assert run(capsys, "logs", "a:v1", "-n", "1")[1] == "a é done\n"
    registry.begin("a").discard()
    logged("a")
    assert run(capsys, "logs", "a")[1].startswith("a starts")
    assert run(capsys, "logs", str(draft.path))[1] == "goes on\n"


def test_a_model_without_a_log_is_reported(publish, capsys):
    publish("a")
    code, out, err = run(capsys, "logs", "a")
    assert (code, out) == (3, "")
    assert "'a:v1' has no log" in err
    assert run(capsys, "logs", "aa")[0] == 3
    assert run(capsys, "logs", "../a")[0] == 3
    assert run(capsys, "logs", "A", "-f")[0] == 2


def test_f14_no_log_is_read_through_a_link(publish, capsys):
    version = publish("a")
    (version.path / "run.log").symlink_to("/etc/passwd")
    assert run(capsys, "logs", "a")[:2] == (5, "")


def test_f17_an_incomplete_log_that_is_not_utf8_is_shown(publish, capsys):
    version = publish("a")
    (version.path / "run.log").write_bytes(b"one\r\n\xff two\nthr")
    assert run(capsys, "logs", "a")[1] == "one\n\ufffd two\nthr\n"


def test_f15_a_terminal_gets_no_control_characters(publish, monkeypatch):
    version = publish("a")
    (version.path / "run.log").write_bytes("\x1b[2Jx\x07\u202e\n".encode())
    shown = {}
    for terminal in (False, True):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["logs", "a"]) == 0
        shown[terminal] = stream.getvalue()
    assert shown == {False: "\x1b[2Jx\x07\u202e\n", True: "[2Jx\n"}
    out = io.StringIO()
    Output("json", out=out).event("s", {"line": "\x1b"})
    assert "\x1b" not in out.getvalue()


def test_following_ends_with_the_run_and_misses_nothing(publish, registry, follower):
    draft = registry.begin("a")
    with locks.hold(registry.root, "a"):
        append(draft.path, "one\ntwo\n")
        process = follower("a", "-f", "-n", "1")
        assert process.stdout.readline() == b"two\n"
        append(draft.path, "thr")
        time.sleep(0.4)
        append(draft.path, "ee\n")
        assert process.stdout.readline() == b"three\n"
        assert process.poll() is None
        # A run is published before its last line is written.
        (draft.path / "manifest.json").write_text("{}")
        time.sleep(0.4)
        append(draft.path, "the last")
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, b"the last\n", b"")


def test_following_a_stopped_run_ends_at_once(logged, registry, capsys):
    logged("a")
    start = time.monotonic()
    assert run(capsys, "logs", "a", "-f")[:2] == (0, "a starts\nstep 1\na é done\n")
    draft = registry.begin("a")
    append(draft.path, "left behind\n")
    code, out, err = run(capsys, "logs", "a", "-f")
    assert (code, out) == (0, "left behind\n")
    assert "a:v2 is not running" in err
    assert time.monotonic() - start < 5


def test_following_waits_for_a_run_that_prepares_its_data(logged, registry, follower):
    logged("a")
    with locks.hold(registry.root, "a"):
        process = follower("a", "-f")
        time.sleep(0.6)
        draft = registry.begin("a")
        time.sleep(0.3)
        append(draft.path, "starts\n")
        assert process.stdout.readline() == b"starts\n"
    assert process.wait(10) == 0


def test_an_older_run_does_not_follow_a_newer_one(publish, registry, capsys):
    old = registry.begin("a")
    append(old.path, "old\n")
    registry.begin("a")
    with locks.hold(registry.root, "a"):
        assert run(capsys, "logs", "a:v1", "-f")[1] == "old\n"


def test_f35_ctrl_c_ends_following_quietly(publish, registry, follower):
    draft = registry.begin("a")
    append(draft.path, "one\n")
    with locks.hold(registry.root, "a"):
        process = follower("a", "-f")
        assert process.stdout.readline() == b"one\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_a_long_log_is_read_in_chunks(publish, monkeypatch, capsys):
    version = publish("a")
    lines = [f"line {i} " + "x" * (i % 300) for i in range(3000)]
    (version.path / "run.log").write_text("\n".join(lines) + "\n")
    assert run(capsys, "logs", "a")[1].splitlines() == lines
    assert run(capsys, "logs", "a", "-n", "700")[1].splitlines() == lines[-700:]
    assert logs._PAUSE < 1
