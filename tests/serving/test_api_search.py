"""Requests drawn at random from the OpenAPI document: no answer is a bug, and all have the form it gives.

What is drawn is the same in every run. For a long search against a running server:
`st run http://127.0.0.1:8000/openapi.json --checks all --exclude-checks positive_data_acceptance`.
"""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import given
from servers import Running

from quill.serving import openapi

schemathesis = pytest.importorskip("schemathesis")

POSTS = [path for path, operations in openapi.document()["paths"].items() if "post" in operations]
_SLOW = ("max_tokens", "max_completion_tokens", "max_length")


@pytest.fixture(scope="session")
def schema(server: Running):
    """The document of a running server."""
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("path", POSTS)
def test_h1_h2_no_body_breaks_the_server(schema, path, mode):
    operation = schema[path]["POST"]
    strategy = operation.as_strategy(
        generation_mode=schemathesis.GenerationMode(mode), path_parameters={"name": "tiny"}
    )
    checks = schemathesis.checks
    answered = [
        checks.not_a_server_error,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.status_code_conformance,
    ]

    @hypothesis.settings(max_examples=15, suppress_health_check=list(hypothesis.HealthCheck))
    @given(case=strategy)
    def search(case):
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"
            for name in _SLOW:
                if isinstance(case.body.get(name, 0), int | float | None):
                    case.body[name] = 2
        case.call_and_validate(checks=answered, timeout=60)

    search()
