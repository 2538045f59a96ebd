"""kill -9 at any moment of a training, and the same command again: in the end it is the same model.

Bit for bit, whether it was killed while it started, stepped, evaluated, saved or published, and however
often.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import trainings
from trainings import events, finish, reached, result, start

from quill.registry.store import Registry

pytestmark = pytest.mark.slow

KILLS = 50


def whole_versions(weights) -> dict[str, dict[str, bytes]]:
    """The files of every visible version, read to the last byte and found to be what its manifest says."""
    found = {}
    for version in Registry(weights).entries(all_versions=True):
        assert version.damaged is None, version.damaged
        found[version.reference] = {n: version.read_file(n) for n in version.manifest["files"]}
    return found


def test_f28_killed_fifty_times_and_repeated_it_is_the_same_model(place, injections):
    luck, moments = random.Random(9), []
    kills, hit, done, before = 0, Counter(), 0, {}
    while kills < KILLS:
        name, said = f"m{done}", place.folder / f"m{done}"
        while True:
            if not moments:
                # One from each tenth of the run's time, so that no part of it is left out.
                moments = [(tenth + luck.random()) / 10 * place.seconds for tenth in range(10)]
                luck.shuffle(moments)
            child = start(place.arguments(name), place.folder, said)
            time.sleep(moments.pop())
            child.kill()
            child.join()
            if child.exitcode == -signal.SIGKILL:
                kills += 1
                hit[reached(said)] += 1
            now = whole_versions(place.weights)
            assert before.items() <= now.items()
            if luck.random() < 0.5:
                break
        again = start(place.arguments(name), place.folder, said)
        assert finish(again) == 0, said.with_suffix(".err").read_text()
        # Killed before its folder held anything, a version is given up for the next number.
        finished = [v for v in Registry(place.weights).entries(all_versions=True) if v.name == name]
        assert [v.reference for v in finished] == [events(said)[-1]["reference"]]
        assert result(finished[0].path) == place.whole
        before = whole_versions(place.weights)
        done += 1
    assert done == len(before)
    assert len(hit) > 2, "the moments were meant to be spread over the run"
    where = ", ".join(f"{n} {how}" for how, n in hit.most_common())
    injections.note(f"kill -9: {kills} kills of {done} trainings of {place.seconds:.2f} s: {where}")


@pytest.fixture(scope="module")
def operations(prepared):
    """The names of the write operations of a training, in order."""
    told = prepared.folder / "operations"
    fault = functools.partial(trainings.fault_at, None, "", str(told))
    child = start(prepared.arguments("counted"), prepared.folder, prepared.folder / "said", fault)
    assert finish(child) == 0
    found = told.read_text().split()
    assert len(found) > 500
    return found


@pytest.mark.parametrize(("way", "points"), [("exit", 16), ("enospc lasting", 8), ("eio", 8), ("short", 1)])
def test_f26_f27_f28_a_training_struck_at_a_write_goes_on_as_if_nothing_had_been(
    place, operations, way, points, injections
):
    """The registry's own tests strike every operation; here some of a whole training are, of every kind."""
    luck, before, missed = random.Random(way), {}, 0
    kinds = sorted(set(operations) - ({"close", "ftruncate"} if way == "exit" else set()))
    for n in range(points):
        name, said, told = f"m{n}", place.folder / f"m{n}", place.folder / "told"
        told.unlink(missing_ok=True)
        k = luck.choice([i for i, kind in enumerate(operations) if kind == kinds[n % len(kinds)]])
        fault = functools.partial(trainings.fault_at, k, way, str(told))
        code = finish(start(place.arguments(name), place.folder, said, fault))
        err = said.with_suffix(".err").read_text()
        assert "Traceback" not in err
        done = told.read_text().split()
        # A step that a busy machine makes slow is reported alone: runs differ by a few operations.
        struck = done[0] if way == "short" else done[k] if k < len(done) else None
        missed += struck is None
        if way == "exit":
            assert code == (9 if struck else 0)
        elif way == "short":
            assert code == 0
        elif code == 0:
            # What cannot be tidied up, noted in a lock or remembered for next time is no failure.
            assert result(Registry(place.weights).resolve(name).path) == place.whole, (struck, err)
        else:
            assert code == 7, err
            assert (
                ("No space" in err or "disk is full" in err)
                if way.startswith("enospc")
                else "input/output error" in err
            )
        now = whole_versions(place.weights)
        assert before.items() <= now.items()
        assert finish(start(place.arguments(name), place.folder, said)) == 0, said.with_suffix(
            ".err"
        ).read_text()
        assert result(Registry(place.weights).resolve(name).path) == place.whole
        before = whole_versions(place.weights)
    assert missed <= 1
    injections.add(
        "training", way, points if way != "short" else sum(o in ("write", "pwrite") for o in operations)
    )


@pytest.mark.parametrize("moment", ["starting", "stepped", "evaluated"])
def test_f28_the_console_script_killed_and_repeated(place, moment):
    script = [sys.executable, "-m", "quill"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [*script, *place.arguments("m")], stdout=subprocess.PIPE, cwd=place.folder, env=environment
    )
    if moment == "starting":
        while not (place.weights / "m").exists():
            assert child.poll() is None
            time.sleep(0.001)
    else:
        passed = 0
        while passed < 5:
            passed += json.loads(child.stdout.readline())["event"] == moment
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert whole_versions(place.weights) == {}
    done = subprocess.run(
        [*script, *place.arguments("m")], capture_output=True, cwd=place.folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert result(Registry(place.weights).resolve("m").path) == place.whole
