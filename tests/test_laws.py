"""The laws of the architecture page that can be read off the source.

import-linter holds the layers; ruff forbids `print`. The rest of the laws are behaviour and are tested where
they belong: `tests/integration/test_adding.py`, `tests/registry`, `tests/training`, `tests/model`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "quill").rglob("*.py"))
# What talks to people: the command line, and the tables and progress of notebooks.
DISPLAYS = {"cli", "notebook.py"}
LIBRARY = [path for path in SOURCES if path.relative_to(ROOT / "quill").parts[0] not in DISPLAYS]

# The sandboxed reader of torch files is a program of its own: it answers on its standard output.
TALKS_TO_ITS_PARENT = ROOT / "quill" / "formats" / "torch_files" / "child.py"

# What changes the process for everybody in it; the command line may, once, at its start.
PROCESS_WIDE = {
    "set_num_threads", "set_num_interop_threads", "set_default_dtype", "set_default_device",
    "set_flush_denormal", "set_float32_matmul_precision", "use_deterministic_algorithms",
    "mallopt", "putenv", "chdir", "umask",
}  # fmt: skip

# Restored before the function returns: dropout seeds a forked generator, decoding opts into one thread.
RESTORED = {
    "quill/training/device.py": {"torch.manual_seed", "torch.use_deterministic_algorithms"},
    "quill/threads.py": {"torch.set_num_threads"},
}

_LONGEST_FUNCTION = 60


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _dotted(node: ast.AST) -> str:
    """The dotted name an expression spells, or ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _foreign(tree: ast.Module) -> Iterator[str]:
    """Local names that stand for modules or members of other projects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                if root not in sys.stdlib_module_names and root != "quill":
                    yield alias.asname or root
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            root = node.module.partition(".")[0]
            if root not in sys.stdlib_module_names and root != "quill":
                yield from (alias.asname or alias.name for alias in node.names)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


# What has no public name and doubles the speed, next to what is used where it is missing.
PRIVATE = {
    "quill/generation/cpu.py": {
        "torch.ops.mkldnn._reorder_linear_weight",
        "torch.ops.mkldnn._linear_pointwise",
    }
}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_libraries_are_used_by_their_public_names(path: Path) -> None:
    tree = _tree(path)
    foreign = set(_foreign(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            if _dotted(node).partition(".")[0] in foreign:
                found.append(_dotted(node))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("quill"):
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            found += [node.module for part in parts if _is_private(part)]
    assert set(found) == PRIVATE.get(_name(path), set())


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_the_library_neither_prints_nor_changes_the_process(path: Path) -> None:
    found = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Attribute) and _dotted(node) in ("sys.stdout", "sys.stderr"):
            found.append(_dotted(node))
        if isinstance(node, ast.Call):
            called = _dotted(node.func)
            if called.rpartition(".")[2] in PROCESS_WIDE or called == "torch.manual_seed":
                found.append(called)
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
            found += [
                _dotted(t.value)
                for t in targets
                if isinstance(t, ast.Subscript) and _dotted(t.value) == "os.environ"
            ]
    allowed = RESTORED.get(_name(path), set())
    if path == TALKS_TO_ITS_PARENT:
        allowed = {"sys.stdout", "sys.stderr"}
    assert [f for f in found if f not in allowed] == []


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_is_unpickled(path: Path) -> None:
    forbidden = {f"{module}.{name}" for module in ("pickle", "marshal", "dill") for name in ("load", "loads")}
    forbidden |= {"pickle.Unpickler", "shelve.open", "torch.load", "eval", "exec"}
    if "formats" not in path.parts:
        forbidden |= {"torch.save", "pickle.dump", "pickle.dumps"}
    called = {_dotted(node.func) for node in ast.walk(_tree(path)) if isinstance(node, ast.Call)}
    assert called & forbidden == set()


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_functions_fit_on_a_screen(path: Path) -> None:
    long = []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            if node.end_lineno - first.lineno + 1 > _LONGEST_FUNCTION:
                long.append(node.name)
    assert long == []


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_messages_of_the_library_name_settings_not_flags(path: Path) -> None:
    messages = [
        "".join(
            part.value if isinstance(part, ast.Constant) else "VALUE"
            for part in (node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value])
            if isinstance(part, ast.FormattedValue) or isinstance(getattr(part, "value", None), str)
        )
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.keyword) and node.arg in ("what", "why", "hint")
    ]
    # A command to run has flags; a sentence does not.
    sentences = [m for m in messages if not re.match(r"(quill|pip|git|df|ls|cp|ulimit|python|curl) ", m)]
    assert [m for m in sentences if re.search(r"(?<![\w-])--[a-z]", m)] == []


SINK = ROOT / "quill" / "cli" / "output.py"
# What prints text that it has made safe itself, in colours.
_DRAWS = {"_curves.py", "explain.py", "help.py", "options.py"}
# What draws with rich: tables to a string, bars and panels to stderr, the manual in a pager.
_RICH = {"_tables.py", "_progress.py", "_training_display.py", "help.py"}


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[-2] == "cli" and p != SINK], ids=_name)
def test_f15_only_the_sink_writes_to_a_stream(path: Path) -> None:
    printers = {"print", "os.write", "typer.echo", "typer.secho", "click.echo", "rich.print"}
    found = []
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        if called in printers or (called.endswith("Console") and path.name not in _RICH):
            found.append(called)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("write", "writelines", "draw"):
            inner = node.func.value
            receiver = _dotted(inner.func if isinstance(inner, ast.Call) else inner).rpartition(".")[2]
            allowed = {"output", "_output", "Output"}
            if node.func.attr == "draw":
                allowed = {"chart", "_explained", "_picture"} | (allowed if path.name in _DRAWS else set())
            found += [] if receiver in allowed else [f"{receiver}.{node.func.attr}"]
    assert found == []


def test_files_are_named_by_what_they_hold() -> None:
    vague = {"utils", "util", "helpers", "helper", "manager", "misc", "common", "core", "base_utils"}
    assert [_name(p) for p in SOURCES if p.stem in vague or p.parent.name in vague] == []


def test_the_top_level_is_fixed() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not in a git checkout")
    top = {line.partition("/")[0] for line in listed}
    fixed = {"quill", "configs", "weights", "tests", "pyproject.toml", "README.md"}
    beside = {"LICENSE", "Dockerfile", "compose.yaml"}
    assert fixed <= top
    assert {name for name in top - fixed - beside if not name.startswith(".")} == set()


def test_only_the_command_line_starts_the_package() -> None:
    assert [_name(p) for p in SOURCES if p.name == "__main__.py"] == ["quill/__main__.py"]
