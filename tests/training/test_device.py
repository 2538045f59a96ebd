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


def test_on_cuda_a_compiled_pass_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda f, **settings: asked.append(settings) or f)
    for name, compiled in (("cuda:1", True), ("cpu", True), ("cuda", False)):
        device = Device(name, "bfloat16", compiled)
        assert device.records == (name == "cuda:1")
        device.compile(torch.relu)
    # "reduce-overhead" is torch's name for CUDA graphs.
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}, {}, {}]


def test_only_cuda_needs_to_be_asked_for_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_asked(name: str) -> bool:
        with Device(name, "float32", False).repeatable():
            return torch.are_deterministic_algorithms_enabled()

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert not is_asked("cuda"), "torch would refuse its products"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert is_asked("cuda") and not is_asked("cpu")
    assert not torch.are_deterministic_algorithms_enabled(), "as before"
