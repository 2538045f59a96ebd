"""The help of every command, pinned at 80 columns, so that a change of words is seen in review.

To write the files anew: UPDATE_GOLDEN=1 python -m pytest tests/cli/test_help.py
"""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from quill.cli import _help, app
from quill.cli._tables import Canvas
from quill.cli.app import main

GOLDEN = Path(__file__).with_name("golden")
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))


def _screens() -> list[str]:
    """Every command line that prints help."""
    group = typer.main.get_command(app.build(app.commands()))
    found = ["--help"]
    for name, command in group.commands.items():
        found.append(f"{name} --help")
        found += [f"{name} {part} --help" for part in getattr(command, "commands", {})]
        found += [f"{name} --help-all" for p in command.params if "--help-all" in p.opts]
    return found


SCREENS = _screens()


def _file(screen: str) -> Path:
    words = screen.replace("--help-all", "all").replace("--help", "").split()
    return GOLDEN / f"{'-'.join(words) or 'quill'}.txt"


@pytest.mark.parametrize("screen", SCREENS)
def test_help_is_the_pinned_one(screen, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(screen.split()) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    if UPDATE:
        _file(screen).write_text(shown, encoding="utf-8")
    assert shown == _file(screen).read_text(encoding="utf-8"), "see the first lines of this test's file"


def test_every_pinned_help_belongs_to_a_command():
    assert {_file(s) for s in SCREENS} == set(GOLDEN.glob("*.txt"))


@pytest.mark.parametrize("screen", SCREENS)
def test_help_follows_its_style(screen, capsys):
    assert main(screen.split()) == 0
    text = capsys.readouterr().out
    assert not re.search(r"RANGE|\b1<=|<bool>|\[default|\[required|  +INTEGER", text)
    assert "Examples:" in text or screen.split()[0] in ("alias", "config", "registry")
    # Every option is described by sentences.
    options = text.partition("\nOptions:")[2].partition("\nExamples:")[0]
    for entry in re.split(r"\n  (?=-)", options)[1:]:
        described = re.split(r"\n\n|\n(?=\S)", entry)[0]
        assert described.rstrip().endswith("."), described


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("columns", [80, 120])
def test_a_flag_is_shown_whole_beside_or_above_its_help(screen, columns):
    """No name is cut or folded, and at least half of the screen is left for the help."""
    group = typer.main.get_command(app.build([screen.split()[0]] if screen != "--help" else []))
    words = [w for w in screen.split() if not w.startswith("-")]
    command = group
    for word in words:
        command = command.commands[word]
    with command.make_context("quill", [], resilient_parsing=True) as context:
        shown = _help.render(command, context, Canvas(columns, False), whole=True).splitlines()
    assert max(map(len, shown)) <= columns
    for param in command.get_params(context):
        if param.param_type_name == "option":
            [line] = [x for x in shown if re.match(rf"  {re.escape(_help.flags(param))}(  |$)", x)]
            help_at = re.search(r"  +\S", line[len(_help.flags(param)) + 2 :])
            start = len(_help.flags(param)) + 2 + help_at.end() - 1 if help_at else 0
            assert start <= columns / 2, line


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_shows_ten_flags_and_help_all_the_others_by_group(command, capsys):
    def shown(screen: str) -> tuple[list[str], list[str]]:
        assert main([command, screen]) == 0
        text = capsys.readouterr().out
        assert "\nExamples:\n  quill " in text and f"\n  {_help.MANUAL}/" in text
        return re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", text, re.M), re.findall(r"^(\w+) .*:$", text, re.M)

    face, _ = shown("--help")
    every, groups = shown("--help-all")
    assert len(face) == 12 and face[-2:] == ["--help-all", "--help"]
    assert set(face) < set(every)
    params = typer.main.get_command(app.build([command])).commands[command].params
    options = {p.opts[0] if p.opts[0].startswith("--") else p.opts[-1] for p in params if p.opts[0][0] == "-"}
    assert set(every) == options | {"--help"}
    assert (
        groups
        == {"train": ["Run", "Data", "Model", "Training", "Common"], "sample": ["Sampling", "Common"]}[
            command
        ]
    )


EXAMPLES = [
    (screen, line.strip())
    for screen in SCREENS
    if _file(screen).exists()
    for line in _file(screen)
    .read_text(encoding="utf-8")
    .partition("\nExamples:\n")[2]
    .partition("\n\nManual:")[0]
    .splitlines()
]


def _parses(words: list[str]) -> None:
    """Parse a command line as quill does, without running it."""
    group = typer.main.get_command(app.build(app.commands()))
    command = group.commands[words[0]]
    rest = words[1:]
    if hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    params = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    flags = [w.partition("=")[0] for w in rest if w.startswith("-") and w != "-"]
    if {"--help", "-h", "--help-all"} & set(flags):
        return
    assert set(flags) <= params | {"--help"}, words
    with command.make_context(words[0], list(rest)):
        pass


@pytest.mark.parametrize(("screen", "example"), EXAMPLES)
def test_examples_of_the_help_parse(screen, example):
    line = example.partition(" > ")[0].rpartition("| ")[2]
    line = line.replace('eval "$(', "").replace(')"', "")
    words = shlex.split(line)
    assert words[0] == "quill"
    _parses(words[1:])


ROOT = Path(__file__).resolve().parents[2]
# Stands for the values that an f-string fills in.
FILLED = "1"


def _texts(node: ast.AST) -> Iterator[str]:
    """The texts that an expression may become, with every value filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else _filled(v) for v in node.values)
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _texts(value)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for left in _texts(node.left):
            for right in _texts(node.right):
                yield left + right


def _filled(value: ast.expr) -> str:
    """A value to stand for an interpolated expression: a path may have a space, unless it is quoted."""
    source = ast.unparse(value)
    is_path = re.search(r"\b(path|file|folder|link)\b[^.]*$", source)
    return "a b" if is_path and "quote(" not in source else FILLED


def _hints() -> list[tuple[str, str]]:
    """Every hint in the tree that names a command of quill, and where it is."""
    found = []
    for file in sorted((ROOT / "quill").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                for text in _texts(node.value):
                    where = f"{file.relative_to(ROOT)}:{node.value.lineno}"
                    plain = re.sub(r"\$\([^)]*\)", FILLED, text)
                    commands = re.findall(r"\bquill (?:[a-z]+|--help)\b(?:(?! && |, | or quill ).)*", plain)
                    found += [(where, command) for command in commands]
    return found


HINTS = _hints()


def test_help_writes_every_default_in_one_way():
    described = _help.described
    assert described("Texts to draw.", 1) == "Texts to draw (default: 1)."
    assert described("Add biases (gpt2 only).", True) == "Add biases (gpt2 only; default: yes)."
    assert described("Width of a head; defaults to n_embd / n_head.", None) == (
        "Width of a head (default: n_embd / n_head)."
    )
    assert described("Scale; defaults to d ** -0.5 (gpt2 only).", None) == (
        "Scale (gpt2 only; default: d ** -0.5)."
    )
    assert described("Lines (default: all).", None) == "Lines (default: all)."
    assert described("Stop text", []) == "Stop text."
    assert described("Dropout", 0.0) == "Dropout (default: 0.0)."


def test_hints_are_found():
    assert len(HINTS) > 20


@pytest.mark.parametrize(("where", "hint"), HINTS)
def test_a_command_in_a_hint_runs_as_printed(where, hint):
    """It parses: the command and its flags exist, and nothing is missing."""
    assert "=True" not in hint
    _parses(shlex.split(hint)[1:])


def test_no_message_installs_another_program_of_that_name():
    """On PyPI `quill` is another project; this one is quill-gpt."""
    found = []
    for file in sorted((ROOT / "quill").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for text in _texts(node) if isinstance(node, ast.Constant | ast.JoinedStr) else ():
                found += re.findall(r"pip install[^\n]*", text)
    assert found
    for command in found:
        assert not re.search(r"\bquill(?!-gpt)\b", command), command
