"""The work whose speed is measured, each as a user's command does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from quill import threads
from quill.benchmark import flops
from quill.benchmark.subject import TEXT, Subject
from quill.config.settings import SampleConfig
from quill.config.shape import Shape
from quill.data import prepare
from quill.data.named_sources import NAMED
from quill.evaluation import measure
from quill.generation import cpu
from quill.generation.decoding import Decoder
from quill.generation.sampling import Sampler
from quill.model.gpt import GPT
from quill.training.trainer import Trainer

TRAINING, EVALUATION, PREPARING = "training", "evaluation", "preparing"
# Sequences side by side.
DECODING = {1: "decoding, batch 1", 8: "decoding, batch 8"}
# Tokens that are generated in turn, from one token on.
MOST_GENERATED = 128
# Steps that are queued on a GPU before their losses are read.
_QUEUED = 10
# A short text would measure what every call of prepare takes.
_PREPARED_BYTES = 1 << 24

# Does a piece of the work; returns its tokens and the seconds that they took.
Piece = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Work:
    """One kind of work.

    Attributes:
        name: What it is.
        piece: Does a piece of it.
        dtype: Precision of its products; empty if there are none.
        flops: Operations that the model needs per token; None if it is not computed by the model.
        bytes: Bytes of weights and cache that must be read per token; None if that does not bound it.
    """

    name: str
    piece: Piece
    dtype: str
    flops: float | None
    bytes: float | None

    def speed(self, seconds: float) -> float:
        """Tokens per second, over as many pieces as take some time, at least one."""
        tokens = taken = 0.0
        while not tokens or taken < seconds:
            more, took = self.piece()
            tokens, taken = tokens + more, taken + took
        return tokens / taken


def works(subject: Subject, folder: Path, *, whole_steps: bool) -> Iterator[Work]:
    """All kinds of work.

    Args:
        subject: The model and its text.
        folder: An empty folder for what is prepared.
        whole_steps: Whether the time of a step that was cut is that of the config's whole step.
    """
    dtype = subject.device.dtype
    pieces: dict[str, tuple[Piece, str]] = {
        TRAINING: (training(subject, whole_steps), dtype),
        **{name: (_decoding(subject, rows), "float32") for rows, name in DECODING.items()},
        EVALUATION: (evaluation(subject), "float32" if dtype == "float16" else dtype),
        PREPARING: (_preparing(subject, folder), ""),
    }
    for name, (piece, precision) in pieces.items():
        yield Work(name, piece, precision, *needs(name, subject.model.shape))


def needs(name: str, shape: Shape) -> tuple[float | None, float | None]:
    """The operations and the bytes to read per token of a kind of work; None where they do not bound it.

    Args:
        name: The kind of work.
        shape: The model's.
    """
    if name == PREPARING or not shape.n_layer:
        return None, None
    if name == TRAINING:
        return flops.training(shape), None
    if name == EVALUATION:
        return flops.forward(shape, shape.block_size), None
    context = generated(shape.block_size) / 2
    [rows] = [rows for rows, found in DECODING.items() if found == name]
    return flops.forward(shape, context), flops.bytes_read(shape, context, rows)


def generated(block_size: int) -> int:
    """Tokens that fill a context together with the first, but not too many."""
    return max(1, min(block_size - 1, MOST_GENERATED))


def training(subject: Subject, whole_steps: bool) -> Piece:
    """Optimizer steps; of a step that was cut to a share, the passes count as often as in the whole step."""
    trainer = Trainer(subject.model, subject.step, subject.dataset.train, subject.device)
    tokens = subject.step.batch_size * subject.model.shape.block_size
    repeated = subject.passes if whole_steps else 1.0
    steps = _QUEUED if subject.device.runs_ahead else 1

    def piece() -> tuple[float, float]:
        start = time.perf_counter()
        for _ in range(steps):
            trainer.enqueue()
        trainer.read()
        seconds = time.perf_counter() - start
        if repeated > 1:
            start = time.perf_counter()
            trainer.gradients()
            trainer.model.zero_grad(set_to_none=True)
            seconds += steps * (repeated - 1) * (time.perf_counter() - start)
        return steps * repeated * tokens, seconds

    return piece


def _decoding(subject: Subject, rows: int) -> Piece:
    """Samples side by side, as `quill sample` generates them; one with as many threads as are fastest."""
    model = subject.model
    device, n = model.wte.weight.device, generated(model.shape.block_size)
    first = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    config = SampleConfig(max_new_tokens=n, seed=0)

    def steps(twin: GPT) -> Iterator[str]:
        decoder = Decoder(twin, rows=rows)
        sampler = Sampler(config, range(rows), first, model.shape.vocab_size)
        chosen = first
        for _ in range(n):
            chosen = sampler(decoder.feed(chosen))
            yield str(chosen[:, 0].tolist())

    def piece() -> tuple[float, float]:
        # Training changes the weights, which the twin has a copy of.
        twin = cpu.for_decoding(model) if rows == 1 else cpu.for_batches(model)
        start = time.perf_counter()
        chunks = steps(twin)
        if rows == 1 and device.type == "cpu":
            chunks = cpu.at_best_threads(chunks)
        with threads.best_waiting("none" if rows == 1 else device.type) as pace:
            for _ in pace.each(range(n)):
                next(chunks)
        return n * rows, time.perf_counter() - start

    return piece


def evaluation(subject: Subject) -> Piece:
    """The validation loss of a few windows, in the precision that a run evaluates in."""
    size = subject.model.shape.block_size
    windows = max(1, measure.tokens_at_once(subject.device.kind) // size)
    tokens = subject.dataset.val[: windows * size + 1]

    def piece() -> tuple[float, float]:
        start = time.perf_counter()
        figures = measure.evaluate(
            subject.model, tokens, n_bytes=len(tokens), autocast=subject.device.autocast
        )
        return figures.tokens, time.perf_counter() - start

    return piece


def _preparing(subject: Subject, folder: Path) -> Piece:
    """A text of 16 MB turned into a dataset on disk, with a tokenizer that is trained already."""
    text = NAMED[TEXT].file
    assert text is not None
    once, source = text.read_bytes(), folder / "text.txt"
    source.write_bytes(once * (_PREPARED_BYTES // len(once)))
    config = subject.config.data.model_copy(update={"source": str(source)})
    tokenizer = subject.dataset.tokenizer

    def piece() -> tuple[float, float]:
        start = time.perf_counter()
        made = prepare.prepare(config, folder / "data", name="prepared", force=True, tokenizer=tokenizer)
        seconds = time.perf_counter() - start
        return made.count("train") + made.count("val"), seconds

    return piece
