"""Settings of the whole process: the command line makes them, the library makes none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from quill.cli import _environment


def test_a_waiting_thread_spins_for_a_moment_only():
    env: dict[str, str] = {}
    _environment.prepare(env)
    assert env == {"GOMP_SPINCOUNT": "20000"}


@pytest.mark.parametrize("variable", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_the_users_own_setting_wins(variable):
    env = {variable: "mine"}
    _environment.prepare(env)
    assert env == {variable: "mine"}


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
        "print(sorted({'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & set(os.environ)),"
        " 'quill.cli._environment' in __import__('sys').modules)"
    )
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[] False\n", done.stderr
