"""Counts for Prometheus. Names are vLLM's with another prefix, so that its dashboards fit."""

from __future__ import annotations

import platform
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from quill import __version__
from quill.serving.engine import Engine
from quill.serving.jobs import Job
from quill.serving.residents import Resident

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_WHOLE = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)


class Metrics:
    """The counts of one server. Labels are names in the registry and routes, never a client's words."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        model = ["model_name"]
        self._requests = Counter("quill_requests", "Answers.", ["route", "code"], registry=r)
        self._rejected = Counter("quill_requests_rejected", "Requests refused.", ["reason"], registry=r)
        self._aborted = Counter(
            "quill_requests_aborted", "Requests that ended early.", [*model, "reason"], registry=r
        )
        self._success = Counter(
            "quill_request_success", "Samples that ended.", [*model, "finished_reason"], registry=r
        )
        self._prompt = Counter("quill_prompt_tokens", "Tokens read in prompts.", model, registry=r)
        self._generated = Counter("quill_generation_tokens", "Tokens generated.", model, registry=r)
        self._first = Histogram(
            "quill_time_to_first_token_seconds",
            "From the request to its first token.",
            model,
            buckets=_FIRST_TOKEN,
            registry=r,
        )
        self._whole = Histogram(
            "quill_e2e_request_latency_seconds",
            "From the request to its last token.",
            model,
            buckets=_WHOLE,
            registry=r,
        )
        self._loads = Counter("quill_model_loads", "Models loaded.", [*model, "result"], registry=r)
        self._load_seconds = Histogram(
            "quill_model_load_seconds", "Time to load a model.", model, buckets=_WHOLE, registry=r
        )
        info = Gauge("quill_build_info", "Versions.", ["version", "python"], registry=r)
        info.labels(__version__, platform.python_version()).set(1)

    def watch(self, engine: Engine) -> None:
        """Include the state of an engine."""
        self.registry.register(_State(engine))

    def answered(self, route: str, status: int, refused: str | None) -> None:
        """Count an answer; `refused` is the code of its error."""
        self._requests.labels(route, str(status)).inc()
        if refused is not None:
            self._rejected.labels(refused).inc()

    def loaded(self, resident: Resident) -> None:
        """Count a load, or the failure of one."""
        name = resident.version.reference
        self._loads.labels(name, "failed" if resident.error else "ok").inc()
        self._load_seconds.labels(name).observe(resident.seconds)

    def finished(self, name: str, job: Job) -> None:
        """Count a job that was answered whole."""
        now = time.monotonic()
        self._prompt.labels(name).inc(sum(map(len, job.prompts)))
        self._generated.labels(name).inc(job.drawn)
        for reason in job.ended:
            self._success.labels(name, reason).inc()
        if job.first_token is not None:
            self._first.labels(name).observe(job.first_token - job.submitted)
        self._whole.labels(name).observe(now - job.submitted)

    def aborted(self, name: str, reason: str) -> None:
        """Count a job that ended early."""
        self._aborted.labels(name, reason).inc()

    def render(self) -> bytes:
        """All counts in Prometheus' text format."""
        return generate_latest(self.registry)


class _State(Collector):
    """Gauges that are read off the engine when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> list[GaugeMetricFamily]:
        """Read the engine."""
        running = GaugeMetricFamily("quill_num_requests_running", "Samples running.", labels=["model_name"])
        slots = GaugeMetricFamily("quill_slots_total", "Most samples at once.", labels=["model_name"])
        size = GaugeMetricFamily("quill_model_bytes", "Memory of a model.", labels=["model_name"])
        residents = self._engine.residents.loaded()
        for resident in residents:
            if resident.lane is not None:
                name = [resident.version.reference]
                running.add_metric(name, resident.lane.running)
                slots.add_metric(name, resident.lane.slots)
                size.add_metric(name, resident.bytes)
        waiting = GaugeMetricFamily(
            "quill_num_requests_waiting", "Requests waiting.", value=self._engine.queued
        )
        models = GaugeMetricFamily("quill_models_loaded", "Models in memory.", value=len(residents))
        return [running, slots, size, waiting, models]
