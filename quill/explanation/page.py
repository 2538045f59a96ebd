"""The page that shows an explanation: HTML, style and script in one file, or for a server apart."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

# The module with `mount(element, document)`, and its style; every rule begins with .quill-explain.
ASSETS = ("explain.js", "explain.css")


def asset(name: str) -> str:
    """The text of one of ASSETS."""
    return files("quill").joinpath("explanation", "assets", name).read_text(encoding="utf-8")


def render(document: Mapping[str, Any]) -> str:
    """One file that opens from disk, with the right to load nothing.

    Args:
        document: What `Explanation.to_dict` returns.
    """
    style = asset("explain.css")
    script = f"""{asset("explain.js")}
mount(document.querySelector("main"), JSON.parse(document.getElementById("data").textContent));
"""
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:"
    title = f"{document['reference'] or 'A model'}: a look inside"
    # In a script element "</script>" and "<!--" would end or change the data, so no "<" is left.
    data = json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="quill">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body class="quill-explain-page">
<main></main>
<script type="application/json" id="data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    """A source expression of a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
