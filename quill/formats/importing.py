"""Import a foreign model: read it, check it as strictly as quill's own, and publish it as a version."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quill import fsio, naming, strictjson
from quill.checkpoint.card import card
from quill.checkpoint.load import CONFIG, TOKENIZER, WEIGHTS, read_config, read_tokenizer
from quill.checkpoint.weights import stream_tensors
from quill.config import reading
from quill.config.differences import differences
from quill.config.settings import RunConfig
from quill.errors import CorruptError, InputError, NotFoundError, RefusedError, shorten
from quill.formats import base
from quill.registry import locks, manifest

if TYPE_CHECKING:
    import torch

    from quill.registry.store import Registry
    from quill.registry.version import Version

HUB = "hf:"
# Names of files and folders that say nothing about the model in them.
_NAMELESS = {"ckpt", "model", "checkpoint", "pytorch_model", "out", "nanogpt", "weights"}
_FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16")
_MOST_SHOWN = 3
# What may be a repository on the Hub: gpt2 or org/name, but not the path of a file.
_REPOSITORY = re.compile(r"(?!.*\.(?:pth?|bin|gguf|safetensors)$)(?:[\w-]+|\w[\w.-]*/\w[\w.-]*)")


class _Import(NamedTuple):
    """A model that passed all checks, the dtypes and shapes of its weights, its config and its facts."""

    name: str
    incoming: base.Incoming
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    config: RunConfig
    facts: dict[str, Any]


def _silent(message: str) -> None:
    """Ignore a notice."""


def import_model(
    source: str,
    registry: Registry,
    *,
    name: str | None = None,
    format_name: str = "auto",
    config: Path | None = None,
    tokenizer: str | None = None,
    new_version: bool = False,
    notice: Callable[[str], None] = _silent,
) -> Version:
    """Import a foreign model under a name; importing the same model again returns the version that exists.

    Args:
        source: A file, a folder, or hf:REPOSITORY on the Hugging Face Hub.
        registry: The registry to import into.
        name: The model's name; None to name it after the source.
        format_name: A registered format; "auto" to detect it.
        config: A config file of the foreign project, for a source without one.
        tokenizer: The vocabulary, for a source without one: a published tokenizer (gpt2), a tokenizer.json,
            a meta.pkl, or the text that the model was trained on.
        new_version: Import even if the name has a different model.
        notice: Called with a message before something that takes long.

    Returns:
        The version.

    Raises:
        NotFoundError: The source does not exist.
        CorruptError: It is damaged, unsafe, or incomplete.
        InputError: Only the caller can supply what is missing, or quill has no such model.
        RefusedError: The name has a different model.
        ResourceError: Disk, memory, permission or network.
    """
    name = naming.check(name, "model") if name is not None else _name(source)
    path = _locate(source, notice)
    kind = _detect(path, source) if format_name == "auto" else base.load(format_name)
    if not kind.reads:
        able = ", ".join(n for n in base.names() if base.load(n).reads)
        raise InputError(f"models cannot be imported from {kind.name}", why=f"quill imports {able}")
    made = _check(kind.read(path, base.Supplied(config, tokenizer)), name, _shown(source))
    made.facts["parent"] = {"reference": _shown(source), "digest": fingerprint(path)}
    made.facts["imported"] = {"format": kind.name, "notes": list(made.incoming.notes)}
    if found := _existing(made, registry, new_version):
        return found
    fsio.make_dir(registry.root)
    with locks.hold(registry.root, name):
        # Another import may have published it while this one waited for the lock.
        return _existing(made, registry, new_version) or _publish(made, registry)


def ensure(reference: str, registry: Registry, notice: Callable[[str], None] = _silent) -> Version:
    """Resolve a reference, importing it from the Hub first if it is hf:REPOSITORY.

    Args:
        reference: As for `Registry.resolve`, or hf:REPOSITORY.
        registry: The registry to look in and to import into.
        notice: Called with a message before something that takes long.
    """
    if not reference.startswith(HUB):
        return registry.resolve(reference)
    newest = registry.newest(_name(reference))
    if newest is not None and not newest.damaged:
        parent = newest.facts["parent"]
        if parent is not None and parent["reference"] == reference:
            return newest
    return import_model(reference, registry, notice=notice)


def fingerprint(path: Path) -> str:
    """The sha256, hex, of a file, or of the names and hashes of the files in a folder."""
    if path.is_file():
        return fsio.sha256(path)
    if not path.is_dir():
        raise CorruptError(f"'{path}' is not a plain file", why="it is a device or a pipe")
    # The Hub's cache contains links to what it fetched, so links are followed.
    found = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith("."))
    hashes = {f.name: fsio.sha256(f) for f in found}
    return hashlib.sha256(strictjson.canonical(hashes)).hexdigest()


def _locate(source: str, notice: Callable[[str], None]) -> Path:
    """The file or folder of a source, fetched first where it is on the Hub."""
    if not source:
        raise InputError("the source is empty", why="it is a file, a folder or hf:REPOSITORY")
    if source.startswith(HUB):
        from quill.formats.hf import hub

        return hub.fetch(source[len(HUB) :], notice)
    path = fsio.expanded(source)
    if not path.exists():
        raise NotFoundError(
            f"'{source}' does not exist",
            why="the source is a file, a folder or hf:REPOSITORY",
            hint=f"quill import {HUB}{source}" if _REPOSITORY.fullmatch(source) else "",
        )
    return path


def _detect(path: Path, source: str) -> base.Format:
    kinds = [k for k in map(base.load, base.names()) if k.reads]
    found = [k for k in kinds if k.recognises(path)]
    if len(found) == 1:
        return found[0]
    if found:
        why = f"it could be {' or '.join(k.name for k in found)}"
        raise InputError(f"the format of '{source}' is ambiguous", why=why, hint=f"format={found[0].name}")
    why = f"quill imports {', '.join(k.name for k in kinds)}, and it is none of these"
    hint = "quill import --help"
    if (path / manifest.FILE).is_file() and (path / WEIGHTS).is_file():
        why, hint = (
            "it is a version in a quill registry",
            f"quill cp {shlex.quote(_with_slash(source))} my-model",
        )
    elif path.is_file() and any(k.recognises(path.absolute().parent) for k in kinds):
        folder = shlex.quote(str(path.absolute().parent))
        why, hint = "it is only one file of a model", f"quill import {folder}"
    raise InputError(f"'{source}' is not in a format that quill imports", why=why, hint=hint)


def _check(incoming: base.Incoming, name: str, source: str) -> _Import:
    """Check names, shapes, dtypes and the vocabulary before anything is written."""
    from quill.model.gpt import outline

    model, tokenizer = incoming.model, incoming.tokenizer
    if model.n_layer > len(incoming.weights):
        why = f"{model.n_layer} layers, but only {len(incoming.weights)} tensors"
        raise CorruptError(f"'{source}' is not a complete model", why=why)
    wanted = {n: tuple(t.shape) for n, t in outline(model.shape()).state_dict().items()}
    layout = {n: (t.dtype, tuple(t.shape)) for n, t in incoming.weights.items() if n in wanted}
    wrong = [f"{shorten(n)} does not belong to this model" for n in incoming.weights if n not in wanted]
    if wrong := _mismatches(wanted, layout) + wrong:
        more = f"; and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        raise CorruptError(f"'{source}' is not a complete model", why="; ".join(wrong[:_MOST_SHOWN]) + more)
    rows = model.vocab_size or 0
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer does not belong to '{source}'",
            why=f"it has {tokenizer.vocab_size:,} tokens; the model has {rows:,}",
            hint="pass the model's own vocabulary as tokenizer=",
        )
    document = {"name": name, "data": {"tokenizer": tokenizer.kind}, "model": model.model_dump()}
    config = reading.check(RunConfig, document, origin=source, error=CorruptError)
    facts = {**incoming.facts, "parameters": sum(math.prod(shape) for shape in wanted.values())}
    return _Import(name, incoming, layout, config, facts)


def _mismatches(
    wanted: Mapping[str, tuple[int, ...]], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> list[str]:
    wrong = [f"{name} is missing" for name in wanted if name not in layout]
    for name, (dtype, shape) in layout.items():
        if shape != wanted[name]:
            wrong.append(f"{name} has shape {shape} instead of {wanted[name]}")
        elif str(dtype) not in _FLOATS:
            wrong.append(f"{name} is {dtype}; weights are float32, float16 or bfloat16")
    return wrong


def _existing(made: _Import, registry: Registry, new_version: bool) -> Version | None:
    """The newest version of the name if it is the same model.

    Raises:
        RefusedError: It is a different model, and `new_version` is not set.
    """
    newest = registry.newest(made.name)
    if newest is None or newest.damaged:
        return None
    changed = _changes(newest, made)
    if changed and not new_version:
        raise RefusedError(
            f"{newest.reference} is a different model", why="; ".join(changed), hint="new_version=True"
        )
    return None if changed else newest


def _changes(version: Version, made: _Import) -> list[str]:
    """How a version differs from what the import would publish."""
    imported, parent = version.facts["imported"], version.facts["parent"]
    if imported is None or parent is None:
        return ["it was not imported"]
    changed: list[str] = []
    if parent["digest"] != made.facts["parent"]["digest"]:
        changed.append(f"it was imported from other files ({parent['reference']})")
    was, now = imported["format"], made.facts["imported"]["format"]
    if was != now:
        changed.append(f"its format was {was}, not {now}")
    if read_tokenizer(version).fingerprint != made.incoming.tokenizer.fingerprint:
        changed.append("its tokenizer has another vocabulary")
    before, after = read_config(version).to_dict(), made.config.to_dict()
    for setting, (was, now) in differences({"model": before["model"]}, {"model": after["model"]}).items():
        changed.append(f"{setting} was {shorten(was)}, not {shorten(now)}")
    return changed


def _publish(made: _Import, registry: Registry) -> Version:
    draft = registry.begin(made.name)
    draft.lock_folder()
    try:
        draft.write_json(CONFIG, made.config.to_dict())
        draft.write_json(TOKENIZER, made.incoming.tokenizer.to_dict())
        draft.write_file(WEIGHTS, lambda path: stream_tensors(path, made.layout, made.incoming.weights))
        text = card(draft.reference, made.config, made.facts)
        draft.write_bytes("README.md", text.encode("utf-8", "replace"))
        return draft.publish(**made.facts)
    except BaseException:
        draft.discard()
        raise


def _with_slash(source: str) -> str:
    """A path as a reference, which is a name unless it contains a slash."""
    return source if "/" in source else f"./{source}"


def _name(source: str) -> str:
    """A model's name, made from its repository, its folder or its file."""
    if source.startswith(HUB):
        parts = [source[len(HUB) :].partition("@")[0].rpartition("/")[2]]
    else:
        path = fsio.expanded(source).absolute()
        parts = [path.name if path.is_dir() else path.stem, path.parent.name]
    for part in parts:
        cleaned = re.sub(r"[^a-z0-9._-]+", "-", part.lower()).strip("-._")[:64]
        if cleaned and (cleaned not in _NAMELESS or part is parts[-1]):
            return naming.check(cleaned, "model")
    raise InputError(f"'{source}' cannot name the model", why="it contains no letters", hint="name=my-model")


def _shown(source: str) -> str:
    """A source as the manifest records it, without the folders of this computer."""
    return source if source.startswith(HUB) else fsio.expanded(source).absolute().name
