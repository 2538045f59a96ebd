"""The commands that change or check a registry: cp, mv, rm, alias, verify, gc and doctor."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
from holding import held_elsewhere

from quill.cli.app import main
from quill.registry import aliases
from quill.registry.store import Registry

UNIQUE = "4242-0123456789ab"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def document(capsys, *arguments: str) -> dict:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


@pytest.fixture
def real(tiny_registry, registry, monkeypatch) -> Registry:
    """A copy of the registry with a trained model."""
    shutil.copytree(tiny_registry.root, registry.root)
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
    return registry


@pytest.fixture
def training(registry):
    """Hold a name in another process, as a training does: training("name")."""
    with ExitStack() as held:
        yield lambda name: held.enter_context(held_elsewhere(registry.root, name))


class TestCp:
    def test_in_its_three_forms(self, publish, capsys):
        source = publish("a")
        assert run(capsys, "cp", "a", "b") == (0, "b:v1\n", "")
        assert run(capsys, "cp", "a", "b", "-q") == (0, "b:v2\n", "")
        assert document(capsys, "cp", "a:v1", "b") == {
            "schema": "quill.cp/1",
            "dry_run": False,
            "reference": "b:v3",
            "bytes": source.size,
            "copied_from": {"reference": "a:v1", "digest": source.digest},
        }

    def test_a_miss_suggests_the_command_with_the_close_name(self, publish, capsys):
        publish("shakespeare")
        code, out, err = run(capsys, "cp", "shakespear", "b")
        assert (code, out) == (3, "")
        assert err.splitlines()[2] == "  try: quill cp shakespeare b"

    def test_a_reference_is_not_a_new_name(self, publish, capsys):
        publish("a")
        code, _, err = run(capsys, "cp", "a", "b:v2")
        assert code == 2
        assert "try: quill cp a b" in err


class TestMv:
    def test_in_its_three_forms(self, publish, capsys):
        publish("a")
        publish("a")
        code, out, err = run(capsys, "mv", "a", "b")
        assert (code, out, err) == (0, "b\n", "renamed a to b: v1, v2\n")
        assert run(capsys, "mv", "b", "c", "-q") == (0, "c\n", "")
        assert document(capsys, "mv", "c", "d") == {
            "schema": "quill.mv/1", "dry_run": False, "name": "d", "was": "c", "versions": ["d:v1", "d:v2"],
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("arguments", "code", "hint"),
        [
            (["a", "b"], 4, "quill cp a b"),
            (["a:v1", "c"], 2, "quill cp a:v1 c && quill rm a:v1"),
            (["a", "c:v1"], 2, "quill mv a c"),
            (["alph", "c"], 3, "quill mv alpha c"),
            (["a", "A"], 2, "use 'a'"),
        ],
    )
    def test_refusals_suggest_a_command(self, publish, capsys, arguments, code, hint):
        for name in ("a", "b", "alpha"):
            publish(name)
        found, out, err = run(capsys, "mv", *arguments)
        assert (found, out) == (code, "")
        assert err.splitlines()[-1] == f"  try: {hint}"

    def test_f42_a_model_in_training_stays(self, publish, training, capsys):
        publish("a")
        pid = training("a")
        for command in (["mv", "a", "b"], ["rm", "a", "-y"]):
            code, out, err = run(capsys, *command)
            assert (code, out) == (75, "")
            assert f"pid {pid}" in err
        assert run(capsys, "list", "-q")[1] == "a:v1\n"


class TestRm:
    def test_in_its_three_forms(self, publish, capsys):
        sizes = [publish("a").size for _ in range(3)]
        assert run(capsys, "rm", "a:v1", "-y", "-q") == (0, "a:v1\n", "")
        code, out, err = run(capsys, "rm", "a:v2", "--yes")
        assert (code, out) == (0, "a:v2\n")
        assert "freed" in err
        found = document(capsys, "rm", "a", "-y")
        assert found["removed"] == [{"reference": "a:v3", "bytes": found["bytes"]}]
        assert (found["schema"], found["dry_run"]) == ("quill.rm/1", False)
        assert found["bytes"] > sizes[2], "the manifest takes something too"

    def test_a_dry_run_prints_the_same_and_removes_nothing(self, publish, capsys):
        publish("a")
        publish("a")
        code, out, err = run(capsys, "rm", "a", "--all-versions", "--dry-run")
        assert (code, out) == (0, "a:v1\na:v2\n")
        assert "nothing was removed" in err
        assert run(capsys, "rm", "a", "--all-versions", "-y", "-q")[:2] == (0, out)

    def test_without_a_terminal_a_confirmation_flag_is_required(self, publish, capsys):
        publish("a")
        code, out, err = run(capsys, "rm", "a")
        assert (code, out) == (2, "")
        assert "--yes" in err
        assert run(capsys, "list", "-q")[1] == "a:v1\n"

    def test_a_name_with_several_versions_requires_all_versions(self, publish, capsys):
        publish("a")
        publish("a")
        code, _, err = run(capsys, "rm", "a", "-y")
        assert code == 2
        assert "v1, v2" in err
        assert "quill rm a --all-versions" in err

    def test_versions_with_an_alias_are_refused(self, publish, capsys):
        publish("a")
        run(capsys, "alias", "set", "a", "champion")
        code, out, err = run(capsys, "rm", "a", "-y")
        assert (code, out) == (4, "")
        assert err.splitlines()[-1] == "  try: quill alias rm a:champion"

    def test_missing_references(self, publish, capsys):
        publish("shakespeare")
        code, out, err = run(capsys, "rm", "shakespear", "-y")
        assert (code, out) == (3, "")
        assert err.splitlines()[-1] == "  try: quill rm shakespeare -y"
        assert run(capsys, "rm", "shakespear", "-y", "--missing-ok") == (0, "", "nothing to remove\n")
        code, out, _ = run(capsys, "rm", "shakespear", "shakespeare", "-y", "--missing-ok")
        assert (code, out) == (0, "shakespeare:v1\n")
        assert document(capsys, "rm", "shakespeare", "--missing-ok")["removed"] == []

    @pytest.mark.parametrize(
        ("answer", "code"), [(b"y\n", 0), (b"YES\n", 0), (b"n\n", 4), (b"\n", 4), (b"\x04", 4), (b"yo\n", 4)]
    )
    def test_a_confirmation_is_requested(self, publish, registry, tmp_path, answer, code):
        publish("a")
        found, out, seen = on_terminal(registry, answer, "rm", "a")
        assert found == code
        assert "remove a:v1 (" in seen
        assert "[y/N]" in seen
        assert out == ("a:v1\n" if code == 0 else "")
        assert len(registry.entries()) == (0 if code == 0 else 1)

    def test_an_interrupted_confirmation_removes_nothing(self, publish, registry):
        publish("a")
        assert on_terminal(registry, b"\x03", "rm", "a")[0] == 130
        assert len(registry.entries()) == 1

    def test_yes_skips_the_confirmation(self, publish, registry):
        publish("a")
        code, out, seen = on_terminal(registry, b"", "rm", "a", "-y")
        assert (code, out) == (0, "a:v1\n")
        assert "[y/N]" not in seen


def on_terminal(registry: Registry, answer: bytes, *arguments: str) -> tuple[int, str, str]:
    """Run a command whose stdin and stderr are a terminal; answer what it asks."""
    keyboard, screen = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from quill.cli.app import run; run()", *arguments],
        stdin=screen,
        stderr=screen,
        stdout=subprocess.PIPE,
        env={**os.environ, "QUILL_REGISTRY": str(registry.root)},
        start_new_session=True,
        preexec_fn=_be_its_terminal,
    )
    os.close(screen)
    seen = b""
    while answer and b"[y/N] " not in seen:
        seen += os.read(keyboard, 1024)
    os.write(keyboard, answer)
    out = process.stdout.read().decode()
    code = process.wait(30)
    try:
        while more := os.read(keyboard, 1024):
            seen += more
    except OSError:
        pass
    os.close(keyboard)
    return code, out, seen.decode()


def _be_its_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class TestAlias:
    def test_in_its_three_forms(self, publish, capsys):
        publish("a")
        publish("a")
        publish("b")
        assert run(capsys, "alias", "set", "a:v1", "champion") == (0, "a:champion\n", "")
        assert document(capsys, "alias", "set", "a", "champion") == {
            "schema": "quill.alias.set/1", "alias": "a:champion", "reference": "a:v2", "before": "a:v1",
        }  # fmt: skip
        assert run(capsys, "alias", "set", "b", "tried", "-q") == (0, "b:tried\n", "")
        code, out, err = run(capsys, "alias", "list")
        assert (code, err) == (0, "")
        assert [line.split() for line in out.splitlines()] == [
            ["ALIAS", "VERSION", "STATE"], ["a:champion", "a:v2", "ok"], ["b:tried", "b:v1", "ok"],
        ]  # fmt: skip
        assert run(capsys, "alias", "list", "b", "-q") == (0, "b:tried\n", "")
        assert document(capsys, "alias", "list", "a")["aliases"] == [
            {"alias": "a:champion", "reference": "a:v2", "state": "ok"}
        ]
        assert run(capsys, "show", "a:champion", "-q")[1] == "a:v2\n"
        assert document(capsys, "alias", "rm", "a:champion") == {
            "schema": "quill.alias.rm/1", "removed": [{"alias": "a:champion", "reference": "a:v2"}],
        }  # fmt: skip
        assert run(capsys, "alias", "rm", "b:tried") == (0, "b:tried\n", "")
        code, out, err = run(capsys, "alias", "list")
        assert (code, out) == (0, "")
        assert "no aliases yet" in err

    def test_a_moved_alias_names_its_former_version(self, publish, capsys):
        publish("a")
        publish("a")
        run(capsys, "alias", "set", "a:v1", "champion")
        assert run(capsys, "alias", "set", "a:v2", "champion")[2] == "moved a:champion from v1 to v2\n"
        assert run(capsys, "alias", "set", "a:v2", "champion") == (0, "a:champion\n", "")

    @pytest.mark.parametrize("alias", ["latest", "v2", "V2", "2", "a b", "", "x:y", "../x", "Champion"])
    def test_f13_words_that_cannot_be_aliases(self, publish, capsys, alias):
        publish("a")
        code, out, err = run(capsys, "alias", "set", "a", alias)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) <= 3
        assert run(capsys, "alias", "list", "-q")[1] == ""

    def test_missing_models_and_aliases(self, publish, capsys):
        publish("shakespeare")
        run(capsys, "alias", "set", "shakespeare", "champion")
        for typed, meant in (
            (["set", "shakespear", "x"], "set shakespeare x"),
            (["rm", "shakespeare:champoin"], "rm shakespeare:champion"),
            (["list", "shakespear"], "list shakespeare"),
        ):
            code, out, err = run(capsys, "alias", *typed)
            assert (code, out) == (3, "")
            assert err.splitlines()[-1] == f"  try: quill alias {meant}"
        assert run(capsys, "alias", "rm", "shakespeare:x", "nobody:x", "--missing-ok") == (0, "", "")

    @pytest.mark.parametrize("typed", ["a", "a:v1", "a:latest", "./a", "a:"])
    def test_only_aliases_can_be_removed(self, publish, capsys, typed):
        publish("a")
        assert run(capsys, "alias", "rm", typed)[0] == 2

    def test_damaged_aliases_of_one_model_hide_no_others(self, publish, registry, capsys):
        publish("a")
        publish("b")
        run(capsys, "alias", "set", "b", "champion")
        (registry.root / "a" / "model.json").write_text("{")
        code, out, _ = run(capsys, "alias", "list")
        assert code == 0
        assert "damaged" in out
        assert "b:champion" in out
        assert run(capsys, "alias", "list", "-q")[1] == "b:champion\n"
        assert run(capsys, "alias", "list", "a")[0] == 5

    def test_f53_aliases_are_restored_from_their_copy(self, publish, registry, capsys):
        publish("a")
        publish("b")
        run(capsys, "alias", "set", "a", "champion")
        (registry.root / "a" / "model.json").unlink()
        found = run(capsys, "doctor")[1]
        assert "the aliases of 'a' are lost; quill alias restore a" in " ".join(found.split())
        code, out, err = run(capsys, "rm", "a", "-y")
        assert (code, out) == (5, "")
        assert err.splitlines()[-1] == "  try: quill alias restore a"
        assert run(capsys, "alias", "restore", "a", "-q") == (0, "a:champion\n", "")
        assert run(capsys, "rm", "a", "-y")[0] == 4
        assert "aliases" not in [f["what"] for f in document(capsys, "doctor")["findings"]]
        assert run(capsys, "alias", "restore", "b") == (0, "", "restored: b has no aliases\n")
        assert run(capsys, "alias", "restore", "c")[0] == 3

    def test_an_alias_of_a_removed_version_is_marked(self, publish, registry, capsys):
        publish("a")
        aliases.update(registry.root / "a", lambda held: held | {"aliases": {"lost": 7}})
        assert document(capsys, "alias", "list")["aliases"] == [
            {"alias": "a:lost", "reference": "a:v7", "state": "removed"}
        ]

    def test_f15_an_alias_from_a_hostile_file_cannot_reach_the_terminal(self, publish, registry, capsys):
        publish("a")
        aliases.update(registry.root / "a", lambda held: held | {"aliases": {"\x1b[2J\n": 1}})
        for arguments in (["alias", "list"], ["alias", "list", "--json"], ["alias", "list", "-q"]):
            out = run(capsys, *arguments)[1]
            assert "\x1b" not in out
            assert not any(line.startswith("[") for line in out.splitlines())


class TestVerify:
    def test_in_its_three_forms(self, real, capsys):
        code, out, err = run(capsys, "verify")
        assert code == 0
        assert out.splitlines()[0].split() == ["NAME", "FILES", "SIZE", "STATE"]
        assert out.splitlines()[1].split()[0] == "tiny:v1"
        assert out.splitlines()[1].split()[-1] == "ok"
        assert "no damage found" in err
        found = document(capsys, "verify", "tiny:v1")
        assert (found["schema"], found["damaged"]) == ("quill.verify/1", 0)
        (verdict,) = found["verified"]
        assert {f["file"] for f in verdict["files"]} > {"config.json", "model.safetensors", "tokenizer.json"}
        assert {f["state"] for f in verdict["files"]} == {"ok"}
        assert run(capsys, "verify", "-q") == (0, "", "")
        lines = run(capsys, "verify", "-v")[1].splitlines()
        assert len(lines) == 1 + len(verdict["files"])

    @pytest.mark.parametrize("form", [(), ("-v",), ("--json",), ("-q",)])
    def test_f3_damage_exits_5_in_every_form(self, real, capsys, form):
        shutil.copytree(real.root / "tiny", real.root / "bad")
        path = real.root / "bad" / "v1" / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        code, out, err = run(capsys, "verify", *form)
        assert code == 5
        assert "bad:v1" in out
        assert run(capsys, "verify", "tiny", *form)[0] == 0
        if not form:
            rows = {line.split()[0]: line for line in out.splitlines()[1:]}
            assert "damaged: model.safetensors: its sha256 is" in rows["bad:v1"]
            assert rows["tiny:v1"].endswith("ok")
            assert "restore it from a copy" in err
        if form == ("-q",):
            assert (out, err) == ("bad:v1\n", "")
        if form == ("--json",):
            assert {v["reference"]: v["state"] for v in json.loads(out)["verified"]} == {
                "bad:v1": "damaged", "tiny:v1": "ok",
            }  # fmt: skip

    def test_a_miss(self, real, capsys):
        code, out, err = run(capsys, "verify", "tinny")
        assert (code, out) == (3, "")
        assert err.splitlines()[-1] == "  try: quill verify tiny"

    def test_an_empty_registry_is_whole(self, registry, capsys):
        code, out, err = run(capsys, "verify", "--registry", str(registry.root))
        assert (code, out) == (0, "")
        assert "nothing to verify" in err


class TestGc:
    def test_in_its_three_forms(self, publish, registry, capsys):
        for _ in range(4):
            publish("a")
        (registry.root / f".tmp-{UNIQUE}").write_bytes(bytes(1000))
        told = document(capsys, "gc", "--older-than", "0", "--keep", "3", "--dry-run")
        assert told["dry_run"] is True
        assert [(r["what"], r["kind"]) for r in told["removed"]] == [
            ("a:v1", "version"), (f"weights/.tmp-{UNIQUE}", "leftover"),
        ]  # fmt: skip
        code, out, err = run(capsys, "gc", "--older-than", "0", "--keep", "3", "--yes")
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == ["REMOVED", "a:v1", f"weights/.tmp-{UNIQUE}"]
        assert "freed" in err
        assert run(capsys, "gc", "--older-than", "0", "--keep", "3") == (0, "", "nothing to remove\n")
        code, out, _ = run(capsys, "gc", "--keep", "1", "-qy")
        assert code == 0
        assert int(out) == 2 * told["removed"][0]["bytes"]
        assert run(capsys, "gc", "-q") == (0, "0\n", "")
        assert document(capsys, "gc") == {
            "schema": "quill.gc/1", "dry_run": False, "bytes": 0, "removed": [], "skipped": [],
        }  # fmt: skip

    @pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 4)])
    def test_old_versions_are_removed_after_a_yes(self, publish, registry, capsys, answer, code):
        publish("a")
        publish("a")
        found, _, seen = on_terminal(registry, answer, "gc", "--keep", "1")
        assert found == code
        assert "remove a:v1 (" in seen
        left = ["a:v2"] if code == 0 else ["a:v1", "a:v2"]
        assert run(capsys, "list", "-aq")[1].split() == left

    def test_without_a_terminal_old_versions_need_yes_and_leftovers_do_not(self, publish, registry, capsys):
        publish("a")
        (registry.root / f".tmp-{UNIQUE}").write_bytes(bytes(1000))
        assert run(capsys, "gc", "--keep", "1", "--older-than", "0", "-q") == (0, "1000\n", "")
        publish("a")
        code, out, err = run(capsys, "gc", "--keep", "1")
        assert (code, out) == (2, "")
        assert err.startswith("error: removing a:v1 requires a confirmation\n")
        assert run(capsys, "list", "-aq")[1].split() == ["a:v1", "a:v2"]
        assert run(capsys, "gc", "--keep", "1", "--dry-run")[0] == 0

    def test_the_folder_of_datasets_is_cleaned_too(self, publish, registry, capsys, monkeypatch):
        publish("a")
        left = registry.root.parent / "elsewhere" / ".trash" / f"{UNIQUE}-old" / "train.bin"
        left.parent.mkdir(parents=True)
        left.write_bytes(bytes(500))
        monkeypatch.setenv("QUILL_DATA", str(registry.root.parent / "elsewhere"))
        assert run(capsys, "gc", "-q")[1] == "0\n"
        assert run(capsys, "gc", "-q", "--older-than", "0")[1] == "500\n"
        assert not left.exists()

    def test_a_model_in_training_is_skipped_and_reported(self, publish, training, capsys):
        publish("a")
        publish("a")
        training("a")
        code, out, err = run(capsys, "gc", "--keep", "1")
        assert (code, out) == (0, "")
        assert "kept a: a process is working on it" in err
        assert document(capsys, "gc", "--keep", "1")["skipped"] == [
            {"what": "a", "why": "a process is working on it"}
        ]

    @pytest.mark.parametrize(
        "arguments",
        [["--keep", "0"], ["--keep", "-1"], ["--keep", "x"], ["--older-than", "-1"], ["--older-than", "nan"],
         ["--older-than", "inf"], ["--older-than", "1e9"]],
    )  # fmt: skip
    def test_invalid_numbers_are_refused(self, publish, capsys, arguments):
        publish("a")
        publish("a")
        code, out, err = run(capsys, "gc", *arguments)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) <= 3

    def test_f41_a_failed_removal_exits_7_after_the_others(self, publish, registry, capsys, monkeypatch):
        for name in ("a", "a", "b", "b"):
            publish(name)
        rename = os.rename

        def refuse(source, target):
            if source.parent.name == "a":
                raise OSError(30, os.strerror(30))
            rename(source, target)

        monkeypatch.setattr(os, "rename", refuse)
        code, out, err = run(capsys, "gc", "--keep", "1", "-y")
        assert code == 7
        assert "b:v1" in out
        assert "read-only" in err
        assert run(capsys, "list", "-aq")[1].split() == ["a:v1", "a:v2", "b:v2"]


class TestDoctor:
    def findings(self, capsys) -> dict[str, tuple[str, str]]:
        return {f["what"]: (f["state"], f["found"]) for f in document(capsys, "doctor")["findings"]}

    def test_unfinished_runs_and_leftovers_are_reported(self, publish, registry, training, capsys):
        publish("a")
        registry.begin("a").update_status(step=1)
        registry.begin("b").update_status(step=1)
        training("b")
        trash = registry.root / ".trash" / UNIQUE
        trash.parent.mkdir()
        trash.write_bytes(bytes(1500))
        assert self.findings(capsys)["leftovers"] == ("ok", "none"), "it is younger than a day"
        old = time.time() + 2 * 86400
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda: old)
            found = self.findings(capsys)
        assert found["leftovers"] == ("ok", "1, 1.5 kB; remove with quill gc")
        assert found["unfinished"] == ("ok", "a:v2")
        assert found["training"] == ("ok", "b:v1")
        assert found["locks"] == ("ok", "work")
        assert trash.exists()

    def test_f32_locks_without_effect_are_a_warning(self, publish, registry, capsys, monkeypatch):
        import fcntl

        publish("a")
        monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)
        state, found = self.findings(capsys)["locks"]
        assert state == "warning"
        assert "have no effect" in found

    def test_a_missing_registry_is_not_created(self, registry, capsys, monkeypatch):
        monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
        assert "locks" not in self.findings(capsys)
        assert not registry.root.exists()


@pytest.mark.parametrize("verb", ["cp", "mv", "rm", "alias", "verify", "gc"])
def test_f36_every_verb_takes_closed_streams(verb, publish, registry):
    publish("a")
    arguments = {"cp": "a b", "mv": "a b", "rm": "a -y", "alias": "set a x", "verify": "a", "gc": "--keep 1"}[
        verb
    ]
    line = f"exec {sys.executable} -c 'from quill.cli.app import run; run()' {verb} {arguments} <&- >&- 2>&-"
    env = {**os.environ, "QUILL_REGISTRY": str(registry.root)}
    # What these versions hold is no model, and verify is the one to notice.
    assert subprocess.run(["sh", "-c", line], env=env).returncode == (5 if verb == "verify" else 0)
