"""List models, or datasets (same as list)."""

from __future__ import annotations

from quill.cli.list import command as command
