"""Resume states: the newest undamaged one is found, however the run ended."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from crashing import snapshot

from quill.checkpoint.resume_state import load_state, save_state
from quill.errors import CorruptError, ResourceError


def save(draft, step, keep=2):
    values = {"weight": torch.full((4, 3), float(step)), "rng": torch.arange(8, dtype=torch.uint8)}
    return save_state(draft, step, values, {"step": step, "best_val_loss": None}, keep=keep)


def steps(draft):
    return sorted(n for n in os.listdir(draft.path / "state") if not n.startswith("."))


@pytest.fixture
def draft(registry):
    """A draft with states of the steps 500 and 1000."""
    draft = registry.begin("a")
    save(draft, 500)
    save(draft, 1000)
    return draft


def test_a_new_draft_has_no_state(registry):
    assert load_state(registry.begin("a")) is None


def test_the_newest_state_is_loaded(draft):
    values, info, notes, _ = load_state(draft)
    assert torch.equal(values["weight"], torch.full((4, 3), 1000.0))
    assert values["rng"].tolist() == list(range(8))
    assert info == {"step": 1000, "best_val_loss": None}
    assert notes == []
    assert sorted(os.listdir(draft.path / "state" / "step-001000")) == [
        "manifest.json",
        "state.json",
        "state.safetensors",
    ]


def test_f14_states_are_neither_read_nor_written_nor_removed_through_a_link(draft, tmp_path):
    (draft.path / "state").rename(tmp_path / "outside")
    (draft.path / "state").symlink_to(tmp_path / "outside")
    before = snapshot(tmp_path / "outside")
    for act in (lambda: load_state(draft), lambda: save(draft, 1500), lambda: save(draft, 10)):
        with pytest.raises(CorruptError, match="symbolic link"):
            act()
    assert snapshot(tmp_path / "outside") == before


def test_only_the_newest_states_are_kept(draft):
    save(draft, 1500)
    assert steps(draft) == ["step-001000", "step-001500"]
    save(draft, 2000, keep=3)
    assert steps(draft) == ["step-001000", "step-001500", "step-002000"]
    save(draft, 10_000_000, keep=2)
    assert steps(draft) == ["step-002000", "step-10000000"]
    assert load_state(draft)[1]["step"] == 10_000_000
    assert os.listdir(draft.path.parent.parent / ".trash") == []


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.safetensors"])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove", "link"])
def test_f43_a_damaged_newest_state_is_skipped_with_a_note(draft, tmp_path, name, how):
    path = draft.path / "state" / "step-001000" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    if how == "link":
        (tmp_path / "x").write_bytes(raw)
        path.symlink_to(tmp_path / "x")
    elif how != "remove":
        path.write_bytes({"flip": bytes(raw), "truncate": bytes(raw[:-1]), "empty": b""}[how])
    _, info, notes, _ = load_state(draft)
    assert info["step"] == 500
    assert len(notes) == 1
    assert "step-001000" in notes[0]


def test_f43_when_every_state_is_damaged_the_run_does_not_silently_start_over(draft):
    for folder in (draft.path / "state").glob("step-*"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(CorruptError) as caught:
        load_state(draft)
    assert "step-000500" in caught.value.why
    assert "step-001000" in caught.value.why
    assert 'resume="never"' in caught.value.hint


def test_resuming_from_an_earlier_state_drops_later_ones(draft):
    (draft.path / "state" / "step-001000" / "state.json").write_text("{")
    save(draft, 750)
    assert steps(draft) == ["step-000500", "step-000750"]
    assert load_state(draft)[1]["step"] == 750


def test_a_step_can_be_saved_again(draft):
    (draft.path / "state" / "step-001000" / "state.json").write_text("{")
    save(draft, 1000)
    assert load_state(draft)[1:3] == ({"step": 1000, "best_val_loss": None}, [])
    assert steps(draft) == ["step-000500", "step-001000"]


@pytest.mark.parametrize("operation", ["mkdir", "open", "write", "fsync", "rename"])
def test_f26_a_full_disk_leaves_the_earlier_states(draft, monkeypatch, operation):
    opened = os.open

    def fail(*arguments, **more):
        if operation == "open" and not arguments[1] & os.O_CREAT:
            return opened(*arguments, **more)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, fail)
        with pytest.raises(ResourceError) as caught:
            save(draft, 1500)
    assert "disk is full" in caught.value.why
    assert steps(draft) == ["step-000500", "step-001000"]
    assert load_state(draft)[1]["step"] == 1000
    save(draft, 1500)
    assert steps(draft) == ["step-001000", "step-001500"]


def test_f26_a_full_disk_is_noticed_before_writing(draft, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(100, 95, 5))
    with pytest.raises(ResourceError, match="not enough disk"):
        save(draft, 1500)
    assert steps(draft) == ["step-000500", "step-001000"]


def test_loaded_tensors_can_be_changed_without_changing_the_state(draft):
    values, *_ = load_state(draft)
    values["weight"] += 1
    assert torch.equal(values["weight"], torch.full((4, 3), 1001.0))
    assert torch.equal(load_state(draft)[0]["weight"], torch.full((4, 3), 1000.0))
