"""Files and words that nobody wrote by hand: whatever they hold, quill refuses them in its own words.

Every file that a registry or a user hands to quill is replaced by arbitrary bytes, by arbitrary JSON, and by
what a valid one becomes when bits flip, parts vanish, values change their type, numbers grow and lists nest.
Then everything that reads it is called. It may refuse, with a QuillError and quickly; it may not fail in any
other way, and nothing beside the registry may change.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from quill import fsio
from quill.checkpoint.load import load_checkpoint
from quill.checkpoint.resume_state import load_state, save_state
from quill.cli.app import main
from quill.config import reading
from quill.errors import CorruptError, InputError, QuillError
from quill.evaluation.curves import stream
from quill.registry import aliases, names
from quill.registry.draft import Draft
from quill.registry.folder import Folder
from quill.registry.store import Registry
from quill.tokenizers import base

# A file this small is read, checked and refused in a moment, also on a machine that is busy.
SECONDS = 5.0
# How many times as long as usual to look: FUZZ=50 python -m pytest tests/registry/test_fuzz.py
LONGER = int(os.environ.get("FUZZ", "1"))
BIG = 10**400
numbers = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**22, BIG, -BIG, 1e308, -0.0, 5e-324]),
    st.floats(),
)
odd_text = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "\0", "\n", "../x", "/etc/passwd", "a/b", "NaN", "\x1b[31m", "\ud800", "x" * 5000, "none"]
    ),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, odd_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_text, inner, max_size=4)),
    max_leaves=8,
)


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


class Twice(dict[str, Any]):
    """An object that is written with its first key twice."""


def dump(value: Any) -> bytes:
    """JSON as no strict writer would write it: NaN, lone surrogates, keys twice, thousands of levels."""
    if isinstance(value, dict):
        pairs = [f"{json.dumps(k)}: {dump(v).decode()}" for k, v in value.items()]
        return ("{" + ", ".join(pairs + pairs[:1] * isinstance(value, Twice)) + "}").encode()
    if isinstance(value, list):
        depth = 0
        while isinstance(value, list) and len(value) == 1:
            depth, value = depth + 1, value[0]
        inner = b", ".join(map(dump, value)) if isinstance(value, list) else dump(value)
        brackets = depth + isinstance(value, list)
        return b"[" * brackets + inner + b"]" * brackets
    return json.dumps(value).encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a document, but of those that `deep` has put there."""
    yield path
    if len(path) > 20:
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*path, key))


@st.composite
def mutated(draw: Any, document: Any) -> bytes:
    """What a valid document may have become."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        # Short lists of places first: a vocabulary has thousands that are all alike.
        path = draw(st.sampled_from(sorted(islice(places(document), 2000), key=len)[:400]))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                document = draw(anything)
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "delete", "deep", "more", "swap", "twice", "text"]))
        key, old = path[-1], parent[path[-1]]
        if how == "delete":
            del parent[key]
        elif how == "deep":
            parent[key] = deep(draw(st.sampled_from([1, 50, 1200, 100_000])))
        elif how == "more" and isinstance(parent, dict):
            parent[draw(odd_text)] = draw(anything)
        elif how == "more":
            parent.extend([old] * draw(st.sampled_from([1, 1000])))
        elif how == "swap" and isinstance(old, (int, float)):
            parent[key] = draw(
                st.sampled_from([-old, old * 2, bool(old), str(old), [old], {"": old}, 0.5, BIG])
            )
        elif how == "twice" and isinstance(old, dict):
            parent[key] = Twice(old)
        elif how == "text" and isinstance(old, str):
            parent[key] = draw(st.sampled_from([old[:-1], old + old, old[::-1], "", old.upper()]))
        else:
            parent[key] = draw(anything)
    return dump(document)


@st.composite
def damaged(draw: Any, raw: bytes) -> bytes:
    """What a file may have become on a bad disk or a bad line."""
    content = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        how = draw(st.sampled_from(["flip", "cut", "remove", "insert", "zero"]))
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        if how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at:]
        elif how == "remove":
            del content[at : at + draw(st.integers(1, 20))]
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=6))
        elif how == "zero":
            content[at : at + 8] = bytes(len(content[at : at + 8]))
    return bytes(content)


def contents(raw: bytes) -> st.SearchStrategy[bytes]:
    """What stands in a valid file's place."""
    return st.one_of(
        mutated(json.loads(raw)), mutated(json.loads(raw)), damaged(raw), anything.map(dump), st.binary()
    )


fuzzed = hypothesis_settings(
    max_examples=60 * LONGER,
    deadline=None,
    # A find is told at once: making it smaller takes minutes where each try reads a whole registry.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """What is refused is refused soon."""
    began = time.perf_counter()
    yield
    assert time.perf_counter() - began < SECONDS


def run(*arguments: str) -> int:
    """A command, as it is typed; what it prints is thrown away, unless it met a bug of its own."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded():
        code = main([*arguments, "--debug"])
    err.flush()
    said = err.buffer.getvalue().decode()
    note(f"quill {' '.join(map(ascii, arguments))}: {code}\n{said[:2000]}")
    assert code in (0, 2, 3, 4, 5, 6, 7), said
    return code


def attempt(work: Callable[[], Any], *kinds: type[QuillError], most: int = 0) -> Any:
    """What some work gives, or None where it refuses; `most` is the length of what it may quote whole."""
    with bounded():
        try:
            return work()
        except QuillError as e:
            assert not kinds or isinstance(e, kinds)
            assert str(e)
            assert len(str(e)) < 1500 + most, "a message is for people"
            return None


@pytest.fixture(scope="module")
def valid(tiny_registry, tmp_path_factory) -> Path:
    """A registry of one model with an alias, and a run of it that was stopped."""
    folder = tmp_path_factory.mktemp("valid")
    shutil.copytree(tiny_registry.root, folder / "weights")
    registry = Registry(folder / "weights")
    aliases.update(registry.root / "tiny", lambda held: held | {"aliases": {"best": 1}})
    draft = registry.begin("tiny")
    for name in ("config.json", "tokenizer.json", "model.safetensors", "metrics.jsonl"):
        shutil.copy(registry.resolve("tiny").path / name, draft.path / name)
    draft.take()
    import torch

    save_state(draft, 3, {"w": torch.ones(4)}, {"trainer": {"step": 3}, "best_val_loss": None})
    return folder


@pytest.fixture(scope="module")
def surroundings(valid, tmp_path_factory) -> Path:
    """A folder that holds the registry's copy and something precious."""
    folder = tmp_path_factory.mktemp("around")
    shutil.copytree(valid / "weights", folder / "weights")
    (folder / "precious").write_text("precious")
    (folder / "x").mkdir()
    return folder


@pytest.fixture
def weights(surroundings, valid, monkeypatch) -> Iterator[Path]:
    """That registry's folder; in the end nothing beside it has changed."""
    monkeypatch.chdir(surroundings)
    monkeypatch.setenv("QUILL_REGISTRY", str(surroundings / "weights"))
    yield surroundings / "weights"
    assert sorted(os.listdir(surroundings)) == ["precious", "weights", "x"]
    assert (surroundings / "precious").read_text() == "precious"
    assert os.listdir(surroundings / "x") == []
    shutil.rmtree(surroundings / "weights")
    shutil.copytree(valid / "weights", surroundings / "weights")


def read_all(root: Path) -> None:
    """Whatever the library reads of a registry."""
    registry = Registry(root)
    for found in attempt(lambda: registry.entries(all_versions=True)) or []:
        assert found.reference
        assert found.size is None if found.damaged else found.size >= 0
        if not found.damaged:
            for name in ("config.json", "tokenizer.json", "metrics.jsonl"):
                attempt(lambda f=found, n=name: f.read_file(n), CorruptError)
    for draft in attempt(registry.drafts) or []:
        status = draft.status()
        assert status is None or isinstance(status, dict)
        attempt(lambda d=draft: load_state(d))
    for ref in ("tiny", "tiny:v1", "tiny:best", str(root / "tiny"), str(root / "tiny" / "v1")):
        if version := attempt(lambda r=ref: registry.resolve(r)):
            attempt(lambda v=version: load_checkpoint(v))


def replace(path: Path, content: bytes) -> None:
    """Put other bytes in a file's place, as a hand or a bad disk does."""
    path.write_bytes(content)


FILES = [
    "tiny/v1/manifest.json",
    "tiny/v1/config.json",
    "tiny/v1/tokenizer.json",
    "tiny/model.json",
    "tiny/v2/status.json",
    "tiny/v2/config.json",
    "tiny/v2/state/step-000003/manifest.json",
    "tiny/v2/state/step-000003/state.json",
    ".quill.json",
]


@pytest.mark.parametrize("name", FILES)
def test_f4_f7_f9_no_content_of_a_registrys_file_is_a_traceback(name, weights, valid):
    raw = (valid / "weights" / name).read_bytes()
    turn = iter(range(10**9))

    @fuzzed
    @given(content=contents(raw))
    @example(content=b"")
    @example(content=b"[" * 100_000)
    @example(content=b"\xff\xfe{\0}\0")
    def all_that_reads_it(content: bytes) -> None:
        replace(weights / name, content)
        read_all(weights)
        # Each is a process's whole work, so that not all can be done every time.
        commands = (
            ("list", "--json"),
            ("list", "--all-versions"),
            ("show", "tiny"),
            ("show", "tiny:v2", "--json"),
            ("show", "tiny", "--metrics"),
            ("config", "show", "tiny"),
            ("sample", "tiny", "--max-new-tokens=3", "-q"),
            ("doctor",),
        )
        run(*commands[next(turn) % len(commands)])

    all_that_reads_it()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_f4_f7_f9_without_a_manifest_no_content_is_a_traceback(name, weights, valid):
    """A folder put there by hand has no hash that would refuse what was changed before it is looked at."""
    (weights / "tiny" / "v1" / "manifest.json").unlink()
    raw = (valid / "weights" / "tiny" / "v1" / name).read_bytes()
    turn = iter(range(10**9))

    @fuzzed
    @given(content=damaged(raw) if name.endswith("tensors") else contents(raw))
    def all_that_reads_it(content: bytes) -> None:
        replace(weights / "tiny" / "v1" / name, content)
        read_all(weights)
        if next(turn) % 4 == 0:
            run("sample", "tiny", "--max-new-tokens=3", "-q")

    all_that_reads_it()


@pytest.mark.parametrize(
    "name", ["tiny/model.json", ".quill.json", "tiny/v1/manifest.json", "tiny/v2/status.json"]
)
def test_f28_no_content_of_a_small_file_lets_a_version_be_written_over(name, weights, valid, fill):
    raw = (valid / "weights" / name).read_bytes()
    registry = Registry(weights)
    old = {p: p.read_bytes() for p in (weights / "tiny").glob("v[12]/*") if p.is_file()}

    @hypothesis_settings(fuzzed, max_examples=40 * LONGER)
    @given(content=contents(raw))
    def writing(content: bytes) -> None:
        replace(weights / name, content)
        there = set(os.listdir(weights / "tiny"))
        draft = attempt(lambda: registry.begin("tiny"))
        if draft is not None:
            assert draft.path.name not in there
            attempt(draft.take)
            fill(draft)
            attempt(draft.publish)
            shutil.rmtree(draft.path)
        assert all(p.read_bytes() == content for p, content in old.items() if p != weights / name)

    writing()


@pytest.mark.parametrize("source", ["shipped", "stored"])
def test_f6_f7_f8_f9_f10_f11_f12_no_config_is_a_traceback(source, weights, valid, root):
    raw = (valid / "weights" / "tiny" / "v1" / "config.json").read_bytes()
    if source == "shipped":
        raw = next(
            p for p in sorted((root / "configs").glob("*.json")) if p.name != "schema.json"
        ).read_bytes()
    path, turn = weights / "mine.json", iter(range(10**9))

    @hypothesis_settings(fuzzed, max_examples=120 * LONGER)
    @given(content=contents(raw))
    def reading_it(content: bytes) -> None:
        replace(path, content)
        config = attempt(lambda: reading.load(path), InputError)
        if config is not None:
            again = reading.parse(json.loads(json.dumps(config.to_dict())))
            assert again.model_dump(exclude={"schema_"}) == config.model_dump(exclude={"schema_"})
        if next(turn) % 5 == 0:
            assert run("config", "check", str(path)) in (0, 2, 7)

    reading_it()


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_f4_no_tokenizer_is_a_traceback(kind, ranks_of):
    raw = json.dumps(ranks_of(kind)).encode()

    @hypothesis_settings(fuzzed, max_examples=120 * LONGER)
    @given(content=contents(raw), text=st.text(max_size=20))
    def reading_it(content: bytes, text: str) -> None:
        found = attempt(lambda: base.read(content))
        if found is None:
            return
        assert found.vocab_size >= 1
        assert base.read(found.to_dict()).fingerprint == found.fingerprint
        attempt(lambda: found.decode(range(min(found.vocab_size, 500))))
        ids = attempt(lambda: found.encode(text, unknown="skip"))
        if ids is not None:
            assert all(0 <= i < found.vocab_size for i in ids)

    reading_it()


@pytest.fixture(scope="module")
def ranks_of() -> Callable[[str], dict[str, Any]]:
    """The JSON form of a small tokenizer of a kind."""

    def make(kind: str) -> dict[str, Any]:
        if kind != "bpe":
            return base.load(kind).train(["the cat sat on the mat, and the rat"]).to_dict()
        from quill.tokenizers.bpe import BpeTokenizer

        ranks = [bytes([b]) for b in range(256)] + [b"th", b"the"]
        return BpeTokenizer(ranks, {"<|endoftext|>": 258}, r"\w+|\s+|[^\w\s]+").to_dict()

    return make


references = st.one_of(
    odd_text,
    st.text(st.sampled_from("tinyv12:./~-_ABx\0\n\x1b[é＂‮"), max_size=12),
    st.sampled_from(["tiny", "tiny:v1", "tiny:best"]).flatmap(lambda ref: damaged(ref.encode())).map(
        lambda raw: raw.decode("utf-8", "surrogateescape")
    ),
    st.sampled_from(["tiny:", ":v1", "tiny:v0", "tiny:v01", "tiny:v999999999999", "tiny:latest:latest", "./",
                     "/", "~", "~root", "~nobody/x", "../weights/tiny", "./weights/tiny/v1/../v1", "con",
                     "TINY"]),
)  # fmt: skip


def can_be_typed(text: str) -> bool:
    """Whether an argument of a process may be this: bytes without NUL."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


@hypothesis_settings(fuzzed, max_examples=250 * LONGER)
@given(ref=references)
@example(ref="./x\0y")
@example(ref="~\0/x")
@example(ref="/" + "x" * 5000)
@example(ref="./" + "\udc80")
def test_f13_no_reference_is_a_traceback_or_a_way_out(ref, weights):
    registry = Registry(weights)
    for found in (
        attempt(lambda: names.parse(ref), InputError),
        attempt(lambda: names.check_name(ref), InputError),
    ):
        assert found is None or isinstance(found, (names.Reference, str))
    version = attempt(lambda: registry.resolve(ref), most=len(ref))
    if version is not None and not names.is_path(ref):
        assert version.path.parent == weights / "tiny"
    if not ref.startswith("-") and can_be_typed(ref):
        code = run("show", ref)
        assert (code == 0) == (version is not None) or ref.startswith("tiny:v2") or names.is_path(ref)


@hypothesis_settings(fuzzed, max_examples=150 * LONGER)
@given(name=references)
def test_f13_whatever_is_taken_for_a_name_is_one_folder_of_the_registry(name, weights):
    draft = attempt(lambda: Registry(weights).begin(name))
    if draft is not None:
        assert draft.path.parent.parent == weights
        assert draft.path.is_dir()
        assert names.check_name(draft.path.parent.name) == name
        shutil.rmtree(draft.path if name == "tiny" else draft.path.parent)


@hypothesis_settings(fuzzed, max_examples=100 * LONGER)
@given(
    content=st.one_of(st.binary(), damaged(b'{"step": 1, "loss": 2.0}\n{"step": 2, "val_loss": 1.0}\n' * 3))
)
def test_no_metrics_are_a_traceback(content, weights):
    path = weights / "tiny" / "v2" / "metrics.jsonl"
    replace(path, content)
    metrics = Folder("tiny", 2, path.parent).metrics
    assert all(isinstance(line["step"], int) for line in attempt(lambda: list(stream(metrics()))) or [])


def test_f13_f14_what_a_manifest_lists_is_read_inside_its_folder_alone(weights):
    """The paths that are tried first by whoever wants a file of somebody else's."""
    path = weights / "tiny" / "v1" / "manifest.json"
    manifest = json.loads(path.read_text())
    secret = weights.parent / "precious"
    entry = {"bytes": secret.stat().st_size, "sha256": fsio.sha256(secret)}
    for name in (
        "../../../precious",
        str(secret),
        "..\\precious",
        "a/../../../../precious",
        "./x",
        "a//b",
        "a\0b",
    ):
        manifest["files"] = {"model.safetensors": entry, name: entry}
        path.write_text(json.dumps(manifest))
        with pytest.raises(CorruptError):
            Registry(weights).resolve("tiny")


def test_the_harness_writes_what_no_writer_would(weights):
    """The mutations themselves: a strict reader refuses them for what they are."""
    assert dump({"a": float("nan"), "b": [deep(3)]}) == b'{"a": NaN, "b": [[[[1]]]]}'
    assert dump(Twice(a=1)) == b'{"a": 1, "a": 1}'
    assert Draft(weights, "tiny", 2).status() is not None
