"""Print a script that completes quill's commands in your shell."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from typer import Argument

from quill.cli import _completion, options
from quill.cli._completion import SHELLS, completing
from quill.cli.options import Session

# Where each shell finds completion scripts.
_ALWAYS = {
    "bash": "quill completion bash > ~/.local/share/bash-completion/completions/quill",
    "zsh": "quill completion zsh > ~/.zfunc/_quill  (with fpath+=~/.zfunc before compinit in ~/.zshrc)",
    "fish": "quill completion fish > ~/.config/fish/completions/quill.fish",
    "powershell": "quill completion powershell >> $PROFILE",
}
_NOW = {
    "bash": 'eval "$(quill completion bash)"',
    "zsh": 'eval "$(quill completion zsh)"',
    "fish": "quill completion fish | source",
    "powershell": "quill completion powershell | Out-String | Invoke-Expression",
}


@options.command(examples='eval "$(quill completion bash)"')
def command(
    session: Session,
    shell: Annotated[
        Literal["bash", "zsh", "fish", "powershell"],
        Argument(
            metavar="|".join(SHELLS),
            help="Shell to generate the script for.",
            autocompletion=completing(*SHELLS),
        ),
    ],
) -> None:
    """Print a script that completes quill's commands in your shell.

    Commands, flags, models, versions and aliases are completed.
    """
    from quill.cli import app

    text = _completion.script(shell, typer.main.get_command(app.build([], completion=True)))
    row = {"shell": shell, "script": text}
    if session.output.form == "json":
        session.output.show("quill.completion/1", row, key="script")
    else:
        session.output.stream(text)
    if session.output.terminal:
        session.output.say(f"for this shell:   {_NOW[shell]}\nfor every shell:  {_ALWAYS[shell]}")
