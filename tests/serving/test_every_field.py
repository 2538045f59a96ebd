"""Every field of every request with every kind of value: the answers are what the OpenAPI document says.

`test_api_search.py` draws bodies at random.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
from pydantic import ValidationError
from servers import Answer, Running

from quill.serving import openapi, requests

jsonschema = pytest.importorskip("jsonschema_rs")

DOCUMENT = openapi.document()
BODIES = {
    path: operations["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    for path, operations in DOCUMENT["paths"].items()
    if "post" in operations and not path.startswith("/m/")
}
GOOD: dict[str, Any] = {
    "model": "tiny",
    "prompt": "3 bells",
    "messages": [{"role": "user", "content": "3"}],
    "tokens": [1, 2],
    "max_tokens": 1,
    "max_length": 1,
}
# Refusals of what the schema allows: what a model cannot do, and limits that the server has been given.
_KNOWN = {"unsupported_parameter", "unknown_character", "model_not_found", "context_length_exceeded"}
VALUES: list[Any] = [
    True, False, 0, 1, 2, 3.0, 1.5, -1, -0.5, 21, 2**31, -(2**63) - 1, 10**30, 1e308, "", "3", "a" * 400,
    "1", [], [1], [1.0], [-1], [2**31], ["3"], ["3", 1], [None], [[]], [[1], [2]], [["3"]], [True], ["3"] * 9,
    {}, {"type": "text"}, {"1": 0}, {"3": {"3": []}}, {"include_usage": True}, {"include_usage": 1},
    [{"role": "user", "content": "3"}], [{"role": "user"}], [{"content": "3"}], [{"role": 3, "content": []}],
    [{"role": "user", "content": [{"type": "text", "text": "3"}]}],
]  # fmt: skip


def fields() -> Iterator[tuple[str, str]]:
    """Every path with each of its fields."""
    for path, name in BODIES.items():
        for field in DOCUMENT["components"]["schemas"][name]["properties"]:
            yield path, field


def body_for(path: str) -> dict[str, Any]:
    """A body that is accepted."""
    known = DOCUMENT["components"]["schemas"][BODIES[path]]["properties"]
    return {name: value for name, value in GOOD.items() if name in known}


@lru_cache
def validator(name: str) -> Any:
    """What validates against a schema of the document."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema.Draft202012Validator(schema)


def allows(path: str, body: Any) -> bool:
    """Whether the document allows a body."""
    return validator(BODIES[path]).is_valid(body)


def check_answer(path: str, answer: Answer) -> None:
    """An answer has the form that the document gives it."""
    assert answer.status < 500, answer.body
    if answer.status != 200:
        assert answer.code
    elif answer.headers["content-type"] == "application/json" and path in openapi.ANSWERS:
        validator(openapi.ANSWERS[path].__name__).validate(answer.json)


@pytest.mark.parametrize(("path", "field"), list(fields()))
def test_a_field_takes_what_the_document_allows(server: Running, path: str, field: str):
    for value in VALUES:
        body = {**body_for(path), field: value}
        answer = server.post(path, body)
        check_answer(path, answer)
        shown = json.dumps(body)[:200]
        if not allows(path, body):
            assert (answer.status, answer.code) == (400, "invalid_value"), shown
            assert answer.json["error"]["param"] == field, shown
        elif answer.status != 200:
            limits = field in ("max_tokens", "max_completion_tokens", "max_length", "prompt", "tokens")
            assert answer.code in _KNOWN or (limits and answer.code == "invalid_value"), (shown, answer.body)


@pytest.mark.parametrize("path", BODIES)
def test_every_field_may_be_null_and_more_are_ignored(server: Running, path: str):
    schema = DOCUMENT["components"]["schemas"][BODIES[path]]
    free = schema["properties"].keys() - set(schema.get("required", ())) - GOOD.keys()
    body = {**body_for(path), **dict.fromkeys(free), "user": "me", "metadata": {"a": [None]}, "store": 1.5}
    assert allows(path, body)
    answer = server.post(path, body)
    assert answer.status == 200
    check_answer(path, answer)
    for name in schema.get("required", ()):
        refused = server.post(path, {**body, name: None})
        assert (refused.status, refused.json["error"]["param"]) == (400, name)


@pytest.mark.parametrize("stream", [False, True])
def test_twenty_prompts_of_several_samples(server: Running, stream: bool):
    prompts = [f"{i} bells" for i in range(20)]
    fields = {
        "prompt": prompts,
        "n": 3,
        "max_tokens": 2,
        "echo": True,
        "logprobs": 1,
        "seed": 5,
        "stream": stream,
    }
    answer = server.complete(**fields)
    check_answer("/v1/completions", answer)
    chunks = answer.chunks if stream else [answer.json]
    texts = [""] * 60
    for choice in itertools.chain.from_iterable(c["choices"] for c in chunks):
        texts[choice["index"]] += choice["text"]
    assert all(text.startswith(prompts[i // 3]) for i, text in enumerate(texts))
    assert all(len(text) == len(prompts[i // 3]) + 2 for i, text in enumerate(texts))


@pytest.mark.parametrize(
    "body",
    [{"prompt": [-1] * 10_000}, {"prompt": [[True] * 1000] * 100}, {"stop": [1] * 10_000}],
    ids=["ids", "lists", "stop"],
)
def test_h2_a_list_of_wrong_values_is_refused_at_the_first(body: dict[str, Any]):
    with pytest.raises(ValidationError) as e:
        requests.CompletionRequest.model_validate({"prompt": "3", **body})
    assert e.value.error_count() < 10


def test_h2_a_table_of_wrong_values_is_refused_by_its_size(server: Running):
    answer = server.complete(prompt="3", logit_bias={str(i): "x" for i in range(301)})
    assert (answer.status, answer.json["error"]["param"]) == (400, "logit_bias")
    assert "300" in answer.json["error"]["message"]
