"""Devices: which one is meant, what is refused, and in which precision it computes."""

from __future__ import annotations

import pytest
import torch

from quill.errors import ResourceError
from quill.training.device import Device, find_device


def test_auto_is_the_fastest_kind_there_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert find_device("auto") == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(ResourceError, match="no device 'cuda:3'") as caught:
        find_device("cuda:3")
    assert "cpu" in caught.value.why


def test_float32_needs_no_autocast_and_bfloat16_has_it() -> None:
    a = torch.ones(2, 2)
    with Device("cpu", "float32", False).autocast():
        assert (a @ a).dtype == torch.float32
    with Device("cpu", "bfloat16", False).autocast():
        assert (a @ a).dtype == torch.bfloat16
