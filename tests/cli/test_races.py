"""Commands whose model is renamed or removed while they read it."""

from __future__ import annotations

import shutil

import pytest
from crashing import invariants, versions
from versions import model, trained

from quill.cli.app import main
from quill.registry import gc, remove, rename
from quill.registry.files import OpenFile
from quill.registry.store import Registry

__all__ = ["model", "trained"]

READERS = {
    "export": ["export", "tiny:v1", "--out", "out"],
    "cp": ["cp", "tiny:v1", "other"],
    "sample": ["sample", "tiny:v1", "-p", "a", "--max-new-tokens", "2"],
    "show": ["show", "tiny:v1", "--config"],
}
CHANGES = {
    "mv": lambda registry: rename.plan(registry, "tiny", "big").execute(),
    "rm": lambda registry: remove.plan(registry, ["tiny:v1"]).execute(),
    "train --keep": lambda registry: gc.prune(registry, "tiny", 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reader", READERS)
def test_f59_a_model_that_is_renamed_or_removed_meanwhile_is_not_damaged(
    trained, registry, tmp_path, monkeypatch, capsys, reader, change, injections
):
    trained()
    trained()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
    whole, opened, real = tmp_path / "whole", [0], OpenFile.__init__
    shutil.copytree(registry.root, whole)
    missed = 0

    def opening(self, path, entry):
        opened[0] -= 1
        if not opened[0]:
            CHANGES[change](registry)
        real(self, path, entry)

    monkeypatch.setattr(OpenFile, "__init__", opening)
    for nth in range(1, 20):
        opened[0] = nth
        code = main(READERS[reader])
        is_over, opened[0] = opened[0] > 0, 0
        err = capsys.readouterr().err
        assert code in (0, 3), err
        if code:
            missed += 1
            assert "'tiny:v1' was renamed or removed in the meantime" in err
        if reader == "cp":
            invariants(Registry(registry.root), versions(registry))
            assert code == 0 or not registry.entries("other")
        shutil.rmtree(registry.root)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(whole, registry.root)
        if is_over:
            break
    injections.add(f"{reader} beside {change}", "changed", nth - 1)
    assert missed
    assert is_over


def test_f59_what_a_copy_is_writing_is_neither_renamed_nor_removed(registry, trained, monkeypatch, capsys):
    trained()
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
    draft = registry.begin("other")
    draft.lock_folder()
    for command in (["mv", "other", "new"], ["rm", "other:v1", "-y"]):
        assert main(command) == 75
        assert "a process is writing 'other:v1'" in capsys.readouterr().err
    del draft
    assert main(["mv", "other", "new"]) == 0
    assert main(["rm", "new:v1", "-y"]) == 0
