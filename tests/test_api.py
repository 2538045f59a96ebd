"""The Python API: each call does what the command of its name does."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import pytest

import quill
from quill import notebook
from quill.config import keyword_types, keywords
from quill.config.settings import SECTIONS, DataConfig, SampleConfig, Section
from quill.data.dataset import Dataset
from quill.errors import InputError, NotFoundError
from quill.generation.generator import Samples

if TYPE_CHECKING:
    from quill.registry.store import Registry
    from quill.registry.version import Version


def test_importing_quill_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys, quill; print({'torch', 'pydantic', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_its_attributes_are_the_api() -> None:
    assert dir(quill) == sorted(quill.__all__)
    for name in quill.__all__:
        assert getattr(quill, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        _ = quill.sampel  # type: ignore[attr-defined]
    assert quill.errors.NotFoundError is NotFoundError
    assert quill.events.Stepped(1, 2, 3.0, 0.1, 1.0, 10.0, 0.5).loss == 3.0


def plain(annotation: Any) -> Any:
    """The annotation of a field without its bounds."""
    if get_origin(annotation) is Annotated:
        return plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return Union[tuple(plain(arm) for arm in get_args(annotation))]  # noqa: UP007
    return annotation


@pytest.mark.parametrize(
    ("declared", "sections", "without"),
    [
        (keyword_types.SampleSettings, {"": SampleConfig}, set()),
        (keyword_types.TextSettings, {"data": DataConfig}, {"data"}),
        (keyword_types.RunSettings, SECTIONS, set()),
    ],
)
def test_keywords_are_the_fields_of_the_settings(
    declared: Any, sections: dict[str, type[Section]], without: set[str]
) -> None:
    fields = {
        word: sections[path.rpartition(".")[0]].model_fields[path.rpartition(".")[2]]
        for word, path in keywords.paths(sections).items()
        if word not in without
    }
    assert get_type_hints(declared) == {word: plain(field.annotation) for word, field in fields.items()}


def test_it_takes_every_argument_of_the_library() -> None:
    from quill.data.merge import merge
    from quill.data.prepare import prepare
    from quill.formats.exporting import export
    from quill.formats.importing import import_model
    from quill.training.run import train

    renamed = {
        "format_name": "format",
        "version": "reference",
        "root": "registry",
        "data_root": "registry",
        "on_bytes": "observer",
    }
    for ours, theirs in (
        (quill.train, train),
        (quill.prepare, prepare),
        (quill.merge, merge),
        (quill.export, export),
        (quill.import_model, import_model),
    ):
        wanted = {renamed.get(name, name) for name in inspect.signature(theirs).parameters}
        if ours is quill.prepare:
            # Settings come as keywords; shards that are sources of their own come from other programs.
            wanted -= {"config", "apart"}
        assert wanted <= set(inspect.signature(ours).parameters), theirs.__module__


def test_help_shows_every_setting_with_its_default() -> None:
    from quill.generation.generator import Generator

    for function, name, default in (
        (Generator.generate, "temperature", 0.8),
        (Generator.stream, "top_k", None),
        (quill.train, "max_iters", 2000),
        (quill.train, "init_from", None),
        (quill.prepare, "val_fraction", 0.1),
    ):
        parameters = inspect.signature(function).parameters
        assert parameters[name].default == default, name
        assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]


def test_a_model_is_loaded_sampled_and_measured(tiny_registry: Registry) -> None:
    model = quill.load("tiny", registry=tiny_registry.root, device="cpu")
    [text] = model.generate("3 bells", max_new_tokens=20, seed=1)
    config = quill.SampleConfig(max_new_tokens=20, seed=1)
    assert [text] == model.generate("3 bells", config)
    assert (
        text == "".join(model.stream("3 bells", config)) == "".join(model.stream("3 bells", config, seed=1))
    )
    assert model.generate("3 bells", config, seed=2) != [text]
    assert len(text) == 20
    ids = model.tokenizer.encode("3 bells")
    assert model.tokenizer.decode(ids) == "3 bells"
    figures = quill.evaluate("tiny", "3 bells, and the tide is 4 feet.", registry=tiny_registry.root)
    assert 0 < figures.loss < 6
    assert [v.reference for v in quill.models(registry=tiny_registry.root)] == ["tiny:v1"]


def test_an_invalid_keyword_is_refused_with_the_one_that_was_meant(tiny_registry: Registry) -> None:
    model = quill.load("tiny", registry=tiny_registry.root, device="cpu")
    with pytest.raises(InputError, match="did you mean 'temperature'"):
        model.generate("3 bells", temprature=0.5)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="'temperature' = -1"):
        model.generate("3 bells", temperature=-1)
    with pytest.raises(InputError, match=r"did you mean 'train\.max_iters'"):
        quill.train("tide", max_iter=3, registry=tiny_registry.root)  # type: ignore[call-arg]


def test_a_model_is_measured_on_its_own_data_as_on_the_command_line(
    tiny_registry: Registry, tiny: Version
) -> None:
    figures = quill.evaluate("tiny", registry=tiny_registry.root, device="cpu")
    assert tiny.manifest is not None
    assert figures.loss == pytest.approx(tiny.manifest["best_val_loss"], abs=1e-6)
    with pytest.raises(InputError, match="mutually exclusive"):
        quill.evaluate("tiny", "text", data="tiny", registry=tiny_registry.root)
    assert quill.evaluate("tiny", "3 bells日", unknown="skip", registry=tiny_registry.root).tokens == 6


def test_predict_returns_every_position_or_the_last(tiny_registry: Registry) -> None:
    import torch

    model = quill.load("tiny", registry=tiny_registry.root)
    idx = torch.tensor([model.tokenizer.encode("3 bells")])
    every, last = model.model.predict(idx), model.model.predict(idx, targets=False)
    assert every.shape == (1, 7, model.tokenizer.vocab_size)
    assert last.shape == (1, model.tokenizer.vocab_size)
    assert torch.allclose(every[:, -1], last, atol=1e-5)


def test_text_is_prepared_and_a_model_trained_from_a_dict(tmp_path: Path, tiny_text: str) -> None:
    text = tmp_path / "tide.txt"
    text.write_text(tiny_text)
    root = tmp_path / "weights"
    dataset = quill.prepare(str(text), name="tide", registry=root)
    assert dataset.path == tmp_path / "data" / "tide"
    config = {
        "name": "t",
        "data": {"source": "tide"},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8},
        "train": {"max_iters": 2, "batch_size": 2, "eval_interval": 2, "warmup_iters": 0, "device": "cpu"},
    }
    version = quill.train(config, registry=root)
    assert version is not None
    assert version.reference == "t:v1"
    again = quill.train(config, registry=root)
    assert again is not None
    assert again.reference == "t:v1"
    other = quill.train(config, registry=root, name="u", max_iters=4, seed=7)
    assert other is not None
    compared = quill.compare("t", "u", registry=root)
    assert compared.settings == {"train.max_iters": (2, 4), "train.seed": (1337, 7)}
    assert compared.figures["steps"] == (2, 4)
    assert "train.seed" in compared._repr_html_()


def test_shards_are_merged(tmp_path: Path, tiny_text: str) -> None:
    text = tmp_path / "tide.txt"
    text.write_text(tiny_text)
    root = tmp_path / "weights"
    whole = quill.prepare(str(text), name="whole", registry=root)
    with pytest.raises(NotFoundError, match="no shards of 'tide'"):
        quill.merge("tide", registry=root)
    quill.prepare(str(text), name="tide", registry=root, shard=(2, 2))
    with pytest.raises(InputError, match="1 of the 2 shards"):
        quill.merge("tide", registry=root)
    quill.prepare(str(text), name="tide", registry=root, shard=(1, 2))
    seen: list[Any] = []
    merged = quill.merge("tide", registry=root, observer=seen.append)
    assert merged.path == tmp_path / "data" / "tide"
    assert merged.manifest["files"] == whole.manifest["files"]
    assert "merging" in {event.stage for event in seen}


def test_a_name_in_configs_is_a_config_and_another_is_data(
    tmp_path: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quill import api

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.json").write_text('{"train": {"max_iters": 7, "batch_size": 3}}')
    run = api._run_config("small", None, {"max_iters": 5, "model_vocab_size": 99, "data": "tide"})
    assert (run.name, run.train.max_iters, run.train.batch_size) == ("small", 5, 3)
    assert (run.model.vocab_size, run.data.source) == (99, "tide")
    assert api._run_config("tide", None, {}).data.source == api._run_config("tide", None, {}).name == "tide"
    assert api._run_config(run, "other", {}).name == "other"
    assert api._run_config(run, None, {}) == run


def test_versions_are_shown_aliased_and_removed(tmp_path: Path, tiny: Version) -> None:
    root = tmp_path / "weights"
    shutil.copytree(tiny.root, root)
    assert quill.alias("tiny:v1", "champion", registry=root).reference == "tiny:v1"
    facts = quill.show("tiny:champion", registry=root)
    assert (facts["reference"], facts["state"], facts["aliases"]) == ("tiny:v1", "ok", ["champion"])
    assert facts["config"]["model"]["n_layer"] == 1
    assert "tiny:v1" in facts._repr_html_()
    with pytest.raises(quill.errors.RefusedError):
        quill.rm("tiny", registry=root)
    shutil.rmtree(root)
    shutil.copytree(tiny.root, root)
    assert quill.rm("tiny", "gone", missing_ok=True, dry_run=True, registry=root) == ["tiny:v1"]
    assert quill.rm("tiny", registry=root) == ["tiny:v1"]
    assert quill.models(registry=root) == []


def test_what_a_notebook_shows_is_short_and_escaped(tiny_registry: Registry) -> None:
    model = quill.load("tiny", registry=tiny_registry.root, device="cpu")
    assert repr(model).startswith("<tiny:v1: ")
    assert repr(model).endswith("modern x 1, context 16, char tokenizer, cpu>")
    models = quill.models(registry=tiny_registry.root)
    assert "<td>tiny:v1</td>" in models._repr_html_()
    assert "tiny:v1" in models[0]._repr_html_()
    assert Samples(["a<b\n", "c"])._repr_html_() == "<pre>a&lt;b\n</pre><hr><pre>c</pre>"
    assert notebook.table(("a",), [("<b>",), (None,)]).count("<td></td>") == 1
    assert "<b>" not in notebook.table(("a",), [("<b>",)])
    cells: list[Any] = [1 / 3, {"a": 1, "b": 2}, {"a": {}, "b": {}}, ["x", "y"]]
    shown = notebook.table(("a",), [[cell] for cell in cells])
    assert [f"<td>{text}</td>" in shown for text in ("0.333333", "a 1, b 2", "a, b", "x, y")] == [True] * 4
    dataset = Dataset.open(tiny_registry.root.parent / "data" / "tiny")
    assert repr(dataset).startswith("<tiny: ")
    assert repr(dataset).endswith(f"char vocabulary of {dataset.vocab_size}>")


class Bar:
    """A stand-in for tqdm's bar."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, total: int, initial: int, unit: str, file: Any) -> None:
        self.total, self.n, self.closed = total, initial, False
        Bar.made.append(self)

    def set_postfix(self, **values: Any) -> None:
        self.shown = values

    def write(self, line: str, file: Any) -> None:
        file.write(f"\r{line}\n")

    def update(self, steps: int) -> None:
        self.n += steps

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("with_bar", [True, False])
def test_a_notebook_sees_the_progress_of_a_run_and_a_script_does_not(
    tmp_path: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    with_bar: bool,
) -> None:  # fmt: skip
    (tmp_path / "tide.txt").write_text(tiny_text)
    small: Any = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 2, "max_iters": 3}
    small |= {"eval_interval": 2, "device": "cpu", "dtype": "float32", "compile": "off"}
    seen: list[Any] = []

    def train(name: str, **options: Any) -> None:
        source = str(tmp_path / "tide.txt")
        quill.train(
            source, name=name, registry=tmp_path / "weights", observer=seen.append, **options, **small
        )

    train("a")
    assert capsys.readouterr() == ("", "")
    assert [type(e).__name__ for e in seen].count("Stepped") == 3
    Bar.made.clear()
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    tqdm = ModuleType("tqdm.auto")
    tqdm.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", ModuleType("tqdm") if with_bar else None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", tqdm if with_bar else None)
    train("b")
    out, err = capsys.readouterr()
    assert err == "", "a notebook shows stderr as an alarm"
    assert "step 2: val loss" in out
    assert ("\rstep 2" in out) is with_bar, "a bar makes room for the line"
    assert 'next: quill.load("b:v1")' in out
    assert [(b.total, b.n, b.closed) for b in Bar.made] == ([(3, 3, True)] if with_bar else [])
    train("c", progress=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.delitem(sys.modules, "ipykernel")
    train("d", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 2: val loss" in err


def test_errors_are_those_of_the_library(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        quill.load("nobody", registry=tmp_path)
    with pytest.raises(InputError, match="lerning_rate"):
        quill.train({"name": "x", "train": {"lerning_rate": 1.0}}, registry=tmp_path)
    with pytest.raises(InputError, match="tokenizer"):
        quill.prepare("x.txt", registry=tmp_path, tokenizer="nope")


def test_a_version_is_accepted_wherever_a_reference_is(
    tiny_registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the default registry is another one: a version knows its own."""
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "other"))
    tiny = quill.models("tiny", registry=tiny_registry.root)[0]
    by_name = quill.evaluate("tiny", registry=tiny_registry.root)
    assert quill.evaluate(tiny) == by_name
    assert quill.evaluate(tiny, registry=tiny_registry.root) == by_name
    assert quill.load(tiny).generate("", max_new_tokens=3, temperature=0.0)
    assert quill.show(tiny)["reference"] == "tiny:v1"
    assert quill.compare(tiny, "tiny", registry=tiny_registry.root).settings == {}
    assert quill.compare(tiny, tiny).settings == {}
    assert quill.export(tiny, "hf", tmp_path / "out").path == tmp_path / "out"
    # In another registry it is found by its path.
    assert quill.show(tiny, registry=tmp_path / "other")["path"] == tiny.path
    shutil.copytree(tiny_registry.root.parent, tmp_path / "copy")
    copied = tmp_path / "copy" / "weights"
    mine = quill.models("tiny", registry=copied)[0]
    assert quill.alias(mine, "best") == mine
    assert quill.load("tiny:best", registry=copied)
    again = quill.train(
        "tiny", init_from=mine, name="again", max_iters=1, batch_size=2, warmup_iters=0, device="cpu",
        registry=copied,
    )  # fmt: skip
    assert again is not None and again.facts["parent"] is not None
    assert again.facts["parent"]["reference"] == "tiny:v1"
    assert quill.rm(again) == ["again:v1"]


def test_a_device_that_cannot_exist_is_refused_in_plain_words(tiny: Version) -> None:
    with pytest.raises(InputError, match="'foo'") as caught:
        quill.load(tiny, device="foo")
    assert caught.value.why == "choose auto, cpu, cuda, cuda:N, mps"


def test_tasks_are_named_and_need_the_harness(
    tiny_registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the figures are is tested with the harness, in `tests/evaluation/test_harness.py`."""
    parameters = inspect.signature(quill.tasks).parameters
    assert list(parameters) == ["reference", "names", "registry", "device"]
    with pytest.raises(InputError, match="no task is named"):
        quill.tasks("tiny", [], registry=tiny_registry.root)
    with pytest.raises(NotFoundError):
        quill.tasks("none", "hellaswag", registry=tiny_registry.root)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="cannot run tasks") as error:
        quill.tasks("tiny", "hellaswag", registry=tiny_registry.root, device="cpu")
    assert error.value.hint == "pip install 'quill-gpt[lm-eval]'"


def test_tasks_get_the_model_and_every_name(tiny_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from quill.evaluation import harness

    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(harness, "measure", lambda model, names: asked.append((model.name, names)) or [])
    assert quill.tasks("tiny", "a", registry=tiny_registry.root, device="cpu") == []
    assert quill.tasks("tiny", ("a", "b.yaml"), registry=tiny_registry.root, device="cpu") == []
    assert asked == [("tiny:v1", ["a"]), ("tiny:v1", ["a", "b.yaml"])]
