"""What tests share: the project's folders, text to learn from, a registry, and a model in it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from quill.registry.store import Registry
    from quill.registry.version import Version

# The table of faults, with the report of which tests hold quill to each; a browser.
pytest_plugins = ["faults", "browsing"]

ROOT = Path(__file__).resolve().parent.parent

# The same examples in every run; `--hypothesis-profile=default` draws new ones.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
hypothesis.settings.load_profile("reproducible")

Quill = Callable[..., "subprocess.CompletedProcess[bytes]"]

# A shell starts what it puts into the background with signals ignored, and quill leaves what is ignored
# alone; the tests of signals are about one that was started in the foreground.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("SIGHUP", "SIGTERM"):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), signal.SIG_DFL)


# Workers share the cores, and threads that wait for each other beside busy processes spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Tests know which models there are; those of the shipped ones turn them on again.
os.environ["QUILL_SHIPPED"] = "off"


# Spare the disk: no test can tell whether it synced, and those of power losses simulate one.
os.fsync = lambda fd: None


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither the user's registry and cache nor the terminal's settings reach a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in list(os.environ):
        if name.startswith("QUILL_") or name in (
            "NO_COLOR",
            "FORCE_COLOR",
            "GITHUB_ACTIONS",
            "CI",
            "COLUMNS",
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("QUILL_SHIPPED", "off")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel, built from what .dockerignore lets into the context of the image."""
    pytest.importorskip("hatchling")
    source = tmp_path_factory.mktemp("source")
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    ignored = shutil.ignore_patterns(*(line.removeprefix("**/") for line in lines if line.startswith("**/")))
    for name in (line.removeprefix("!") for line in lines if line.startswith("!")):
        (source / name).parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(source / "dist")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="session")
def shared() -> Path:
    """Material beside the project that is not part of it: reference text, tokenizer ranks."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no ../shared beside the project")
    return folder


@pytest.fixture(scope="session")
def shakespeare_file(shared: Path) -> Path:
    """Tiny Shakespeare, 1,115,394 bytes."""
    path = shared / "data" / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip("../shared has no tiny Shakespeare")
    return path


@pytest.fixture(scope="session")
def shakespeare_text(shakespeare_file: Path) -> str:
    """Tiny Shakespeare as text."""
    return shakespeare_file.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def ranks(shared: Path) -> Path:
    """A folder with GPT-2's byte pairs as tiktoken caches them."""
    folder = shared / "data" / "tiktoken"
    if not folder.is_dir():
        pytest.skip("../shared has no tiktoken ranks")
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry with nothing in it, not yet on disk."""
    from quill.registry.store import Registry

    return Registry(tmp_path / "weights")


@pytest.fixture
def quill(tmp_path: Path) -> Quill:
    """Run the command line as a process of its own: `quill("list", "--json", stdin=b"")`."""

    def run(
        *arguments: str, stdin: bytes | None = None, env: dict[str, str | None] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "QUILL_REGISTRY": str(tmp_path / "weights")}
        for name, value in (env or {}).items():
            if value is None:
                environment.pop(name, None)
            else:
                environment[name] = value
        return subprocess.run(
            [sys.executable, "-c", "from quill.cli.app import run; run()", *arguments],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env=environment,
            cwd=tmp_path,
            timeout=120,
        )

    return run


OnTerminal = Callable[..., str]


@pytest.fixture
def on_terminal() -> OnTerminal:
    """Run a command on a terminal, in an environment, and type into it; returns what is shown."""
    pty = pytest.importorskip("pty")

    def run(command: list[str], env: dict[str, str], typed: str = "") -> str:
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=env, start_new_session=True
        )
        os.close(follower)
        os.write(leader, typed.encode())
        shown = b""
        # The end of a terminal is an error on Linux, and no data elsewhere.
        with suppress(OSError):
            while chunk := os.read(leader, 65536):
                shown += chunk
        os.close(leader)
        assert process.wait(timeout=60) == 0
        return shown.decode().replace("\r\n", "\n")

    return run


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """A few thousand characters that a model of a few hundred parameters can learn something of."""
    return "".join(f"{i} bells, {i} bells, and the tide is {i * 7 % 12} feet.\n" for i in range(150))


@pytest.fixture(scope="session")
def tiny_registry(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Registry:
    """A registry, not to be changed, with the trained model `tiny`; its dataset `tiny` lies beside it."""
    from quill.config import reading
    from quill.data.prepare import prepare
    from quill.registry.store import Registry
    from quill.training.run import train

    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "tiny.txt"
    text.write_text(tiny_text, encoding="utf-8")
    settings = {
        "data.source": "tiny",
        "model.n_layer": 1,
        "model.n_head": 1,
        "model.n_embd": 8,
        "model.block_size": 16,
        "train.batch_size": 4,
        "train.max_iters": 5,
        "train.eval_interval": 5,
        "train.warmup_iters": 0,
        "train.device": "cpu",
        "train.dtype": "float32",
        "train.compile": "off",
    }
    config = reading.parse({"name": "tiny"}, settings, origin="the tests")
    prepare(config.data.model_copy(update={"source": str(text)}), folder / "data", name="tiny")
    registry = Registry(folder / "weights")
    train(config, registry, folder / "data")
    return registry


@pytest.fixture(scope="session")
def tiny(tiny_registry: Registry) -> Version:
    """A trained model of a few hundred parameters."""
    return tiny_registry.resolve("tiny")
