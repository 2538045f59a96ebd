"""The windows of a step, and evaluation over each token once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quill.data.batches import batch, check_length, windows
from quill.errors import InputError

TOKENS = np.arange(1000, dtype=np.uint16)


def test_targets_are_the_inputs_one_token_later() -> None:
    x, y = batch(TOKENS, seed=1, step=0, batch_size=12, block_size=64)
    assert x.shape == y.shape == (12, 64)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(64))


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    def starts(seed: int, step: int) -> list[int]:
        return batch(TOKENS, seed=seed, step=step, batch_size=8, block_size=16)[0][:, 0].tolist()

    assert starts(1, 5) == starts(1, 5)
    drawn = [tuple(starts(seed, step)) for seed in (0, 1, 2**63 - 1) for step in (0, 1, 2, 10**9)]
    assert len(set(drawn)) == len(drawn)
    np.random.seed(0)
    torch.manual_seed(0)
    assert starts(1, 5) == starts(1, 5)


def test_the_draw_never_changes() -> None:
    # Written down once: a resumed run of any later version must see the same data.
    x, _ = batch(TOKENS, seed=1337, step=7, batch_size=6, block_size=8)
    assert x[:, 0].tolist() == [366, 376, 677, 225, 723, 982]


@pytest.mark.parametrize(("n_micro", "world_size"), [(4, 1), (1, 4), (2, 2), (8, 1)])
def test_eight_windows_at_once_equal_several_passes_or_processes(n_micro: int, world_size: int) -> None:
    whole, _ = batch(TOKENS, seed=3, step=9, batch_size=8, block_size=16)
    batches = [
        batch(
            TOKENS,
            seed=3,
            step=9,
            batch_size=8 // (n_micro * world_size),
            block_size=16,
            micro=micro,
            n_micro=n_micro,
            rank=rank,
            world_size=world_size,
        )[0]
        for rank in range(world_size)
        for micro in range(n_micro)
    ]
    assert torch.equal(torch.cat(batches), whole)


def test_every_position_is_drawn_and_none_beyond() -> None:
    tokens = TOKENS[:19]
    drawn = [batch(tokens, seed=0, step=s, batch_size=4, block_size=16)[0][:, 0] for s in range(50)]
    seen = set(torch.cat(drawn).tolist())
    assert seen == {0, 1, 2}
    x, y = batch(TOKENS[:17], seed=0, step=0, batch_size=4, block_size=16)
    assert x[:, 0].tolist() == [0] * 4
    assert y[:, -1].tolist() == [16] * 4


def test_positions_are_drawn_evenly() -> None:
    starts = torch.cat(
        [batch(TOKENS, seed=0, step=s, batch_size=100, block_size=1)[0][:, 0] for s in range(100)]
    )
    counts = torch.bincount(starts.flatten() * 10 // 999, minlength=10)
    # 10,000 draws in ten bins: a deviation of 150 is five standard deviations.
    assert int((counts - 1000).abs().max()) < 150


def test_ids_beyond_16_bits_keep_their_value() -> None:
    tokens = np.full(40, 200_018, np.uint32)
    x, y = batch(tokens, seed=0, step=0, batch_size=2, block_size=8)
    assert x.unique().tolist() == y.unique().tolist() == [200_018]


@given(n=st.integers(0, 200), block_size=st.integers(1, 40), batch_size=st.integers(1, 9))
def test_windows_cover_every_target_once(n: int, block_size: int, batch_size: int) -> None:
    tokens = TOKENS[:n]
    found = list(windows(tokens, block_size=block_size, batch_size=batch_size))
    assert [int(t) for _, y in found for t in y.flatten()] == list(range(1, n))
    assert [int(t) for x, _ in found for t in x.flatten()] == list(range(n - 1))
    for x, y in found:
        assert x.shape == y.shape
        assert x.shape[0] <= batch_size
        assert x.shape[1] == block_size or (x.shape[0] == 1 and x.shape[1] < block_size)
        assert x.dtype == y.dtype == torch.int64


def test_f16_a_split_too_short_is_refused_with_both_counts() -> None:
    check_length(65, 64, "val")
    with pytest.raises(InputError) as e:
        check_length(64, 64, "val", dataset="tiny")
    assert e.value.exit_code == 2
    assert "val split of 'tiny' has 64 tokens" in e.value.what
    assert "65" in e.value.why
    assert "model.block_size=63" in e.value.hint


def test_f16_an_empty_split_has_another_hint() -> None:
    with pytest.raises(InputError) as e:
        check_length(0, 64, "val")
    assert "data.val_fraction" in e.value.hint
