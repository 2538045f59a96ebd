"""Laws of every format, also of those not written yet: what goes out comes back, or is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shapes import SHAPES

from quill.checkpoint.load import load_checkpoint, read_tokenizer
from quill.errors import CorruptError, InputError, QuillError, RefusedError
from quill.formats import base, exporting, importing
from quill.registry.store import Registry

FORMATS = base.names()
WRITTEN = [n for n in FORMATS if base.load(n).writes]
BOTH = [n for n in WRITTEN if base.load(n).reads]
# Files for people, which importing does not need.
DISPENSABLE = {"README.md", "generation_config.json", "tokenizer_config.json"}
TEXT = "The 3 seas are calm, said old Ahab"


def refused(name: str, version) -> str | None:
    loaded = load_checkpoint(version)
    return base.load(name).refusal(loaded.model.shape, loaded.tokenizer)


def fitting(name: str, publish):
    """A model of a shape that the format supports."""
    made = (publish(shape, name=shape) for shape in ("openai", "quillgpt", "nanogpt"))
    return next(version for version in made if not refused(name, version))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_declares_what_it_supports(name):
    kind = base.load(name)
    assert kind.name == name
    assert kind.reads or kind.writes
    assert bool(kind.suffix) == kind.writes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOTH)
def test_an_export_imports_with_the_same_logits(name, shape, publish, here, tmp_path):
    version = publish(shape)
    if why := refused(name, version):
        with pytest.raises(InputError, match="does not support") as caught:
            exporting.export(version, name)
        assert why in caught.value.what
        assert os.listdir(here) == []
        return
    made = exporting.export(version, name)
    assert made.path.exists()
    back = importing.import_model(str(made.path), Registry(tmp_path / "other"), name="back")
    ours, theirs = load_checkpoint(version), load_checkpoint(back)
    idx = torch.tensor([ours.tokenizer.encode(TEXT)[:20]])
    rows = ours.tokenizer.vocab_size
    difference = (ours.model.predict(idx)[..., :rows] - theirs.model.predict(idx)[..., :rows]).abs().max()
    assert float(difference) < 1e-4
    assert theirs.tokenizer.encode(TEXT) == ours.tokenizer.encode(TEXT)
    assert back.manifest["parent"]["digest"] == importing.fingerprint(made.path)


@pytest.mark.parametrize("tokenizer", ["char", "word", "bpe"])
@pytest.mark.parametrize("name", BOTH)
def test_a_tokenizer_imports_as_it_was_exported_or_is_refused(
    name, tokenizer, publish, tokenizers, here, tmp_path
):
    if tokenizer not in tokenizers:
        pytest.skip("rustbpe is not installed")
    shapes = [s for s in ("modern", "nanogpt", "quillgpt") if not refused(name, publish(s, name=s))]
    version = publish(shapes[0], tokenizer)
    if refused(name, version):
        assert tokenizer != "char", "characters are what every format of this size is used with"
        return
    made = exporting.export(version, name)
    back = importing.import_model(str(made.path), Registry(tmp_path / "other"), name="back")
    ours, theirs = tokenizers[tokenizer], read_tokenizer(back)
    text = "The 12 seas\n are  rough; ünd Ælfrid 😀"
    assert theirs.encode(text, unknown="skip") == ours.encode(text, unknown="skip")
    assert [theirs.token_bytes(i) for i in range(ours.vocab_size)] == [
        ours.token_bytes(i) for i in range(ours.vocab_size)
    ]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_foreign_program_agrees(name, publish, here):
    kind = base.load(name)
    version = fitting(name, publish)
    if not kind.runtime:
        with pytest.raises(InputError, match="cannot verify"):
            exporting.export(version, name, verify=True)
        return
    try:
        made = exporting.export(version, name, verify=True)
    except InputError as e:
        if "not installed" not in e.what:
            raise
        pytest.skip(str(e))
    assert made.difference is not None
    assert made.difference.largest <= kind.tolerance.get("float32", 1e-4) * max(1, made.difference.magnitude)
    assert max(made.difference.lengths) == 24


@pytest.mark.parametrize("name", [n for n in WRITTEN if base.load(n).runtime])
def test_an_export_that_a_foreign_program_contradicts_is_deleted(name, publish, here, monkeypatch):
    kind = base.load(name)
    version = fitting(name, publish)
    monkeypatch.setattr(
        type(kind), "logits", lambda self, path, idx: dict(enumerate(torch.zeros(idx.shape[1], 4096)))
    )
    with pytest.raises(RefusedError, match="disagree"):
        exporting.export(version, name, verify=True)
    assert os.listdir(here) == []


@pytest.mark.parametrize("name", WRITTEN)
def test_f48_an_export_is_complete_or_absent_and_never_overwrites_another(name, publish, here):
    version = fitting(name, publish)
    # Killed once the format has written everything, and nothing is in its place yet.
    code = (
        "import os, sys; from pathlib import Path; from quill.formats import exporting\n"
        "from quill.registry.store import Registry\n"
        "exporting.fsio.syncing.fsync = lambda *a, **k: os._exit(9)\n"
        "exporting.export(Registry(Path(sys.argv[1])).resolve(sys.argv[2]), sys.argv[3], Path('out'))"
    )
    registry = version.path.parent.parent
    killed = subprocess.run([sys.executable, "-c", code, str(registry), version.reference, name], check=False)
    assert killed.returncode == 9
    assert not Path("out").exists()
    assert exporting.export(version, name, Path("out")).path == Path("out")
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    with pytest.raises(RefusedError, match="already exists") as caught:
        exporting.export(version, name, Path("out"))
    assert caught.value.exit_code == 4
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*")} == before
    assert exporting.export(version, name, Path("out"), force=True).path.exists()


@pytest.mark.parametrize("name", WRITTEN)
def test_force_replaces_an_export_and_nothing_else(name, publish, here):
    version = fitting(name, publish)
    precious = here / "out" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(RefusedError, match="was not replaced"):
        exporting.export(version, name, Path("out"), force=True)
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize("name", BOTH)
def test_a_damaged_export_is_refused_and_leaves_no_version(name, publish, here, tmp_path):
    made = exporting.export(fitting(name, publish), name, Path("out"))
    attempts = 0
    for file in [made.path] if made.path.is_file() else sorted(made.path.iterdir()):
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:9], b"<html>", b"\xff" * 64 + whole[64:]):
            file.write_bytes(damaged)
            attempts += 1
            registry = Registry(tmp_path / f"other{attempts}")
            try:
                importing.import_model(str(made.path), registry, name="back")
            except QuillError as e:
                assert e.exit_code in (2, 5), e
                assert not registry.entries()
            else:
                assert file.name in DISPENSABLE
        file.write_bytes(whole)


@pytest.mark.parametrize("name", FORMATS)
def test_recognising_never_fails(name, tmp_path):
    kind = base.load(name)
    if not kind.reads:
        return
    (tmp_path / "empty").touch()
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "noise").write_bytes(os.urandom(4096))
    for path in tmp_path.iterdir():
        assert kind.recognises(path) in (True, False)
    assert not kind.recognises(tmp_path / "noise")


def test_an_unknown_format_is_refused_with_those_that_exist(tmp_path):
    (tmp_path / "noise").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="not in a format") as caught:
        importing.import_model(str(tmp_path / "noise"), Registry(tmp_path / "w"))
    assert all(n in caught.value.why for n in BOTH)


def test_an_unknown_format_is_refused(publish):
    with pytest.raises(InputError, match="no format named 'ggfu'"):
        exporting.export(publish(), "ggfu")


def test_importing_again_finds_the_version_and_never_replaces_a_different_model(publish, here, tmp_path):
    made = exporting.export(publish("nanogpt"), "hf")
    registry = Registry(tmp_path / "other")
    first = importing.import_model(str(made.path), registry, name="a")
    assert importing.import_model(str(made.path), registry, name="a") == first
    other = exporting.export(publish("modern", name="b"), "hf")
    with pytest.raises(RefusedError, match="different model") as caught:
        importing.import_model(str(other.path), registry, name="a")
    assert caught.value.hint == "new_version=True"
    assert importing.import_model(str(other.path), registry, name="a", new_version=True).number == 2


def test_a_model_without_one_of_its_tensors_is_refused(publish, here, tmp_path, monkeypatch):
    made = exporting.export(publish("nanogpt"), "hf")
    kind = type(base.load("hf"))
    read = kind.read

    def without_a_norm(self, path, supplied):
        whole = read(self, path, supplied)
        weights = {n: t for n, t in whole.weights.items() if n != "ln_f.weight"}
        return base.Incoming(whole.model, weights, whole.tokenizer)

    monkeypatch.setattr(kind, "read", without_a_norm)
    with pytest.raises(CorruptError, match="not a complete model") as caught:
        importing.import_model(str(made.path), Registry(tmp_path / "other"))
    assert "ln_f.weight is missing" in caught.value.why
