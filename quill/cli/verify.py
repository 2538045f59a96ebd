"""Check every file of the registry, byte by byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument

from quill.cli import options
from quill.cli.options import Session
from quill.errors import CorruptError
from quill.units import size

if TYPE_CHECKING:
    from quill.checkpoint.verify import File, Verdict


@options.command()
def command(
    session: Session,
    references: Annotated[
        list[str] | None,
        Argument(metavar="REF", help="A name for all of its versions, or name:v2; unset: everything."),
    ] = None,
) -> None:
    """Check every file of the registry, byte by byte: that it is what was published.

    Sizes and sha256 of all files, that config, tokenizer and weights can be read and belong together, that
    every weight is a finite number; the same of what an unfinished run would go on from. Nothing is held in
    memory whole. With -v a line for each file. Exit code 5 if anything is damaged.
    """
    from quill.checkpoint import verify as verification

    output, registry = session.output, session.registry()
    subjects = verification.subjects(registry, references or ())
    total = sum(verification.size(s) for s in subjects)
    done = 0
    found: list[Verdict] = []
    with output.progress(size) as report:

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            report("verifying", done, total or None)

        for subject in subjects:
            verdict = verification.check(subject, on_bytes)
            # What the aliases of a name are is worth a line only where something is wrong with them.
            if verdict is not None and (verdict.kind != "model" or verdict.errors):
                found.append(verdict)
    wrong = [v for v in found if v.errors]
    output.emit(
        "quill.verify/1",
        {"damaged": sum(v.state == "damaged" for v in found), "verified": [_document(v) for v in found]},
        human=_table(session, found) if found else "",
        quiet=[v.reference for v in wrong],
    )
    if not found:
        output.say("nothing to verify yet")
    elif not wrong:
        output.say(f"all of it is as it was published: {size(done) or '0 B'} in {_count(found)} files")
    else:
        output.say(f"{len(wrong)} of {len(found)} are not as they were published")
        for hint in dict.fromkeys(e.hint for v in wrong for e in v.errors if e.hint):
            output.say(f"  try: {hint}")
        codes = {e.exit_code for v in wrong for e in v.errors}
        raise typer.Exit(CorruptError.exit_code if CorruptError.exit_code in codes else max(codes))


def _count(found: list[Verdict]) -> int:
    return sum(len(v.files) for v in found)


def _document(verdict: Verdict) -> dict[str, Any]:
    return {
        "reference": verdict.reference,
        "kind": verdict.kind,
        "state": verdict.state,
        **({"error": str(verdict.error)} if verdict.error else {}),
        "files": [
            {
                "file": f.name,
                "bytes": f.bytes,
                "state": f.state,
                **({"error": str(f.error)} if f.error else {}),
            }
            for f in verdict.files
        ],
    }


def _table(session: Session, found: list[Verdict]) -> str:
    if session.output.verbose:
        rows = [[v.reference, f.name, size(f.bytes), _said(f)] for v in found for f in v.files]
        rows += [[v.reference, "", "", _of(v)] for v in found if v.error]
        return session.output.table(["NAME", "FILE", "SIZE", "STATE"], rows, right=("SIZE",))
    rows = [[v.reference, f"{len(v.files)}", size(sum(f.bytes or 0 for f in v.files)), _of(v)] for v in found]
    return session.output.table(["NAME", "FILES", "SIZE", "STATE"], rows, right=("FILES", "SIZE"))


def _said(file: File) -> str:
    why = (file.error.why or file.error.what) if file.error else ""
    return f"{file.state}: {why}" if why else file.state


def _of(verdict: Verdict) -> str:
    """A version's state in a line: what is wrong with it, or what lies in it that nobody reads."""
    if verdict.error:
        return f"{verdict.state}: {verdict.error.why or verdict.error.what}"
    wrong = [f"{f.name}: {f.error.why or f.error.what}" for f in verdict.files if f.error]
    if wrong:
        return f"{verdict.state}: {'; '.join(wrong)}"
    extra = [f.name for f in verdict.files if not f.listed]
    return f"ok, not of it: {', '.join(extra)}" if extra else "ok"
