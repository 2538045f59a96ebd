"""Completion in a shell: what may follow, taken from the registry and from the folder of datasets.

Typer asks the completers of this module for values, and finds commands, flags and choices itself. Quill
adds one thing: bash splits words at ":" and "=", which breaks NAME:vN.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import typer

from quill import discovery

SHELLS = ("bash", "zsh", "fish", "powershell")
VARIABLE = "_QUILL_COMPLETE"

Completer = Callable[[typer.Context, str], list[str]]


def script(shell: str, command: Any) -> str:
    """The script that makes a shell ask quill.

    Args:
        shell: One of SHELLS.
        command: The group of all commands, built with completion.
    """
    return _typer(command, f"source_{shell}").strip() + "\n"


def answer(question: str, load: Callable[[str | None], typer.Typer]) -> None:
    """Print what a shell asked for: its script, or a candidate a line.

    Errors print nothing: they must not disturb the line that is being typed.

    Args:
        question: "source_bash" for the script, "complete_bash" for candidates; likewise for the other shells.
        load: Builds the app with one command imported.
    """
    task, _, shell = question.partition("_")
    if task == "source":
        print_to_stdout(script(shell, typer.main.get_command(load(None))))
        return
    with suppress(Exception):
        kept = _join_words() if shell == "bash" else ""
        words = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")
        name = next((w for w in words.split()[1:] if not w.startswith("-")), None)
        found = _typer(typer.main.get_command(load(name)), question)
        print_to_stdout("".join(f"{line.removeprefix(kept)}\n" for line in found.splitlines() if line))


def completing(*values: str) -> Completer:
    """A completer of fixed values."""

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        return [v for v in values if v.startswith(incomplete)]

    return complete


def models(
    *,
    versions: bool = True,
    aliases: bool = True,
    drafts: bool | Literal["weights"] = False,
    datasets: bool = False,
) -> Completer:
    """A completer of names in the registry; of a name typed in full, its versions and aliases.

    Args:
        versions: Whether NAME:vN is meant too.
        aliases: Whether NAME:ALIAS is meant too.
        drafts: Whether an unfinished run is meant too, or only one that has weights.
        datasets: Whether data:NAME is meant too.
    """

    def complete(context: typer.Context, incomplete: str) -> list[str]:
        found: list[str] = []
        with suppress(Exception):
            from quill.registry import store

            where = store.locate(context.params.get("registry"))
            for root in filter(None, (where.root, where.shipped)):
                with suppress(OSError):
                    found += _models(root, incomplete, versions, aliases, drafts)
            found = list(dict.fromkeys(found))
            if datasets:
                found += [f"data:{name}" for name in _datasets(where.root)]
        return [v for v in found if v.startswith(incomplete)]

    return complete


def datasets(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the names of prepared datasets."""
    with suppress(Exception):
        from quill.registry import store

        names = _datasets(store.locate(context.params.get("registry")).root)
        return [n for n in names if n.startswith(incomplete)]
    return []


def formats(*others: str) -> Completer:
    """A completer of formats."""
    return completing(*others, *discovery.names("formats"))


def print_to_stdout(text: str) -> None:
    """Write what a shell reads."""
    from quill.cli.output import Output

    Output().stream(text if text.endswith("\n") or not text else text + "\n")


def _typer(command: Any, instruction: str) -> str:
    """What Typer answers to an instruction of a shell."""
    # Typer's completion adds two flags that install it; `quill completion` does that.
    command.params = [p for p in command.params if p.name not in ("install_completion", "show_completion")]
    from typer.completion import shell_complete

    said, ignored = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(ignored), suppress(SystemExit):
        shell_complete(command, {}, "quill", VARIABLE, instruction)
    return said.getvalue()


def _join_words() -> str:
    """Undo bash's splitting at ":" and "=" in the environment that Typer reads.

    Returns:
        How the candidates begin with what bash keeps, and so does not want again.
    """
    text, at = os.environ["COMP_WORDS"], int(os.environ["COMP_CWORD"])
    typed = [*(text.split("\n") if "\n" in text else text.split()), ""][: at + 1]
    words: list[str] = []
    kept = ""
    for i, word in enumerate(typed):
        before = typed[i - 1] if i else ""
        if words and (word == ":" or before == ":"):
            words[-1] += word
            kept = words[-1].rpartition(":")[0] + ":"
        elif word == "=" and words and words[-1].startswith("-"):
            if i == len(typed) - 1:
                words.append("")
        else:
            words.append(word)
            kept = ""
    import shlex

    os.environ["COMP_WORDS"] = " ".join(shlex.quote(w) if w else "" for w in words)
    os.environ["COMP_CWORD"] = str(len(words) - 1)
    return kept


def _models(
    root: Path,
    typed: str,
    with_versions: bool,
    with_aliases: bool,
    drafts: bool | Literal["weights"],
) -> Iterator[str]:
    """Names, versions and aliases; reads folders and aliases only."""
    from quill.errors import QuillError
    from quill.registry import aliases, manifest, names
    from quill.registry import folder as folders

    name, colon, _ = typed.partition(":")
    for entry in sorted(os.listdir(root)):
        if not entry.startswith(typed) and entry != name:
            continue
        with suppress(QuillError, OSError):
            folder = root / names.check_name(entry)
            numbers = sorted(filter(None, map(names.version_number, os.listdir(folder))))
            complete = [n for n in numbers if folders.is_published(folder / f"v{n}")]
            complete += [1] if 1 not in numbers and folders.is_flat(folder) else []
            if drafts == "weights":
                numbers = [n for n in numbers if (folder / f"v{n}" / manifest.WEIGHTS).exists()]
            numbers = sorted({*numbers, *complete}) if drafts else complete
            if not numbers:
                # All versions were removed; the folder only keeps the numbers from being reused.
                continue
            if not colon:
                yield entry
            if entry == name:
                if with_versions:
                    yield from (f"{entry}:v{n}" for n in numbers)
                    yield from [f"{entry}:{names.LATEST}"] if complete else []
                if with_aliases:
                    known = aliases.read(folder)["aliases"]
                    yield from (f"{entry}:{names.check_alias(a)}" for a in known)


def _datasets(registry: Path) -> list[str]:
    from quill.data.dataset import MANIFEST
    from quill.data.store import locate
    from quill.registry import names

    found = []
    root = locate(registry)
    for entry in sorted(os.listdir(root)):
        with suppress(Exception):
            if (root / entry / MANIFEST).is_file():
                found.append(names.check_name(entry))
    return found
