"""Verifying: every kind of damage is found and named, and nothing else is reported as damage."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc

import pytest
import torch

from quill import fsio
from quill.checkpoint.finite import check_finite, count_not_finite
from quill.checkpoint.resume_state import save_state
from quill.checkpoint.verify import count_bytes, find_targets, verify_target
from quill.checkpoint.weights import read_tensors, save_tensors
from quill.errors import CorruptError, NotFoundError
from quill.registry import aliases
from quill.registry.files import OpenFile
from quill.registry.tensors import read_layout


def verdicts(registry, *refs):
    return [v for v in (verify_target(t) for t in find_targets(registry, refs)) if v is not None]


def states(registry, *refs) -> dict[str, str]:
    return {f"{v.reference}": v.state for v in verdicts(registry, *refs) if v.kind != "model"}


def change(path, values) -> None:
    """Replace a version's weights, and describe the new ones in its manifest."""
    save_tensors(path / "model.safetensors", values)
    describe(path, "model.safetensors")


def describe(path, name) -> None:
    document = json.loads((path / "manifest.json").read_text())
    raw = (path / name).read_bytes()
    document["files"][name] = {"bytes": len(raw), "sha256": fsio.sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(document))


def weights_of(version) -> dict[str, torch.Tensor]:
    with version.open_file("model.safetensors") as reading:
        return read_tensors(reading, read_layout(reading.path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_unchanged_version_is_ok(registry, trained, dtype):
    version = trained(dtype=dtype)
    seen = []
    (target, of_aliases) = find_targets(registry)
    verdict = verify_target(target, seen.append)
    assert (verdict.state, verdict.errors) == ("ok", [])
    assert {f.name: f.bytes for f in verdict.files} == {
        n: e["bytes"] for n, e in version.manifest["files"].items()
    }
    assert sum(seen) == version.size == count_bytes(target)
    assert verify_target(of_aliases).state == "ok"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_f3_a_flipped_bit_is_found_in_its_file(registry, trained, name):
    path = trained().path
    trained("other")
    raw = bytearray((path / name).read_bytes())
    raw[-3] ^= 1
    (path / name).write_bytes(raw)
    assert states(registry) == {"other:v1": "ok", "tiny:v1": "damaged"}
    (verdict,) = (v for v in verdicts(registry, "tiny:v1"))
    assert [f.name for f in verdict.files if f.error] == [name]
    assert "sha256" in verdict.errors[0].why
    assert verdict.errors[0].exit_code == 5


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "missing"),
        ("shorter", "bytes, the manifest says"),
        ("link", "symbolic link"),
        ("lfs", "Git LFS"),
    ],
)
def test_f1_f14_missing_short_and_linked_files_are_damage(registry, trained, tmp_path, how, said):
    path = trained().path / "model.safetensors"
    raw = path.read_bytes()
    path.unlink()
    if how == "shorter":
        path.write_bytes(raw[:-1])
    elif how == "link":
        (tmp_path / "outside").write_bytes(raw)
        path.symlink_to(tmp_path / "outside")
    elif how == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (verdict,) = verdicts(registry, "tiny:v1")
    assert verdict.state == "damaged"
    assert said in str(verdict.errors[0])
    assert [f.state for f in verdict.files] == ["ok", "damaged", "ok"], "the other files are checked too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_f5_nan_and_infinity_are_found_even_if_the_hash_is_right(registry, trained, dtype, value):
    version = trained()
    values = {n: t.to(dtype) for n, t in weights_of(version).items()}
    name = sorted(values)[1]
    values[name].reshape(-1)[-1] = value
    change(version.path, values)
    (verdict,) = verdicts(registry, "tiny:v1")
    (error,) = verdict.errors
    assert isinstance(error, CorruptError)
    assert "NaN or infinity" in error.what
    assert error.why == f"1 of {values[name].numel():,} in '{name}'"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_not_finite_numbers_are_counted_exactly(dtype):
    """For all 16-bit patterns, and as many random wider ones."""
    width = torch.empty(0, dtype=dtype).element_size()
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16) if width == 2 else None
    raw = bits.numpy().tobytes() if bits is not None else os.urandom(width * 2**16) + b"\xff\x7f" * width * 4
    numbers = torch.frombuffer(bytearray(raw), dtype=dtype)
    expected = int((~torch.isfinite(numbers)).sum())
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[str(dtype)[6:]]
    assert count_not_finite(raw, kind) == expected > 0


def test_f4_files_that_do_not_fit_are_found_even_if_their_hashes_are_right(registry, trained):
    version = trained("shape")
    values = weights_of(version)
    change(version.path, {n: t[:-1] if n == "wte.weight" else t for n, t in values.items()})
    path = trained("vocabulary").path
    document = json.loads((path / "tokenizer.json").read_text())
    document["vocabulary"] += "hijk"
    (path / "tokenizer.json").write_text(json.dumps(document))
    describe(path, "tokenizer.json")
    path = trained("config").path
    (path / "config.json").write_text('{"schema_version": 1, "model": {"n_layer": -1}}')
    describe(path, "config.json")
    wrong = {v.reference: [f.name for f in v.files if f.error] for v in verdicts(registry) if v.errors}
    assert wrong == {
        "shape:v1": ["model.safetensors"],
        "vocabulary:v1": ["model.safetensors"],
        "config:v1": ["config.json"],
    }


def test_f2_a_lying_header_is_damage(registry, trained):
    path = trained().path
    (path / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    describe(path, "model.safetensors")
    assert states(registry) == {"tiny:v1": "damaged"}


def test_an_unlisted_file_is_reported_but_is_not_damage(registry, trained):
    path = trained().path
    (path / "notes.txt").write_text("mine")
    (path / "run.log").write_text("the run's own")
    (verdict,) = verdicts(registry, "tiny:v1")
    assert (verdict.state, verdict.errors) == ("ok", [])
    assert [(f.name, f.state) for f in verdict.files if not f.listed] == [("notes.txt", "unlisted")]
    (path / "device").symlink_to("/dev/null")
    assert states(registry) == {"tiny:v1": "damaged"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}']
)
def test_an_unreadable_manifest_is_damage(registry, trained, text):
    (trained().path / "manifest.json").write_text(text)
    (verdict,) = verdicts(registry, "tiny:v1")
    assert verdict.state == "damaged"
    assert verdict.files == []


def test_f12_a_version_from_a_newer_quill_is_unreadable_not_damaged(registry, trained):
    path = trained().path
    document = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(document | {"schema": 99}))
    (verdict,) = verdicts(registry, "tiny:v1")
    assert verdict.state == "unreadable"
    assert [e.exit_code for e in verdict.errors] == [2]


def test_f27_a_failing_disk_makes_a_version_unreadable_not_damaged(registry, trained, monkeypatch):
    trained()
    trained("other")
    real = OpenFile.read_chunk

    def read_chunk(file, *most):
        if file.path.parent.parent.name == "tiny":
            with fsio.guard(file.path, "read"):
                raise OSError(5, os.strerror(5))
        return real(file, *most)

    monkeypatch.setattr(OpenFile, "read_chunk", read_chunk)
    assert states(registry) == {"other:v1": "ok", "tiny:v1": "unreadable"}


def test_a_hand_made_model_has_no_hashes_but_must_fit(registry, trained):
    source = trained().path
    folder = registry.root / "hand"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(source / name, folder / name)
    assert states(registry, "hand") == {"hand:v1": "ok"}
    (folder / "tokenizer.json").unlink()
    assert states(registry, "hand") == {"hand:v1": "damaged"}


def test_resume_states_are_verified_too(registry, trained):
    trained()
    draft = registry.begin("tiny")
    for step in (100, 200, 300):
        save_state(draft, step, {"w": torch.full((64,), float(step))}, {"step": step}, keep=3)
    names = {s: f"tiny:v2 step-000{s}" for s in (100, 200, 300)}
    assert states(registry) == {"tiny:v1": "ok"} | dict.fromkeys(names.values(), "ok")
    folder = draft.path / "state"
    raw = bytearray((folder / "step-000200" / "state.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "step-000200" / "state.safetensors").write_bytes(raw)
    (folder / "step-000300" / "state.json").unlink()
    assert states(registry, "tiny") == {
        "tiny:v1": "ok", names[100]: "ok", names[200]: "damaged", names[300]: "damaged",
    }  # fmt: skip
    assert set(states(registry, "tiny:v2")) == set(names.values())
    assert set(states(registry, "tiny:v1")) == {"tiny:v1"}


def test_a_model_removed_during_verification_is_not_damage(registry, trained):
    trained()
    found = find_targets(registry)
    shutil.rmtree(registry.root / "tiny")
    assert [verify_target(t) for t in found] == [None, None]


def test_aliases_must_point_to_versions(registry, trained):
    trained()
    folder = registry.root / "tiny"
    aliases.set_alias(folder, "champion", 1)
    assert [v.errors for v in verdicts(registry)] == [[], []]
    aliases.update(folder, lambda held: held | {"aliases": {"champion": 1, "lost": 7}})
    (verdict,) = (v for v in verdicts(registry) if v.kind == "model")
    assert verdict.reference == "tiny"
    assert "'tiny:lost' points to a missing version" in str(verdict.errors[0])


@pytest.mark.parametrize("name", ["model.json", "model.copy.json"])
def test_f53_damage_to_aliases_names_the_command_that_restores_them(registry, trained, name):
    trained()
    folder = registry.root / "tiny"
    aliases.set_alias(folder, "champion", 1)
    (folder / name).write_text("{")
    (verdict,) = (v for v in verdicts(registry) if v.kind == "model")
    assert verdict.state == "damaged"
    assert [f.name for f in verdict.files if f.error] == [name]
    assert [e.hint for e in verdict.errors] == ["quill alias restore tiny"]
    aliases.restore(folder)
    assert [v.errors for v in verdicts(registry)] == [[], []]


def test_f14_linked_models_and_versions_are_damage(registry, trained, tmp_path):
    trained()
    registry.root.joinpath("link").symlink_to(registry.root / "tiny")
    (registry.root / "tiny" / "v7").symlink_to(registry.root / "tiny" / "v1")
    assert states(registry) == {"link": "damaged", "tiny:v1": "ok", "tiny:v7": "damaged"}


def test_references_select_what_is_verified(registry, trained, tmp_path):
    trained("a")
    trained("a")
    trained("b")
    aliases.set_alias(registry.root / "a", "champion", 1)
    assert set(states(registry, "a")) == {"a:v1", "a:v2"}
    assert set(states(registry, "a:v2", "b")) == {"a:v2", "b:v1"}
    assert set(states(registry, "a:champion")) == {"a:v1"}
    assert set(states(registry, "a:latest", "a:v2")) == {"a:v2"}
    (registry.root / "a" / "v2" / "config.json").unlink()
    assert states(registry, "a:latest") == {"a:v2": "damaged"}
    assert states(registry, str(registry.root / "b" / "v1")) == {str(registry.root / "b" / "v1"): "ok"}
    for ref in ("c", "a:v9", "a:nobody"):
        with pytest.raises(NotFoundError):
            find_targets(registry, [ref])


def test_an_empty_registry_has_no_targets(registry):
    assert find_targets(registry) == []


def test_verifying_takes_little_memory(registry, trained):
    """A tensor of 96 MB is read in chunks of 1 MB."""
    version = trained()
    values = {"wte.weight": torch.zeros(24_000_000)}
    change(version.path, values)
    version = registry.resolve("tiny")
    del values
    with version.open_file("model.safetensors") as reading:
        tracemalloc.start()
        check_finite(reading)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8e6
