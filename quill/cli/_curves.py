"""The loss curves of a model: drawn, as points, or as an image file."""

from __future__ import annotations

from codecs import iterdecode
from pathlib import Path
from shutil import get_terminal_size
from typing import Literal

from quill import fsio
from quill.cli import _picture
from quill.cli.output import Output
from quill.errors import InputError, NotFoundError
from quill.evaluation import chart, curves
from quill.registry.folder import Folder
from quill.registry.manifest import METRICS

# A wider chart shows nothing more.
_WIDEST = 100
_STYLES = {"train": "busy", "val": "warn", "best": "good"}


def show(output: Output, found: Folder) -> None:
    """Draw the curves; `--json` prints their points, `-q` the stored lines.

    Raises:
        NotFoundError: There are no losses.
    """
    points = _points(found)
    if output.form == "human":
        output.draw(draw(output, points, get_terminal_size().columns))
        return
    if output.form == "quiet":
        for text in iterdecode(found.metrics(), "utf-8", "replace"):
            output.write(text)
        return
    lines, stride = curves.lines_by_kind(found.metrics())
    if stride > 1:
        every = f"quill show {found.reference} --metrics -q"
        output.say(f"the metrics are long, and one line in {stride} is shown; all of them: {every}")
    best = points.best
    document = {
        "reference": found.reference,
        "train": lines["loss"],
        "val": lines["val_loss"],
        "samples": lines["sample"],
        "best": {"step": best.step, "val_loss": best.loss} if best else None,
    }
    output.show("quill.metrics/1", document, key="reference")


def draw(
    output: Output,
    points: curves.Curves,
    width: int,
    *,
    err: bool = False,
    height: int | None = None,
    last: int = 0,
) -> str:
    """Draw curves in the characters and colours of a terminal.

    Args:
        output: Where they go.
        points: The losses.
        width: Columns of the terminal.
        err: Whether they go to stderr.
        height: As for `chart.draw`.
        last: As for `chart.draw`.
    """

    def paint(text: str, role: chart.Role) -> str:
        return output.style(text, _STYLES[role], stdout=not err)

    return chart.draw(
        points, min(width, _WIDEST), height=height, last=last, plain=_is_plain(output), paint=paint
    )


def form_of(path: Path) -> Literal["svg", "png"]:
    """The type of an image from its file name.

    Raises:
        InputError: It is not a supported type.
    """
    suffix = path.suffix.lower()
    if suffix == ".svg":
        return "svg"
    if suffix == ".png":
        return "png"
    raise InputError(
        f"cannot plot to '{path}'", why="the file name must end in .svg or .png", hint="--plot loss.svg"
    )


def save(output: Output, found: Folder, path: Path) -> None:
    """Write the curves to an image file, and print its path.

    Raises:
        NotFoundError: There are no losses.
        InputError: matplotlib is not installed.
        ResourceError: It cannot be written.
    """
    drawn = _picture.draw(_points(found), found.reference, form_of(path))
    fsio.write_bytes(path, drawn)
    document = {"reference": found.reference, "path": str(path)}
    output.show("quill.plot/1", document, key="path")


def _points(found: Folder) -> curves.Curves:
    points = curves.read(found.metrics())
    if not points:
        unfinished = not found.is_published
        raise NotFoundError(
            f"{found.reference} has no metrics" + (" yet" if unfinished else ""),
            why=f"its folder contains no losses in {METRICS}",
            hint=f"quill {'logs' if unfinished else 'eval'} {found.reference}",
        )
    return points


def _is_plain(output: Output) -> bool:
    """Whether to draw in ASCII: the locale's encoding, or the terminal's font, has nothing else."""
    env = output.env
    locale = env.get("LC_ALL") or env.get("LC_CTYPE") or env.get("LANG") or "UTF-8"
    small = env.get("TERM") in ("dumb", "linux") and (output.terminal or output.live)
    return small or "UTF8" not in locale.upper().replace("-", "")
