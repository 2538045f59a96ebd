"""Completion in bash, zsh and fish: what follows when Tab is pressed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quill.cli import _completion
from quill.cli.app import main
from quill.registry import aliases

RUN = [sys.executable, "-c", "from quill.cli.app import run; run()"]


@pytest.fixture
def models(publish, registry, monkeypatch):
    """shakespeare with v1, v2 and an alias, sea with one version, begun with none that is finished."""
    publish("shakespeare")
    publish("shakespeare")
    publish("sea")
    registry.begin("begun")
    registry.begin("shakespeare")
    aliases.update(registry.root / "shakespeare", lambda held: held | {"aliases": {"champion": 1}})
    return registry


@pytest.fixture
def ask(monkeypatch, capsys):
    """The candidates of a shell at the end of a line: ask("quill", "show", "sh"), split as bash splits."""

    def answer(*words: str, shell: str = "bash") -> list[str]:
        with monkeypatch.context() as env:
            env.setenv("_QUILL_COMPLETE", f"complete_{shell}")
            env.setenv("COMP_WORDS", "\n".join(words) if shell == "bash" else "")
            env.setenv("COMP_CWORD", str(len(words) - 1))
            env.setenv("_TYPER_COMPLETE_ARGS", " ".join(words))
            env.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
            assert main([]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        if shell == "zsh":
            return [c.replace("\\\\:", ":") for c in re.findall(r'"([^"]*)"(?::"[^"]*")?', out)]
        return out.splitlines()

    return answer


@pytest.mark.parametrize(
    "before",
    [
        ["sample"],
        ["show"],
        ["show", "--metrics", "--json"],
        ["eval"],
        ["eval", "sea"],
        ["compare"],
        ["compare", "sea"],
        ["logs", "-f", "-n", "5"],
        ["sample", "--temperature", "0.5"],
        ["config", "show"],
        ["train", "--from"],
        ["train", "--name"],
        ["train", "--from", "="],
        ["list"],
        ["sample", "--"],
    ],
    ids=" ".join,
)
def test_names_are_completed_wherever_a_model_is_meant(before, models, ask):
    assert ask("quill", *before, "sha") == ["shakespeare"]


def test_every_reference_of_every_command_is_completed(models, ask):
    """Commands added later too: an argument that is called REF or NAME completes models."""
    import typer

    from quill.cli import app

    asked = 0
    for name in app.commands():
        command = typer.main.get_command(app.build([name])).commands[name]
        for part, body in getattr(command, "commands", {"": command}).items():
            first = next((p for p in body.params if p.param_type_name == "argument"), None)
            if first is not None and first.metavar in ("REF", "NAME", "GLOB", "NAME:ALIAS", "FILE|REF"):
                words = [w for w in (name, part) if w]
                assert ask("quill", *words, "shakes")[:1] == ["shakespeare"], words
                asked += 1
    assert asked > 8


def test_after_the_colon_versions_and_aliases(models, ask):
    # bash takes the colon for a word, and replaces only what comes after it.
    expected = ["v1", "v2", "latest", "champion"]
    assert ask("quill", "cp", "shakespeare", ":") == expected
    assert ask("quill", "cp", "shakespeare", ":", "v") == ["v1", "v2"]
    assert ask("quill", "eval", "sea", ":", "v1", "shakespeare", ":", "ch") == ["champion"]
    assert ask("quill", "eval", "sea", ":", "v1", "s") == ["sea", "shakespeare"]
    # Where it does not, the candidates are whole.
    whole = [f"shakespeare:{x}" for x in expected]
    assert ask("quill", "cp", "shakespeare:") == whole
    assert ask("quill", "cp", "shakespeare") == ["shakespeare", *whole]
    assert ask("quill", "cp", "shakespeare:", shell="fish") == whole
    assert ask("quill", "cp", "shakespeare:", shell="zsh") == whole


def test_unfinished_runs_are_completed_for_commands_that_accept_them(models, ask):
    assert ask("quill", "cp", "be") == []
    assert ask("quill", "show", "be") == ["begun"]
    for command in ("sample", "eval", "export", "publish"):
        assert ask("quill", command, "be") == [], command
    (models.root / "begun" / "v1" / "model.safetensors").write_bytes(b"")
    for command in ("sample", "eval", "export", "publish"):
        assert ask("quill", command, "be") == ["begun"], command
    assert ask("quill", "sample", "begun", ":") == ["v1"]
    assert ask("quill", "logs", "shakespeare", ":", "v") == ["v1", "v2", "v3"]


def test_a_removed_name_is_not_completed(models, ask):
    shutil.rmtree(models.root / "sea" / "v1")
    assert ask("quill", "sample", "s") == ["shakespeare"]


def test_models_copied_into_the_registry_by_hand_are_completed(models, ask):
    folder = models.root / "hand"
    shutil.copytree(models.root / "sea" / "v1", folder)
    (folder / "manifest.json").unlink()
    for command in ("cp", "sample"):
        assert ask("quill", command, "hand") == ["hand", "hand:v1", "hand:latest"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quill", "sa"], ["sample"]),
        (["quill", "config", "s"], ["schema", "show"]),
        (["quill", "train", "--batch"], ["--batch-size"]),
        (["quill", "train", "--batch_s"], []),
        (["quill", "train", "--optimizer", ""], ["adamw", "muon"]),
        (["quill", "train", "--optimizer", "=", "m"], ["muon"]),
        (["quill", "list", "--sort", "n"], ["name"]),
        (["quill", "list", "--sort", "="], ["name", "created", "loss", "params", "size"]),
        (["quill", "completion", ""], ["bash", "zsh", "fish", "powershell"]),
        (["quill", "export", "sea", "--format", "gg"], ["gguf"]),
        (["quill", "import", "x", "-f", "a"], ["auto"]),
        (["quill", "show", "--lin"], ["--lineage"]),
        (["quill", "--ver"], ["--version"]),
        (["quill", "show", "--he"], ["--help"]),
        (["quill", "prepare", "--tokenizer", "gp"], ["gpt2"]),
    ],
    ids=str,
)
def test_commands_flags_and_choices(words, expected, models, ask):
    assert ask(*words) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["quill", "train", "--config", "conf"],
        ["quill", "config", "check", "conf"],
        ["quill", "prepare", "te"],
        ["quill", "show", "sea", "x"],
        ["quill", "sample", "sea", "Once upon"],
        ["quill", "sample", "./s"],
        ["quill", "train", "--nothing=s"],
        ["quill", "sample", ":"],
        ["quill", "sample", "=", ":", "="],
        ["quill", "sample", "\x1b[31m"],
        ["quill", "sample", "*"],
    ],
    ids=str,
)
def test_other_values_are_left_to_the_shell(words, models, ask):
    for shell in ("bash", "zsh", "fish"):
        assert ask(*words, shell=shell) == []


def test_the_registry_flag_is_respected(models, publish, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(tmp_path / "none"))
    assert ask("quill", "sample", "s") == []
    assert ask("quill", "sample", "--registry", str(models.root), "sh") == ["shakespeare"]
    assert ask("quill", "sample", f"--registry={models.root}", "sh") == ["shakespeare"]


def test_damaged_models_hide_no_others(models, ask):
    (models.root / "shakespeare" / "model.json").write_text("{")
    (models.root / "shakespeare" / "v2" / "manifest.json").write_text("[")
    (models.root / "a file").write_text("")
    (models.root / "loop").symlink_to("loop")
    assert ask("quill", "cp", "s") == ["sea", "shakespeare"]
    assert ask("quill", "cp", "shakespeare", ":") == ["v1", "v2", "latest"]


def test_f15_names_that_a_shell_would_execute_are_never_completed(models, ask):
    for evil in ("$(touch x)", "`x`", "a;b", "s\x1b[2J", "s'x", "s*", "S"):
        shutil.copytree(models.root / "sea", models.root / evil)
    evil = {"$(touch x)": 1, "champion": 1, "x\ny": 1}
    aliases.update(models.root / "sea", lambda held: held | {"aliases": evil})
    for shell in ("bash", "zsh", "fish"):
        assert ask("quill", "cp", "", shell=shell) == ["sea", "shakespeare"]
        for word in ask("quill", "cp", "sea:", shell=shell):
            assert set(word) <= set("sea:v1lateschampion")


def test_fish_shows_the_help_of_commands_and_flags(models, ask):
    assert ask("quill", "samp", shell="fish") == ["sample\tGenerate text with a model."]
    assert ask("quill", "show", "--lin", shell="fish")[0].startswith("--lineage\tPrint the data")


@pytest.mark.parametrize("shell", _completion.SHELLS)
def test_the_script_is_printed_in_every_form(shell, capsys, monkeypatch):
    assert main(["completion", shell]) == 0
    plain = capsys.readouterr().out
    assert "_QUILL_COMPLETE" in plain
    assert main(["completion", shell, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema": "quill.completion/1", "shell": shell, "script": plain}
    assert main(["completion", shell, "-q"]) == 0
    assert capsys.readouterr().out == plain
    with monkeypatch.context() as env:
        env.setenv("_QUILL_COMPLETE", f"source_{shell}")
        assert main([]) == 0
    assert capsys.readouterr().out == plain


def test_a_shell_without_a_script_is_refused():
    assert main(["completion", "tcsh"]) == 2


def test_datasets_are_completed(models, ask, tmp_path, monkeypatch):
    (tmp_path / "data" / "seas").mkdir(parents=True)
    (tmp_path / "data" / "seas" / "manifest.json").write_text("{}")
    (tmp_path / "data" / ".downloads").mkdir()
    monkeypatch.setenv("QUILL_DATA", str(tmp_path / "data"))
    assert ask("quill", "eval", "sea", "--data", "s") == ["seas"]
    assert ask("quill", "train", "--data", "s") == ["seas"]
    assert ask("quill", "train", "s") == ["seas"]


def test_an_invalid_request_completes_nothing(models, capsys, monkeypatch):
    for name, value in (("COMP_WORDS", "quill sa"), ("COMP_CWORD", "x"), ("COMP_CWORD", "-7")):
        with monkeypatch.context() as env:
            env.setenv("_QUILL_COMPLETE", "complete_bash")
            env.setenv(name, value)
            assert main([]) == 0
        assert capsys.readouterr() == ("", "")


def test_it_loads_no_torch_and_is_quick(models, tmp_path):
    code = (
        "import sys\nfrom quill.cli.app import main\nmain([])\n"
        "print(*{'torch', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    env = {**os.environ, "_QUILL_COMPLETE": "complete_bash", "COMP_CWORD": "2", "COMP_WORDS": "quill show sh"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, env=env, check=True)
    assert (done.stdout, done.stderr.split()) == (b"shakespeare\n", [])
    resource = pytest.importorskip("resource")
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, env=env, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


def as_program(folder: Path) -> Path:
    """A program `quill` in a folder for the shells to find."""
    folder.mkdir()
    program = folder / "quill"
    program.write_text(f"#!{sys.executable}\nfrom quill.cli.app import run\nrun()\n")
    program.chmod(0o755)
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_accepts_the_script(models, tmp_path):
    env = {**os.environ, "PATH": f"{as_program(tmp_path / 'bin')}:{os.environ['PATH']}"}
    script = """
        eval "$(_QUILL_COMPLETE=source_bash quill)"
        COMP_WORDS=(quill show shakespeare : v); COMP_CWORD=4; _quill_completion quill; echo "${COMPREPLY[*]}"
        COMP_WORDS=(quill show "a  b" ""); COMP_CWORD=2; _quill_completion quill; echo "${COMPREPLY[*]}"
        COMP_WORDS=(quill eval sea s); COMP_CWORD=3; _quill_completion quill; echo "${COMPREPLY[*]}"
        complete -p quill
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, env=env, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "v1 v2 v3",
        "",
        "sea shakespeare",
        "complete -o default -F _quill_completion quill",
    ]


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_accepts_the_script(models, tmp_path):
    env = {**os.environ, "PATH": f"{as_program(tmp_path / 'bin')}:{os.environ['PATH']}"}
    script = "quill completion fish | source; complete -C 'quill show shakespeare:v'"
    done = subprocess.run(["fish", "-c", script], capture_output=True, env=env, text=True, check=True)
    assert done.stdout.split() == ["shakespeare:v1", "shakespeare:v2", "shakespeare:v3"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_completes_what_is_typed(models, tmp_path, on_terminal):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".zshrc").write_text(
        'autoload -U compinit; compinit -u; PS1=; unsetopt beep; eval "$(quill completion zsh)"\n'
    )
    path = f"{as_program(tmp_path / 'bin')}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "HOME": str(home), "ZDOTDIR": str(home), "TERM": "xterm"}
    shown = on_terminal(
        ["zsh", "-i"], env, "quill show se\t --path\nquill show shakespeare:ch\t --path\nexit\n"
    )
    assert str(models.root / "sea" / "v1") in shown
    assert str(models.root / "shakespeare" / "v1") in shown
