"""Exports a model to a foreign format, and compares the program that runs it with quill."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quill import fsio
from quill.checkpoint.load import Checkpoint, load_checkpoint, open_checkpoint, read_config
from quill.errors import InputError, RefusedError
from quill.formats import base

if TYPE_CHECKING:
    from quill.registry.folder import Folder

# Other common names of dtypes.
_DTYPES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "bf16": "bfloat16"}
# The largest difference that rounding of the weights may make, unless the format states another; relative to
# the largest logit if that is above 1.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# float32 cannot represent the probability of e^-87 and less.
_LEAST_LOG_PROBABILITY = -80.0
_SEED = 20_250_101


@dataclass(frozen=True)
class Difference:
    """How far another program's logits are from quill's.

    Attributes:
        largest: The largest absolute difference of a logit.
        magnitude: The largest absolute logit.
        lengths: The lengths of the prompts, in tokens.
        runtime: The other program.
        quantity: What was compared: "logits" or "log probabilities".
    """

    largest: float
    magnitude: float
    lengths: tuple[int, ...]
    runtime: str
    quantity: str = "logits"

    def __str__(self) -> str:
        lengths = ", ".join(map(str, self.lengths[:-1]))
        lengths = f"{lengths} and {self.lengths[-1]}" if lengths else str(self.lengths[-1])
        return (
            f"{self.runtime} and quill agree: {self.quantity} up to {self.magnitude:.3g} differ by at most "
            f"{self.largest:.2g}, for prompts of {lengths} tokens"
        )


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        path: The file or folder.
        format: The format's registered name.
        dtype: The dtype of the weights.
        size: The total size in bytes.
        notes: What the user should know about the conversion.
        difference: From the program that runs the export; None if they were not compared.
    """

    path: Path
    format: str
    dtype: str
    size: int
    notes: tuple[str, ...]
    difference: Difference | None


def export(
    version: Folder,
    format_name: str,
    out: Path | None = None,
    *,
    dtype: str | None = None,
    verify: bool = False,
    modelfile: bool = False,
    force: bool = False,
    device: str = "cpu",
) -> Exported:
    """Export a model to a foreign format.

    Args:
        version: The model: a version, or an unfinished run with weights.
        format_name: A registered format.
        out: The file or folder to write; unset: the model's name with the format's suffix, in the current
            folder.
        dtype: The dtype of the weights; unset: the format's default.
        verify: Compare the logits of the program that runs the export with quill's before the export is moved
            to its path.
        modelfile: Also write a Modelfile for Ollama, as PATH.Modelfile.
        force: Replace an existing export.
        device: Where quill's own model runs when they are compared.

    Returns:
        The export.

    Raises:
        InputError: The format does not support the model, is read-only, or requires a missing package.
        RefusedError: The path exists, or the other program computes something else.
        ResourceError: Disk or permission.
    """
    kind = _format(format_name, verify=verify)
    dtype = _dtype(kind, dtype)
    target = Path(f"{version.name}{kind.suffix}") if out is None else fsio.expanded(out)
    recipe = target.with_name(f"{target.name}.Modelfile") if modelfile else None
    for path in (target, recipe):
        if path and os.path.lexists(path) and not force:
            why = "an export never overwrites silently"
            raise RefusedError(f"'{path}' already exists", why=why, hint="force=True")
    has_counts = bool(read_config(version).model.ngram)
    with _open(kind, version, stream=kind.streams and not verify and not has_counts) as loaded:
        modelfile_text = kind.modelfile(target.name, loaded) if recipe else None
        if recipe and modelfile_text is None:
            why = "a Modelfile is for Ollama"
            raise InputError(f"Ollama cannot load {kind.name}", why=why, hint="format=gguf")
        fsio.make_dir(target.absolute().parent)
        with fsio.stage(target.absolute(), replace=force) as made:
            notes = kind.write(loaded, made, dtype)
            if has_counts:
                notes = (*notes, "the export has the network alone, without the n-gram counts")
            if force:
                _refuse_other(made, target)
            difference = _compare(kind, loaded, made, device) if verify else None
            if difference:
                _refuse_different(difference, kind, dtype, version)
            size = sum(f.stat().st_size for f in (made.rglob("*") if made.is_dir() else [made]))
    if recipe and modelfile_text:
        fsio.write_bytes(recipe.absolute(), modelfile_text.encode())
        notes = (*notes, f"for Ollama: {shlex.join(['ollama', 'create', version.name, '-f', str(recipe)])}")
    return Exported(target, kind.name, dtype, size, notes, difference)


def _format(format_name: str, *, verify: bool) -> base.Format:
    """The format, if quill can write and, if need be, verify it."""
    kind = base.load(format_name)
    if not kind.writes:
        able = ", ".join(n for n in base.names() if base.load(n).writes)
        raise InputError(f"quill only reads {kind.name}", why=f"it writes {able}", hint="format=hf")
    if verify and not kind.runtime:
        why = "only its own project's scripts run it"
        raise InputError(f"quill cannot verify {kind.name}", why=why, hint="leave out verify=True")
    return kind


@contextmanager
def _open(kind: base.Format, version: Folder, stream: bool) -> Iterator[Checkpoint]:
    """The model, if the format supports it: in memory, or each weight read when it is written."""
    with open_checkpoint(version) if stream else nullcontext(load_checkpoint(version)) as loaded:
        if why := kind.refusal(loaded.model.shape, loaded.tokenizer):
            able = _able(loaded)
            raise InputError(
                f"{kind.name} does not support {version.reference}: {why}",
                why=f"it can be exported to {', '.join(able) or 'no other format'}",
                hint=f"quill export {version.reference} --format {able[0]}" if able else "",
            )
        yield _network_alone(loaded) if loaded.model.shape.ngram else loaded


def _network_alone(loaded: Checkpoint) -> Checkpoint:
    """The model without n-gram counts, which no other format has."""
    config = loaded.config.model_copy(update={"model": loaded.config.model.model_copy(update={"ngram": 0})})
    return replace(loaded, config=config, model=loaded.model.network())


def _dtype(kind: base.Format, dtype: str | None) -> str:
    chosen = _DTYPES.get(dtype or "", dtype) or kind.dtypes[0]
    if chosen not in kind.dtypes:
        raise InputError(
            f"{kind.name} has no dtype '{dtype}'",
            why=f"it has {', '.join(kind.dtypes)}",
            hint=f"dtype={kind.dtypes[0]}",
        )
    return chosen


def _able(loaded: Checkpoint) -> list[str]:
    """The formats that support a model."""
    kinds = (base.load(name) for name in base.names())
    return [k.name for k in kinds if k.writes and not k.refusal(loaded.model.shape, loaded.tokenizer)]


def _refuse_other(made: Path, target: Path) -> None:
    """Refuse to replace anything but an export of the same kind."""
    if not os.path.lexists(target):
        return
    why = ""
    if made.is_dir() != target.is_dir() or target.is_symlink():
        kinds = ("a folder", "a file") if made.is_dir() else ("a file", "a folder")
        why = f"the export is {kinds[0]}, and the path is a link or {kinds[1]}"
    elif made.is_dir() and (foreign := sorted(set(os.listdir(target)) - set(os.listdir(made)))):
        why = f"it contains '{foreign[0]}', which is not part of such an export"
    if why:
        raise RefusedError(f"'{target}' was not replaced", why=why, hint="choose another path for the export")


def _compare(kind: base.Format, loaded: Checkpoint, made: Path, device: str) -> Difference:
    """Compare the logits of random prompts of several lengths."""
    import torch

    rows, context = loaded.tokenizer.vocab_size, loaded.config.model.block_size
    lengths = tuple(sorted({1, min(2, context), min(17, context), context}))
    generator = torch.Generator().manual_seed(_SEED)
    model = loaded.model.to(device)
    largest = magnitude = 0.0
    for length in lengths:
        idx = torch.randint(rows, (1, length), generator=generator)
        found = kind.logits(made, idx)
        ours = model.predict(idx.to(device))[0, list(found)].float().cpu()[:, :rows]
        theirs = torch.stack(list(found.values()))[:, :rows]
        if kind.log_probabilities:
            ours, theirs = (x.log_softmax(-1).clamp(min=_LEAST_LOG_PROBABILITY) for x in (ours, theirs))
        difference = float((ours - theirs).abs().max())
        # max() would drop NaN.
        largest = max(largest, difference if difference == difference else float("inf"))
        magnitude = max(magnitude, float(ours.abs().max()))
    quantity = "log probabilities" if kind.log_probabilities else "logits"
    return Difference(largest, magnitude, lengths, kind.runtime, quantity)


def _refuse_different(found: Difference, kind: base.Format, dtype: str, version: Folder) -> None:
    limit = kind.tolerance.get(dtype, _TOLERANCE.get(dtype, 1.0)) * max(1.0, found.magnitude)
    if not found.largest <= limit:
        raise RefusedError(
            f"{found.runtime} and quill disagree on {version.reference}",
            why=f"{found.quantity} differ by up to {found.largest:.3g}, by more than {limit:.3g} for {dtype}",
            hint="to export it anyway, leave out verify=True",
        )
