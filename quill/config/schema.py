"""The settings as a JSON Schema for editors, and as a Markdown table.

Format: JSON Schema 2020-12.
"""

from __future__ import annotations

from typing import Any

from quill.config.settings import SECTIONS, RunConfig


def build() -> dict[str, Any]:
    """Build the schema in `configs/schema.json`, which config files refer to."""
    body = RunConfig.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body, "title": "quill run config"}


def table() -> str:
    """Write every setting of a run, its default and meaning, as a Markdown table."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for section, cls in SECTIONS.items():
        for name, field in cls.model_fields.items():
            default = "unset" if field.default is None else str(field.default).lower()
            meaning = (field.description or "").replace("|", "\\|")
            rows.append(f"| `{section}.{name}` | {default} | {meaning} |")
    return "\n".join(rows) + "\n"
