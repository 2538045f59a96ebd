"""Fetching from the Hub, against a small one of our own: what is fetched, and what is said otherwise."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quill.errors import InputError
from quill.formats import exporting
from quill.formats.hf import hub
from quill.formats.hf.push import push

pytest.importorskip("huggingface_hub", reason="huggingface_hub, which fetches")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The server's address is read when the package is imported, so each try has a process of its own.
FETCH = """
import json, sys
from quill.errors import QuillError
from quill.formats.hf import hub
from quill.formats.hf.push import push
for repository in sys.argv[1:]:
    said = []
    try:
        print(json.dumps({"path": str(hub.fetch(repository, said.append)), "said": said}))
    except QuillError as e:
        print(json.dumps({"code": e.exit_code, "what": e.what, "why": e.why, "hint": e.hint}))
"""
PUSH = """
import json, sys
from pathlib import Path
from quill.errors import QuillError
from quill.formats.hf.push import push
from quill.registry.store import Registry
registry, reference, repository, *more = sys.argv[1:]
said = []
try:
    version = Registry(Path(registry)).resolve(reference)
    address = push(version, repository, private="private" in more, notice=said.append)
    print(json.dumps({"address": address, "said": said}))
except QuillError as e:
    print(json.dumps({"code": e.exit_code, "what": e.what, "why": e.why, "hint": e.hint}))
"""
IMPORT = """
import json, sys
from pathlib import Path
from quill.formats import importing
from quill.registry.store import Registry
registry = Registry(Path(sys.argv[1]))
first = importing.import_model("hf:org/tiny", registry)
assert importing.ensure("hf:org/tiny", registry) == first
print(json.dumps({"reference": first.reference, "parent": first.manifest["parent"]["reference"]}))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as fetching a snapshot needs: one public repository, org/tiny, of one commit."""

    protocol_version = "HTTP/1.1"
    files: Path
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"{self.command} {path}")
        names = sorted(f.relative_to(self.files).as_posix() for f in self.files.rglob("*") if f.is_file())
        if path in ("/api/models/org/tiny/revision/main", "/api/models/org/tiny/revision/v2"):
            listed = [{"rfilename": name} for name in names]
            self.reply(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": listed}).encode())
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": n, "size": len(self.whole(n)), "oid": self.tag(n)} for n in names
            ]
            self.reply(json.dumps(entries).encode())
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/") and path.split(COMMIT + "/")[1] in names:
            name = path.split(COMMIT + "/")[1]
            self.reply(self.whole(name), ETag=f'"{self.tag(name)}"', **{"X-Repo-Commit": COMMIT})
        else:
            missing = "RevisionNotFound" if "/org/tiny/" in path else "RepoNotFound"
            self.reply(b"{}", 404, **{"X-Error-Code": missing})

    do_HEAD = do_GET

    def whole(self, name: str) -> bytes:
        return (self.files / name).read_bytes()

    def tag(self, name: str) -> str:
        return hashlib.sha1(self.whole(name)).hexdigest()

    def reply(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class Uploads(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs. The public repository org/public exists; others are created."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, bool]
    files: dict[str, bytes]
    asked: list[str]
    refuse: int

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"GET {path}")
        name = path.removeprefix("/api/models/")
        if name not in self.repositories:
            self.reply({}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        self.reply({"id": name, "private": self.repositories[name], "sha": COMMIT, "siblings": []})

    def do_POST(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(f"POST {path}")
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse or "authorization" not in self.headers:
            self.reply({"error": "no"}, self.refuse or 401)
        elif path == "/api/repos/create":
            body = json.loads(raw)
            name = f"{body['organization']}/{body['name']}"
            known = name in self.repositories
            hidden = bool(body.get("private")) or body.get("visibility") == "private"
            self.repositories.setdefault(name, hidden)
            self.reply({"url": f"{self.here()}/{name}", "name": name}, 409 if known else 200)
        elif path.endswith("/preupload/main"):
            listed = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(raw)["files"]]
            self.reply({"files": [{**f, "shouldIgnore": False} for f in listed]})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, raw.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"{self.here()}{path.replace('/api/models', '').replace('/commit/main', '')}"
            self.reply({"success": True, "commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        else:
            self.reply({"error": path}, 404)

    def here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def reply(self, body: dict, code: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def uploads() -> Iterator[ThreadingHTTPServer]:
    state = {"repositories": {"org/public": False}, "files": {}, "asked": [], "refuse": 0}
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Uploads,), state)) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture
def files(publish, tmp_path: Path) -> Path:
    """What the repository holds: an export, and what nobody should fetch."""
    folder = exporting.export(publish("openai"), "hf", tmp_path / "repository").path
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 a pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"another copy")
    return folder


@pytest.fixture
def server(files: Path) -> Iterator[ThreadingHTTPServer]:
    served = type("Served", (Hub,), {"files": files, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), served) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def process(server: ThreadingHTTPServer, home: Path, code: str, *arguments: str, **env: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), **env}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_model_files_alone_are_fetched_and_only_once(server, tmp_path):
    first, again, tagged = process(server, tmp_path / "home", FETCH, "org/tiny", "org/tiny", "org/tiny@v2")
    assert first["said"] == [f"downloading org/tiny from http://127.0.0.1:{server.server_port}"]
    assert first["path"] == again["path"] == tagged["path"]
    assert Path(first["path"]).is_relative_to(tmp_path / "home")
    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {f.name for f in Path(first["path"]).iterdir()} == wanted
    asked = [a for a in server.RequestHandlerClass.asked if a.startswith("GET") and "/resolve/" in a]
    assert len(asked) == len(wanted)


def test_what_was_fetched_is_imported_under_the_repositorys_name(server, tmp_path):
    (made,) = process(server, tmp_path / "home", IMPORT, str(tmp_path / "other"))
    assert made == {"reference": "tiny:v1", "parent": "hf:org/tiny"}


def test_what_is_not_there_is_said(server, tmp_path):
    nobody, revision = process(server, tmp_path / "home", FETCH, "org/nobody", "org/tiny@v3")
    assert nobody["code"] == revision["code"] == 3
    assert "'org/nobody'" in nobody["what"] and f":{server.server_port}/org/nobody" in nobody["why"]
    assert "'v3'" in revision["what"]


def test_f50_without_a_network_it_says_from_where_and_how_to_place_it_by_hand(server, tmp_path):
    process(server, tmp_path / "home", FETCH, "org/tiny")
    server.shutdown()
    server.server_close()
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        other, known = process(server, tmp_path / "home", FETCH, "org/other", "org/tiny", **offline)
        assert other["code"] == 7
        assert f"http://127.0.0.1:{server.server_port}/org/other" in other["why"]
        assert "hf download org/other --local-dir other" in other["hint"]
        assert "quill import ./other" in other["hint"]
        # What is in the cache needs no network.
        assert Path(known["path"]).is_dir()


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b/c", "a b", "/etc", "x@", "-x", "a\n", "a/..", "https://x/y"]
)
def test_f13_what_names_no_repository_is_refused_before_anything_is_asked(name):
    with pytest.raises(InputError, match="is not a repository"):
        hub.fetch(name)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="huggingface_hub") as caught:
        hub.fetch("gpt2")
    assert "quill-gpt[hf]" in caught.value.hint


@pytest.mark.parametrize("private", [False, True])
def test_a_model_is_pushed_and_can_be_imported_from_what_was_pushed(uploads, publish, tmp_path, private):
    version = publish("openai", name="tiny")
    arguments = [str(version.path.parent.parent), "tiny", "hf:org/new", *(["private"] if private else [])]
    (made,) = process(uploads, tmp_path / "home", PUSH, *arguments, HF_TOKEN="hf_test")
    here = f"http://127.0.0.1:{uploads.server_port}/org/new"
    assert made == {"address": here, "said": [f"uploading tiny:v1 to {here}"]}
    served = uploads.RequestHandlerClass
    assert served.repositories["org/new"] == private
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, raw in served.files.items():
        (folder / name).write_bytes(raw)
    expected = exporting.export(version, "hf", tmp_path / "expected").path
    assert {f.name for f in folder.iterdir()} == {f.name for f in expected.iterdir()}
    for file in expected.iterdir():
        same = file.read_bytes() == (folder / file.name).read_bytes()
        assert same == (file.name != "README.md")
    assert 'name = "org/new"' in (folder / "README.md").read_text()
    # Again, into the repository that is there now.
    (again,) = process(uploads, tmp_path / "home", PUSH, *arguments, HF_TOKEN="hf_test")
    assert again["address"] == here


def test_private_refuses_a_repository_that_is_public(uploads, publish, tmp_path):
    version = publish("openai", name="tiny")
    arguments = [str(version.path.parent.parent), "tiny", "hf:org/public", "private"]
    (made,) = process(uploads, tmp_path / "home", PUSH, *arguments, HF_TOKEN="hf_test")
    assert made["code"] == 4 and "is public" in made["what"]
    assert not uploads.RequestHandlerClass.files


def test_a_push_that_is_not_allowed_says_how_to_log_in(uploads, publish, tmp_path):
    version = publish("openai", name="tiny")
    arguments = [str(version.path.parent.parent), "tiny", "hf:org/new"]
    (made,) = process(uploads, tmp_path / "home", PUSH, *arguments)
    assert (made["code"], made["hint"]) == (7, "hf auth login")
    uploads.RequestHandlerClass.refuse = 403
    (made,) = process(uploads, tmp_path / "home", PUSH, *arguments, HF_TOKEN="hf_test")
    assert (made["code"], made["hint"]) == (4, "hf auth login")
    uploads.shutdown()
    uploads.server_close()
    (made,) = process(uploads, tmp_path / "home", PUSH, *arguments, HF_TOKEN="hf_test")
    assert made["code"] == 7 and "org/new" in made["what"]


@pytest.mark.parametrize("name", ["", "org/x", "hf:", "hf:x", "hf:../x", "hf:a/b/c", "hf:a/..", "hf:-a/b"])
def test_what_is_not_a_repository_is_refused_before_an_upload(name, publish):
    with pytest.raises(InputError, match="is not a repository"):
        push(publish("openai"), name)


def test_the_command_pushes_and_prints_the_address(uploads, publish, tmp_path):
    version = publish("openai", name="tiny")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    here = f"http://127.0.0.1:{uploads.server_port}"
    environment |= {"HF_ENDPOINT": here, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"}
    environment["QUILL_REGISTRY"] = str(version.path.parent.parent)
    command = [sys.executable, "-m", "quill", "push", "tiny", "hf:org/new", "--private"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{here}/org/new\n"), done.stderr
    assert done.stderr == f"uploading tiny:v1 to {here}/org/new\n"
    assert uploads.RequestHandlerClass.repositories["org/new"]
