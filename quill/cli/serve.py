"""Serve models over HTTP."""

from __future__ import annotations

import sys
from typing import Annotated

from typer import Argument

from quill.cli import options
from quill.cli._completion import models
from quill.cli.options import Session
from quill.config.settings import ServeConfig

_FACE = (
    "host",
    "port",
    "api_key_file",
    "allow_host",
    "cors_origin",
    "max_models",
    "max_memory",
    "keep_alive",
    "device",
)
# The engine gives up Python's lock dozens of times for each token, and gets it back after at most so long.
_SWITCH_SECONDS = 0.0005


@options.command(
    {"": ServeConfig},
    face=_FACE,
    examples="""
    quill serve
    quill serve shakespeare --port 9000
    quill serve --host 0.0.0.0 --api-key-file keys.txt
    """,
    topic="serve",
)
def command(
    session: Session,
    references: Annotated[
        list[str] | None,
        Argument(
            metavar="REF",
            help="Models to serve, the first as the default (default: all models).",
            autocompletion=models(),
        ),
    ] = None,
    device: options.Device = None,
) -> None:
    """Serve models over HTTP, with a playground and OpenAI's API for completions.

    Prints the address once connections are accepted, and runs until it is interrupted.
    """
    from quill.config import reading
    from quill.serving.extra import require_extra

    config = reading.check(ServeConfig, dict(session.overrides), origin="the arguments")
    require_extra()
    output, registry = session.output, session.registry()

    from quill.serving.server import serve

    sys.setswitchinterval(_SWITCH_SECONDS)

    def announce(address: str) -> None:
        output.show("quill.serve/1", {"address": address}, key="address")

    serve(config, registry, references or [], session.device(device), announce)
