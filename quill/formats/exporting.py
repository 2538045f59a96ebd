"""Out of the registry: a model in a foreign format, compared with the foreign program, put in place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quill import fsio
from quill.checkpoint.load import Checkpoint, load_checkpoint
from quill.errors import InputError, RefusedError
from quill.formats import base

if TYPE_CHECKING:
    from quill.registry.version import Version

# What people call the types elsewhere.
_DTYPES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}
# The largest difference of a logit, relative to the largest logit where that is above 1, that rounding of
# the weights may make where a format does not say otherwise.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_SEED = 20_250_101


@dataclass(frozen=True)
class Difference:
    """How far a foreign program's logits are from quill's.

    Attributes:
        largest: The largest absolute difference of a logit.
        magnitude: The largest absolute logit.
        lengths: How many tokens there were in each comparison.
        runtime: The foreign program.
    """

    largest: float
    magnitude: float
    lengths: tuple[int, ...]
    runtime: str


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        path: The file or folder.
        format: The format's registered name.
        dtype: How the weights were kept.
        size: Bytes in all.
        notes: What a person should know of the translation.
        difference: From the foreign program; None where it was not asked.
    """

    path: Path
    format: str
    dtype: str
    size: int
    notes: tuple[str, ...]
    difference: Difference | None


def export(
    version: Version,
    format_name: str,
    out: Path | None = None,
    *,
    dtype: str | None = None,
    verify: bool = False,
    modelfile: bool = False,
    force: bool = False,
) -> Exported:
    """Write a model in a foreign format.

    Args:
        version: The model.
        format_name: A registered format.
        out: The file or folder to make; unset: the model's name and the format's suffix, here.
        dtype: How the weights are kept; unset: the format's default.
        verify: Compare the foreign program's logits with quill's before anything is put in place.
        modelfile: Also write what Ollama makes a model of, as PATH.Modelfile.
        force: Replace what is there, if it is such an export.

    Returns:
        What was made.

    Raises:
        InputError: The format cannot hold the model or is not written, or a package is missing.
        RefusedError: Something is there already, or the foreign program computes something else.
        ResourceError: Disk or permission.
    """
    kind = _written(format_name, verify=verify)
    dtype = _dtype(kind, dtype)
    target = Path(f"{version.name}{kind.suffix}") if out is None else fsio.expanded(out)
    recipe = target.with_name(f"{target.name}.Modelfile") if modelfile else None
    for path in (target, recipe):
        if path and os.path.lexists(path) and not force:
            why = "nothing is written over unasked"
            raise RefusedError(f"'{path}' exists already", why=why, hint="--force")
    loaded = _load(kind, version)
    told = kind.modelfile(target.name, loaded) if recipe else None
    if recipe and told is None:
        raise InputError(
            f"Ollama does not load {kind.name}", why="--modelfile is for it", hint="--format gguf"
        )
    fsio.make_dir(target.absolute().parent)
    with fsio.stage(target.absolute(), replace=force) as made:
        notes = kind.write(loaded, made, dtype)
        if force:
            _refuse_other(made, target)
        difference = _compare(kind, loaded, made) if verify else None
        if difference:
            _refuse_different(difference, kind, dtype, version)
        size = sum(f.stat().st_size for f in (made.rglob("*") if made.is_dir() else [made]))
    if recipe and told:
        fsio.write_bytes(recipe.absolute(), told.encode())
        notes = (*notes, f"for Ollama: ollama create {version.name} -f {recipe}")
    return Exported(target, kind.name, dtype, size, notes, difference)


def _written(format_name: str, *, verify: bool) -> base.Format:
    """The format, if it is written, and can be verified where that is asked for."""
    kind = base.load(format_name)
    if not kind.writes:
        able = ", ".join(n for n in base.names() if base.load(n).writes)
        why = "it is only read"
        raise InputError(f"models cannot be exported to {kind.name}", why=why, hint=f"one of {able}")
    if verify and not kind.runtime:
        raise InputError(
            f"--verify does not apply to {kind.name}",
            why="there is no program to run it with but the project's own scripts",
            hint="leave --verify out",
        )
    return kind


def _load(kind: base.Format, version: Version) -> Checkpoint:
    """The model, if the format can hold it."""
    loaded = load_checkpoint(version)
    if why := kind.refusal(loaded.config.model, loaded.tokenizer):
        able = _able(loaded)
        raise InputError(
            f"{kind.name} cannot hold {version.reference}: {why}",
            why=f"it can be exported to {', '.join(able) or 'no other format'}",
            hint=f"quill export {version.reference} --format {able[0]}" if able else "",
        )
    return loaded


def _dtype(kind: base.Format, dtype: str | None) -> str:
    chosen = _DTYPES.get(dtype or "", dtype) or kind.dtypes[0]
    if chosen not in kind.dtypes:
        raise InputError(
            f"--dtype {dtype} is refused",
            why=f"{kind.name} keeps weights as {', '.join(kind.dtypes)}",
            hint=f"--dtype {kind.dtypes[0]}",
        )
    return chosen


def _able(loaded: Checkpoint) -> list[str]:
    """The formats that can hold a model."""
    kinds = (base.load(name) for name in base.names())
    return [k.name for k in kinds if k.writes and not k.refusal(loaded.config.model, loaded.tokenizer)]


def _refuse_other(made: Path, target: Path) -> None:
    """Replace an export only by another: --force is no licence to delete somebody's folder."""
    if not os.path.lexists(target):
        return
    if made.is_dir() != target.is_dir() or target.is_symlink():
        kinds = ("a folder", "a file") if made.is_dir() else ("a file", "a folder")
        raise RefusedError(
            f"'{target}' is not replaced",
            why=f"the export is {kinds[0]}, and that is a link or {kinds[1]}",
            hint="choose another --out",
        )
    if made.is_dir():
        foreign = sorted(set(os.listdir(target)) - set(os.listdir(made)))
        if foreign:
            raise RefusedError(
                f"'{target}' is not replaced",
                why=f"it holds '{foreign[0]}', which no such export does",
                hint="choose another --out",
            )


def _compare(kind: base.Format, loaded: Checkpoint, made: Path) -> Difference:
    """Ask quill and the foreign program for the logits of the same tokens, at several lengths."""
    import torch

    rows, context = loaded.tokenizer.vocab_size, loaded.config.model.block_size
    lengths = tuple(sorted({1, min(2, context), min(17, context), context}))
    generator = torch.Generator().manual_seed(_SEED)
    largest = magnitude = 0.0
    for length in lengths:
        idx = torch.randint(rows, (1, length), generator=generator)
        ours = loaded.model.predict(idx).float()[..., :rows]
        theirs = kind.logits(made, idx)[..., :rows]
        difference = float((ours - theirs).abs().max())
        # What is not a number compares as no difference at all.
        largest = max(largest, difference if difference == difference else float("inf"))
        magnitude = max(magnitude, float(ours.abs().max()))
    return Difference(largest, magnitude, lengths, kind.runtime)


def _refuse_different(found: Difference, kind: base.Format, dtype: str, version: Version) -> None:
    limit = kind.tolerance.get(dtype, _TOLERANCE.get(dtype, 1.0)) * max(1.0, found.magnitude)
    if not found.largest <= limit:
        raise RefusedError(
            f"{found.runtime} computes something else than {version.reference}",
            why=f"its logits differ by up to {found.largest:.3g}, at most {limit:.3g} is let pass in {dtype}",
            hint="leave --verify out to have it all the same",
        )
