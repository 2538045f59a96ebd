"""The check of hints that runs with every test of formats."""

from __future__ import annotations

import pytest
from hints import problem

from quill.errors import InputError
from quill.formats import importing
from quill.registry.store import Registry


@pytest.mark.parametrize(
    "hint",
    [
        "",
        "new_version=True",
        'tokenizer="/tmp/a b/input.txt"',
        "quill import --help",
        "quill import 'a b' --name c",
        "df -h",
        "pass the text as tokenizer=",
    ],
)
def test_commands_and_sentences_pass(hint):
    assert problem(hint) == ""


@pytest.mark.parametrize(
    "hint",
    [
        "--tokenizer input.txt",
        "pass --tokenizer",
        "quill imprt x",
        "quill import",
        "quill import x --nope",
        "quill import FILE",
        "quill import it's",
        "Do it.",
        "again",
    ],
)
def test_a_hint_that_does_not_run_is_found(hint):
    assert problem(hint)


def test_the_hints_of_errors_are_recorded(hints, tmp_path):
    (tmp_path / "noise.bin").write_bytes(b"noise")
    with pytest.raises(InputError):
        importing.import_model(str(tmp_path / "noise.bin"), Registry(tmp_path / "w"))
    assert list(hints) == ["quill import --help"]
