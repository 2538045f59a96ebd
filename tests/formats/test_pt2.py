"""torch.export: the archive computes the same as quill, for any batch and length, and without quill."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from shapes import SHAPES

from quill import strictjson
from quill.checkpoint.load import load_checkpoint
from quill.errors import CorruptError, InputError, ResourceError
from quill.formats import base
from quill.generation.generator import generate
from quill.registry.store import Registry
from quill.tokenizers import base as tokenizers_of_quill

CONTEXT = 24

# What a program does that has never heard of quill.
ALONE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "quill":
            raise ImportError("quill is not here")

sys.meta_path.insert(0, Blocker())
try:
    import quill
except ImportError:
    pass
else:
    raise SystemExit("quill is here after all")

import json
import torch

extra = {"config.json": "", "tokenizer.json": ""}
model = torch.export.load(sys.argv[1], extra_files=extra).module()
characters = json.loads(extra["tokenizer.json"])["vocabulary"]
context = json.loads(extra["config.json"])["model"]["block_size"]
ids = [characters.index(c) for c in "Once upon a time"]
with torch.no_grad():
    for _ in range(50):
        logits = model(torch.tensor([ids[-context:]]))
        ids.append(int(logits[0, -1].argmax()))
print("".join(characters[i] for i in ids))
"""


@pytest.fixture
def exported(publish, tmp_path):
    """Write a model: `exported("gpt2", dtype="float16")` gives the checkpoint and the file."""

    def write(shape, dtype="float32", **settings):
        made = load_checkpoint(publish(shape, **settings))
        base.load("pt2").write(made, tmp_path / "out", dtype)
        return made, tmp_path / "out"

    return write


def tokens(made, batch, length):
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(made.tokenizer.vocab_size, (batch, length), generator=generator)


def loaded(path):
    with open(path, "rb") as file:
        return torch.export.load(file)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_program_computes_the_same_logits_for_any_batch_and_length(shape, exported):
    made, path = exported(shape, dropout=0.5)
    program = loaded(path)
    module = program.module()
    for batch, length in itertools.product((1, 2, 5), (1, 2, 7, CONTEXT)):
        idx = tokens(made, batch, length)
        theirs = module(idx)
        assert not theirs.requires_grad
        torch.testing.assert_close(theirs, made.model.predict(idx), rtol=0, atol=1e-5)
    assert set(program.state_dict) == set(made.model.state_dict())


@pytest.mark.parametrize("shape", ["openai", "modern"])
@pytest.mark.parametrize("context", [1, 2])
def test_the_shortest_context_lengths_work(shape, context, exported):
    made, path = exported(shape, block_size=context, n_layer=1)
    module = loaded(path).module()
    for batch, length in itertools.product((1, 3), range(1, context + 1)):
        idx = tokens(made, batch, length)
        torch.testing.assert_close(module(idx), made.model.predict(idx), rtol=0, atol=1e-5)


def test_a_text_beyond_the_context_is_refused(exported):
    made, path = exported("modern", n_layer=1)
    with pytest.raises(CorruptError, match="cannot run") as caught:
        base.load("pt2").logits(path, tokens(made, 1, CONTEXT + 1))
    assert str(CONTEXT) in caught.value.why


def test_it_runs_without_quill_and_continues_a_text_as_quill_does(root: Path, tmp_path: Path):
    made = load_checkpoint(Registry(root / "weights").resolve("shakespeare"))
    base.load("pt2").write(made, tmp_path / "shakespeare.pt2", "float32")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, "shakespeare.pt2"],
        cwd=tmp_path,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    prompt = torch.tensor([made.tokenizer.encode("Once upon a time")])
    ours = generate(made.model, prompt, 50, temperature=0)[0].tolist()
    assert done.stdout.decode() == made.tokenizer.decode(ours) + "\n"


@pytest.mark.parametrize(
    ("shape", "dtype", "share"), [("openai", "bfloat16", 0.05), ("modern", "float16", 5e-3)]
)
def test_narrow_dtypes_halve_the_weights_and_keep_the_logits(shape, dtype, share, exported):
    made, path = exported(shape, dtype)
    assert {t.dtype for t in loaded(path).state_dict.values()} == {getattr(torch, dtype)}
    idx = tokens(made, 1, CONTEXT)
    ours, theirs = made.model.predict(idx)[0], torch.stack(list(base.load("pt2").logits(path, idx).values()))
    assert theirs.dtype == torch.float32
    assert 0 < float((ours - theirs).abs().max()) < share * max(1, float(ours.abs().max()))
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


def test_the_archive_contains_config_and_tokenizer_but_no_pickles_and_no_paths(exported, root):
    made, path = exported("modern", n_layer=1)
    extra = {"config.json": "", "tokenizer.json": ""}
    with open(path, "rb") as file:
        torch.export.load(file, extra_files=extra)
    config = strictjson.parse(extra["config.json"].encode(), origin="config.json")
    assert config == made.config.to_dict()
    kept = tokenizers_of_quill.read(extra["tokenizer.json"].encode())
    assert kept.fingerprint == made.tokenizer.fingerprint
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            raw = archive.read(name)
            assert not raw.startswith((b"PK", b"\x80")) or "/weights/" in name or "/constants/" in name
            assert str(root).encode() not in raw
            assert b'"use_pickle": true' not in raw


def test_a_weight_beyond_float16_is_refused(publish, tmp_path):
    made = load_checkpoint(publish("gpt2"))
    with torch.no_grad():
        made.model.h[0].attn.c_attn.weight[0, 0] = -70_000
    with pytest.raises(InputError, match="do not fit float16"):
        base.load("pt2").write(made, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_and_does_not_end_the_process(publish, tmp_path):
    made = load_checkpoint(publish("gpt2", n_embd=192, n_layer=1))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # The threads that torch computed with so far are not in the child.
            torch.set_num_threads(1)
            # The kernel then refuses to write on, as it does on a full disk.
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
            base.load("pt2").write(made, tmp_path / "out", "float32")
        except ResourceError:
            code = 7
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_file_that_torch_cannot_run_is_damaged(exported):
    made, path = exported("bigram")
    whole = path.read_bytes()
    for damaged in (b"", b"PK\x03\x04", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"torch\.export cannot run"):
            base.load("pt2").logits(path, tokens(made, 1, 2))
