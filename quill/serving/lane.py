"""The samples of one loaded model: which may start, what each draws next, and when it has ended.

Everything here runs on the engine's thread. One turn reads at most one chunk of prompts, draws one token for
every sample that is ready, and takes one step of the model for all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from quill.errors import DivergedError
from quill.generation.batch import Batch, BatchRow
from quill.generation.cpu import FEW_TOKENS
from quill.generation.generator import Generator
from quill.generation.row import Row
from quill.generation.sampling import Sampler, check_finite, draw_together
from quill.serving.jobs import Job, Piece, TokenInfo
from quill.threads import one_thread
from quill.tokenizers.base import StreamDecoder

Deliver = Callable[[Job, list[Piece], Exception | None], None]
# The log probability of a token, and the likeliest tokens with theirs.
Logprob = tuple[float, tuple[tuple[int, float], ...]]

# Tokens of prompts that are read at once while other samples wait for their next token.
_CHUNK = 128
# Positions whose logits over the whole vocabulary exist at once.
_SCORED_AT_ONCE = 128
_FEW_ROWS = 3
# JSON has no infinity.
LEAST = -9999.0


class Sample:
    """One sample of a job.

    Args:
        job: The job.
        index: Number of the sample in its job.
        generator: The model and its tokenizer.
    """

    def __init__(self, job: Job, index: int, generator: Generator) -> None:
        self.job, self.index = job, index
        self.prompt, number = divmod(index, job.n)
        tokenizer, size = generator.tokenizer, generator.model.shape.block_size
        whole = torch.tensor([job.prompts[self.prompt]], device=generator.device)
        self.idx = whole[:, -size:]
        self.sampler = Sampler(job.config, [number], whole, tokenizer.vocab_size)
        self.row: BatchRow | None = None
        self.logits: Tensor | None = None
        self.read = 0
        self._drawn = 0
        self._text = Row(tokenizer, job.config.stop, ends=job.ends)
        self._eot = tokenizer.eot_id if job.ends else None
        # Counts characters as they are decoded, before stop strings hold some back.
        self._decoder = StreamDecoder(tokenizer)
        self._decoded = self._sent = 0
        self._offset = job.offsets.get(self.prompt, 0)
        # With where the text of each begins and ends in what was decoded.
        self._held: list[tuple[TokenInfo, int, int]] = []

    @property
    def has_drawn(self) -> bool:
        """Whether a token was drawn."""
        return self._drawn > 0

    def take(self, token: int, logprob: Logprob | None) -> Piece:
        """Add a drawn token; return what is new in the text."""
        self._drawn += 1
        text, finish = self._text.feed(token), None
        if self._text.done:
            finish = "stop"
        elif self._drawn == self.job.config.max_new_tokens:
            finish = "length"
            text += self._text.flush()
        piece = Piece(self.index, text, finish=finish, drawn=1)  # type: ignore[arg-type]
        self._sent += len(text)
        if logprob is not None:
            start = self._decoded
            if token != self._eot:
                self._decoded += len(self._decoder.feed(token))
            if token != self._eot or self.job.score:
                self._held.append((TokenInfo(token, self._offset + start, *logprob), start, self._decoded))
            piece.tokens = self._certain(finish is not None)
        return piece

    def _certain(self, ended: bool) -> list[TokenInfo]:
        """The held tokens whose text was sent; at the end all but those that a stop string cut off."""
        held = self._held
        if ended:
            n = len(held)
            if self._text.stopped:
                n = sum(start < self._sent for _, start, _ in held)
        else:
            n = sum(end <= self._sent for _, _, end in held)
            # The first tokens of a character wait for the one that completes it.
            while n and held[n - 1][1] == held[n - 1][2]:
                n -= 1
        self._held = held[n:]
        return [token for token, _, _ in held[:n]]


class Lane:
    """The waiting and running samples of one model.

    Args:
        generator: The model.
        slots: The most samples at once.
        deliver: Takes what is new in a job, or the error that ended it.
    """

    def __init__(self, generator: Generator, slots: int, deliver: Deliver) -> None:
        self.generator, self._deliver = generator, deliver
        self.batch = Batch(generator.ready(FEW_TOKENS, slots), slots)
        self._waiting: deque[tuple[Job, Iterator[int]]] = deque()
        self._samples: list[Sample] = []
        self._on_cpu = generator.device.type == "cpu"

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._samples or self._waiting)

    @property
    def slots(self) -> int:
        """The most samples at once."""
        return len(self.batch.rows)

    @property
    def running(self) -> int:
        """Samples in progress."""
        return len(self._samples)

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._waiting.append((job, iter(range(len(job.prompts) * job.n))))

    def fail(self, error: Exception) -> None:
        """End every job with an error."""
        for job in self._jobs():
            self._deliver(job, [], error)
        self._waiting.clear()
        for sample in list(self._samples):
            self._end(sample, damaged=True)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Take the paths of one row and of two once, so that the first request does not wait for them."""
        model = self.generator.ready(FEW_TOKENS)
        first = torch.zeros(1, 1, dtype=torch.int64, device=self.generator.device)
        rows = []
        for _ in range(min(2, len(self.batch.rows))):
            rows.append(self.batch.join(model))
            rows[-1].read(first)
            self.batch.step(rows, first.expand(len(rows), 1))
        for row in rows:
            self.batch.leave(row)

    @torch.inference_mode()
    def turn(self) -> None:
        """Advance every sample by at most one token."""
        self._drop_cancelled()
        room = _CHUNK
        while room > 0 and (read := self._read_prompt(room)) is not None:
            room -= read
        ready = [s for s in self._samples if s.logits is not None]
        if ready and (going := self._draw(ready)):
            rows = [s.row for s, _ in going if s.row is not None]
            tokens = torch.cat([token for _, token in going])
            with self._threads(len(going)):
                logits = self.batch.step(rows, tokens)
            for (sample, _), row in zip(going, torch.split(logits, 1), strict=True):
                sample.logits = row

    def _jobs(self) -> list[Job]:
        found = [*(s.job for s in self._samples), *(job for job, _ in self._waiting)]
        return list(dict.fromkeys(found))

    def _threads(self, rows: int) -> AbstractContextManager[None]:
        # Few rows take so little arithmetic that sharing it costs more than it gains.
        return one_thread() if self._on_cpu and rows <= _FEW_ROWS else nullcontext()

    def _drop_cancelled(self) -> None:
        if any(job.cancelled for job, _ in self._waiting):
            self._waiting = deque((job, rest) for job, rest in self._waiting if not job.cancelled)
        for sample in [s for s in self._samples if s.job.cancelled]:
            self._end(sample)

    def _read_prompt(self, room: int) -> int | None:
        """Read on in a sample that is starting, or start the next one if there is a slot.

        Args:
            room: The most tokens to read while other samples wait.

        Returns:
            How many tokens were read; None if there was nothing to do.
        """
        sample = next((s for s in self._samples if s.logits is None), None)
        try:
            if sample is None and (sample := self._start()) is None:
                return None
            if sample.row is None or sample.logits is not None:
                return 0
            # A sample that is alone reads its prompt at once, as `quill sample` does.
            end = sample.idx.shape[1] if len(self._samples) == 1 else sample.read + room
            tokens = sample.idx[:, sample.read : end]
            with self._threads(1):
                logits = sample.row.read(tokens)
            sample.read += tokens.shape[1]
            if sample.read == sample.idx.shape[1]:
                sample.logits = logits
            return tokens.shape[1]
        except Exception as e:
            if sample is None:
                raise
            self._end_job(sample.job, e)
            return 0

    def _start(self) -> Sample | None:
        """Begin one sample of the job that waits longest, whose next one waits behind the others' first."""
        while self._waiting and not self.batch.is_full:
            job, rest = self._waiting.popleft()
            index = next(rest, None)
            if index is None:
                continue
            job.started = True
            if job.score and index % job.n == 0:
                self._score(job, index)
            if job.config.max_new_tokens == 0:
                self._deliver(job, [Piece(index, finish="length")], None)
                self._waiting.appendleft((job, rest))
                return None
            sample = Sample(job, index, self.generator)
            like = next((s for s in self._samples if s.job is job and self._same_start(s, sample)), None)
            sample.row = self.batch.join(
                self.generator.ready(job.config.max_new_tokens), None if like is None else like.row
            )
            self._samples.append(sample)
            if like is not None:
                sample.logits, sample.read = like.logits, like.read
            self._waiting.append((job, rest))
            return sample
        return None

    @staticmethod
    def _same_start(other: Sample, sample: Sample) -> bool:
        """Whether a sample of the same prompt has read it, and drawn nothing yet."""
        return other.prompt == sample.prompt and other.logits is not None and not other.has_drawn

    def _draw(self, ready: list[Sample]) -> list[tuple[Sample, Tensor]]:
        """Draw a token for each sample; return those that continue, with their tokens."""
        ready = self._finite(ready)
        if not ready:
            return []
        logits = torch.cat([s.logits for s in ready if s.logits is not None])
        chosen = draw_together([s.sampler for s in ready], logits)
        news: dict[Job, list[Piece]] = {}
        going = []
        for i, (sample, token) in enumerate(zip(ready, chosen[:, 0].tolist(), strict=True)):
            logprob = None
            if sample.job.logprobs is not None:
                size = self.generator.tokenizer.vocab_size
                logprob = logprobs(logits[i : i + 1, :size], chosen[i : i + 1], sample.job.logprobs)[0]
            piece = sample.take(token, logprob)
            news.setdefault(sample.job, []).append(piece)
            if piece.finish is None:
                going.append((sample, chosen[i : i + 1]))
            else:
                self._end(sample)
        for job, pieces in news.items():
            self._deliver(job, pieces, None)
        return going

    def _finite(self, ready: list[Sample]) -> list[Sample]:
        """The samples whose logits are finite; the jobs of the others end with an error."""
        good = []
        for sample in ready:
            try:
                if sample.logits is not None:
                    check_finite(sample.logits[:, : self.generator.tokenizer.vocab_size].double())
                good.append(sample)
            except DivergedError as e:
                self._end_job(sample.job, e)
        return [s for s in good if s in self._samples]

    def _score(self, job: Job, index: int) -> None:
        """Report the log probabilities of a prompt's own tokens."""
        ids, tokenizer, model = job.prompts[index // job.n], self.generator.tokenizer, self.generator.model
        idx = torch.tensor([ids], device=self.generator.device)
        found: list[Logprob | None] = [None]
        # Nothing follows the last token, so it may be one more than the context has room for.
        read = idx[:, : max(1, len(ids) - 1)]
        hidden, near = model.hidden(read), model.near(read)
        for start in range(0, len(ids) - 1, _SCORED_AT_ONCE):
            end = min(start + _SCORED_AT_ONCE, len(ids) - 1)
            part = slice(start, end)
            logits = model.head(hidden[:, part], None if near is None else near[:, part])
            logits = logits[0, :, : tokenizer.vocab_size]
            found += logprobs(logits, idx[0, start + 1 : end + 1, None], job.logprobs or 0)
        decoder, tokens, offset = StreamDecoder(tokenizer), [], 0
        for token, one in zip(ids, found, strict=True):
            tokens.append(TokenInfo(token, offset, *(one or (None, None))))
            offset += len(decoder.feed(token))
        job.offsets[index // job.n] = offset + len(decoder.flush())
        self._deliver(job, [Piece(index + i, tokens=list(tokens)) for i in range(job.n)], None)

    def _end_job(self, job: Job, error: Exception) -> None:
        for sample in [s for s in self._samples if s.job is job]:
            self._end(sample, damaged=True)
        self._waiting = deque(w for w in self._waiting if w[0] is not job)
        self._deliver(job, [], error)

    def _end(self, sample: Sample, *, damaged: bool = False) -> None:
        self._samples.remove(sample)
        if sample.row is not None:
            self.batch.leave(sample.row, damaged=damaged)


def logprobs(logits: Tensor, chosen: Tensor, most: int) -> list[Logprob]:
    """The log probabilities of tokens and of the likeliest at their positions, before any temperature.

    Args:
        logits: (B, V).
        chosen: Token ids, (B, 1).
        most: How many of the likeliest.
    """
    table = logits.float().log_softmax(-1)
    own = table.gather(-1, chosen)[:, 0].tolist()
    values, ids = (x.tolist() for x in table.topk(min(most, table.shape[-1])))
    found = []
    for value, token, row, names in zip(own, chosen[:, 0].tolist(), values, ids, strict=True):
        top = {name: max(v, LEAST) for name, v in zip(names, row, strict=True)}
        top.setdefault(token, max(value, LEAST))
        found.append((top[token], tuple(top.items())))
    return found
