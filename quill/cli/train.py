"""Train a model and keep it by name."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option

from quill import strictjson
from quill.cli import options
from quill.cli._signals import Signals
from quill.cli.options import Session
from quill.cli.output import Output, safe
from quill.cli.prepare import watch as watch_data
from quill.config.settings import SECTIONS
from quill.errors import InputError
from quill.units import count, duration, size

if TYPE_CHECKING:
    from quill.config.settings import RunConfig
    from quill.training.events import Event
    from quill.training.plan import Plan


@options.command(SECTIONS)
def command(
    session: Session,
    config: Annotated[
        Path | None, Option("--config", "-c", metavar="FILE", help="A config file; flags win over it.")
    ] = None,
    name: Annotated[
        str | None, Option(metavar="NAME", help="The model's name; unset: the config's, or the data's.")
    ] = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        Option(metavar="auto|never|must", help="Whether to go on with an unfinished run of the same config."),
    ] = "auto",
    new_version: Annotated[
        bool, Option("--new-version", help="Train again under a name that has a finished model.")
    ] = False,
    max_minutes: Annotated[
        float | None,
        Option(metavar="NUMBER", help="Save and stop after so long, with nothing printed; repeat to go on."),
    ] = None,
    wait: Annotated[
        float, Option(metavar="SEC", help="Seconds to wait for another run of this name; else exit 75.")
    ] = 0.0,
    keep: Annotated[
        int | None,
        Option(metavar="N", help="Afterwards remove all but the newest N versions; aliased ones stay."),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the settings, the size, and the time it would take.")
    ] = False,
) -> None:
    """Train a model and keep it by name; the same command again resumes it, or finds it done.

    Every setting of a config file is a flag too; 'none' unsets an optional one. Without a file, all others
    are at their defaults. Prints the model's reference.
    """
    run = read_config(session, config, name)
    if not 0 <= wait < 60 * 60 * 24 * 366:
        raise InputError(f"--wait {wait:g} is refused", why="it is seconds, from 0 to a year")
    if keep is not None and keep < 1:
        raise InputError(f"--keep {keep} is refused", why="at least the version just trained stays")
    registry, data_root = session.registry(), session.datasets()
    if dry_run:
        from quill.training.plan import plan

        with watch_data(session.output) as on_data:
            planned = plan(run, registry, data_root, on_data)
        _print_plan(session.output, planned)
        return
    output = session.output
    with Signals() as signals:
        from quill.cli import _training_display
        from quill.training.run import train

        with ExitStack() as preparing, _training_display.watch(output) as observer:
            on_data = preparing.enter_context(watch_data(output))

            def observe(event: Event) -> None:
                # The bar of preparing makes way for the run's own display.
                preparing.close()
                signals.notice(event)
                observer(event)

            outcome = train(
                run,
                registry,
                data_root,
                resume=resume,
                new_version=new_version,
                max_seconds=_seconds(max_minutes),
                wait=wait,
                keep=keep,
                observer=observe,
                on_data=on_data,
                poll=signals.poll,
            )
    manifest = outcome.version.manifest if outcome.version else None
    output.event(
        _training_display.SCHEMA,
        {
            "event": "result",
            "reference": outcome.reference,
            "reason": outcome.reason,
            "manifest": manifest,
        },
    )
    if output.form != "json" and outcome.version:
        output.write(outcome.reference + "\n")


def read_config(session: Session, file: Path | None, name: str | None) -> RunConfig:
    """The run that flags and file ask for, with a name.

    Raises:
        InputError: A setting is refused, or no name follows from the data.
    """
    from quill.config import reading
    from quill.registry.names import check_name

    overrides = {**session.overrides, **({"name": name} if name is not None else {})}
    if file is not None:
        run = reading.load(file, overrides)
    else:
        run = reading.parse({}, overrides, origin="the arguments")
    if run.name is None:
        source = run.data.source
        if not isinstance(source, str) or "/" in source or "." in source or source == "-":
            raise InputError(
                "the model has no name",
                why="it follows from the config file's, or from the data's where that has one",
                hint="--name my-model",
            )
        run = run.model_copy(update={"name": source})
    check_name(str(run.name))
    return run


def _seconds(minutes: float | None) -> float | None:
    if minutes is not None and not 0 < minutes < 60 * 24 * 366:
        raise InputError(f"--max-minutes {minutes:g} is refused", why="it is above 0, and at most a year")
    return None if minutes is None else 60 * minutes


def _print_plan(output: Output, plan: Plan) -> None:
    data = f"{plan.dataset}, {plan.train_tokens:,} tokens to train on and {plan.val_tokens:,} to validate"
    short = ": a smaller --batch-size is needed" if plan.memory_bytes > plan.memory_present else ""
    facts = output.fields(
        [
            ("parameters", f"{plan.parameters:,} ({count(plan.parameters)})"),
            ("data", data),
            ("tokens per step", f"{plan.tokens_per_step:,}"),
            ("epochs", f"{plan.epochs:.1f}"),
            ("memory", f"{size(plan.memory_bytes)} of {size(plan.memory_present)}{short}"),
            ("device", f"{plan.device} {plan.dtype}{', compiled' if plan.compiled else ''}"),
            ("time per step", f"{plan.seconds_per_step:.3g} s, timed on {plan.measured_on}"),
            ("time in all", duration(plan.seconds_total)),
        ]
    )
    config = safe(strictjson.dumps(plan.config))
    output.emit("quill.plan/1", asdict(plan), human=config + facts, quiet=str(plan.config.get("name", "")))
