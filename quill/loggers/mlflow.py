"""MLflow, where its own variables say: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from quill.loggers import base

_TAG = "quill.run"


class MlflowLogger(base.Logger):
    package = "mlflow"

    def __init__(self, run: base.LoggedRun) -> None:
        mlflow: Any = import_module("mlflow")
        self._entities: Any = import_module("mlflow.entities")
        # The client instead of the module's functions, which belong to the program that quill is used from.
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or base.PROJECT
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(name)
        before = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(experiment, tags={_TAG: run.id}, run_name=run.reference)
        self._id = made.info.run_id
        self._client.log_dict(self._id, dict(run.config), "config.json")
        settings = [self._entities.Param(key, str(value)[:250]) for key, value in base.flat(run.config)]
        self._client.log_batch(self._id, params=settings)

    @property
    def where(self) -> str:
        return f"run {self._id} at {self._client.tracking_uri}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/step-{step:06d}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._id)
