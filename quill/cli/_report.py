"""Reports of `quill eval`: calibration and loss by context, as tables and as an image file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quill import fsio
from quill.cli import _curves, _picture
from quill.cli._tables import Column
from quill.cli.output import Output
from quill.evaluation.report import Report


def _share(field: str) -> Column:
    def text(row: Any) -> str:
        return "" if row[field] is None else f"{row[field]:.1%}"

    return Column(field.upper(), text, right=True)


def _gap(row: Any) -> str:
    return "" if row["confidence"] is None else f"{row['confidence'] - row['accuracy']:+.1%}"


_TOKENS = Column("TOKENS", lambda r: f"{r['tokens']:,}", right=True, drop=1)
_BINS = (
    Column("BIN", lambda r: f"{r['low']:.0%} to {r['high']:.0%}", right=True),
    _TOKENS,
    _share("confidence"),
    _share("accuracy"),
    Column("DIFFERENCE", _gap, right=True),
)
_CONTEXT = (
    Column(
        "CONTEXT",
        lambda r: f"{r['first']:,} to {r['last']:,}" if r["last"] > r["first"] else f"{r['first']:,}",
        right=True,
    ),
    _TOKENS,
    Column("LOSS", lambda r: "" if r["loss"] is None else f"{r['loss']:.4f}", right=True),
)


def show(output: Output, row: Mapping[str, Any]) -> None:
    """Print a model's calibration and loss by context for people.

    Args:
        output: Where they go.
        row: The model's row in the JSON document.
    """
    found, fitted = row["calibration"], row["fitted"]
    summary = (
        f"{row['reference']}: confidence {found['confidence']:.1%}, accuracy {found['accuracy']:.1%}, "
        f"expected calibration error {found['expected_error']:.2%}\n"
        f"entropy {found['entropy']:.4f}, loss {row['loss']:.4f} nats per token; "
        f"{fitted['loss']:.4f} at temperature {fitted['temperature']:.2f}"
    )
    output.section(summary, [b for b in found["bins"] if b["tokens"]], _BINS)
    output.section(f"{row['reference']}: loss by tokens of context", row["context"], _CONTEXT)


def save(output: Output, reports: Mapping[str, Report], path: Path) -> None:
    """Write reports to an image file.

    Args:
        output: Learns where.
        reports: The reports, by the models' references.
        path: The file.

    Raises:
        InputError: Its type is not supported, or matplotlib is not installed.
        ResourceError: It cannot be written.
    """
    fsio.write_bytes(path, _picture.draw_reports(reports, _curves.form_of(path)))
    output.say(f"drew {path}")
