"""`quill help`: the manual's pages, and the help of commands."""

from __future__ import annotations

import json
import os
import sys
import tomllib

import pytest

from quill.cli import _help, app
from quill.cli import help as manual
from quill.cli.app import main

PAGE = "# First steps\n\nSome *words* and a list:\n\n- one\n- two\n\n```sh\nquill list\n```\n"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A manual of two pages."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "index.md").write_text("# Index\n")
    (folder / "tutorial.md").write_text(PAGE)
    (folder / "formats.md").write_text("No heading.\n")
    monkeypatch.setattr(manual, "_folder", lambda: folder)
    return folder


def test_alone_it_lists_commands_and_topics(pages, capsys):
    assert main(["help"]) == 0
    out = capsys.readouterr().out
    for name in app.commands():
        assert f"\n  {name} " in out
    assert "\n  tutorial  First steps\n" in out
    assert "index" not in out
    assert main(["help", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["topics"] == [
        {"topic": "formats", "title": "formats"},
        {"topic": "tutorial", "title": "First steps"},
    ]
    assert main(["help", "-q"]) == 0
    assert capsys.readouterr().out == "formats\ntutorial\n"


def test_a_page_in_a_pipe_is_its_markdown(pages, capsys):
    for words in (["tutorial"], ["Tutorial"], ["tutorial.md"]):
        assert main(["help", *words]) == 0
        assert capsys.readouterr().out == PAGE
    assert main(["help", "tutorial", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == PAGE


@pytest.mark.parametrize("words", [["train"], ["config", "check"], ["alias"], ["list"]], ids=" ".join)
def test_help_of_a_command_is_the_commands_own(words, capsys):
    assert main(["help", *words]) == 0
    first = capsys.readouterr().out
    assert main([*words, "--help"]) == 0
    assert capsys.readouterr().out == first


def test_an_unknown_topic_leads_to_the_close_ones(pages, capsys):
    assert main(["help", "tutorail"]) == 3
    assert "try: quill help tutorial or quill help train" in capsys.readouterr().err
    assert main(["help", "nothing", "like", "it"]) == 3
    assert "try: quill help\n" in capsys.readouterr().err
    assert main(["help", "../../etc/passwd"]) == 3


def test_without_pages_it_lists_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(manual, "_folder", lambda: tmp_path / "none")
    assert main(["help"]) == 0
    out = capsys.readouterr().out
    assert "Commands:" in out
    assert "Topics" not in out


def test_a_page_on_a_terminal_is_drawn_and_paged(pages, on_terminal):
    code = (
        "import sys, pathlib\nfrom quill.cli import help as manual\nfrom quill.cli.app import run\n"
        "folder = pathlib.Path(sys.argv.pop())\nmanual._folder = lambda: folder\nrun()"
    )
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "60", "PAGER": "cat"}
    text = on_terminal([sys.executable, "-c", code, "help", "tutorial", str(pages)], env)
    assert "First steps" in text
    assert "# First" not in text
    assert "\x1b[" in text
    assert " • " in text


def test_the_manuals_address_is_the_projects(root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Documentation"] == f"{_help.MANUAL}/index.md"


def test_topics_that_help_names_exist():
    if not (known := manual.topics()):
        pytest.skip("there is no manual yet")
    import typer

    group = typer.main.get_command(app.build(app.commands()))
    for command in group.commands.values():
        for each in getattr(command, "commands", {"": command}).values():
            topic = getattr(each.callback, "topic", "")
            assert topic == "" or topic in known
