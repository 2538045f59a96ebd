"""The models and configs that come with quill: found beneath the user's own, and never changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from versions import fill, finish, publish, registry

from quill import shipped
from quill.cli.app import main
from quill.config import reading
from quill.errors import NotFoundError
from quill.registry.store import Registry, locate

pytestmark = pytest.mark.slow

__all__ = ["fill", "finish", "publish", "registry"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def layered(registry, publish, finish, tmp_path, monkeypatch):
    """A registry with `mine` and `both`, above shipped models `both` and `theirs`; commands use it."""
    below = Registry(tmp_path / "shipped")
    for name in ("both", "theirs"):
        finish(below.begin(name))
    for name in ("mine", "both", "both"):
        publish(name)
    monkeypatch.setattr(shipped, "folder", lambda kind: below.root)
    monkeypatch.delenv("QUILL_SHIPPED")
    monkeypatch.chdir(tmp_path)
    where = locate()
    return Registry(where.root, where.why, where.shipped)


def test_shipped_models_are_found_beneath_the_users_own(layered, tmp_path):
    assert layered.resolve("theirs").path == tmp_path / "shipped" / "theirs" / "v1"
    assert layered.resolve("theirs:v1").path == tmp_path / "shipped" / "theirs" / "v1"
    assert layered.resolve("both").number == 2
    assert layered.resolve("both:v1").path == layered.root / "both" / "v1"
    assert [v.reference for v in layered.entries()] == ["both:v2", "mine:v1"]
    assert [m.name for m in layered.shipped_models()] == ["theirs"]
    with pytest.raises(NotFoundError, match="theirs"):
        layered.resolve("theirs:v2")
    with pytest.raises(NotFoundError) as caught:
        layered.resolve("thiers")
    assert caught.value.close == ("theirs",)


def located(flag: Path | None = None) -> Registry:
    where = locate(flag)
    return Registry(where.root, where.why, where.shipped)


@pytest.mark.parametrize("explicit", ["flag", "variable"])
def test_they_are_beneath_a_registry_that_is_named_explicitly(layered, tmp_path, monkeypatch, explicit):
    other = tmp_path / "other"
    if explicit == "variable":
        monkeypatch.setenv("QUILL_REGISTRY", str(other))
    named = located(other if explicit == "flag" else None)
    assert named.root == other
    assert named.resolve("theirs").path == tmp_path / "shipped" / "theirs" / "v1"
    assert not other.exists()


@pytest.mark.parametrize("off", ["off", "OFF", "0", "no", "false"])
def test_a_variable_hides_them(layered, monkeypatch, capsys, off):
    monkeypatch.setenv("QUILL_SHIPPED", off)
    assert main(["show", "theirs"]) == 3
    assert "comes with quill" not in capsys.readouterr().err
    assert located().shipped_models() == []


def test_versions_of_a_shipped_name_are_numbered_after_the_shipped_ones(layered, finish, tmp_path, capsys):
    shipped_one = layered.resolve("theirs:v1")
    own = finish(layered.begin("theirs"))
    assert own.reference == "theirs:v2"
    assert layered.resolve("theirs").path == own.path == layered.root / "theirs" / "v2"
    assert layered.resolve("theirs:v1") == shipped_one
    assert layered.find("theirs:v1") == shipped_one
    # Numbers that the registry has used before are its own.
    assert layered.resolve("both:v1").path == layered.root / "both" / "v1"
    assert finish(layered.begin("both")).number == 3
    with pytest.raises(NotFoundError, match="theirs:v3"):
        layered.resolve("theirs:v3")
    # An unfinished run is found by its number, and does not take one from the model beneath.
    draft = layered.begin("theirs")
    assert layered.find("theirs:v3").path == draft.path
    assert main(["list", "--all-versions", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert {r["reference"]: r.get("shipped", False) for r in rows if r["reference"].startswith("theirs")} == {
        "theirs:v1": True, "theirs:v2": False, "theirs:v3": False,
    }  # fmt: skip
    assert main(["rm", "-y", "theirs:v1"]) == 3
    assert "'theirs:v1' comes with quill" in capsys.readouterr().err
    assert main(["mv", "mine", "theirs"]) == 4
    # Without its own versions, the name means the shipped model again.
    draft.discard()
    assert main(["rm", "-y", "theirs:v2"]) == 0
    assert layered.resolve("theirs") == shipped_one
    assert finish(layered.begin("theirs")).number == 4


def test_no_model_is_renamed_to_the_name_of_a_shipped_one(layered, capsys):
    assert main(["mv", "mine", "theirs"]) == 4
    assert "a model of that name comes with quill" in capsys.readouterr().err


def test_the_shipped_registry_is_not_beneath_itself(tmp_path):
    assert Registry(tmp_path, shipped=tmp_path).shipped is None


def test_list_shows_which_models_come_with_quill(layered, capsys):
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert {r["reference"]: r.get("shipped", False) for r in rows} == {
        "both:v2": False, "mine:v1": False, "theirs:v1": True,
    }  # fmt: skip
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("ok, shipped")] == ["theirs:v1"]


def test_no_command_changes_a_shipped_model(layered, tmp_path, capsys):
    before = snapshot(tmp_path / "shipped")
    for command in (
        ["rm", "-y", "theirs"],
        ["mv", "theirs", "ours"],
        ["alias", "set", "theirs:v1", "best"],
        ["alias", "rm", "theirs:best"],
    ):
        assert main(command) == 3, command
        assert re.search(r"quill cp theirs(:v1)? NAME", capsys.readouterr().err), command
    assert main(["gc", "-y", "--keep", "1", "--older-than", "0"]) == 0
    assert main(["verify"]) in (0, 5)  # The models here are too small to fit their configs.
    assert main(["cp", "theirs", "ours"]) == 0
    assert main(["show", "theirs"]) == 0
    draft = layered.begin("theirs")
    assert draft.path == layered.root / "theirs" / "v2"
    assert snapshot(tmp_path / "shipped") == before
    assert sorted(os.listdir(tmp_path / "shipped")) == [".locks", ".quill.json", "both", "theirs"]
    assert layered.resolve("ours").path == layered.root / "ours" / "v1"


def test_a_config_is_found_by_name_unless_there_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = reading.load(Path("quickstart"))
    assert (config.name, config.data.source) == ("quickstart", "harpoon")
    (tmp_path / "quickstart").write_text('{"name": "mine"}')
    assert reading.load(Path("quickstart")).name == "mine"
    with pytest.raises(NotFoundError, match="quickstart") as caught:
        reading.load(Path("quickstrat"))
    assert caught.value.close[0] == "quickstart"
    for path in ("nowhere/gpt2", "gpt2.json"):
        with pytest.raises(NotFoundError):
            reading.load(Path(path))


@pytest.fixture(scope="module")
def wheel(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed from its wheel, in a folder of its own."""
    installed = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel_file) as archive:
        archive.extractall(installed)
    return installed


def run(wheel: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("QUILL_")}
    environment |= {
        "PYTHONPATH": str(wheel),
        "HOME": str(cwd.parent / "home"),
        "XDG_DATA_HOME": str(cwd.parent / "home" / "data"),
    }
    command = [sys.executable, "-c", "from quill.cli.app import run; run()", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_an_installed_wheel_works_in_an_empty_folder(wheel, tmp_path):
    before = snapshot(wheel)
    cwd = tmp_path / "empty"
    cwd.mkdir()
    for path in wheel.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    sample = run(wheel, cwd, "sample", "shakespeare", "--max-new-tokens", "20", "--seed", "1")
    assert sample.returncode == 0, sample.stderr
    assert len(sample.stdout) >= 20
    listed = run(wheel, cwd, "list", "--json")
    rows = json.loads(listed.stdout)["models"]
    assert sorted(row["reference"].partition(":")[0] for row in rows) == ["harpoon", "shakespeare"]
    assert all(row["shipped"] for row in rows)
    assert run(wheel, cwd, "verify", "shakespeare", "harpoon").returncode == 0
    trained = run(
        wheel, cwd, "train", "--config", "quickstart", "--max-iters", "2", "--batch-size", "2",
        "--warmup-iters", "1", "--eval-iters", "1", "--device", "cpu",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.strip() == "quickstart:v1"
    assert os.listdir(cwd) == []
    after = {n: raw for n, raw in snapshot(wheel).items() if "__pycache__" not in n}
    assert after == {n: raw for n, raw in before.items() if "__pycache__" not in n}


def test_a_wheel_contains_no_models_but_the_shipped_ones(wheel):
    packed = wheel / "quill" / "_shipped"
    assert sorted(os.listdir(packed)) == ["configs", "weights"]
    assert sorted(os.listdir(packed / "weights")) == [".quill.json", "harpoon", "shakespeare"]
    assert set(shipped.configs()) == {p.stem for p in (packed / "configs").glob("*.json")} - {"schema"}


@pytest.mark.parametrize("room", ["explanation", "serving"])
def test_a_wheel_contains_the_files_of_the_pages(wheel, root, room):
    packed, source = (folder / "quill" / room / "assets" for folder in (wheel, root))
    assert snapshot(packed) == snapshot(source)
    assert snapshot(source)
