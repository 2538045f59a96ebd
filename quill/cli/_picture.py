"""Loss curves, calibration and loss by context as an SVG or PNG file."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from quill.errors import InputError
from quill.evaluation.curves import Curves, span

if TYPE_CHECKING:
    from quill.evaluation.report import Report

Form = Literal["svg", "png"]


def draw(found: Curves, title: str, form: Form) -> bytes:
    """Draw both curves; the same points give the same bytes.

    Args:
        found: The curves, with at least one point.
        title: Title of the picture, as plain text.
        form: Format of the file.

    Raises:
        InputError: matplotlib is not installed.
    """
    drawn = io.BytesIO()
    with _figure(form, drawn, width=7) as figure:
        axes = figure.subplots()
        low, high = span(found.train, found.val)
        smooth, best = found.smooth(), found.best
        if smooth is not found.train:
            axes.plot(*zip(*found.train, strict=True), color="#1f77b4", alpha=0.25, linewidth=0.7)
        if smooth:
            label = "training, smoothed" if smooth is not found.train else "training"
            axes.plot(*zip(*smooth, strict=True), color="#1f77b4", linewidth=1.5, label=label)
        if found.val:
            dots = "o" if len(found.val) <= 40 else ""
            axes.plot(
                *zip(*found.val, strict=True),
                color="#d95f02",
                marker=dots,
                markersize=4,
                linewidth=1.5,
                label="validation",
            )
        room = 0.05 * (high - low)
        if best:
            axes.vlines(best.step, low - room, best.loss, color="#555555", linewidth=0.8, linestyle=":")
            label = f"best: {best.loss:.4f} at step {best.step:,}"
            axes.plot(*best, "*", color="#555555", markersize=13, markeredgecolor="white", label=label)
        axes.set_xlim(0, 1.02 * max(1, *(p.step for p in (*found.train, *found.val))))
        axes.set_ylim(low - room, high + room)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.set_title(_printable(title), parse_math=False, loc="left")
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        _finish(axes)
    return drawn.getvalue()


def draw_reports(found: Mapping[str, Report], form: Form) -> bytes:
    """Draw reliability diagrams and the loss by context; the same reports give the same bytes.

    Args:
        found: At least one report, by the model's reference.
        form: Format of the file.

    Raises:
        InputError: matplotlib is not installed.
    """
    drawn = io.BytesIO()
    with _figure(form, drawn, width=10) as figure:
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
        for i, (reference, report) in enumerate(found.items()):
            color = f"C{i % 10}"
            bins = [b for b in report.calibration.bins if b.tokens]
            most = max(b.tokens for b in bins)
            x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
            label = f"{_printable(reference)}, error {report.calibration.expected_error:.2%}"
            left.plot(x, y, color=color, linewidth=1, label=label)
            left.scatter(x, y, [8 + 60 * b.tokens / most for b in bins], color=color)
            lengths = [(n, nats) for n, nats in enumerate(report.losses, 1) if nats is not None]
            right.plot(*zip(*lengths, strict=True), color=color, alpha=0.25, linewidth=0.7)
            means = [((c.first * c.last) ** 0.5, c.loss) for c in report.context if c.loss is not None]
            right.plot(
                *zip(*means, strict=True), "o-", color=color, markersize=4, label=_printable(reference)
            )
        left.set_title("how often it is right, by how sure it is", loc="left")
        left.set_xlabel("probability of the likeliest token")
        left.set_ylabel("share of these tokens that come next")
        left.set_xlim(0, 1)
        left.set_ylim(0, 1)
        right.set_title("loss by the length of the context", loc="left")
        right.set_xscale("log", base=2)
        right.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
        right.set_xlabel("tokens of context")
        right.set_ylabel("loss, nats per token")
        for axes in (left, right):
            _finish(axes)
    return drawn.getvalue()


@contextmanager
def _figure(form: Form, drawn: io.BytesIO, *, width: float) -> Iterator[Any]:
    """A figure that is written when it is complete."""
    # Its warnings about its own folders and fonts are nothing that users can act on.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        from matplotlib import rc_context  # type: ignore[import-not-found, unused-ignore]
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise InputError(
            f"cannot draw a .{form} file",
            why="matplotlib is not installed",
            hint="pip install 'quill-gpt[plot]'",
        ) from None
    with rc_context({"svg.hashsalt": "quill", "axes.unicode_minus": False, "font.size": 10}):
        figure = Figure(figsize=(width, 4.2), dpi=150, layout="constrained")
        yield figure
        no_date = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(drawn, format=form, metadata=no_date)


def _finish(axes: Any) -> None:
    """Draw the grid and the legend."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    # A reference is a name, not a formula.
    for text in axes.legend(edgecolor="none").get_texts():
        text.set_parse_math(False)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
