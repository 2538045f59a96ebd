"""FIFOs, devices, folders and endless files in the place of a registry's files: refused at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quill.cli.app import main

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "a terabyte": _sparse,
}
FILES = [
    "a/v1/config.json", "a/v1/tokenizer.json", "a/v1/metrics.jsonl", "a/v1/manifest.json",
    "a/model.json", "a/model.copy.json", "a/v2/config.json", "a/v2/metrics.jsonl", "a/v2/status.json",
    "a/v2/run.log", "a/v2/state/step-000005/manifest.json", "a/v2/state/step-000005/state.json",
]  # fmt: skip
COMMANDS = [
    ["list", "--all-versions"], ["show", "a:v1", "--metrics"], ["show", "a:v2", "--metrics"],
    ["logs", "a:v2", "-n", "3"], ["gc", "--dry-run"], ["cp", "a:v1", "b"], ["verify", "a"],
    ["compare", "a:v1", "a:v1"], ["explain", "a:v1", "x"],
]  # fmt: skip
DATA_FILES = ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]
DATA_COMMANDS = [
    ["list", "data:"], ["show", "data:d"], ["verify", "data:d"], ["gc", "--dry-run"],
    ["train", "--data", "d", "--name", "z", "--dry-run"],
]  # fmt: skip


@pytest.fixture
def place(registry, publish):
    """A registry with a:v1 and an unfinished a:v2."""
    publish("a")
    draft = registry.begin("a")
    draft.write_json("config.json", {"schema_version": 1, "name": "x", "model": {"n_layer": 2}})
    draft.update_status(data_key="k")
    draft.write_bytes("metrics.jsonl", b'{"step": 5, "loss": 1.0}\n')
    draft.write_bytes("run.log", b"step 5\n")
    draft.save_state(5, lambda place: (place / "state.json").write_text("{}"), facts={"step": 5})
    return registry


@pytest.fixture
def hurried() -> Iterator[None]:
    """A minute for what might wait or read for ever."""

    def late(*_: object) -> None:
        raise AssertionError("it takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_f56_a_special_or_endless_file_is_refused_at_once(place, name, kind, hurried, capsys):
    refuses(place.root / name, kind, COMMANDS, capsys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DATA_FILES)
def test_f56_a_special_or_endless_file_of_a_dataset_too(place, name, kind, hurried, tmp_path, capsys):
    text = tmp_path / "d.txt"
    text.write_text("the tide turns at dawn, and the boats go out.\n" * 50)
    assert main(["prepare", str(text), "--name", "d"]) == 0
    refuses(place.root.parent / "data" / "d" / name, kind, DATA_COMMANDS, capsys)


@pytest.mark.parametrize("kind", ["fifo", "link to a device", "a terabyte"])
def test_f56_a_special_file_in_the_place_of_a_dataset(place, kind, hurried, tmp_path, capsys):
    text = tmp_path / "d.txt"
    text.write_text("the tide turns at dawn, and the boats go out.\n" * 50)
    (place.root.parent / "data").mkdir()
    again = ["prepare", str(text), "--name", "d"]
    commands = [*DATA_COMMANDS, again, [*again, "--force"]]
    refuses(place.root.parent / "data" / "d", kind, commands, capsys)


def refuses(path: Path, kind: str, commands: list[list[str]], capsys) -> None:
    """Put something else in the place of a file, and run commands that would read it."""
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    for arguments in commands:
        code = main(arguments)
        err = capsys.readouterr().err
        assert code in (0, 3, 4, 5), (arguments, err)
        assert len(err) < 2000
        if path.parent.exists():
            assert os.path.lexists(path), arguments
