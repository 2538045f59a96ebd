"""`quill sample`: the text alone, from wherever the prompt came, in every form."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from quill.cli.app import main

RUN = [sys.executable, "-c", "from quill.cli.app import run; run()"]


@pytest.fixture(autouse=True)
def _there(tiny_registry, tiny, monkeypatch):
    monkeypatch.setenv("QUILL_REGISTRY", str(tiny_registry.root))
    monkeypatch.setenv("QUILL_DEVICE", "cpu")


def sample(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["sample", "tiny", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def drawn(capsys, *arguments: str) -> str:
    code, out, err = sample(capsys, "--seed=1", "--max-new-tokens=20", *arguments)
    assert (code, err) == (0, "")
    return out


def test_one_sample_in_its_forms(capsys):
    text = drawn(capsys, "bells")
    assert text.startswith("bells")
    assert text.endswith("\n")
    assert 20 <= len(text) - len("bells") <= 21
    document = json.loads(drawn(capsys, "bells", "--json"))
    assert document["schema"] == "quill.sample/1"
    assert document["reference"] == "tiny:v1"
    assert document["prompt"] == "bells"
    [only] = document["samples"]
    assert ("bells" + only).removesuffix("\n") == text.removesuffix("\n")
    assert drawn(capsys, "bells", "-q") == text
    assert drawn(capsys, "bells", "--no-stream") == text
    assert drawn(capsys, "bells", "--no-echo") == text.removeprefix("bells")


def test_several_samples_are_kept_apart_by_a_line_of_dashes(capsys):
    one = drawn(capsys, "bells", "-n1")
    several = drawn(capsys, "bells", "-n", "3").split("-" * 20 + "\n")
    assert len(several) == 3
    assert several[0] == one
    assert all(s.startswith("bells") for s in several)
    samples = json.loads(drawn(capsys, "bells", "--num-samples=3", "--json"))["samples"]
    assert [("bells" + s).rstrip("\n") for s in samples] == [s.rstrip("\n") for s in several]


def test_a_prompt_is_the_same_from_everywhere(capsys, tmp_path):
    wanted = drawn(capsys, "the tide\n")
    file = tmp_path / "prompt.txt"
    file.write_text("the tide\n")
    assert drawn(capsys, "--prompt", "the tide\n") == wanted
    assert drawn(capsys, "-p", "the tide\n") == wanted
    assert drawn(capsys, "--prompt-file", str(file)) == wanted
    arguments = ["sample", "tiny", "-", "--seed=1", "--max-new-tokens=20"]
    done = subprocess.run([*RUN, *arguments], input=b"the tide\n", capture_output=True)
    assert done.stdout.decode() == wanted


def test_a_piped_prompt_is_read_if_no_other_is_given():
    arguments = [*RUN, "sample", "tiny", "--seed=1", "--max-new-tokens=20"]
    asked = subprocess.run([*arguments, "-"], input=b"the tide\n", capture_output=True)
    piped = subprocess.run(arguments, input=b"the tide\n", capture_output=True)
    assert piped.stdout == asked.stdout
    assert piped.stdout.startswith(b"the tide\n")
    # A loop that reads its list from stdin keeps it, if the prompt is given.
    code = "import subprocess, sys; subprocess.run(sys.argv[1:]); sys.stdout.write(sys.stdin.read())"
    loop = subprocess.run(
        [sys.executable, "-c", code, *arguments, "bells"], input=b"rest of a list", capture_output=True
    )
    assert b"rest of a list" in loop.stdout


def test_stdin_is_read_only_if_it_is_piped(monkeypatch, capsys):
    class Untouchable:
        def __getattr__(self, name: str) -> object:
            raise OSError("stdin was read")

    monkeypatch.setattr(sys, "stdin", Untouchable())
    assert drawn(capsys, "bells")
    assert drawn(capsys)


def test_several_words_are_one_prompt(capsys):
    assert drawn(capsys, "the", "tide") == drawn(capsys, "the tide")


@pytest.mark.parametrize("flag", ["--temperature=0", "--temp=0", "-t 0", "--temp 0"])
def test_temperature_by_its_names(flag, capsys):
    assert drawn(capsys, "bells", *flag.split()) == drawn(capsys, "bells", "--temperature", "0")


def test_a_device_that_does_not_exist_is_a_usage_error(capsys, monkeypatch):
    code, out, err = sample(capsys, "bells", "--device", "tpu")
    assert (code, out) == (2, "")
    assert "'device' = 'tpu' in the arguments is invalid\n  why: choose auto, cpu, cuda, cuda:N, mps\n" in err
    monkeypatch.setenv("QUILL_DEVICE", "foo")
    code, out, err = sample(capsys, "bells")
    assert (code, out) == (2, "")
    assert "'device' = 'foo' in QUILL_DEVICE is invalid\n  why: choose auto, cpu, cuda, cuda:N, mps\n" in err
    assert sample(capsys, "bells", "--device", "cpu")[0] == 0


def test_f23_an_empty_prompt_starts_from_a_new_line(capsys):
    assert drawn(capsys) == drawn(capsys, "") == drawn(capsys, "\n", "--no-echo")


def test_f23_a_long_prompt_keeps_its_end_and_says_so(capsys):
    code, out, err = sample(capsys, "bells " * 50, "--max-new-tokens=1")
    assert code == 0
    assert out.startswith("bells " * 50)
    assert "the last 16" in err


def test_f22_an_unknown_character_is_named_and_nothing_printed(capsys):
    code, out, err = sample(capsys, "bells é")
    assert (code, out) == (2, "")
    assert "'é' (U+00E9)" in err
    assert "--unknown skip" in err
    code, out, _ = sample(capsys, "bells é", "--unknown", "skip", "--max-new-tokens=3")
    assert code == 0
    assert out.startswith("bells é")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--prompt", "b"], "PROMPT and --prompt are mutually exclusive"),
        (["--prompt", "b", "--prompt-file", "c"], "mutually exclusive"),
        (["--temperature", "-1"], "'temperature' = -1"),
        (["--temperature", "nan"], "'temperature' = nan"),
        (["--top-p", "0"], "'top_p' = 0"),
        (["--top-k", "0"], "'top_k' = 0"),
        (["--stop", ""], "a stop string is empty"),
    ],
)
def test_f24_invalid_settings_exit_2(arguments, words, capsys):
    code, out, err = sample(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err


def test_f24_extreme_settings_work(capsys):
    assert drawn(capsys, "bells", "--max-new-tokens=0") == "bells\n"
    greedy = drawn(capsys, "bells", "--temperature=0")
    assert (
        greedy == drawn(capsys, "bells", "--temperature=0", "--seed=2") == drawn(capsys, "bells", "--top-k=1")
    )
    assert drawn(capsys, "bells", "--top-k=1000000")


def test_stop_strings_end_a_sample_one_or_several(capsys):
    whole = drawn(capsys, "bells", "--temperature=0", "--no-echo").rstrip("\n")
    stop = whole[5:7]
    assert drawn(capsys, "bells", "--temperature=0", "--no-echo", "--stop", stop) == (
        whole[: whole.index(stop)] + "\n"
    )
    assert drawn(
        capsys, "bells", "--temperature=0", "--no-echo", "--stop", "never in it", "--stop", stop
    ) == (whole[: whole.index(stop)] + "\n")


@pytest.mark.parametrize("prompt", ["", "bells", "bells\n", "bells\n\n"])
@pytest.mark.parametrize("new", ["", " and", " and\n", "\n"])
@pytest.mark.parametrize("flags", [["--stream"], ["--no-stream"], ["-n2"]])
@pytest.mark.parametrize("echo", [True, False])
def test_a_newline_is_added_only_if_the_text_lacks_one(capsys, monkeypatch, prompt, new, flags, echo):
    from quill.generation.generator import Generator

    monkeypatch.setattr(Generator, "stream", lambda self, *_: iter([new[:2], new[2:]] if new else []))
    monkeypatch.setattr(Generator, "generate", lambda self, text, config, *_: [new] * config.num_samples)
    code, out, _ = sample(capsys, "--prompt", prompt, *flags, *([] if echo else ["--no-echo"]))
    text = prompt + new if echo else new
    one = text if text.endswith("\n") else text + "\n"
    assert (code, out) == (0, one + "-" * 20 + "\n" + one if flags == ["-n2"] else one)


def test_line_ends_of_windows_in_a_prompt_are_newlines(capsys, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"3 bells\r\n4 bells\r\n")
    assert drawn(capsys, "--prompt-file", str(file)) == drawn(capsys, "--prompt", "3 bells\n4 bells\n")
    arguments = ["sample", "tiny", "-", "--seed=1", "--max-new-tokens=20"]
    done = subprocess.run([*RUN, *arguments], input=file.read_bytes(), capture_output=True)
    assert done.stdout.decode() == drawn(capsys, "--prompt", "3 bells\n4 bells\n")


def test_prompt_files_that_cannot_be_read(capsys, tmp_path):
    assert sample(capsys, "--prompt-file", str(tmp_path / "none"))[0] == 3
    assert sample(capsys, "--prompt-file", str(tmp_path))[0] == 2
    bad = tmp_path / "bad"
    bad.write_bytes(b"ab\xff")
    code, _, err = sample(capsys, "--prompt-file", str(bad))
    assert code == 2
    assert "byte 2 is 0xff" in err


def test_a_missing_model_exits_3_before_torch_is_loaded():
    code = (
        "import sys\nfrom quill.cli.app import main\ncode = main(['sample', 'tine', 'x'])\n"
        "sys.exit(100 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 3
    assert b"quill sample tiny" in done.stderr


def test_f37_a_closed_pipe_ends_sampling_with_141():
    process = subprocess.Popen(
        [*RUN, "sample", "tiny", "--max-new-tokens=100000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_tokens_arrive_as_they_are_drawn():
    """The first character is there while the last is still far away."""
    process = subprocess.Popen([*RUN, "sample", "tiny", "--max-new-tokens=100000000"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    assert process.poll() is None
    process.terminate()
    process.wait(timeout=60)
    process.stdout.close()


def test_sampling_loads_only_what_it_needs():
    code = (
        "import sys\nfrom quill.cli.app import main\nmain(['sample', 'tiny', 'x', '--unknown=skip'])\n"
        "sys.exit(' '.join({'rich', 'tiktoken', 'regex', 'pandas', 'torch._dynamo'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr.decode()


def test_f5_weights_that_are_not_finite_exit_6(tiny, tmp_path, capsys, monkeypatch):
    import torch

    from quill.checkpoint.load import load_checkpoint
    from quill.checkpoint.weights import save_weights
    from quill.registry.store import Registry

    registry = Registry(tmp_path / "weights")
    draft = registry.begin("nan")
    loaded = load_checkpoint(tiny)
    with torch.no_grad():
        next(iter(loaded.model.parameters())).fill_(float("nan"))
    for name in ("config.json", "tokenizer.json"):
        draft.write_bytes(name, tiny.read_file(name))
    draft.write_file("model.safetensors", lambda path: save_weights(path, loaded.model))
    draft.publish()
    monkeypatch.setenv("QUILL_REGISTRY", str(registry.root))
    assert main(["sample", "nan", "b"]) == 6
    out, err = capsys.readouterr()
    assert out == ""
    assert "NaN or infinity" in err
