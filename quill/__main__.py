"""`python -m quill` is the `quill` command."""

from quill.cli.app import run

run()
