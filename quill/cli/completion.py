"""Print a script that makes a shell complete quill."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Argument

from quill.cli import _completion, options
from quill.cli.options import Session

# Where each shell looks by itself.
_HOW = {
    "bash": "quill completion bash > ~/.local/share/bash-completion/completions/quill",
    "zsh": "quill completion zsh > ~/.zfunc/_quill, where ~/.zshrc has fpath+=~/.zfunc before compinit",
    "fish": "quill completion fish > ~/.config/fish/completions/quill.fish",
}
_NOW = {
    "bash": 'eval "$(quill completion bash)"',
    "zsh": 'eval "$(quill completion zsh)"',
    "fish": "quill completion fish | source",
}


@options.command()
def command(
    session: Session,
    shell: Annotated[Literal["bash", "zsh", "fish"], Argument(metavar="bash|zsh|fish", help="Whose.")],
) -> None:
    """Print what makes a shell complete quill's commands, flags and models.

    For this shell alone: eval "$(quill completion bash)". A model's versions are completed after its name
    and a colon.
    """
    text = _completion.script(shell)
    session.output.emit(
        "quill.completion/1", {"shell": shell, "script": text}, human=text, quiet=text.splitlines()
    )
    if session.output.terminal:
        session.output.say(f"for this shell: {_NOW[shell]}\nfor every one: {_HOW[shell]}")
