"""kill -9 at any moment of a preparation, and the same command again: in the end it is the same dataset.

What was complete when it was killed is not made again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from trainings import finish, start

from quill.data import duplicates, encode, shards, sources
from quill.data.dataset import SPLITS

pytestmark = pytest.mark.slow

KILLS = 10
MOST = 8_000


def small() -> None:
    """Write small files in this process, encode small tasks, and trust the times of new files."""
    shards.SHARD_BYTES = duplicates._FILE_BYTES = MOST
    encode.encode.__kwdefaults__["size"] = 2048
    sources._SETTLED_SECONDS = 0.0


def recorded(root: Path) -> dict[str, Path]:
    """Return the complete files that a killed preparation left, by name."""
    found = {}
    for record in root.glob(".tmp-0-*/shards.json"):
        for split, done in json.loads(record.read_text())["splits"].items():
            if split in SPLITS:
                found |= {
                    name: record.with_name(name) for name in (shards.name(split, n) for n in range(len(done)))
                }
    return found


def begun(root: Path) -> int:
    return sum(1 for _ in root.glob(".tmp-0-*/*.bin"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


def facts(folder: Path) -> dict[str, object]:
    return {k: v for k, v in json.loads((folder / "manifest.json").read_text()).items() if k != "created"}


@pytest.mark.parametrize("dedup", [(), ("--dedup=exact",)])
def test_f28_killed_ten_times_and_repeated_it_is_the_same_dataset(tmp_path, tiny_text, dedup):
    luck = random.Random(5)
    lines = [f"{n} {line}" for n, line in enumerate(tiny_text.splitlines() * 200)][:5_000]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))

    def prepare(place: str):
        arguments = [
            "prepare",
            str(text),
            "--name=sea",
            f"--registry={tmp_path / place / 'weights'}",
            "--workers=2",
        ]
        return start([*arguments, *dedup, "--quiet"], tmp_path, tmp_path / "said", small)

    def finished(place: str) -> Path:
        made = tmp_path / place / "data" / "sea"
        was_complete = made.exists()
        assert finish(prepare(place)) == 0, (tmp_path / "said.err").read_text()
        # What one leaves that was killed after it had published is for gc.
        assert was_complete or list(made.parent.glob(".tmp-0-*")) == []
        return made

    whole = finished("whole")
    assert min(len(shards.names(split, os.listdir(whole))) for split in SPLITS) > 5
    kept = tmp_path / "kept"
    kept.mkdir()
    kills = again = files = 0
    while kills < KILLS:
        place, reused = f"p{again}", dict[str, Path]()
        root = tmp_path / place / "data"
        while kills < KILLS and not (root / "sea").exists():
            more = begun(root) + luck.randint(0, 12)
            child = prepare(place)
            while child.is_alive() and begun(root) < more:
                time.sleep(0.005)
            time.sleep(luck.uniform(0, 0.02))
            child.kill()
            child.join()
            kills += child.exitcode == -signal.SIGKILL
            for name, path in recorded(root).items():
                if name not in reused:
                    # A second name of the file, by which it is known later.
                    reused[name] = kept / f"{again}-{name}"
                    os.link(path, reused[name])
        made = finished(place)
        assert contents(made) == contents(whole)
        assert facts(made) == facts(whole)
        assert [name for name, file in reused.items() if not os.path.samefile(made / name, file)] == []
        files += len(reused)
        again += 1
    assert files > 5
