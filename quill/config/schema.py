"""The JSON Schema of a config file, for editors and other programs. Format: JSON Schema 2020-12."""

from __future__ import annotations

from typing import Any

from quill.config.settings import RunConfig


def build() -> dict[str, Any]:
    """The schema that `configs/schema.json` holds and config files point at."""
    body = RunConfig.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body, "title": "quill run config"}
