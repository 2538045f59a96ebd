"""Layouts of other releases: older ones are brought up to date, newer ones refused."""

from __future__ import annotations

import copy

import pytest

from quill.config import settings
from quill.errors import CorruptError, InputError
from quill.registry import migrations


def rename_loss(document):
    """A step as one would be written: from version 1 to 2."""
    return {k: v for k, v in document.items() if k != "loss"} | {"best_val_loss": document["loss"]}


def add_tags(document):
    """From version 2 to 3."""
    return {**document, "tags": []}


@pytest.mark.parametrize("start", [1, 2, 3])
def test_the_chain_is_followed_from_wherever_a_document_is(start):
    document = {"schema": 1, "loss": 1.5}
    for number, step in enumerate((rename_loss, add_tags)[: start - 1], start=2):
        document = {**step(document), "schema": number}
    before = copy.deepcopy(document)
    assert migrations.migrate(document, steps=(rename_loss, add_tags)) == {
        "schema": 3,
        "best_val_loss": 1.5,
        "tags": [],
    }
    assert document == before


def test_the_current_version_is_left_as_it_is():
    document = {"schema": migrations.SCHEMA_VERSION, "anything": [1]}
    assert migrations.migrate(document) == document


def test_f12_a_newer_layout_names_the_quill_it_needs():
    newer = {"schema": migrations.SCHEMA_VERSION + 1, "versions": {"quill": "9.1.0"}}
    with pytest.raises(InputError) as caught:
        migrations.migrate(newer, origin="m.json")
    assert caught.value.exit_code == 2
    assert "needs quill >= 9.1.0" in str(caught.value)


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None, []])
def test_f12_a_version_that_is_no_count_is_damage(version):
    with pytest.raises(CorruptError):
        migrations.migrate({"schema": version})


def test_a_manifest_says_its_version_and_a_config_by_hand_need_not():
    with pytest.raises(CorruptError):
        migrations.migrate({})
    assert migrations.migrate({"model": {}}, "config") == {"model": {}}


def test_configs_are_migrated_up_to_what_the_settings_read():
    assert len(migrations.STEPS["config"]) + 1 == settings.SCHEMA_VERSION
