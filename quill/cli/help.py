"""Show the manual, or the help of a command."""

from __future__ import annotations

import os
import sys
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument

from quill.cli import _help, options
from quill.cli.options import Session
from quill.cli.output import canvas_of
from quill.errors import NotFoundError, shorten

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from quill.cli.output import Output

# The page that the web shows first; `quill help` itself takes its place here.
_INDEX = "index"
_WIDEST = 100


def topics() -> dict[str, str]:
    """The pages of the manual and their titles, by name."""
    folder = _folder()
    if not folder.is_dir():
        return {}
    pages = {p.name.removesuffix(".md"): p for p in folder.iterdir() if p.name.endswith(".md")}
    pages.pop(_INDEX, None)
    return {name: _title(pages[name].read_text(encoding="utf-8"), name) for name in sorted(pages)}


def _complete(context: typer.Context, incomplete: str) -> list[str]:
    from quill.cli import app

    return [n for n in (*app.commands(), *topics()) if n.startswith(incomplete)]


@options.command(
    examples="""
    quill help
    quill help tutorial
    quill help train
    """
)
def command(
    session: Session,
    words: Annotated[
        list[str] | None,
        Argument(metavar="TOPIC|COMMAND", help="Page of the manual, or a command.", autocompletion=_complete),
    ] = None,
) -> None:
    """Show a page of the manual, or the help of a command. Without an argument, list both."""
    from quill.cli import app

    output = session.output
    known = topics()
    if not words:
        rows = [{"topic": name, "title": title} for name, title in known.items()]
        if output.form == "human":
            output.draw(_overview(known))
        else:
            output.show("quill.help/1", rows, key="topic", within="topics")
        return
    name, *rest = (w.lower() for w in words)
    if name in app.commands():
        output.draw(_of_command(name, rest) + "\n")
        return
    page = name.removesuffix(".md")
    if page not in known or rest:
        from difflib import get_close_matches

        everything = [*known, *app.commands()]
        raise NotFoundError(
            f"no help on {shorten(' '.join(words))}",
            why=f"the topics are {', '.join(known)}" if known else "there is no such command",
            close=get_close_matches(page, everything, 3),
            hint="" if get_close_matches(page, everything, 1) else "quill help",
        )
    text = _folder().joinpath(f"{page}.md").read_text(encoding="utf-8")
    if output.form == "human" and output.terminal:
        _page(output, text)
    elif output.form == "json":
        output.show("quill.help/1", {"topic": page, "title": known[page], "text": text}, key="topic")
    else:
        output.write(text)


def _folder() -> Traversable:
    return files("quill").joinpath("docs")


def _title(text: str, name: str) -> str:
    heading = next((line for line in text.splitlines() if line.startswith("# ")), f"# {name}")
    return heading.removeprefix("# ").strip()


def _overview(known: dict[str, str]) -> str:
    """The commands, and below them the topics."""
    from quill.cli import app

    group: Any = typer.main.get_command(app.build([]))
    with group.make_context(app.PROGRAM, [], resilient_parsing=True) as context:
        text = str(group.get_help(context))
    canvas = canvas_of(sys.stdout)
    width = max(map(len, known), default=0)
    lines = [f"  {canvas.paint(name.ljust(width), 'busy')}  {title}" for name, title in known.items()]
    if lines:
        heading = canvas.paint("Topics, for quill help TOPIC:", "head")
        text += "\n\n" + "\n".join([heading, *lines])
    return text + "\n"


def _of_command(name: str, parts: list[str]) -> str:
    """The help of a command, or of a part of it such as `config check`."""
    from quill.cli import app

    target: Any = typer.main.get_command(app.build([name])).commands[name]  # type: ignore[attr-defined]
    path = f"{app.PROGRAM} {name}"
    if parts and parts[0] in getattr(target, "commands", {}):
        target, path = target.commands[parts[0]], f"{path} {parts[0]}"
    with target.make_context(path, [], resilient_parsing=True) as context:
        return _help.render(target, context, canvas_of(sys.stdout))


def _page(output: Output, text: str) -> None:
    """Show Markdown on a terminal, in its pager if it is longer than the screen."""
    from rich.console import Console
    from rich.markdown import Markdown

    canvas = output.canvas
    console = Console(
        width=min(canvas.width or _WIDEST, _WIDEST), no_color=not canvas.colour, force_terminal=canvas.colour
    )
    # less: quit if it fits the screen, pass colours through, leave the text on the screen.
    os.environ.setdefault("LESS", "-FRX")
    with console.pager(styles=canvas.colour):
        console.print(Markdown(text))
