"""Verify the files of models and datasets against their manifests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument

from quill.cli import options
from quill.cli._completion import models
from quill.cli._datasets import PREFIX
from quill.cli._tables import Column, Style
from quill.cli.options import Session
from quill.errors import CorruptError
from quill.units import plural, size

if TYPE_CHECKING:
    from quill.checkpoint.verify import Result
    from quill.data.verify import Result as DatasetResult


@options.command(
    examples="""
    quill verify
    quill verify shakespeare:v2 -v
    quill verify data:shakespeare
    """,
    topic="registry",
)
def command(
    session: Session,
    references: Annotated[
        list[str] | None,
        Argument(
            metavar="REF",
            help="Versions, names for all of their versions, or data:name (default: everything).",
            autocompletion=models(drafts=True, datasets=True),
        ),
    ] = None,
) -> None:
    """Verify every file of the registry and of the datasets against its manifest.

    Checks sizes and sha256; that config, tokenizer and weights can be read and fit together; that all
    weights are finite, and all ids of a dataset in its vocabulary. Unfinished runs are checked too. -v
    prints a line for each file. Exits with code 5 if anything is damaged.
    """
    from quill.checkpoint.verify import count_bytes, find_targets, verify_target
    from quill.data import verify as verify_data

    output = session.output
    references = references or []
    names = [r.removeprefix(PREFIX) for r in references if r.startswith(PREFIX)]
    models = [r for r in references if not r.startswith(PREFIX)]
    targets = find_targets(session.registry(), models) if models or not references else []
    datasets = verify_data.find(session.datasets(), names) if names or not references else []
    total = sum(map(count_bytes, targets)) + sum(map(verify_data.count_bytes, datasets))
    done = 0
    found: list[Result | verify_data.Result] = []
    with output.progress(size) as report:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            report("verifying", done, total or None)

        for target in targets:
            result = verify_target(target, on_bytes)
            # The aliases of a model are listed only if they are damaged.
            if result is not None and (result.kind != "model" or result.errors):
                found.append(result)
        found += [verify_data.verify(path, on_bytes) for path in datasets]
    wrong = [v for v in found if v.errors]
    rows = [_row(v) for v in found]
    if output.verbose and output.form == "human":
        files = [{"reference": r["reference"], **f} for r in rows for f in r["files"]]
        alone = [{**r, "file": "", "bytes": None} for r in rows if r.get("why")]
        output.show("quill.verify/1", files + alone, _FILES, key="reference")
    else:
        output.show(
            "quill.verify/1",
            rows,
            _VERSIONS,
            key="reference",
            within="verified",
            quiet=[v.reference for v in wrong],
            damaged=sum(v.state == "damaged" for v in found),
        )
    if not found:
        output.say("nothing to verify")
    elif not wrong:
        output.say(f"no damage found: {size(done)} in {plural(sum(len(v.files) for v in found), 'file')}")
    else:
        output.say(f"{len(wrong)} of {len(found)} are damaged or unreadable")
        for hint in dict.fromkeys(e.hint for v in wrong for e in v.errors if e.hint):
            output.say(f"  try: {hint}")
        codes = {e.exit_code for v in wrong for e in v.errors}
        raise typer.Exit(CorruptError.exit_code if CorruptError.exit_code in codes else max(codes))


def _row(result: Result | DatasetResult) -> dict[str, Any]:
    def fault(error: Any) -> dict[str, str]:
        return {"error": str(error), "why": str(error.why or error.what)} if error else {}

    return {
        "reference": result.reference,
        "kind": result.kind,
        "state": result.state,
        **fault(result.error),
        "files": [
            {"file": f.name, "bytes": f.bytes, "state": f.state, **fault(f.error)} for f in result.files
        ],
    }


def _of_file(file: Any) -> str:
    return f"{file['state']}: {file['why']}" if file.get("why") else str(file["state"])


def _of_version(row: Any) -> str:
    """The state of a version in a line: what is wrong with it, or which files do not belong to it."""
    wrong = [f"{f['file']}: {f['why']}" for f in row["files"] if f.get("why")]
    if row.get("why") or wrong:
        return f"{row['state']}: {row.get('why') or '; '.join(wrong)}"
    unlisted = [f["file"] for f in row["files"] if f["state"] == "unlisted"]
    return f"ok, unlisted files: {', '.join(unlisted)}" if unlisted else "ok"


def _style(row: Any) -> Style:
    return "good" if row["state"] == "ok" else "warn" if row["state"] == "unlisted" else "bad"


_VERSIONS = (
    Column("NAME", lambda r: r["reference"]),
    Column("FILES", lambda r: str(len(r["files"])), right=True, drop=2),
    Column("SIZE", lambda r: size(sum(f["bytes"] or 0 for f in r["files"])), right=True, drop=1),
    Column("STATE", _of_version, style=_style),
)
_FILES = (
    Column("NAME", lambda r: r["reference"]),
    Column("FILE", lambda r: r["file"]),
    Column("SIZE", lambda r: size(r["bytes"]), right=True, drop=1),
    Column("STATE", _of_file, style=_style),
)
