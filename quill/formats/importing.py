"""Into the registry: a foreign model read, held to what quill's own must be, and published as a version."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quill import fsio, naming, strictjson
from quill.checkpoint import load as checkpoint
from quill.checkpoint import weights as tensors
from quill.checkpoint.card import card
from quill.config import reading
from quill.config.settings import RunConfig
from quill.errors import CorruptError, InputError, NotFoundError, RefusedError
from quill.formats import base
from quill.registry import locks
from quill.registry import manifest as manifests

if TYPE_CHECKING:
    from torch import Tensor

    from quill.registry.store import Registry
    from quill.registry.version import Version

HUB = "hf:"
# Names of files and folders that say nothing of the model in them.
_NAMELESS = {"ckpt", "model", "checkpoint", "pytorch_model", "out", "nanogpt", "weights"}
_FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16")
_SHOWN = 3
_NOTHING = base.Beside()


def _unheard(message: str) -> None:
    """Where nobody listens."""


def import_model(
    source: str,
    registry: Registry,
    *,
    name: str | None = None,
    format_name: str = "auto",
    beside: base.Beside = _NOTHING,
    new_version: bool = False,
    notice: Callable[[str], None] = _unheard,
) -> Version:
    """Read a foreign model and keep it by name; one that is there already is found.

    Args:
        source: A file, a folder, or hf:REPOSITORY on the Hugging Face Hub.
        registry: Where to keep it.
        name: What to call it; unset: after the source.
        format_name: A registered format; "auto" looks at the source.
        beside: What was given with it.
        new_version: Keep it beside another model of that name.
        notice: Told what takes long.

    Returns:
        The version.

    Raises:
        NotFoundError: There is no such file or repository.
        CorruptError: It is damaged, unsafe, or no whole model.
        InputError: Something is missing that only the caller can give, or quill has no such model.
        RefusedError: The name is another model's.
        ResourceError: Disk, memory, permission or network.
    """
    name = naming.check(name, "model") if name is not None else _name(source)
    if not source:
        raise InputError("the source is empty", why="it is a file, a folder or hf:REPOSITORY")
    path = _fetch(source, notice) if source.startswith(HUB) else fsio.expanded(source)
    if not path.exists():
        hint = f"quill import {HUB}{source}" if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) else ""
        raise NotFoundError(f"there is no '{source}'", why="it is neither a file nor a folder", hint=hint)
    digest = fingerprint(path)
    newest = registry.newest(name)
    if newest is not None and not newest.damaged:
        parent = (newest.manifest or {}).get("parent") or {}
        if parent.get("digest") == digest:
            return newest
        if not new_version:
            raise RefusedError(
                f"'{name}' is another model already",
                why=f"{newest.reference} was not imported from this source",
                hint=f"--name another, or --new-version for {name}:v{newest.number + 1}",
            )
    kind = _recognise(path, source) if format_name == "auto" else base.load(format_name)
    if not kind.reads:
        able = ", ".join(n for n in base.names() if base.load(n).reads)
        raise InputError(f"models cannot be imported from {kind.name}", why=f"one of {able} can be read")
    incoming = kind.read(path, beside)
    return _publish(incoming, registry, name, _shown(source), digest, kind.name)


def ensure(reference: str, registry: Registry, notice: Callable[[str], None] = _unheard) -> Version:
    """The version that a reference means, fetched from the Hub first where it names a repository there.

    Args:
        reference: What `Registry.resolve` takes, or hf:REPOSITORY.
        registry: Where it is, or will be kept.
        notice: Told what takes long.
    """
    if not reference.startswith(HUB):
        return registry.resolve(reference)
    newest = registry.newest(_name(reference))
    if newest is not None and not newest.damaged:
        parent = (newest.manifest or {}).get("parent") or {}
        if parent.get("reference") == reference:
            return newest
    return import_model(reference, registry, notice=notice)


def fingerprint(path: Path) -> str:
    """The sha256 that a source is recognised by, hex: a file's own, or one over a folder's files."""
    if path.is_file():
        return fsio.sha256(path)
    if not path.is_dir():
        raise CorruptError(f"'{path}' is not a plain file", why="it is a device or a pipe")
    # The Hub's cache holds links to what it fetched, so these are followed.
    found = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    listed = {f.name: fsio.sha256(f) for f in found}
    return hashlib.sha256(strictjson.canonical(listed)).hexdigest()


def _publish(
    incoming: base.Incoming, registry: Registry, name: str, source: str, digest: str, kind: str
) -> Version:
    _check(incoming, source)
    fsio.make_dir(registry.root)
    with locks.hold(registry.root, name):
        return _keep(incoming, registry, name, source, digest, kind)


def _keep(
    incoming: base.Incoming, registry: Registry, name: str, source: str, digest: str, kind: str
) -> Version:
    config = reading.check(
        RunConfig,
        {"name": name, "data": {"tokenizer": incoming.tokenizer.kind}, "model": incoming.model.model_dump()},
        origin=source,
        error=CorruptError,
    )
    draft = registry.begin(name)
    try:
        draft.write_json(checkpoint.CONFIG, config.to_dict())
        draft.write_json(checkpoint.TOKENIZER, incoming.tokenizer.to_dict())
        draft.write_file(checkpoint.WEIGHTS, lambda path: tensors.write(path, incoming.weights))
        facts: dict[str, Any] = {
            **incoming.facts,
            "parameters": sum(t.numel() for t in incoming.weights.values()),
            "parent": {"reference": source, "digest": digest},
            "imported": {"format": kind, "notes": list(incoming.notes)},
        }
        text = card(draft.reference, config, facts)
        draft.write_bytes("README.md", text.encode("utf-8", "replace"))
        return draft.publish(**facts)
    except BaseException:
        draft.discard()
        raise


def _check(incoming: base.Incoming, source: str) -> None:
    """Hold names, shapes and types to what the shape makes of them, before anything is written."""
    from quill.model.gpt import outline

    if incoming.model.n_layer > len(incoming.weights):
        why = f"{incoming.model.n_layer} layers, and {len(incoming.weights)} tensors"
        raise CorruptError(f"'{source}' is no whole model", why=why)
    wanted = {n: tuple(t.shape) for n, t in outline(incoming.model.shape()).state_dict().items()}
    wrong = _differences(wanted, incoming.weights)
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CorruptError(f"'{source}' is no whole model", why="; ".join(wrong[:_SHOWN]) + more)
    rows, tokens = incoming.model.vocab_size or 0, incoming.tokenizer.vocab_size
    if tokens > rows:
        raise InputError(
            f"the tokenizer is not that of '{source}'",
            why=f"it has {tokens:,} tokens, the model {rows:,}",
            hint="--tokenizer FILE",
        )


def _differences(wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> list[str]:
    wrong = [f"{n} is missing" for n in wanted if n not in weights]
    wrong += [f"{ascii(n)[1:-1][:60]} is in no such model" for n in weights if n not in wanted]
    for name, shape in wanted.items():
        found = weights.get(name)
        if found is not None and tuple(found.shape) != shape:
            wrong.append(f"{name} is {tuple(found.shape)}, its shape makes it {shape}")
        elif found is not None and str(found.dtype) not in _FLOATS:
            wrong.append(f"{name} is {found.dtype}, weights are float32, float16 or bfloat16")
    return wrong


def _recognise(path: Path, source: str) -> base.Format:
    kinds = [k for k in map(base.load, base.names()) if k.reads]
    found = [k for k in kinds if k.recognises(path)]
    if len(found) == 1:
        return found[0]
    if found:
        why = f"it could be {' or '.join(k.name for k in found)}"
        raise InputError(f"'{source}' could be several formats", why=why, hint=f"--format {found[0].name}")
    able = ", ".join(k.name for k in kinds)
    why, hint = f"neither its name nor its first bytes are those of {able}", "quill import --help"
    if (path / manifests.FILE).is_file() and (path / checkpoint.WEIGHTS).is_file():
        why, hint = "it is a version of quill's own", f"quill cp {_path(source)} NAME"
    elif path.is_file() and any(k.recognises(path.absolute().parent) for k in kinds):
        why, hint = "it is part of a model's folder", f"quill import {path.absolute().parent}"
    raise InputError(f"'{source}' is of no format that quill reads", why=why, hint=hint)


def _path(source: str) -> str:
    """A path as a reference: with a slash in it."""
    return source if "/" in source else f"./{source}"


def _name(source: str) -> str:
    """What to call a model: after its repository, its folder or its file."""
    if source.startswith(HUB):
        parts = [source[len(HUB) :].partition("@")[0].rpartition("/")[2]]
    else:
        path = fsio.expanded(source).absolute()
        parts = [path.name if path.is_dir() else path.stem, path.parent.name]
    for part in parts:
        cleaned = re.sub(r"[^a-z0-9._-]+", "-", part.lower()).strip("-._")[:64]
        if cleaned and (cleaned not in _NAMELESS or part is parts[-1]):
            return naming.check(cleaned, "model")
    raise InputError(f"'{source}' gives the model no name", why="it has no letters", hint="--name my-model")


def _fetch(source: str, notice: Callable[[str], None]) -> Path:
    from quill.formats.hf import hub as _hub

    return _hub.fetch(source[len(HUB) :], notice)


def _shown(source: str) -> str:
    """The source as the manifest keeps it: without the folders of this machine."""
    return source if source.startswith(HUB) else fsio.expanded(source).absolute().name
