"""Config files: what is refused, with which words, and what older projects' files become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill.config import flat as lineage
from quill.config import reading, schema
from quill.config.settings import SECTIONS, ModelConfig, RunConfig, SampleConfig
from quill.errors import InputError, QuillError


def refuse(text: str | bytes, tmp_path: Path) -> InputError:
    path = tmp_path / "run.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        reading.load(path)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize("number", ["NaN", "1e999", "Infinity", "-Infinity"])
def test_f06_numbers_that_are_not_finite(number: str, tmp_path: Path) -> None:
    assert "train.learning_rate" in refuse(f'{{"train": {{"learning_rate": {number}}}}}', tmp_path).what


@pytest.mark.parametrize("value", ["-3", '"6"', "6.0", "true", "[]"])
def test_f07_values_of_the_wrong_kind(value: str, tmp_path: Path) -> None:
    refuse(f'{{"model": {{"n_layer": {value}}}}}', tmp_path)


@pytest.mark.parametrize("value", ["0", "-1", '"8"', "8.0", "true"])
def test_f07_a_refusal_names_the_path_and_the_setting(value: str, tmp_path: Path) -> None:
    error = refuse(f'{{"train": {{"batch_size": {value}}}}}', tmp_path)
    assert "'train.batch_size' = " in error.what
    assert error.why in ("it must be at least 1", "it must be an integer")


@pytest.mark.parametrize(
    ("document", "suggestion"),
    [
        ({"model": {"n_layers": 3}}, "model.n_layer"),
        ({"train": {"n_layer": 3}}, "model.n_layer"),
        ({"train": {"lerning_rate": 1.0}}, "train.learning_rate"),
        ({"modle": {}}, "model"),
        ({"model": {}, "batch_size": 4}, "train.batch_size"),
    ],
)
def test_f07_an_unknown_key_gets_a_suggestion(document: Any, suggestion: str, tmp_path: Path) -> None:
    assert refuse(json.dumps(document), tmp_path).why == f"did you mean '{suggestion}'?"


def test_f08_a_duplicate_key(tmp_path: Path) -> None:
    assert "'n_layer' twice" in refuse('{"model": {"n_layer": 1, "n_layer": 2}}', tmp_path).what


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"model": {"n_layer": 1,}}', "1:25"),
        ('{\n  // layers\n  "model": {}\n}', "2:3"),
        ('{"model": {}} {}', "1:15"),
        ("{'model': {}}", "1:2"),
        ("[" * 10_000, "1:101"),
    ],
)
def test_f09_a_syntax_error_is_located(text: str, where: str, tmp_path: Path) -> None:
    assert refuse(text, tmp_path).what.endswith(where)


def test_f09_a_trailing_comma_is_explained(tmp_path: Path) -> None:
    assert refuse('{"model": {"n_layer": 1,}}', tmp_path).hint == "remove the trailing comma"


@pytest.mark.parametrize("text", ["", "  \n", "[]", "3", '"x"', "null"])
def test_f09_what_is_no_object(text: str, tmp_path: Path) -> None:
    refuse(text, tmp_path)


def test_f10_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b'\xef\xbb\xbf{"model": {"n_layer": 3}}')
    assert reading.load(path).model.n_layer == 3


def test_f10_utf16_is_refused(tmp_path: Path) -> None:
    assert "UTF-16" in refuse('{"model": {}}'.encode("utf-16"), tmp_path).what


def test_f11_an_integer_of_23_digits(tmp_path: Path) -> None:
    assert "model.n_layer" in refuse('{"model": {"n_layer": ' + "9" * 23 + "}}", tmp_path).what


def test_f11_an_integer_python_will_not_convert(tmp_path: Path) -> None:
    assert "model.n_layer" in refuse('{"model": {"n_layer": ' + "9" * 5000 + "}}", tmp_path).what


def test_f11_a_width_that_heads_do_not_divide(tmp_path: Path) -> None:
    error = refuse('{"model": {"n_embd": 1024, "n_head": 12}}', tmp_path)
    assert error.why == "'model.n_embd' = 1024 is not divisible by 'model.n_head' = 12"
    assert error.hint == "set model.head_size=85"


@pytest.mark.parametrize("version", ["0", "99", '"1"', "1.5"])
def test_f12_a_schema_of_another_time(version: str, tmp_path: Path) -> None:
    assert "schema" in refuse(f'{{"schema_version": {version}}}', tmp_path).what


def test_an_override_is_held_to_what_the_file_is_held_to() -> None:
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        reading.parse({}, {"train.learning_rate": float("nan")})
    assert reading.parse({"train": {"batch_size": 3}}, {"train.batch_size": 5}).train.batch_size == 5


def test_a_refusal_names_who_gave_the_value_and_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the arguments") as caught:
        reading.parse({}, {"train.beta1": float("inf")}, origin="run.json")
    assert caught.value.why == "it must be finite"
    monkeypatch.setenv("QUILL_DTYPE", "int3")
    with pytest.raises(InputError, match="the environment"):
        reading.parse({}, origin="run.json")
    with pytest.raises(InputError, match=r"run\.json"):
        reading.parse(
            {"train": {"dtype": "int3"}, "model": {"n_layer": -1}}, {"train.dtype": "auto"}, origin="run.json"
        )


def test_the_environment_is_between_flag_and_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUILL_DEVICE", "cpu")
    assert reading.parse({"train": {"device": "mps"}}).train.device == "cpu"
    assert reading.parse({}, {"train.device": "cuda"}).train.device == "cuda"


def test_a_config_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "My-Run.json"
    path.write_text("{}")
    assert reading.load(path).name == "my-run"


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), st.lists))
def test_any_value_is_read_or_refused_in_words(value: Any) -> None:
    for document in (value, {"model": value}, {"model": {"n_layer": value}}, {"data": {"source": value}}):
        try:
            reading.parse(document)
        except QuillError as e:
            assert e.what


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    from quill import strictjson

    try:
        strictjson.parse(text.encode("utf-8", "surrogatepass"), origin="x")
    except QuillError as e:
        assert e.what.startswith("'x'")


def test_what_is_stored_reads_back_equal() -> None:
    for document in ({}, {"model": {"block": "gpt2", "n_embd": 96, "n_head": 5, "head_size": 19}}):
        config = reading.parse(document)
        assert reading.parse(config.to_dict()) == config


def test_unset_sizes_are_filled_in_as_soon_as_a_config_is_read() -> None:
    model = reading.parse({"model": {"n_embd": 192, "n_head": 6}}).model
    assert (model.head_size, model.n_kv_head, model.mlp_size, model.activation) == (32, 6, 512, "swiglu")
    gpt2 = ModelConfig(block="gpt2", n_embd=192, n_head=6)
    assert (gpt2.mlp_size, gpt2.activation, gpt2.norm_eps) == (768, "gelu", 1e-5)


FLAT = {
    "data_path": "corpus.txt",
    "vocab_size": 3,
    "batch_size": 32,
    "block_size": 256,
    "max_iters": 3000,
    "eval_interval": 300,
    "learning_rate": 3e-5,
    "eval_iters": 50,
    "n_embd": 1024,
    "n_head": 12,
    "n_layer": 18,
    "dropout": 0.3,
    "encode": {"b": 0, "a": 1, "c": 2},
    "decode": {"0": "b", "1": "a", "2": "c"},
}


def test_a_flat_config_of_an_older_project_is_read_as_it_is() -> None:
    config = reading.parse(FLAT)
    assert config.data.vocabulary == ["b", "a", "c"]
    assert config.data.source == "corpus.txt"
    assert (config.model.head_size, config.model.qkv_bias, config.model.head_bias) == (85, False, True)
    assert (config.train.schedule, config.train.max_iters, config.train.eval_iters) == ("constant", 3000, 50)


def test_the_device_of_a_flat_config_is_what_the_machine_has() -> None:
    config = reading.parse(FLAT | {"device": "cuda"})
    assert config.train.device == "auto"


def test_tables_that_disagree_are_refused() -> None:
    with pytest.raises(InputError, match="disagree"):
        lineage.to_sections(FLAT | {"decode": {"0": "a", "1": "b", "2": "c"}})
    with pytest.raises(InputError, match="vocab_size"):
        lineage.to_sections(FLAT | {"vocab_size": 4})
    with pytest.raises(InputError, match="not a table"):
        lineage.to_sections(FLAT | {"decode": 3})


def test_an_unknown_key_of_a_flat_config_is_refused() -> None:
    with pytest.raises(InputError, match="n_heads"):
        reading.parse({"n_heads": 3, "n_layer": 2})


def test_every_setting_says_what_it_is() -> None:
    for section in (*SECTIONS.values(), SampleConfig):
        for name, field in section.model_fields.items():
            assert field.description, name


def test_settings_names_are_distinct_as_flags() -> None:
    flags = [
        str((field.json_schema_extra or {}).get("flag", name)).replace("_", "-")  # type: ignore[union-attr]
        for section in SECTIONS.values()
        for name, field in section.model_fields.items()
    ]
    assert len(flags) == len(set(flags))


def test_the_committed_schema_is_the_settings_own(root: Path) -> None:
    assert json.loads((root / "configs/schema.json").read_text()) == schema.build()


def test_the_schema_knows_every_section() -> None:
    assert set(schema.build()["properties"]) == {*RunConfig.model_fields, "$schema"} - {"schema_"}
