"""Settings and parameters in errors become flags; quoted text stays."""

from __future__ import annotations

import pytest

from quill import errors
from quill.cli import _flags, app

FLAGS = {
    "force": "--force",
    "new_version": "--new-version",
    "name": "--name",
    "resume": "--resume",
    "stream": "--stream",
    "format_name": "--format",
    "format": "--format",
}
# Those of a command that has every setting.
EVERY = FLAGS | {path: flag for path, (flag, _) in _flags._settings().items()}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("lower train.batch_size", "lower --batch-size"),
        ("set train.device=auto", "set --device auto"),
        ("train.device=cuda:1 needs CUDA", "--device cuda:1 needs CUDA"),
        ("train.learning_rate=3e-4, train.min_lr=0.5.", "--learning-rate 3e-4, --min-lr 0.5."),
        ("data.source=./notes.txt", "--data ./notes.txt"),
        ('data.source="two words.txt"', "--data 'two words.txt'"),
        ("train.init_from=hf:gpt2", "--from hf:gpt2"),
        ("model.vocab_size=100 or data.vocab_size=90", "--model-vocab-size 100 or --vocab-size 90"),
        ("model.bias=true, model.tie_embeddings=false", "--bias, --no-tie-embeddings"),
        ("train.eval_iters=none", "--eval-iters none"),
        ("raise sample.max_new_tokens", "raise --max-new-tokens"),
        ("force=True", "--force"),
        ("stream=False", "--no-stream"),
        ("new_version=True trains m:v2, name= another", "--new-version trains m:v2, --name NAME another"),
        ('resume="never"', "--resume never"),
        ("resume='must'", "--resume must"),
        ("name=my-model", "--name my-model"),
        ('format="gguf"', "--format gguf"),
        # What is not a setting or a parameter of this command stays.
        ("'train.batch_size' = 0 in x.json is refused", "'train.batch_size' = 0 in x.json is refused"),
        ("train.bin and model.safetensors", "train.bin and model.safetensors"),
        ("quill config init > train.json", "quill config init > train.json"),
        ("workers=2", "workers=2"),
        ("a=b and x==y", "a=b and x==y"),
        ("https://x.org/?name=a", "https://x.org/?name=a"),
        ("--name=a", "--name=a"),
    ],
)
def test_settings_and_parameters_become_flags(text, shown):
    assert _flags.spell(text, EVERY) == shown


def test_no_command_is_told_of_flags_that_it_does_not_have():
    settings = _flags._settings()
    text = ", ".join(f"{path}=7" for path in settings)
    for name, command in app._every_command().items():
        for part in getattr(command, "commands", {name: command}).values():
            own = {option for p in part.params for option in (*p.opts, *p.secondary_opts)}
            spelled = _flags.spell(text, _flags.of_command(part.params)).split(", ")
            for path, shown in zip(settings, spelled, strict=True):
                flag = settings[path][0]
                assert shown == (f"{flag} 7" if flag in own else f"{path}=7"), (name, part.name)
    assert _flags.spell("set train.batch_size=8", FLAGS) == "set train.batch_size=8"


def test_out_of_memory_is_explained_by_what_the_command_can_set(capsys, monkeypatch):
    def fail(arguments: list[str]) -> int:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(app, "_dispatch", fail)
    assert app.main(["train", "x.txt"]) == app.main(["sample", "m"]) == 7
    hints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  try: ")]
    assert hints == [
        "  try: set --micro-batch-size, to less than --batch-size",
        "  try: close other programs, or use a smaller model",
    ]


@pytest.mark.parametrize(
    ("hint", "typed", "shown"),
    [
        ("--force", "export m", "quill export m --force"),
        ("set --device auto", "train x.json --device cuda", "quill train x.json --device auto"),
        ("--device auto", "train --device=cuda --json", "quill train --json --device auto"),
        ("--batch-size 8", "train --batch_size 9 x.json", "quill train x.json --batch-size 8"),
        ("--no-stream", "sample m --stream 'a b'", "quill sample m 'a b' --no-stream"),
        ("--force", "rm -- -x", "quill rm --force -- -x"),
        ("--dtype float32, --force", "export m", "quill export m --dtype float32 --force"),
        ("--tokenizer 'a, b.txt'", "import m.pt", "quill import m.pt --tokenizer 'a, b.txt'"),
        ("lower --batch-size", "train", "lower --batch-size"),
        ("quill doctor", "train", "quill doctor"),
        ("--force", "sample m '" + "long " * 40 + "'", "--force"),
        ("--force", "", "--force"),
    ],
)
def test_a_hint_of_flags_is_the_command_as_typed_with_them(hint, typed, shown):
    import shlex

    assert _flags.complete(hint, "quill", shlex.split(typed)) == shown


def test_main_prints_errors_with_flags(monkeypatch, capsys):
    def dispatch(arguments: list[str]) -> int:
        raise errors.RefusedError(
            "'m' exists", why="train.device=cuda and new_version=False were given", hint="new_version=True"
        )

    monkeypatch.setattr(app, "_dispatch", dispatch)
    assert app.main(["train", "--config", "m.json"]) == 4
    assert capsys.readouterr().err.splitlines() == [
        "error: 'm' exists",
        "  why: --device cuda and --no-new-version were given",
        "  try: quill train --config m.json --new-version",
    ]
