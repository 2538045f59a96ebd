"""The program as a whole: exit codes, errors in three lines, start-up, and words of other tools."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from statistics import median

import pytest

from quill import errors
from quill.cli import _errors, _flags, app
from quill.cli._signals import Interrupted
from quill.cli.app import main

COMMANDS = list(app.commands())
RUN = [sys.executable, "-c", "from quill.cli.app import run; run()"]


def test_commands_are_the_files_of_their_folder(root):
    files = {f.stem for f in (root / "quill" / "cli").glob("[a-z]*.py")} - {"app", "output", "options"}
    assert set(COMMANDS) == files
    assert {"prepare", "train", "sample", "eval", "list", "ls", "show", "config", "doctor"} <= files
    face = [c for c in COMMANDS if c in ("prepare", "train", "sample", "eval")]
    assert COMMANDS[:4] == face == ["prepare", "train", "sample", "eval"]


def test_every_command_has_its_line_in_the_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, summary in app.commands().items():
        assert summary.endswith(".")
        assert f"  {name} " in out
        assert summary in " ".join(out.split())


def test_help_has_no_colour_in_a_pipe(quill):
    for env in ({"GITHUB_ACTIONS": "true"}, {"TERM": "xterm-256color"}, {"COLUMNS": "20"}):
        done = quill("--help", env=env)
        assert done.returncode == 0
        assert b"\x1b" not in done.stdout
        assert b"sample" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], *([c, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_loads_no_torch(arguments):
    code = (
        "import sys\nfrom quill.cli.app import main\ncode = main(sys.argv[1:])\n"
        "sys.exit(code or 10 * ('torch' in sys.modules) + 20 * ('numpy' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Usage: quill" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["list"]], ids=" ".join)
def test_help_and_list_load_neither_torch_nor_pydantic_nor_rich(arguments, tmp_path):
    code = (
        "import sys\nfrom quill.cli.app import main\nmain(sys.argv[1:])\n"
        "print(*sorted({'torch', 'pydantic', 'rich', 'numpy'} & set(sys.modules)), file=sys.stderr, end='')"
    )
    env = {**os.environ, "QUILL_REGISTRY": str(tmp_path / "weights")}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=env)
    assert not {"torch", "pydantic", "rich", "numpy"} & set(done.stderr.decode().split())


@pytest.mark.parametrize("arguments", [["--help"], ["list"]], ids=" ".join)
def test_help_and_list_start_about_as_fast_as_three_imports(arguments, tmp_path):
    """1.3 times `import typer, rich, pydantic` in processor time, measured in turns."""
    resource = pytest.importorskip("resource")
    env = {**os.environ, "QUILL_REGISTRY": str(tmp_path / "weights")}
    # As for an installed quill, whose modules are compiled once.
    env.pop("PYTHONDONTWRITEBYTECODE", None)

    def seconds(command: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, env=env, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    commands = ([sys.executable, "-c", "import typer, rich, pydantic"], [*RUN, *arguments])
    for command in commands:
        seconds(command)
    pairs = [tuple(seconds(command) for command in commands) for _ in range(9)]
    theirs, ours = (median(times) for times in zip(*pairs, strict=True))
    assert ours <= 1.3 * theirs


def test_a_shell_completes_commands_and_flags():
    for typed, cursor, expected in (
        ("quill sa", "1", "sample"),
        ("quill train --batch", "2", "--batch-size"),
    ):
        env = {**os.environ, "_QUILL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": cursor}
        done = subprocess.run(RUN, capture_output=True, env=env)
        assert done.stdout.decode().split() == [expected]


def test_no_arguments_is_help_on_stderr_and_exit_2(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: quill" in err


def test_version(capsys):
    from quill import __version__

    for flag in ("--version", "-V"):
        assert main([flag]) == 0
        assert capsys.readouterr().out == f"quill {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["no command 'trian'", "did you mean train"]),
        (["xyzzy"], ["no command 'xyzzy'", "the commands are prepare, train"]),
        (["train", "--batch-siz", "3"], ["no flag '--batch-siz'", "--batch-size"]),
        (["train", "--batch_siz=3"], ["no flag '--batch_siz'", "--batch-size"]),
        (["list", "--sort", "colour"], ["--sort", "'created'"]),
        (["--jsn", "list"], ["no flag '--jsn'", "quill --help"]),
        (["show"], ["missing REF", "quill show --help"]),
        (["compare", "a"], ["at least two models"]),
        (["train", "--name"], ["requires an argument"]),
        (["list", "a", "b"], ["unexpected extra argument"]),
        (["config"], ["'quill config' requires a subcommand", "schema"]),
        (["config", "chekc", "x"], ["no command 'chekc' in 'quill config'", "check"]),
        (["list", "\x1b[31m", "x"], ["unexpected"]),
    ],
)
def test_usage_errors_exit_2_with_a_suggestion(arguments, words, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") <= 3
    assert "\x1b" not in err
    for word in words:
        assert word in err


class Boom(Exception):
    """Something nobody expected."""


def fail_with(failure, monkeypatch):
    def dispatch(arguments: list[str]) -> int:
        raise failure

    monkeypatch.setattr(app, "_dispatch", dispatch)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (errors.InputError("x"), 2),
        (errors.NotFoundError("x"), 3),
        (errors.RefusedError("x"), 4),
        (errors.CorruptError("x"), 5),
        (errors.DivergedError("x"), 6),
        (errors.ResourceError("x"), 7),
        (errors.LockedError("x"), 75),
        (errors.InterruptedRun("x", signum=15), 143),
        (MemoryError(), 7),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 7),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 7),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 7),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 141),
        (Boom("bang"), 1),
        (RuntimeError("shapes do not match"), 1),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else str(x),
)
def test_every_failure_has_its_exit_code_and_no_traceback(failure, code, monkeypatch, capsys):
    fail_with(failure, monkeypatch)
    assert main(["train"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3


def test_an_interrupted_run_is_a_note_and_no_error(monkeypatch, capsys):
    fail_with(
        errors.InterruptedRun("m:v1 was interrupted at step 9", signum=2, hint="repeat to resume"),
        monkeypatch,
    )
    assert main(["train", "my notes.txt"]) == 130
    assert capsys.readouterr() == (
        "",
        "m:v1 was interrupted at step 9\nresume: quill train 'my notes.txt'\n",
    )
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(["train"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_f34_a_signal_that_comes_while_a_class_is_made_is_no_internal_error(monkeypatch, capsys):
    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise Interrupted(15)

    def dispatch(arguments: list[str]) -> int:
        type("Made", (), {"field": Field()})
        return 0

    monkeypatch.setattr(app, "_dispatch", dispatch)
    assert main(["list"]) == 143
    assert capsys.readouterr() == ("", "interrupted\n")
    failure = errors.ResourceError("cannot put it back")
    failure.__cause__ = Interrupted(15)
    fail_with(failure, monkeypatch)
    assert main(["export"]) == 7, "what a cleanup could not do is told"


def test_f40_out_of_memory_names_a_smaller_batch(monkeypatch, capsys):
    fail_with(MemoryError(), monkeypatch)
    assert main(["train"]) == 7
    assert "--batch-size" in capsys.readouterr().err


def test_a_bug_shows_its_traceback_only_when_asked(monkeypatch, capsys):
    fail_with(Boom("bang"), monkeypatch)
    assert main(["list"]) == 1
    err = capsys.readouterr().err
    assert "Boom: bang" in err
    assert "--debug" in err
    assert main(["list", "--debug"]) == 1
    assert "raise failure\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "schema"]], ids=" ".join)
def test_f37_a_closed_pipe_exits_141_without_a_traceback(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*RUN, *arguments], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


def test_f36_closed_standard_streams_do_no_harm(tmp_path):
    env = {**os.environ, "QUILL_REGISTRY": str(tmp_path / "weights")}
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        command = f'"$0" -c "from quill.cli.app import run; run()" list {closed}'
        done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, env=env)
        assert done.returncode == 0, closed
        assert b"Traceback" not in done.stderr


BARE = {"PATH": os.environ["PATH"]}


@pytest.mark.parametrize(
    "env",
    [
        BARE,
        {**BARE, "LC_ALL": "C", "HOME": "/nonexistent"},
        {**BARE, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        {**BARE, "COLUMNS": "20", "TERM": "dumb", "HOME": "/proc/none"},
        {**BARE, "GITHUB_ACTIONS": "true", "CI": "true", "NO_COLOR": "1"},
    ],
    ids=["cron", "C, no home", "ascii", "20 columns", "CI"],
)
def test_f49_bare_environments(env, tmp_path):
    for arguments in (["--help"], ["list"], ["list", "--json"], ["config", "schema"]):
        done = subprocess.run([*RUN, *arguments], capture_output=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
        assert b"\x1b" not in done.stdout + done.stderr
        done.stdout.decode("utf-8")


def test_f49_text_is_utf8_in_an_ascii_locale(tmp_path):
    env = {**BARE, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    folder = tmp_path / "модель"
    env |= {"QUILL_REGISTRY": str(folder), "QUILL_SHIPPED": "off"}
    code = "from quill.cli.output import Output\nfrom quill.cli import app\napp._speak_utf8()\n"
    code += "Output().write('\\u00e9 \\u4e2d \\U0001f642 \\udcff\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.stdout == "é 中 🙂 \\udcff\n".encode()
    listed = subprocess.run([*RUN, "list", "--json"], capture_output=True, env=env, cwd=tmp_path)
    assert json.loads(listed.stdout)["models"] == []


@pytest.mark.parametrize(
    ("env", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
    ids=str,
)
def test_help_on_a_terminal_is_coloured_and_fits(env, coloured, on_terminal):
    for columns in ("20", "80", "300"):
        shown = on_terminal([*RUN, "list", "--help"], {**BARE, "COLUMNS": columns, **env})
        assert ("\x1b[1mOptions:" in shown) is coloured
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown).partition("Examples:")[0]
        assert max(map(len, plain.splitlines())) <= min(int(columns), 100)


@pytest.mark.parametrize("before", ["--json", "-q", "--registry=R", "--registry R", "-v --debug --quiet"])
def test_flags_of_every_command_may_come_before_it(before, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*before.split(), "list"]) == 0
    first = capsys.readouterr()
    assert main(["list", *before.split()]) == 0
    assert capsys.readouterr() == first
    assert main([*before.split(), "config", "check", "none.json"]) == 3


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("run m 'a b'", "quill sample m 'a b'"),
        ("generate m", "quill sample m"),
        ("info m", "quill show m"),
        ("delete m:v1", "quill rm m:v1"),
        ("rename a b", "quill mv a b"),
        ("download hf:gpt2", "quill import hf:gpt2"),
        ("convert m --format gguf", "quill export m --format gguf"),
        ("lst", "quill list"),
        ("version", "quill --version"),
    ],
)
def test_words_of_other_tools_lead_to_the_command(typed, hint, capsys):
    assert main(shlex.split(typed)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"  try: {hint}"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("train --epochs 3", "counts optimizer steps (--max-iters), not epochs"),
        ("train --iters 3", "quill calls it --max-iters"),
        ("train --steps 3", "quill calls it --max-iters"),
        ("sample m --max-tokens 3", "quill calls it --max-new-tokens"),
        ("export m --output x", "quill calls it --out"),
        ("sample m --tmp 3", "did you mean --temperature?"),
        ("train --batch 3", "did you mean --batch-size?"),
        ("train --qwxyz 3", "quill train has no such flag"),
        ("train --max-iters", "try: quill train --help"),
        ("train --temp 0.5", "quill train has no --temperature, but quill sample has"),
        ("train -t 0.5", "quill train has no --temperature, but quill sample has"),
        ("sample m --lr 0.5", "quill sample has no --learning-rate, but quill train has"),
        ("eval m --steps 3", "quill calls it --iters"),
        ("sample --model m", "it is an argument without a flag: quill sample REF"),
        ("prepare --input x", "it is an argument without a flag: quill prepare SOURCE"),
    ],
)
def test_flags_of_other_tools_are_answered_by_meaning(typed, words, capsys):
    assert main(shlex.split(typed)) == 2
    assert words in capsys.readouterr().err


def test_every_flag_of_other_tools_is_answered_by_every_command(capsys):
    """The answer repeats what was typed, and names a flag or an argument that exists where it says."""
    import typer

    group = typer.main.get_command(app.build(COMMANDS))
    assert len(group.commands) == len(COMMANDS)
    flags = {
        name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)}
        for name, c in group.commands.items()
    }
    arguments = {
        name: {p.metavar for p in c.params if p.param_type_name == "argument"}
        for name, c in group.commands.items()
    }
    for name, command in group.commands.items():
        for word in [] if hasattr(command, "commands") else _errors._FLAGS:
            typed = f"--{word}" if len(word) > 1 else f"-{word}"
            if _flags.normal(typed) in flags[name]:
                continue
            error = _errors._no_such_flag(typed, command.params, f"quill {name}", lambda: group.commands)
            assert error.what == f"no flag '{typed}'"
            if found := re.fullmatch(r"quill (.+) has no --([a-z-]+), but quill (.+) has", error.why):
                assert found[1] == name
                assert f"--{found[2]}" not in flags[name]
                assert f"--{found[2]}" in flags[found[3]]
            elif found := re.fullmatch(r"it is an argument without a flag: quill (.+) ([A-Z]+)", error.why):
                assert found[1] == name and found[2] in arguments[name]
            elif found := re.fullmatch(r"quill calls it --([a-z-]+)", error.why):
                assert f"--{found[1]}" in flags[name]
            else:
                assert re.match(
                    r"did you mean --|quill counts optimizer steps|quill \S+ has no such flag$", error.why
                ), (
                    name,
                    word,
                    error.why,
                )


def test_every_word_of_other_tools_leads_to_something_that_exists():
    import typer

    for meant in _errors._COMMANDS.values():
        assert meant.split()[0] in [*COMMANDS, "--version"]
    group = typer.main.get_command(app.build(COMMANDS))
    known = {
        o
        for c in group.commands.values()
        for each in getattr(c, "commands", {"": c}).values()
        for p in each.params
        for o in p.opts
    }
    known |= {p.metavar for c in group.commands.values() for p in c.params if p.param_type_name == "argument"}
    meant = {word for words in _errors._FLAGS.values() for word in words.split()}
    assert {word if word.isupper() else f"--{word}" for word in meant} <= known
