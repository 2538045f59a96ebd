"""Devices: which one is meant, what is refused, and in which precision it computes."""

from __future__ import annotations

import pytest
import torch

from quill.errors import ResourceError
from quill.training.device import Device, find_device


def test_auto_picks_the_fastest_kind_of_device() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert find_device("auto") == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_device_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ResourceError, match="no device 'cuda:3'") as caught:
        find_device("cuda:3")
    assert "cpu" in caught.value.why


def test_only_bfloat16_uses_autocast() -> None:
    a = torch.ones(2, 2)
    with Device("cpu", "float32", False).autocast():
        assert (a @ a).dtype == torch.float32
    with Device("cpu", "bfloat16", False).autocast():
        assert (a @ a).dtype == torch.bfloat16
