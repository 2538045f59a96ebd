"""Texts with a name: those inside the package, and those downloaded on first use."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quill import fsio
from quill.errors import CorruptError, ResourceError

# Called with a stage's name, the bytes done, and the total where it is known.
OnBytes = Callable[[str, int, "int | None"], None]

DOWNLOADS = ".downloads"


@dataclass(frozen=True)
class Named:
    """A text with a name.

    Attributes:
        about: What it is, in a few words.
        file: Its file inside the package, if it is there.
        url: Where it is downloaded from, if it is not.
        size: Its length in bytes.
        sha256: Its hash, in hex.
    """

    about: str
    file: Path | None = None
    url: str = ""
    size: int = 0
    sha256: str = ""


NAMED: dict[str, Named] = {
    "harpoon": Named(
        "prose and verse of the sea, part of quill", file=Path(__file__).with_name("harpoon.txt")
    ),
    "shakespeare": Named(
        "tiny Shakespeare, 1.1 MB of his plays",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}


def path_of(name: str, root: Path) -> Path:
    """Return where the download of a named text is stored, or placed by hand."""
    return root / DOWNLOADS / f"{name}.txt"


def fetch(name: str, root: Path, on_bytes: OnBytes | None = None) -> Path:
    """Return the file of a named text, downloading it on first use and checking it each time.

    Args:
        name: A key of NAMED.
        root: The data root; downloads are stored in its `.downloads`.
        on_bytes: Called with the progress of the download.

    Raises:
        ResourceError: It cannot be downloaded; the hint says how to place it by hand.
        CorruptError: The file there, or the download, is not that text.
    """
    named = NAMED[name]
    if named.file:
        return named.file
    path = path_of(name, root)
    if not path.is_file():
        fsio.refuse_link(path.parent)
        fsio.make_dir(path.parent)
        fsio.write_bytes(path, _download(name, named, path, on_bytes))
    elif path.stat().st_size != named.size or fsio.sha256(path) != named.sha256:
        raise CorruptError(
            f"'{path}' is not the text '{name}'",
            why=f"its sha256 is not {named.sha256}",
            hint=f"rm {shlex.quote(str(path))}",
        )
    return path


def _download(name: str, named: Named, path: Path, on_bytes: OnBytes | None) -> bytes:
    """Download a named text whole and check it."""
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    hint = f"curl --create-dirs -o {shlex.quote(str(path))} {named.url}"
    data = bytearray()
    try:
        with urlopen(Request(named.url, headers={"User-Agent": "quill"}), timeout=30) as reply:
            # One byte more than expected shows that a file is longer without reading all of it.
            while len(data) <= named.size and (more := reply.read(min(65536, named.size + 1 - len(data)))):
                data += more
                if on_bytes:
                    on_bytes("downloading", len(data), named.size)
    except (OSError, HTTPException) as e:
        reason = getattr(e, "reason", None) or e
        raise ResourceError(
            f"'{name}' ({named.about}) is not here and cannot be downloaded",
            why=f"{named.url}: {reason or type(e).__name__}",
            hint=hint,
        ) from e
    if len(data) < named.size:
        raise ResourceError(
            f"cannot download '{name}'",
            why=f"{named.url} ended after {len(data):,} of {named.size:,} bytes",
            hint=hint,
        )
    if hashlib.sha256(data).hexdigest() != named.sha256:
        raise CorruptError(f"{named.url} is not '{name}'", why=f"its sha256 is not {named.sha256}", hint=hint)
    return bytes(data)
