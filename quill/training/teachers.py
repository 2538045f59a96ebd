"""The models that teach a run: found, pinned to their versions, checked, and their divergence from a student.

Distillation: Hinton et al. 2015, arXiv:1503.02531. Several teachers of the same little text: Timiryasov and
Tastet 2023, arXiv:2308.02019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quill.checkpoint.load import fit_vocabulary, load_checkpoint, read_config, read_tokenizer
from quill.config.settings import RunConfig
from quill.config.shape import Shape
from quill.errors import InputError, NotFoundError, QuillError
from quill.formats import importing
from quill.model.gpt import GPT
from quill.registry.folder import Folder
from quill.registry.manifest import Source
from quill.registry.store import Registry
from quill.registry.version import Version

if TYPE_CHECKING:
    from quill.data.dataset import Dataset


def find(
    config: RunConfig,
    registry: Registry,
    notice: Callable[[str], None] = lambda message: None,
    *,
    start_over: bool = False,
    new_version: bool = False,
) -> tuple[Folder, ...]:
    """The teachers of a run: those that it started with if it is unfinished or lengthens a finished one.

    Args:
        config: The run.
        registry: Where models are.
        notice: Receives a sentence before a download.
        start_over: Whether an unfinished run is going to be discarded.
        new_version: Whether the run is another one than the finished one.

    Raises:
        NotFoundError: There is no such model, or a teacher of an unfinished run is gone.
    """
    names = config.train.teacher
    if not names or not config.name:
        return tuple(importing.ensure(name, registry, notice) for name in names)
    newest, draft = registry.newest(config.name), registry.unfinished(config.name)
    if start_over or (newest is not None and draft is not None and draft.number < newest.number):
        draft = None
    status = draft.status() if draft is not None and draft.train_setting("teacher") == names else None
    pinned = [s for s in (status["teachers"] if status else None) or () if isinstance(s, dict)]
    if len(pinned) != len(names):
        taught = None if newest is None or new_version else newest.facts["teachers"]
        fresh = [importing.ensure(name, registry, notice) for name in names]
        # A name that teaches itself means the version before, not the one that it has taught.
        for i, (teacher, source) in enumerate(zip(fresh, taught or (), strict=False)):
            if teacher.name == config.name:
                with suppress(NotFoundError):
                    fresh[i] = _same(names[i], source, registry)
        return tuple(fresh)
    return tuple(_same(name, source, registry) for name, source in zip(names, pinned, strict=True))


def _same(name: str, source: Source, registry: Registry) -> Version:
    """The version that a run started with, renamed or not."""

    def candidates() -> Iterator[Version]:
        for reference in (source.get("reference"), name):
            try:
                yield registry.resolve(str(reference))
            except QuillError:
                continue
        yield from registry.entries(all_versions=True)

    for found in candidates():
        if found.digest == source.get("digest"):
            return found
    raise NotFoundError(
        f"there is no {source.get('reference')} any more, which teaches this run",
        why="an unfinished run resumes with the weights that it has learned from so far",
        hint='pass resume="never" to start over with other teachers',
    )


def check(teachers: Sequence[Folder], config: RunConfig, dataset: Dataset) -> None:
    """Refuse teachers that cannot read what the student reads.

    Args:
        teachers: Those of the run.
        config: The settled run.
        dataset: Its data.

    Raises:
        InputError: A teacher has another tokenizer or a shorter context.
    """
    length = config.model.block_size
    for teacher in teachers:
        tokenizer, context = read_tokenizer(teacher), read_config(teacher).model.block_size
        if tokenizer.fingerprint != dataset.tokenizer.fingerprint:
            raise InputError(
                f"{teacher.reference} cannot teach this run",
                why=f"its {tokenizer.kind} tokenizer is not that of the dataset '{dataset.name}'",
                hint=f"set data.source to the text that {teacher.reference} was trained on",
            )
        if context < length:
            raise InputError(
                f"{teacher.reference} cannot teach this run",
                why=f"its context length is {context:,}, and the run's is {length:,}",
                hint=f"set model.block_size={context}",
            )


def shapes(teachers: Sequence[Folder]) -> list[Shape]:
    """What teachers look like, without loading them."""
    return [fit_vocabulary(read_config(t), read_tokenizer(t), t).model.shape() for t in teachers]


def load(teachers: Sequence[Folder], device: str) -> tuple[GPT, ...]:
    """Load teachers, in eval mode and without gradients."""
    return tuple(load_checkpoint(t, device).model.network().requires_grad_(False).eval() for t in teachers)


def divergence(
    logits: Tensor,
    idx: Tensor,
    teachers: Sequence[GPT],
    temperature: float,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """The Kullback-Leibler divergence of a student from the mean of its teachers' probabilities.

    Args:
        logits: The student's, (B, T, V), float32.
        idx: What the teachers read, (B, T).
        teachers: One or more; their vocabularies may be padded to other sizes.
        temperature: Divides the logits of all.
        autocast: The context in which teachers compute.

    Returns:
        Mean over tokens in nats, times temperature ** 2, which keeps the size of the gradient.
    """
    rows = min(logits.shape[-1], *(t.shape.vocab_size for t in teachers))
    mean = torch.zeros((), device=logits.device)
    with torch.no_grad():
        for teacher in teachers:
            with autocast():
                predicted = teacher(idx)
            mean = mean + F.softmax(predicted[..., :rows].float() / temperature, dim=-1) / len(teachers)
    student = F.log_softmax(logits[..., :rows] / temperature, dim=-1)
    total = F.kl_div(student.flatten(0, 1), mean.flatten(0, 1), reduction="batchmean")
    return total * temperature**2
