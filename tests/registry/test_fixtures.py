"""A registry as every release so far wrote it: each later quill lists, reads, samples and verifies it.

What lies in fixtures/ is what people have on their disks. Nothing that reads it rewrites it, and it may be
moved, copied and packed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from quill import fsio
from quill.checkpoint.load import load_checkpoint
from quill.checkpoint.resume_state import load_state
from quill.cli.app import main
from quill.registry import aliases, migrations
from quill.registry.store import Registry

FIXTURES = Path(__file__).resolve().parent / "fixtures"
RELEASES = sorted(p.name for p in FIXTURES.glob("v*"))


def copied(weights: Path, tmp_path: Path) -> Path:
    """As rsync and cp -r copy a registry: files alone, with new times."""
    shutil.copytree(weights, tmp_path / "elsewhere" / "models", copy_function=shutil.copyfile)
    return tmp_path / "elsewhere" / "models"


def moved(weights: Path, tmp_path: Path) -> Path:
    """As mv moves one."""
    (tmp_path / "deep" / "down").mkdir(parents=True)
    os.rename(copied(weights, tmp_path), tmp_path / "deep" / "down" / "weights")
    return tmp_path / "deep" / "down" / "weights"


def packed(weights: Path, tmp_path: Path) -> Path:
    """As tar packs and unpacks one."""
    with tarfile.open(tmp_path / "weights.tar.gz", "w:gz") as tar:
        tar.add(weights, "weights")
    with tarfile.open(tmp_path / "weights.tar.gz") as tar:
        tar.extractall(
            tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    return tmp_path / "unpacked" / "weights"


def linked(weights: Path, tmp_path: Path) -> Path:
    """As a folder on another disk is put in a registry's place."""
    (tmp_path / "link").symlink_to(copied(weights, tmp_path))
    return tmp_path / "link"


WAYS = {f.__name__: f for f in (copied, moved, packed, linked)}


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Path:
    """The folder of what a release wrote."""
    return FIXTURES / request.param


@pytest.fixture(params=WAYS)
def weights(request: pytest.FixtureRequest, release: Path, tmp_path: Path, monkeypatch) -> Path:
    """Its registry at another place, where commands look for it; in the end it is as it was."""
    root = WAYS[request.param](release / "weights", tmp_path)
    monkeypatch.setenv("QUILL_REGISTRY", str(root))
    monkeypatch.chdir(tmp_path)
    before = state(root)
    yield root
    assert state(root) == before, "reading has written"


def state(root: Path) -> dict[str, tuple[bytes | None, int, int]]:
    """Content, inode and time of everything in a folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        entry = path.lstat()
        found[str(path.relative_to(root))] = (
            path.read_bytes() if path.is_file() else None, entry.st_ino, entry.st_mtime_ns
        )  # fmt: skip
    return found


@pytest.fixture
def said(capsys) -> Callable[..., str]:
    """What a command prints; it must end well."""

    def run(*arguments: str) -> str:
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def test_every_layout_has_a_fixture():
    assert [f"v{n}" for n in range(1, migrations.SCHEMA_VERSION + 1)] == RELEASES


def test_fixtures_are_small_and_tell_nothing_of_who_made_them():
    files = [p for p in FIXTURES.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 60_000 * len(RELEASES)
    for path in files:
        if path.suffix in (".json", ".jsonl", ".md", ".log"):
            text = path.read_text(encoding="utf-8")
            assert not [w for w in ("/tmp", "/home", "/root", "/Users") if w in text]


def test_models_are_read_as_they_were_written(weights, release):
    import torch

    expected = json.loads((release / "expected.json").read_text(encoding="utf-8"))
    found = Registry(weights).entries(all_versions=True)
    assert {v.reference for v in found} == set(expected)
    for version in found:
        assert version.damaged is None
        wanted, loaded = expected[version.reference], load_checkpoint(version)
        assert loaded.tokenizer.encode(wanted["text"]) == wanted["ids"]
        assert loaded.tokenizer.decode(wanted["ids"]) == wanted["text"]
        assert loaded.tokenizer.fingerprint == wanted["fingerprint"]
        assert sum(p.numel() for p in loaded.model.parameters()) == wanted["parameters"]
        with torch.no_grad():
            logits = loaded.model(torch.tensor([wanted["ids"]]))[0, -1]
        assert torch.allclose(logits[:8], torch.tensor(wanted["logits"]), atol=2e-3)
        assert (loaded.version.manifest or {}).get("best_val_loss") == wanted["loss"]
    registry = Registry(weights)
    assert registry.resolve("tide:champion").number == 1
    assert registry.resolve("tide").number == registry.resolve("tide:latest").number == 2
    assert registry.resolve("tide").manifest["parent"]["digest"] == registry.resolve("tide:v1").digest


def test_commands_that_read_do(weights, said):
    listed = json.loads(said("list", "--all-versions", "--json"))
    assert listed["registry"] == str(weights)
    assert {m["reference"] for m in listed["models"]} >= {
        "tide:v1",
        "tide:v2",
        "words:v1",
        "pairs:v1",
        "by-hand:v1",
    }
    for ref in (
        "tide",
        "tide:champion",
        "words",
        "pairs",
        "by-hand",
        str(weights / "tide"),
        str(weights / "tide" / "v1"),
    ):
        assert said("show", ref)
        assert json.loads(said("show", ref, "--json"))["config"]["model"]["n_layer"] == 1
        assert json.loads(said("config", "show", ref))["model"]["n_embd"] == 4
        first = said("sample", ref, "the tide", "--max-new-tokens=8", "--temperature=0")
        assert first.startswith("the tide")
        assert said("sample", ref, "the tide", "--max-new-tokens=8", "--temperature=0") == first
    assert said("doctor")
    assert json.loads(said("verify", "--json"))["damaged"] == 0
    assert json.loads(said("gc", "--dry-run", "--json"))["dry_run"] is True


def test_an_unfinished_run_can_be_gone_on_with(weights):
    draft = Registry(weights).unfinished("tide")
    tensors, info, notes, _ = load_state(draft)
    assert (info["trainer"]["step"], notes) == (1, [])
    assert {n.partition("/")[0] for n in tensors} == {"model", "optimizer"}
    assert draft.status()["step"] == 1


def test_an_unfinished_run_is_finished(release, tmp_path, monkeypatch, capsys):
    root = copied(release / "weights", tmp_path)
    for name in ("tide.txt", "tide.json"):
        shutil.copy(release / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    command = [
        "train",
        "--config=tide.json",
        f"--registry={root}",
        "--resume=must",
        "--new-version",
        "--json",
    ]
    assert main(command) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    started = next(e for e in events if e["event"] == "started")
    assert (started["reference"], started["step"]) == ("tide:v4", 1)
    assert events[-1]["reference"] == Registry(root).resolve("tide").reference == "tide:v4"
    assert main(["verify", f"--registry={root}"]) == 0


def test_numbers_that_were_given_are_not_given_again(release, tmp_path):
    registry = Registry(copied(release / "weights", tmp_path))
    assert registry.begin("tide").number == 5
    assert registry.begin("gone").number == 2
    assert registry.begin("by-hand").number == 2


def test_what_reads_it_may_be_all_that_a_process_ever_does(release, tmp_path):
    """From a place that cannot be written, with nothing but the interpreter."""
    root = copied(release / "weights", tmp_path)
    before = state(root)
    code = "from quill.cli.app import run; run()"
    environment = {"PATH": os.environ["PATH"], "QUILL_REGISTRY": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code, "list", "--json"], capture_output=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["models"]) >= 4
    assert state(root) == before


def test_the_next_version_is_written_beside_it_and_changes_none(release, tmp_path, fill):
    root = copied(release / "weights", tmp_path)
    before = {p: c for p, (c, _, _) in state(root).items() if "/v" in p or p.startswith("by-hand")}
    registry = Registry(root)
    draft = registry.begin("tide")
    fill(draft)
    assert draft.publish().reference == "tide:v5"
    aliases.update(root / "tide", lambda held: held | {"aliases": held["aliases"] | {"new": 5}})
    after = {p: c for p, (c, _, _) in state(root).items()}
    assert before.items() <= after.items()
    assert aliases.read(root / "tide")["aliases"] == {"champion": 1, "new": 5}


def test_f3_a_bit_of_a_fixture_flipped_is_found(release, tmp_path, monkeypatch, capsys):
    """The check itself: what `verify` says of the fixtures could be otherwise."""
    root = copied(release / "weights", tmp_path)
    path = root / "words" / "v1" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    monkeypatch.setenv("QUILL_REGISTRY", str(root))
    assert main(["verify"]) == 5
    assert "words:v1" in capsys.readouterr().out
    assert fsio.sha256(path) not in (path.parent / "manifest.json").read_text()
