"""Check the installation and environment."""

from __future__ import annotations

import functools
import os
import sys
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from quill import __version__, discovery, fsio
from quill.cli import options
from quill.cli._tables import Column, Style
from quill.cli.options import Session
from quill.errors import QuillError
from quill.units import size

if TYPE_CHECKING:
    from quill.registry.store import Model

State = Literal["ok", "warning", "wrong"]
Finding = tuple[str, State, str]

# Optional packages: what each is needed for, and the extra that installs it.
_EXTRAS = {
    "rustbpe": ("--tokenizer bpe", "bpe"),
    "zstandard": (".zst files", "zst"),
    "pyarrow": (".parquet files", "parquet"),
    "datasets": ("prepare hf:", "hub"),
    "huggingface_hub": ("hf: models", "hf"),
    "onnx": ("--format onnx", "onnx"),
    "xllamacpp": ("--format gguf --verify", "gguf"),
    "matplotlib": ("show --plot", "plot"),
    "starlette": ("serve", "serve"),
    **{logger: (f"train --log-to {logger}", logger) for logger in discovery.names("loggers")},
}
_LITTLE_SPACE = 1 << 30
_STYLES: dict[str, Style] = {"ok": "good", "warning": "warn", "wrong": "bad"}
_COLUMNS = (
    Column("CHECK", lambda r: r["what"]),
    Column("STATE", lambda r: r["state"], style=lambda r: _STYLES[r["state"]]),
    Column("FOUND", lambda r: r["found"]),
)


@options.command(examples="quill doctor")
def command(session: Session) -> None:
    """Check the installation and environment: packages, device, folders, locks and models.

    Exits with code 7 if something prevents training or saving a model.
    """
    registry = session.registry()
    findings = [*_versions(), _device(), *_folder("registry", registry.root, registry.why)]
    findings += _locks(session)
    findings += _models(session)
    findings += [*_folder("data root", session.datasets(), ""), *_datasets(session)]
    findings += _leftovers(session)
    findings.append(_encoding())
    wrong = [f for f in findings if f[1] == "wrong"]
    session.output.show(
        "quill.doctor/1",
        [{"what": what, "state": state, "found": found} for what, state, found in findings],
        _COLUMNS,
        key="what",
        within="findings",
        quiet=[f"{what}: {found}" for what, _, found in wrong],
        healthy=not wrong,
    )
    if wrong:
        raise typer.Exit(7)


@functools.cache
def _distribution() -> str:
    """The name that quill was installed under; finding it takes a look at every installed package."""
    found = metadata.packages_distributions().get("quill", [])
    return found[0] if found else "quill-gpt"


def _versions() -> list[Finding]:
    found: list[Finding] = [
        ("quill", "ok", __version__),
        ("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} on {sys.platform}"),
    ]
    for package in ("numpy", "safetensors", "tiktoken"):
        try:
            found.append((package, "ok", metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append(
                (package, "wrong", f"not installed: pip install --force-reinstall {_distribution()}")
            )
    for package, (use, extra) in _EXTRAS.items():
        state = "installed"
        if find_spec(package) is None:
            state = f"not installed, needed for {use}: pip install '{_distribution()}[{extra}]'"
        found.append((package, "ok", state))
    return found


def _device() -> Finding:
    try:
        import torch
    except Exception as e:
        return "torch", "wrong", f"cannot be imported: {e}"
    device = f"cpu, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = f"cuda, {torch.cuda.get_device_name()}"
    elif torch.backends.mps.is_available():
        device = "mps"
    return "torch", "ok", f"{torch.__version__} on {device}"


def _folder(what: str, folder: Path, why: str) -> list[Finding]:
    """Whether a folder can be written or created, and how much space it has."""
    place = f"{folder} ({why})" if why else str(folder)
    existing = next((p for p in fsio.upwards(folder.absolute()) if p.exists()), None)
    if existing is None:
        return [(what, "wrong", f"{place}: none of its parents exists")]
    if not existing.is_dir():
        return [(what, "wrong", f"{place}: '{existing}' is a file")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [(what, "wrong", f"{place}: '{existing}' is not writable; choose another with --registry")]
    import shutil

    free = shutil.disk_usage(existing).free
    made = "" if folder.exists() else ", created when needed"
    state: State = "warning" if free < _LITTLE_SPACE else "ok"
    return [(what, state, f"{place}{made}, {size(free)} free")]


def _locks(session: Session) -> list[Finding]:
    """Whether locks keep two runs of one name apart: on some filesystems flock always succeeds."""
    from quill.registry import locks

    root = session.registry().root
    # A registry that is not writable has its own line.
    with suppress(OSError, QuillError):
        if root.is_dir() and locks.works(root):
            return [("locks", "ok", "work")]
        if root.is_dir():
            found = "have no effect on this filesystem; train each name in one process at a time"
            return [("locks", "warning", found)]
    return []


def _models(session: Session) -> list[Finding]:
    """The models, which of them are damaged, and which runs can be resumed."""
    try:
        models = session.registry().models()
    except QuillError as e:
        return [("models", "wrong", str(e))]
    versions = [v for m in models for v in m.versions]
    damaged = [v.reference for v in versions if v.damaged]
    found: list[Finding] = [("models", "ok", str(len(versions)))]
    if damaged:
        found = [("models", "warning", f"{len(versions)}, damaged: {', '.join(damaged)}")]
    found += _aliases(session, models)
    runs = [(d.state, d.reference) for m in models for d in m.drafts]
    for state in ("training", "unfinished"):
        if which := [reference for of, reference in runs if of == state]:
            found.append((state, "ok", ", ".join(which)))
    return found


def _aliases(session: Session, models: list[Model]) -> list[Finding]:
    """The models whose aliases are not known, of which no version can be removed."""
    from quill.registry import aliases

    found: list[Finding] = []
    for model in models:
        if not (model.drafts or any(v.number for v in model.versions)):
            continue
        try:
            aliases.read_for_removal(session.registry().root / model.name)
        except QuillError as e:
            found.append(("aliases", "warning", f"{e.what}; {e.hint}" if e.hint else e.what))
    return found


def _datasets(session: Session) -> list[Finding]:
    """The datasets, and which of them are damaged as far as sizes and manifests tell."""
    from quill.data import store

    entries = store.entries(session.datasets())
    damaged = [store.PREFIX + e.name for e in entries if e.damage]
    if damaged:
        return [("datasets", "warning", f"{len(entries)}, damaged: {', '.join(damaged)}")]
    return [("datasets", "ok", str(len(entries)))]


def _leftovers(session: Session) -> list[Finding]:
    """Leftovers that `quill gc` would remove."""
    from quill.registry import gc

    try:
        found = gc.plan(session.registry(), session.datasets())
    except QuillError:
        return []  # The lines of the folders report it.
    if not found.removals:
        return [("leftovers", "ok", "none")]
    return [("leftovers", "ok", f"{len(found.removals)}, {size(found.bytes)}; remove with quill gc")]


def _encoding() -> Finding:
    import locale

    return "locale", "ok", f"{locale.getpreferredencoding(False)}; quill always writes UTF-8"
