"""Config files: what is refused, with which message, and how flat configs are read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill.config import flat, reading, schema
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
def test_f06_non_finite_numbers_are_refused(number: str, tmp_path: Path) -> None:
    assert "train.learning_rate" in refuse(f'{{"train": {{"learning_rate": {number}}}}}', tmp_path).what


@pytest.mark.parametrize("value", ["-3", '"6"', "6.0", "true", "[]"])
def test_f07_values_of_the_wrong_type_are_refused(value: str, tmp_path: Path) -> None:
    refuse(f'{{"model": {{"n_layer": {value}}}}}', tmp_path)


@pytest.mark.parametrize("value", ["0", "-1", '"8"', "8.0", "true"])
def test_f07_an_error_names_the_setting_and_the_rule(value: str, tmp_path: Path) -> None:
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


def test_f08_a_duplicate_key_is_refused(tmp_path: Path) -> None:
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
def test_f09_json_values_other_than_objects_are_refused(text: str, tmp_path: Path) -> None:
    refuse(text, tmp_path)


def test_f10_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b'\xef\xbb\xbf{"model": {"n_layer": 3}}')
    assert reading.load(path).model.n_layer == 3


def test_f10_utf16_is_refused(tmp_path: Path) -> None:
    assert "UTF-16" in refuse('{"model": {}}'.encode("utf-16"), tmp_path).what


def test_f11_an_integer_of_23_digits_is_refused(tmp_path: Path) -> None:
    assert "model.n_layer" in refuse('{"model": {"n_layer": ' + "9" * 23 + "}}", tmp_path).what


def test_f11_an_integer_that_python_does_not_convert_is_refused(tmp_path: Path) -> None:
    assert "model.n_layer" in refuse('{"model": {"n_layer": ' + "9" * 5000 + "}}", tmp_path).what


def test_f11_a_width_that_the_heads_do_not_divide_is_refused(tmp_path: Path) -> None:
    error = refuse('{"model": {"n_embd": 1024, "n_head": 12}}', tmp_path)
    assert error.why == "'model.n_embd' = 1024 is not divisible by 'model.n_head' = 12"
    assert error.hint == "set model.head_size=85"


@pytest.mark.parametrize("version", ["0", "99", '"1"', "1.5"])
def test_f12_an_unknown_schema_version_is_refused(version: str, tmp_path: Path) -> None:
    assert "schema" in refuse(f'{{"schema_version": {version}}}', tmp_path).what


def test_overrides_are_validated_like_the_file() -> None:
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        reading.parse({}, {"train.learning_rate": float("nan")})
    assert reading.parse({"train": {"batch_size": 3}}, {"train.batch_size": 5}).train.batch_size == 5


def test_an_error_names_the_source_of_the_value_and_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the arguments") as caught:
        reading.parse({}, {"train.beta1": float("inf")}, origin="run.json")
    assert caught.value.why == "it must be finite"
    monkeypatch.setenv("QUILL_DTYPE", "int3")
    with pytest.raises(InputError, match="in QUILL_DTYPE"):
        reading.parse({}, origin="run.json")
    with pytest.raises(InputError, match=r"run\.json"):
        reading.parse(
            {"train": {"dtype": "int3"}, "model": {"n_layer": -1}}, {"train.dtype": "auto"}, origin="run.json"
        )


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUILL_DEVICE", "cpu")
    assert reading.parse({"train": {"device": "mps"}}).train.device == "cpu"
    assert reading.parse({}, {"train.device": "cuda"}).train.device == "cuda"


def test_a_config_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "My-Run.json"
    path.write_text("{}")
    assert reading.load(path).name == "my-run"


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), st.lists))
def test_any_value_is_read_or_raises_a_quill_error(value: Any) -> None:
    for document in (value, {"model": value}, {"model": {"n_layer": value}}, {"data": {"source": value}}):
        try:
            reading.parse(document)
        except QuillError as e:
            assert e.what


def test_a_lone_surrogate_is_accepted_or_raises_a_quill_error() -> None:
    texts = [
        (name, field)
        for name, section in SECTIONS.items()
        for field in section.model_fields
        if reading.plain_type(section.model_fields[field].annotation)[0] not in (bool, int, float)
    ]
    assert ("model", "activation") in texts
    for name, field in texts:
        for value in ("\ud800", ["\ud800"]):
            try:
                reading.parse({name: {field: value}})
            except QuillError as e:
                str(e).encode()


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_raises_a_quill_error(text: str) -> None:
    from quill import strictjson

    try:
        strictjson.parse(text.encode("utf-8", "surrogatepass"), origin="x")
    except QuillError as e:
        assert e.what.startswith("'x'")


def test_a_stored_config_reads_back_equal() -> None:
    for document in ({}, {"model": {"block": "gpt2", "n_embd": 96, "n_head": 5, "head_size": 19}}):
        config = reading.parse(document)
        assert reading.parse(config.to_dict()) == config


def test_reading_a_config_fills_in_unset_sizes() -> None:
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


def test_a_flat_config_of_an_older_project_is_read() -> None:
    config = reading.parse(FLAT)
    assert config.data.vocabulary == ["b", "a", "c"]
    assert config.data.source == "corpus.txt"
    assert (config.model.head_size, config.model.qkv_bias, config.model.head_bias) == (85, False, True)
    assert (config.train.schedule, config.train.max_iters, config.train.eval_iters) == ("constant", 3000, 50)


def test_the_device_of_a_flat_config_is_ignored() -> None:
    config = reading.parse(FLAT | {"device": "cuda"})
    assert config.train.device == "auto"


def test_tables_that_disagree_are_refused() -> None:
    with pytest.raises(InputError, match="disagree"):
        flat.to_sections(FLAT | {"decode": {"0": "a", "1": "b", "2": "c"}})
    with pytest.raises(InputError, match="vocab_size"):
        flat.to_sections(FLAT | {"vocab_size": 4})
    with pytest.raises(InputError, match="not a table"):
        flat.to_sections(FLAT | {"decode": 3})


def test_an_unknown_key_of_a_flat_config_is_refused() -> None:
    with pytest.raises(InputError, match="n_heads"):
        reading.parse({"n_heads": 3, "n_layer": 2})


def test_every_setting_is_described_in_one_sentence() -> None:
    for section in (*SECTIONS.values(), RunConfig, SampleConfig):
        for name, field in section.model_fields.items():
            assert re.fullmatch(r"[A-Z][^\n]*[^.]\.", field.description or ""), name


def test_settings_names_are_distinct_as_flags() -> None:
    flags = [
        str((field.json_schema_extra or {}).get("flag", name)).replace("_", "-")  # type: ignore[union-attr]
        for section in SECTIONS.values()
        for name, field in section.model_fields.items()
    ]
    assert len(flags) == len(set(flags))


def test_the_committed_schema_is_up_to_date(root: Path) -> None:
    assert json.loads((root / "configs/schema.json").read_text()) == schema.build()


def test_the_schema_has_every_section() -> None:
    assert set(schema.build()["properties"]) == {*RunConfig.model_fields, "$schema"} - {"schema_"}


def test_f11_a_file_that_is_too_large_for_a_config_is_refused_unread(tmp_path: Path) -> None:
    error = refuse('{"train": {}}' + " " * (4 << 20), tmp_path)
    assert "too large" in error.what and "4 MiB" in error.why


@pytest.mark.parametrize("section", [None, "train"])
def test_f11_thousands_of_settings_are_refused_without_naming_each(section, tmp_path, monkeypatch) -> None:
    many = {f"k{i}": 1 for i in range(2000)}
    monkeypatch.setattr(reading, "check", lambda *args, **more: pytest.fail("validated"))
    error = refuse(json.dumps({section: many} if section else many), tmp_path)
    assert "2,000 settings" in error.what and "at most 1,000" in error.why


def test_a_config_may_name_as_many_files_as_a_command_line(tmp_path: Path) -> None:
    source = [f"{i}.txt" for i in range(50_000)]
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"data": {"source": source}}, indent=2))
    assert reading.load(path).data.source == source


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="there is no /dev/fd here")
def test_a_config_can_come_through_a_pipe() -> None:
    read, write = os.pipe()
    os.write(write, b'{"train": {"batch_size": 3}}')
    os.close(write)
    try:
        config = reading.load(Path(f"/dev/fd/{read}"))
        assert (config.name, config.train.batch_size) == (None, 3)
    finally:
        os.close(read)
