"""Say what quill runs on here, and what is wrong with it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import typer

from quill import __version__
from quill.cli import options
from quill.cli.options import Session
from quill.errors import QuillError
from quill.units import size

State = Literal["ok", "warning", "wrong"]
Finding = tuple[str, State, str]

# Extras, and what is missing without them.
_EXTRAS = {
    "rustbpe": "--tokenizer bpe: pip install 'quill-gpt[bpe]'",
    "zstandard": "reading .zst files: pip install 'quill-gpt[zst]'",
    "huggingface_hub": "hf: models: pip install 'quill-gpt[hf]'",
    "onnx": "--format onnx: pip install 'quill-gpt[onnx]'",
    "xllamacpp": "--format gguf --verify: pip install 'quill-gpt[gguf]'",
    "matplotlib": "show --plot: pip install 'quill-gpt[plot]'",
}
_LITTLE_SPACE = 1 << 30


@options.command()
def command(session: Session) -> None:
    """Say what quill runs on here, and what is wrong with it.

    Exit code 7 if something would keep it from training or from keeping a model.
    """
    registry = session.registry()
    findings = [*_versions(), _device(), *_folder("registry", registry.root, registry.why)]
    findings += _locks(session)
    findings += _models(session)
    findings += _folder("datasets", session.datasets(), "")
    findings += _leftovers(session)
    findings.append(_encoding())
    wrong = [f for f in findings if f[1] == "wrong"]
    output = session.output
    marks = {"ok": "", "warning": "warning: ", "wrong": "WRONG: "}
    output.emit(
        "quill.doctor/1",
        {
            "healthy": not wrong,
            "findings": [{"what": what, "state": state, "found": found} for what, state, found in findings],
        },
        human=output.fields([(what, marks[state] + found) for what, state, found in findings]),
        quiet=[f"{what}: {found}" for what, _, found in wrong],
    )
    if wrong:
        raise typer.Exit(7)


def _versions() -> list[Finding]:
    found: list[Finding] = [
        ("quill", "ok", __version__),
        ("python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))} on {sys.platform}"),
    ]
    for package in ("numpy", "safetensors", "tiktoken"):
        try:
            found.append((package, "ok", metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, "wrong", "not installed: pip install --force-reinstall quill"))
    for package, use in _EXTRAS.items():
        there = find_spec(package) is not None
        found.append((package, "ok", "installed" if there else f"not installed; only needed for {use}"))
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
    """Whether a folder can be written, or made, and how much room it has."""
    place = f"{folder} ({why})" if why else str(folder)
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None)
    if existing is None:
        return [(what, "wrong", f"{place}: no part of that path exists")]
    if not existing.is_dir():
        return [(what, "wrong", f"{place}: '{existing}' is a file")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [(what, "wrong", f"{place}: '{existing}' cannot be written; choose another with --registry")]
    import shutil

    free = shutil.disk_usage(existing).free
    made = "" if folder.exists() else ", made when first needed"
    state: State = "warning" if free < _LITTLE_SPACE else "ok"
    return [(what, state, f"{place}{made}, {size(free)} free")]


def _locks(session: Session) -> list[Finding]:
    """Whether two trainings of one name are kept apart: flock says yes to everybody on some filesystems."""
    from quill.registry import locks

    root = session.registry().root
    # Where nothing can be written there is nothing to lock, and the registry's own line says so.
    with suppress(OSError, QuillError):
        if root.is_dir() and locks.works(root):
            return [("locks", "ok", "work")]
        if root.is_dir():
            found = "do nothing on this filesystem; see to it that a name is trained by one process at a time"
            return [("locks", "warning", found)]
    return []


def _models(session: Session) -> list[Finding]:
    """The models there are, which of them are damaged, and which runs could go on."""
    try:
        models = session.registry().models()
    except QuillError as e:
        return [("models", "wrong", str(e))]
    versions = [v for m in models for v in m.versions]
    damaged = [v.reference for v in versions if v.damaged]
    found: list[Finding] = [("models", "ok", str(len(versions)))]
    if damaged:
        found = [("models", "warning", f"{len(versions)}, damaged: {', '.join(damaged)}")]
    runs = [(d.state, d.reference) for m in models for d in m.drafts]
    for state in ("training", "unfinished"):
        if which := [reference for of, reference in runs if of == state]:
            found.append((state, "ok", ", ".join(which)))
    return found


def _leftovers(session: Session) -> list[Finding]:
    """What `quill gc` would remove."""
    from quill.registry import gc

    try:
        found = gc.plan(session.registry(), session.datasets())
    except QuillError:
        return []  # which the lines of the folders have told already
    if not found.removals:
        return [("leftovers", "ok", "none")]
    return [("leftovers", "ok", f"{size(found.bytes)} in {len(found.removals)}; quill gc removes them")]


def _encoding() -> Finding:
    import locale

    return "locale", "ok", f"{locale.getpreferredencoding(False)}; quill itself speaks UTF-8"
