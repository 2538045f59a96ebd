"""Named texts: inside the package, downloaded once, restored from datasets, or placed by hand."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quill.data import named_sources
from quill.data.named_sources import NAMED, Named
from quill.errors import CorruptError, QuillError, ResourceError

CONTENT = b"To be, or not to be. " * 10_000


class Site:
    """A local web server with one page, which may be anything."""

    def __init__(self) -> None:
        self.body = CONTENT
        self.length = len(CONTENT)
        self.status = 200
        self.requests = 0
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.requests += 1
                self.send_response(site.status)
                self.send_header("Content-Length", str(site.length))
                self.end_headers()
                self.wfile.write(site.body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/input.txt"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    page = Named("a page", url=site.url, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(NAMED, "page", page)
    yield site
    site.server.shutdown()
    thread.join()
    site.server.server_close()


def refusal(data: Path, error: type[QuillError]) -> QuillError:
    with pytest.raises(error) as e:
        named_sources.fetch("page", data)
    assert not (data / ".downloads" / "page.txt").exists()
    return e.value


def test_it_is_downloaded_once(site: Site, data: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    path = named_sources.fetch("page", data, lambda *t: told.append(t))
    assert path.read_bytes() == CONTENT
    assert told[-1] == ("downloading", len(CONTENT), len(CONTENT))
    assert named_sources.fetch("page", data) == path
    assert site.requests == 1


def test_f50_offline_the_hint_downloads_it_to_its_place(site: Site, data: Path) -> None:
    site.server.server_close()
    error = refusal(data, ResourceError)
    assert error.exit_code == 7
    assert site.url in error.why
    assert error.hint == f"curl --create-dirs -o {data}/.downloads/page.txt {site.url}"


def test_f50_placed_by_hand_it_is_not_downloaded(site: Site, data: Path) -> None:
    (data / ".downloads").mkdir(parents=True)
    (data / ".downloads" / "page.txt").write_bytes(CONTENT)
    assert named_sources.fetch("page", data).read_bytes() == CONTENT
    assert site.requests == 0


def test_f50_a_missing_page_is_reported(site: Site, data: Path) -> None:
    site.status = 404
    assert "Not Found" in refusal(data, ResourceError).why


def test_another_text_is_refused(site: Site, data: Path) -> None:
    site.body = CONTENT.replace(b"not", b"now")
    error = refusal(data, CorruptError)
    assert "sha256" in error.why


@pytest.mark.parametrize("length", [len(CONTENT), 1000])
def test_a_truncated_text_is_refused(site: Site, data: Path, length: int) -> None:
    site.body, site.length = CONTENT[:1000], length
    error = refusal(data, ResourceError)
    assert error.exit_code == 7


def test_a_longer_text_is_refused(site: Site, data: Path) -> None:
    site.body, site.length = CONTENT + b"more" * 100_000, len(CONTENT) + 400_000
    refusal(data, CorruptError)


def test_a_wrong_file_placed_by_hand_is_refused(site: Site, data: Path) -> None:
    path = data / ".downloads" / "page.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT.replace(b"not", b"now"))
    with pytest.raises(CorruptError, match="page") as e:
        named_sources.fetch("page", data)
    assert str(path) in e.value.hint
    assert path.exists()


def test_f41_a_data_root_that_cannot_be_written_is_reported(site: Site, data: Path) -> None:
    data.write_text("a file, not a folder")
    with pytest.raises(ResourceError):
        named_sources.fetch("page", data)


def test_tiny_shakespeare_is_the_well_known_file(shakespeare_file: Path) -> None:
    named_as = NAMED["shakespeare"]
    raw = shakespeare_file.read_bytes()
    assert (len(raw), hashlib.sha256(raw).hexdigest()) == (named_as.size, named_as.sha256)


def test_packaged_texts_exist(write: Callable[..., Path], data: Path) -> None:
    for name, entry in NAMED.items():
        assert entry.about
        if entry.file:
            text = named_sources.fetch(name, data).read_text(encoding="utf-8")
            assert len(text) > 150_000
            assert "\r" not in text
    assert not data.exists()
