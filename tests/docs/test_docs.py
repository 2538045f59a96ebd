"""The README and the manual are what people follow: commands and code run, tables are true, links resolve."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import generate
import pytest
import warm

import quill
from quill.checkpoint.weights import save_weights
from quill.config import reading
from quill.config.settings import RunConfig
from quill.model.gpt import GPT
from quill.registry.store import Registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
MANUAL = sorted((ROOT / "quill" / "docs").glob("*.md"))
PAGES = [README, *MANUAL]
PROJECT = sorted((ROOT / ".github").glob("*.md"))

# What the pages train in full or plan, a test trains or plans for two steps.
_SHORT = "--max-iters 2 --eval-interval 2 --warmup-iters 0 --batch-size 2 --eval-iters 1"
_MODULES = {"hf": "transformers", "onnx": "onnxruntime", "gguf": "xllamacpp"}


def _fenced(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _commands(page: Path) -> list[str]:
    """Every line of a page's shell examples that calls quill, continuation lines joined."""
    # A whole script has a test of its own, among those of cron.
    examples = [text for text in _fenced(page, "sh") if not text.startswith("#!")]
    lines = "".join(examples).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if "quill " in line and "pip " not in line]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that is like the shipped `shakespeare`, but for its size."""
    [shipped] = (ROOT / "weights" / "shakespeare").glob("v*")
    document = json.loads((shipped / "config.json").read_text(encoding="utf-8"))
    document["model"] |= {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    config = reading.check(RunConfig, document, origin="the tests")
    network = GPT(config.model.shape(), seed=1)
    draft = Registry(tmp_path_factory.mktemp("small")).begin("shakespeare")
    draft.write_json("config.json", config.to_dict())
    draft.write_bytes("tokenizer.json", (shipped / "tokenizer.json").read_bytes())
    draft.write_file("model.safetensors", partial(save_weights, model=network))
    return draft.publish(parameters=sum(p.numel() for p in network.parameters())).path.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a newcomer has after cloning, as far as the pages touch it."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    corpus = Path("quill") / "data" / "harpoon.txt"
    (tmp_path / corpus).parent.mkdir(parents=True)
    shutil.copy(ROOT / corpus, tmp_path / corpus)
    return tmp_path


@pytest.fixture(scope="module")
def entry() -> Iterator[Path]:
    """The program `quill`, in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="quill-") as folder, warm.program(Path(folder)) as made:
        yield made


@pytest.fixture
def environment(entry: Path) -> dict[str, str]:
    """A shell in which `quill` is the one under test and no network is reached."""
    return {
        **os.environ,
        "PATH": f"{entry.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }


@pytest.mark.parametrize("page", [p for p in PAGES if _commands(p)], ids=lambda p: p.stem)
def test_commands_run_one_after_another(
    page: Path, checkout: Path, small: Path, environment: dict[str, str]
) -> None:
    """Those of the README with the shipped models, those of the manual with a smaller `shakespeare`."""
    if page != README:
        shutil.rmtree(checkout / "weights" / "shakespeare")
        shutil.copytree(small, checkout / "weights" / "shakespeare")
    for command in _commands(page):
        if "quill train" in command:
            command = re.sub(r"(quill train[^|;&>]*)", rf"\1 {_SHORT} ", command)
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr.decode()}"


def test_the_readme_shows_the_commands_people_use() -> None:
    assert len(_commands(README)) > 12


@pytest.mark.parametrize(
    ("page", "code"),
    [(page, code) for page in PAGES for code in _fenced(page, "python")],
    ids=lambda value: value.stem if isinstance(value, Path) else value.splitlines()[0],
)
def test_python_runs(page: Path, code: str, checkout: Path, environment: dict[str, str]) -> None:
    for name, module in _MODULES.items():
        if f"shakespeare-{name}" in code:
            pytest.importorskip(module)
            registry = checkout / "weights"
            quill.export("shakespeare", name, checkout / f"shakespeare-{name}", registry=registry)
    script = code.replace('"configs/quickstart.json", max_iters=300', "QUICK")
    quick = {
        "name": "quick",
        "model": {"n_layer": 1, "n_embd": 16, "n_head": 1, "block_size": 16},
        "train": {"max_iters": 2, "batch_size": 2, "eval_interval": 2, "eval_iters": 1, "warmup_iters": 0},
    }
    done = subprocess.run(
        [sys.executable, "-c", f"QUICK = {quick!r}\n{script}"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_files_are_current(name: str) -> None:
    current = (ROOT / name).read_text(encoding="utf-8")
    assert current == generate.PAGES[name](), "run: python tests/docs/generate.py"


@pytest.mark.parametrize("page", [*PAGES, *PROJECT], ids=lambda p: p.stem)
def test_links_and_pictures_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_index_names_every_page() -> None:
    index = (ROOT / "quill" / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\S+?)\.md\)", index)) == {p.stem for p in MANUAL} - {"index"}


def test_every_shipped_config_is_described() -> None:
    named = re.findall(
        r"`configs/([a-z0-9-]+)\.json`", (ROOT / "quill/docs/configs.md").read_text(encoding="utf-8")
    )
    assert sorted(named) == sorted(p.stem for p in (ROOT / "configs").glob("*.json") if p.stem != "schema")


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    [command] = re.findall(r"^python -m pytest.*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert command in (ROOT / ".ci/run").read_text()
    assert shlex.split(command)[:3] == ["python", "-m", "pytest"]
