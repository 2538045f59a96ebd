"""The container: its files fit each other and the package, and its command serves. No image is built here."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from quill.config.settings import ServeConfig

ROOT = Path(__file__).resolve().parent.parent


def _instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with what follows it."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    return [
        (name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines) if name
    ]


INSTRUCTIONS = _instructions()
# The stage that is the image.
FINAL = INSTRUCTIONS[max(i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM") :]


def final(name: str) -> str:
    """What the image's only instruction of a name says."""
    [found] = [rest for each, rest in FINAL if each == name]
    return found


def command() -> list[str]:
    """What runs in the container."""
    return [*json.loads(final("ENTRYPOINT")), *json.loads(final("CMD"))]


def environment() -> dict[str, str]:
    """The variables that the image sets."""
    return dict(word.split("=", 1) for word in final("ENV").split())


@pytest.fixture
def compose() -> dict:
    """The service of compose.yaml."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["quill"]


def test_hadolint_has_nothing_to_say() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_is_installed_in_the_words_of_the_readme() -> None:
    installs = [rest for name, rest in INSTRUCTIONS if name == "RUN" and rest.startswith("pip")]
    assert installs[1:] == ["pip install '.[serve]'"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"--index-url \S+/cpu", installs[0])
    assert f"`{installs[0]}`" in readme


def test_the_image_runs_one_program_without_rights() -> None:
    # Both stages must have the same Python, which the environment of the first links to.
    assert len({rest.split()[0] for name, rest in INSTRUCTIONS if name == "FROM"}) == 1
    user, _, group = final("USER").partition(":")
    assert int(user) > 0 and int(group) > 0
    assert command()[:2] == ["quill", "serve"]
    assert json.loads(final("VOLUME")) == [environment()["QUILL_REGISTRY"]]
    assert f"--owner={user} --group={group} {environment()['QUILL_REGISTRY']}" in final("RUN")
    port = command()[command().index("--port") + 1]
    assert final("EXPOSE") == port
    assert f", {port}, " in final("HEALTHCHECK")
    assert "pip" not in " ".join(rest for _, rest in FINAL)


def test_compose_fits_the_image(compose: dict) -> None:
    assert compose["ports"] == [f"127.0.0.1:{final('EXPOSE')}:{final('EXPOSE')}"]
    assert compose["volumes"] == [f"./weights:{environment()['QUILL_REGISTRY']}:ro"]
    assert compose["environment"]["QUILL_API_KEY"].startswith("${QUILL_API_KEY:?")
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "/.env" in ignored
    # Nothing can be written but what goes with the container.
    assert compose["read_only"] is True
    assert [entry.partition(":")[0] for entry in compose["tmpfs"]] == [environment()["HOME"]]
    assert compose["cap_drop"] == ["ALL"]
    assert int(compose["stop_grace_period"].removesuffix("s")) > ServeConfig().drain + 3


@pytest.fixture
def program(wheel_file: Path, tmp_path: Path) -> Path:
    """`quill` from its wheel in a fresh environment, which takes what quill needs from this one."""
    pytest.importorskip("pip")
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "-q",
    ]
    subprocess.run([*install, str(wheel_file)], check=True)
    [packages] = place.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "quill"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the image is Linux")
def test_its_command_serves_and_its_health_check_sees_it(program: Path, tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    registry = tmp_path / "weights"
    registry.mkdir()
    env = {**environment(), "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"HOME": str(tmp_path / "home"), "QUILL_REGISTRY": str(registry)}
    words = ["0" if word == final("EXPOSE") else word for word in command()]
    refused = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "the key is in QUILL_API_KEY" in refused.stderr
    env["QUILL_API_KEY"] = "secret"
    with subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip().rpartition(":")[2]
            check = json.loads(final("HEALTHCHECK").partition(" CMD ")[2])
            check = [word.replace(final("EXPOSE"), port) for word in check]
            proxies = {**env, "http_proxy": "http://127.0.0.1:9"}
            assert subprocess.run(check, env=proxies).returncode == 0
            connection = http.client.HTTPConnection("127.0.0.1", int(port))
            connection.request("GET", "/v1/models", headers={"authorization": "Bearer secret"})
            served = json.load(connection.getresponse())["data"]
            # The shipped models came with the wheel.
            assert {model["id"] for model in served} == {"harpoon", "shakespeare"}
            connection.close()
        finally:
            server.terminate()
        assert server.wait(timeout=60) == 143
    assert subprocess.run(check, env=env, capture_output=True).returncode == 1
    assert list(registry.iterdir()) == []
