"""The OpenAPI document, made from the models that validate requests, and a page that shows it."""

from __future__ import annotations

import inspect
from functools import lru_cache
from html import escape
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from quill import __version__
from quill.serving import answers, requests

# By path: method, summary, the model of its body, and the type of its answer.
_JSON, _TEXT, _HTML = "application/json", "text/plain", "text/html"
ROUTES: dict[str, tuple[str, str, type[BaseModel] | None, str]] = {
    "/v1/completions": ("post", "Continue prompts.", requests.CompletionRequest, _JSON),
    "/v1/chat/completions": (
        "post",
        "Continue the contents of messages, joined by newlines.",
        requests.ChatRequest,
        _JSON,
    ),
    "/v1/models": ("get", "List the models.", None, _JSON),
    "/v1/models/{name}": ("get", "Describe a model.", None, _JSON),
    "/v1/quill/card/{name}": ("get", "Show how a model was made, with its loss curve.", None, _JSON),
    "/v1/quill/explain": (
        "post",
        "Show what happens between a prompt and the next token, as `quill explain --json` does.",
        requests.ExplainRequest,
        _JSON,
    ),
    "/tokenize": ("post", "Turn text into tokens.", requests.TokenizeRequest, _JSON),
    "/detokenize": ("post", "Turn tokens into text.", requests.DetokenizeRequest, _JSON),
    "/tokenizer_info": ("get", "Describe a model's tokenizer.", None, _JSON),
    "/generate": ("post", "Continue a prompt, as QuillGPT does.", requests.GenerateRequest, _JSON),
    "/generate_stream": ("post", "Continue a prompt as plain text.", requests.GenerateRequest, _TEXT),
    "/health": ("get", "Say that the server lives.", None, _JSON),
    "/ready": ("get", "Say whether the server can generate.", None, _JSON),
    "/metrics": ("get", "Show counts for Prometheus.", None, _TEXT),
    "/openapi.json": ("get", "Show this document.", None, _JSON),
    "/docs": ("get", "Show this document to people.", None, _HTML),
    "/": ("get", "Greet programs, and show the playground to people.", None, _JSON),
    "/static/{name}": ("get", "Send a file of the playground.", None, "*/*"),
}
PER_MODEL = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/tokenizer_info")
_REF = "#/components/schemas/{model}"
# What those that answer with a fixed form answer.
ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/completions": answers.Completion,
    "/v1/chat/completions": answers.ChatCompletion,
    "/v1/models": answers.Models,
    "/v1/models/{name}": answers.Model,
    "/tokenize": answers.Tokens,
    "/detokenize": answers.Text,
    "/tokenizer_info": answers.TokenizerInfo,
    "/generate": answers.Generated,
    "/health": answers.State,
    "/ready": answers.State,
    "/": answers.Greeting,
}


@lru_cache
def document() -> dict[str, Any]:
    """The document."""
    models: set[type[BaseModel]] = {*ANSWERS.values(), answers.Error}
    models |= {body for _, _, body, _ in ROUTES.values() if body}
    named = sorted(models, key=lambda m: m.__name__)
    _, schemas = models_json_schema([(m, "validation") for m in named], ref_template=_REF)
    paths = {path: _operation(path) for path in ROUTES}
    for path in PER_MODEL:
        paths["/m/{name}" + path] = _operation(path, per_model=True)
    return {
        "openapi": "3.1.0",
        "info": {"title": "quill", "version": __version__, "description": "Text from small GPTs."},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


@lru_cache
def page() -> str:
    """The document as a page of its own, without scripts."""
    parts = []
    for path, (method, summary, body, _) in ROUTES.items():
        parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(summary)}</p>")
        if body is not None:
            parts.append(_table(body))
    return _PAGE.format(version=escape(__version__), body="\n".join(parts))


def _operation(path: str, *, per_model: bool = False) -> dict[str, Any]:
    method, summary, body, answer = ROUTES[path]
    form = {"schema": _ref(ANSWERS[path].__name__)} if path in ANSWERS else {}
    error = {"description": "The request is refused.", "content": {_JSON: {"schema": _ref("Error")}}}
    made: dict[str, Any] = {
        "summary": summary,
        "operationId": ("model_" if per_model else "") + (path.strip("/").replace("/", "_") or "home"),
        "security": [{"key": []}, {}],
        "responses": {
            "200": {"description": "The answer.", "content": {answer: form}},
            "4XX": error,
            "5XX": error,
        },
    }
    if body is not None:
        made["requestBody"] = {"required": True, "content": {_JSON: {"schema": _ref(body.__name__)}}}
        if issubclass(body, requests.Sampling):
            made["responses"]["200"]["content"]["text/event-stream"] = {}
    if per_model or "{name}" in path:
        place = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        made["parameters"] = [place]
    return {method: made}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


def _table(body: type[BaseModel]) -> str:
    schema = body.model_json_schema()
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else ascii(field.get("default"))
        rows.append(
            f"<tr><td><code>{escape(name)}</code><td>{escape(default)}"
            f"<td>{escape(field.get('description', ''))}"
        )
    intro = escape((inspect.getdoc(body) or "").partition("\n\n")[2])
    return f"<p>{intro}</p><table><tr><th>Field<th>Default<th>Description{''.join(rows)}</table>"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>quill's HTTP API</title>
<link rel="icon" href="static/icon.svg"><link rel="stylesheet" href="static/docs.css">
<main><h1>quill {version}: HTTP API</h1>
<p>The same as an OpenAPI document: <a href="openapi.json">openapi.json</a>.</p>
{body}
</main></html>
"""
