"""Loss curves as an SVG or PNG file."""

from __future__ import annotations

import io
import logging
from typing import Literal

from quill.errors import InputError
from quill.evaluation.curves import Curves, span


def draw(found: Curves, title: str, form: Literal["svg", "png"]) -> bytes:
    """Draw both curves; the same points give the same bytes.

    Args:
        found: The curves, with at least one point.
        title: Title of the picture, as plain text.
        form: Format of the file.

    Raises:
        InputError: matplotlib is not installed.
    """
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
        figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
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
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in title)
        axes.set_title(shown, parse_math=False, loc="left")
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(edgecolor="none")
        drawn = io.BytesIO()
        no_date = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(drawn, format=form, metadata=no_date)
    return drawn.getvalue()
