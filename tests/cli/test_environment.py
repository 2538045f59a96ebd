"""Settings of the whole process: the command line makes them, the library makes none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quill.cli import _environment


def test_a_waiting_thread_spins_for_a_moment_only():
    env: dict[str, str] = {}
    _environment.prepare(env)
    assert env["GOMP_SPINCOUNT"] == "20000"


def test_products_on_cuda_are_the_same_in_every_run():
    env: dict[str, str] = {}
    _environment.prepare(env)
    assert env["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    env["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    _environment.prepare(env)
    assert env["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own"


@pytest.mark.parametrize(
    ("variable", "unset"),
    [
        ("GOMP_SPINCOUNT", None),
        ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
        ("KMP_BLOCKTIME", "GOMP_SPINCOUNT"),
        ("OMP_NUM_THREADS", None),
        ("MKL_NUM_THREADS", "OMP_NUM_THREADS"),
    ],
)
def test_the_users_own_setting_wins(variable, unset, monkeypatch):
    monkeypatch.setattr(_environment, "_quota", lambda: 1)
    monkeypatch.setattr(_environment.os, "cpu_count", lambda: 8)
    env = {variable: "mine"}
    _environment.prepare(env)
    assert env[variable] == "mine"
    assert unset not in env


@pytest.mark.parametrize(
    ("groups", "files", "processors"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "30000 100000"}, 1),
        ("0::/pod/box", {"pod/cpu.max": "400000 100000", "pod/box/cpu.max": "max 100000"}, 4),
        ("0::/pod/box", {"pod/cpu.max": "300000 100000", "pod/box/cpu.max": "600000 100000"}, 3),
        ("0::/not/seen/here", {"cpu.max": "150000 50000"}, 3),
        ("4:memory:/m\n2:cpu,cpuacct:/box", {"cpu/box/cpu.cfs_quota_us": "500000"}, 5),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1"}, None),
        ("nonsense", {}, None),
    ],
)
def test_threads_follow_the_quota_of_the_cgroup(groups, files, processors, tmp_path, monkeypatch):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
        if name.endswith("quota_us"):
            path.with_name("cpu.cfs_period_us").write_text("100000\n")
    found = _environment._quota(tmp_path)
    assert found == processors
    monkeypatch.setattr(_environment, "_quota", lambda: found)
    monkeypatch.setattr(_environment.os, "cpu_count", lambda: 4)
    env: dict[str, str] = {}
    _environment.prepare(env)
    assert env.get("OMP_NUM_THREADS") == (str(found) if found and found < 4 else None)


_LEAVING = """
import atexit, os, sys, threading, time, types
from quill.cli import _environment
sys.modules["torch"] = types.ModuleType("torch")
class Torch:
    def __del__(self, write=os.write):
        write(1, b"taken apart")
kept = Torch()
atexit.register(print, "exit handler")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
sys.stdout.write("x" * 5000 + chr(10))
"""


def left(code: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, timeout=60)


def test_a_process_with_torch_ends_without_taking_it_apart_and_loses_nothing():
    done = left(_LEAVING + "_environment.leave(7)")
    assert done.returncode == 7
    assert done.stdout.split() == [b"x" * 5000, b"thread", b"exit", b"handler"]
    assert done.stderr == b""


def test_a_profiled_process_ends_as_usual():
    done = left(_LEAVING + "sys.setprofile(lambda *event: None); _environment.leave(7)")
    assert done.returncode == 7
    assert b"taken apart" in done.stdout


def test_a_process_with_torch_ends_quietly_into_a_closed_pipe():
    read, write = os.pipe()
    os.close(read)
    done = left(_LEAVING + "_environment.leave(141)", write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP and glibc")
def test_the_setting_is_in_the_environment_when_torch_is_imported():
    """`quill doctor` imports torch; OpenMP's own report of its settings shows what it has read."""
    code = "from quill.cli.app import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        env={"PATH": "/usr/bin:/bin", "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch was not built with GNU OpenMP")
    assert "GOMP_SPINCOUNT = '20000'" in done.stderr


def test_the_library_changes_no_setting_of_the_process():
    code = (
        "import os, ctypes, quill.training.run, quill.api\n"
        "print(sorted({'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'OMP_NUM_THREADS'} & set(os.environ)),"
        " 'quill.cli._environment' in __import__('sys').modules)"
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[] False\n", done.stderr
