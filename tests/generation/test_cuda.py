"""Steps recorded for a GPU give the same texts; here a step that runs again stands for its recording."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quill import discovery
from quill.config.settings import ModelConfig, SampleConfig
from quill.generation import cuda
from quill.generation.batch import Batch
from quill.generation.decoding import Decoder
from quill.generation.sampling import Sampler
from quill.model.gpt import GPT


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records steps after the second; the numbers of times that each recording was run."""
    runs: list[int] = []

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        at, result = len(runs), step()
        runs.append(0)

        def again() -> Tensor:
            runs[at] += 1
            # As on the device, every run writes to the same memory.
            return result.copy_(step())

        return again

    monkeypatch.setattr(cuda, "records", lambda device: True)
    monkeypatch.setattr(cuda, "record", record)
    monkeypatch.setattr(cuda, "_WORTHWHILE", 2)
    monkeypatch.setattr(cuda, "_FEWEST", 4)
    return runs


def small(block: str = "modern", n_layer: int = 2, ngram: int = 0) -> GPT:
    shape = ModelConfig(
        block=block, n_layer=n_layer, n_head=4, n_embd=16, block_size=16, vocab_size=19, ngram=ngram
    ).shape()
    model = GPT(shape, seed=5)
    if ngram:
        model.ngram.count(torch.arange(200).remainder(19).numpy().astype("uint16"))
    return model.eval()


def sampled(model: GPT, rows: int, n: int) -> list[list[int]]:
    first = torch.arange(rows)[:, None]
    sampler = Sampler(SampleConfig(seed=3), range(rows), first, 19)
    decoder, chosen, found = Decoder(model, rows=rows), first, []
    for _ in range(n):
        chosen = sampler(decoder.feed(chosen))
        found.append(chosen[:, 0].tolist())
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("block", discovery.names("model.blocks"))
def test_recorded_steps_give_the_same_text(block: str, rows: int, recorded: list[int]) -> None:
    model = small(block)
    texts = sampled(model, rows, 40)
    # Two steps, and the positions of each window that are read in parts, are not recorded.
    assert len(recorded) == 3 and sum(recorded) >= 30, "up to 4, 8 and 16 positions"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "records", lambda device: False)
        assert sampled(model, rows, 40) == texts


def test_a_bigram_table_and_ngram_counts_are_asked_about_the_last_tokens(recorded: list[int]) -> None:
    for model in (small(n_layer=0), small(ngram=3)):
        recorded.clear()
        texts = sampled(model, 2, 30)
        assert sum(recorded) > 15
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "records", lambda device: False)
            assert sampled(model, 2, 30) == texts


def test_logits_stay_when_the_next_step_is_run(recorded: list[int]) -> None:
    decoder, logits = Decoder(small()), []
    for token in range(6):
        logits.append(decoder.feed(torch.tensor([[token]])))
    assert sum(recorded) == 4
    kept = [x.clone() for x in logits]
    decoder.feed(torch.tensor([[7]]))
    assert all(torch.equal(x, y) for x, y in zip(logits, kept, strict=True))


def test_memory_that_was_never_written_does_not_matter(recorded: list[int]) -> None:
    model = small()
    cache = model.new_cache()
    for layer in cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    decoder = Decoder(model, cache=cache)
    for token in range(10):
        assert decoder.feed(torch.tensor([[token]])).isfinite().all()
    assert sum(recorded) == 8


def test_rows_that_join_and_leave_are_recorded_by_their_number(recorded: list[int]) -> None:
    model = small()

    def texts() -> list[list[int]]:
        batch, found = Batch(model, 4), []
        rows = [batch.join(model) for _ in range(3)]
        with torch.inference_mode():
            tokens = torch.cat([r.read(torch.arange(i + 1)[None]) for i, r in enumerate(rows)]).argmax(-1)
            for step in range(24):
                if step == 12:
                    batch.leave(rows.pop())
                    tokens = tokens[:2]
                tokens = batch.step(rows, tokens[:, None]).argmax(-1)
                found.append(tokens.tolist())
        return found

    with_recordings = texts()
    assert len(recorded) >= 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "records", lambda device: False)
        assert texts() == with_recordings
