"""Arguments that are no text, or far too long: an error of a few lines, never a bug."""

from __future__ import annotations

import pytest

from quill.cli import app
from quill.cli.app import main

ARGUMENTS = {
    "a byte that is no text": "\udcff",
    "a lone surrogate": "\ud800",
    "70,000 characters": "x" * 70_000,
    "70,000 digits": "9" * 70_000,
    "a long path": "./" + "x/" * 30_000,
}
# Where the argument goes.
COMMANDS = """
    show {} | show m:{} | show data:{} | show m --{} | list {} | list --sort {} | list --registry {}
    show a --registry {} | verify --registry {} | gc --registry {} | compare a a --registry {}
    rm {} -y | mv a {} | cp a {} | alias set a {} | alias rm a:{} | alias restore {} | logs {} | compare a {}
    verify {} | gc {} | gc --keep {} | config check {} | config show {} | config schema {} | help {}
    {} | --{}
    train --config {} | train --data {} --name z | train --learning-rate {} | train --n-layer {} --data a
    prepare {} | prepare {} --name x | prepare x.txt --name {} | prepare x.txt --encoding {} | import {}
    export {} | export a --out {} | export a --format {} | publish {} | eval {} | eval a --data {} | sample {}
    completion {} | push a {} | push {} hf:a/b
    explain {} | explain m:{} x | explain a {} | explain a x --html {} | explain a x --last {}
    bench {} | bench m:{} | bench {}.json | bench --against {} | bench --rounds {} | bench --seconds {}
    serve {} | serve m:{} | serve --port {} | serve a --api-key-file {} | serve a --slots {}
    sample a x --server {} | sample a x --server http://{} | sample a x --api-key-file {} --server 127.0.0.1:1
    chat {} | chat m:{} | chat a --stop {} | chat a --seed {} | chat a --server {} | chat a --server http://{}
    doctor {} | ls {} | registry share {} | registry share --group {}
"""


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_f61_no_argument_is_a_bug_or_echoed_whole(publish, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    publish("a")
    assert {line.split()[0] for line in COMMANDS.replace("\n", "|").split("|") if line.strip()} >= {
        *app.commands()
    }
    for line in COMMANDS.replace("\n", "|").split("|"):
        if words := line.split():
            code = main([w.replace("{}", ARGUMENTS[kind]) for w in words])
            out, err = capsys.readouterr()
            assert code not in (1, 75), (line, err)
            assert len(out) < 2000, line
            assert len(err) < 2000, line
