"""Tasks of lm-evaluation-harness; each figure is that of its own `hf` model on the exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import quill
from quill.errors import NotFoundError
from quill.evaluation import harness

TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices.index(answer)}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tasks that need nothing from outside."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = ["3 bells and the", "12 nails, and", "the tide is ", "4 handles"]
    rows = [
        {
            "text": t,
            "answer": " tide",
            "choices": [" tide", " and 3 bells", " nail"],
            "long": f"{t} tide. " * (3 + i),
        }
        for i, t in enumerate(texts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []
    for name, task in TASKS.items():
        path = tmp_path / f"{name}.yaml"
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
        }
        # JSON is YAML.
        path.write_text(
            f"task: quill_{name}\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in (data | task).items())
        )
        made.append(str(path))
    return made


def test_every_figure_is_that_of_the_hf_model(files, tiny_registry, tmp_path, capsys):
    pytest.importorskip("accelerate")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = quill.load("tiny", registry=tiny_registry.root, device="cpu")
    found = harness.measure(model, files)
    assert capsys.readouterr().out == ""
    quill.export("tiny", "hf", tmp_path / "hf", registry=tiny_registry.root)
    prefix = harness._prefix(model)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=1, prefix_token_id=prefix)
    # It cannot generate with a tokenizer that has no end of text.
    theirs.tokenizer.eos_token = theirs.tokenizer.convert_ids_to_tokens(prefix)
    wanted = simple_evaluate(
        theirs,
        tasks=[f"quill_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tmp_path)),
        log_samples=False,
    )
    assert wanted is not None
    metrics = {m for task in TASKS.values() for m in (x["metric"] for x in task["metric_list"])}
    assert {row["metric"] for row in found} == metrics
    for row in found:
        figure = wanted["results"][row["task"]][f"{row['metric']},{row['filter']}"]
        assert row["value"] == pytest.approx(figure, rel=1e-4, abs=1e-4), row
        assert row["examples"] == 4


def test_unknown_tasks_are_refused(files, tiny_registry, tmp_path):
    model = quill.load("tiny", registry=tiny_registry.root, device="cpu")
    for task in ("no_such_task", str(tmp_path / "none.yaml")):
        with pytest.raises(NotFoundError):
            harness.measure(model, [task])
