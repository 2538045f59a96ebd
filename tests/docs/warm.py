"""A `quill` that starts at once: every call is a fork of one process that has imported what commands need.

The program on the path hands its arguments, folder, environment and streams to that process, and ends as the
fork does. `python warm.py ADDRESS` serves until it is killed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

_PRELOADED = (
    "torch",
    "torch._dynamo",
    "safetensors.torch",
    "quill.training.run",
    "quill.cli.app",
    "rich.table",
)
_CLIENT = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    call = json.dumps([sys.argv, os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [call.encode()], [0, 1, 2])
    sys.exit(server.recv(1)[0])
"""


@contextmanager
def program(folder: Path) -> Iterator[Path]:
    """Start the process, and put a program `quill` into a folder whose path is short."""
    address = str(folder / "warm")
    with subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            entry = folder / "quill"
            entry.write_text(_CLIENT.format(python=sys.executable, address=address))
            entry.chmod(0o755)
            yield entry
        finally:
            process.kill()


def _serve(address: str) -> None:
    for name in _PRELOADED:
        import_module(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(address)
        server.listen()
        os.write(1, b"ready\n")
        while True:
            client, _ = server.accept()
            # The waiting process is a grandchild, so that it leaves no zombie.
            if child := os.fork():
                os.waitpid(child, 0)
                client.close()
                continue
            if os.fork():
                os._exit(0)
            server.close()
            _answer(client)


def _answer(client: socket.socket) -> None:
    call, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        client.send(bytes([code % 256]))
        os._exit(0)
    client.close()
    arguments, folder, environment = json.loads(call)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False)
    from quill.cli.app import run

    run()


if __name__ == "__main__":
    _serve(sys.argv[1])
