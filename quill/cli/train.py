"""Train a model and save it as a version."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Exit, Option

from quill import discovery
from quill.cli import _facts, options
from quill.cli._completion import completing, datasets, models
from quill.cli._datasets import PREFIX
from quill.cli._signals import Signals
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.cli.output import Output
from quill.cli.prepare import watch as watch_data
from quill.config.settings import SECTIONS
from quill.errors import InputError, QuillError, is_out_of_memory
from quill.training import processes
from quill.units import count, duration, size

if TYPE_CHECKING:
    from quill.config.settings import RunConfig
    from quill.evaluation.curves import Curves
    from quill.registry.folder import Folder
    from quill.registry.store import Registry
    from quill.training.events import Event
    from quill.training.plan import Plan

# What people use; the data and the config are arguments.
_FACE = (
    "name",
    "train.init_from",
    "model.n_layer",
    "model.n_embd",
    "model.block_size",
    "train.batch_size",
    "train.learning_rate",
    "train.max_iters",
    "max_minutes",
    "dry_run",
)
_RUN = "Run settings"
_LOGGERS = discovery.names("loggers")
_SAMPLE_TOKENS = 200
_PLAN = (
    Column("parameters", lambda p: f"{p['parameters']:,} ({count(p['parameters'])})"),
    Column(
        "data",
        lambda p: (
            f"{p['dataset']}, {p['train_tokens']:,} tokens for training, {p['val_tokens']:,} for validation"
        ),
    ),
    Column("tokens per step", lambda p: f"{p['tokens_per_step']:,}"),
    Column("epochs", lambda p: f"{p['epochs']:.1f}"),
    Column("memory", lambda p: f"{size(p['memory_bytes'])} of {size(p['memory_present'])}{_in_each(p)}"),
    Column("at once", lambda p: _facts.at_once(p, p["config"]["train"]) or "the whole batch"),
    Column("device", lambda p: f"{p['device']} {p['dtype']}{', compiled' if p['compiled'] else ''}"),
    Column("time per step", lambda p: _time_per_step(p)),
    Column("total time", lambda p: "not estimated" if p["divided"] else duration(p["seconds_total"])),
)


@options.command(
    SECTIONS,
    face=_FACE,
    examples="""
    quill train notes.txt
    quill train configs/shakespeare.json --max-minutes 30
    quill train shakespeare --name small --n-layer 2 --max-iters 500
    quill train more.txt --from shakespeare --name shakespeare-more
    """,
    topic="tutorial",
)
def command(
    session: Session,
    what: Annotated[
        str | None,
        Argument(
            metavar="SOURCE|CONFIG",
            help="Text or dataset to train on, or a config file (.json).",
            autocompletion=datasets,
        ),
    ] = None,
    config: Annotated[
        Path | None, Option("--config", "-c", metavar="FILE", help="Config file; flags override it.")
    ] = None,
    name: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="Name of the model (default: from the config or the data).",
            autocompletion=models(versions=False, aliases=False, drafts=True),
        ),
    ] = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        Option(
            metavar="auto|never|must",
            help="Resume an unfinished run of the same config.",
            rich_help_panel=_RUN,
            autocompletion=completing("auto", "never", "must"),
        ),
    ] = "auto",
    new_version: Annotated[
        bool,
        Option(
            "--new-version",
            help="Train another version of a model that is finished.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    max_minutes: Annotated[
        float | None,
        Option(
            metavar="NUMBER",
            help="Train for at most N minutes; the learning rate decays in that time.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    publish: Annotated[
        bool,
        Option(
            "--publish/--no-publish",
            help="At the time limit, publish the model, or save and pause until rerun.",
            rich_help_panel=_RUN,
        ),
    ] = True,
    wait: Annotated[
        float,
        Option(
            metavar="SECONDS",
            help="Wait for another run of the same name to end, instead of exiting.",
            rich_help_panel=_RUN,
        ),
    ] = 0.0,
    keep: Annotated[
        int | None,
        Option(
            metavar="N",
            help="When finished, remove all but the newest N versions without an alias.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    log_to: Annotated[
        list[str] | None,
        Option(
            metavar="|".join(_LOGGERS),
            help="Copy the run's figures and samples to another program; give several for any of them.",
            rich_help_panel=_RUN,
            autocompletion=completing(*_LOGGERS),
        ),
    ] = None,
    nproc: Annotated[
        int,
        Option(
            metavar="N",
            help="Number of processes on this computer that share each step's batch.",
            rich_help_panel=_RUN,
        ),
    ] = 1,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the settings, model size and estimated time; train nothing.")
    ] = False,
) -> None:
    """Train a model and save it as a version.

    Run the same command again to resume an interrupted run; a finished one is left as it is. Press Ctrl-C
    to save and stop. 'none' unsets an optional setting. Prints the model's reference.
    """
    run = read_config(session, config, name, what)
    if not 0 <= wait < 60 * 60 * 24 * 366:
        raise InputError(f"--wait {wait:g} is out of range", why="it takes seconds, from 0 to one year")
    if keep is not None and keep < 1:
        raise InputError(f"--keep {keep} is out of range", why="the version just trained is always kept")
    if nproc < 1:
        raise InputError(f"--nproc {nproc} is out of range", why="a run needs at least one process")
    registry, data_root = session.registry(), session.datasets()
    output = session.output
    if dry_run:
        from quill.training.plan import plan

        with watch_data(output) as on_data:
            planned = plan(run, registry, data_root, on_data, nproc)
        _print_plan(output, planned)
        return
    if nproc > 1 and not processes.is_launched():
        from quill.cli import _launch

        raise Exit(_launch.launch(nproc, sys.argv[1:]))
    with _watched(output, registry) as watchers:
        from quill.training.run import train

        outcome = train(
            run,
            registry,
            data_root,
            resume=resume,
            new_version=new_version,
            max_seconds=_seconds(max_minutes),
            publish=publish,
            wait=wait,
            keep=keep,
            log_to=log_to or (),
            **watchers,
        )
    if outcome.reason == "followed":
        return
    from quill.cli import _training_display

    result = {
        "event": "result",
        "reference": outcome.reference,
        "reason": outcome.reason,
        "manifest": outcome.version.manifest if outcome.version else None,
    }
    output.event(_training_display.SCHEMA, result)
    if output.form == "human" and output.live and outcome.version:
        _what_next(output, outcome.version, fresh=outcome.reason == "trained", device=run.train.device)
    if output.form != "json" and outcome.version:
        output.write(outcome.reference + "\n")


@contextmanager
def _watched(output: Output, registry: Registry) -> Iterator[dict[str, Any]]:
    """The display and the signal handlers of a run, as the arguments of `train` that take them."""
    if not processes.is_leader():
        with Signals(follows=True) as signals:
            yield {"poll": signals.poll}
        return
    from quill.cli import _training_display
    from quill.training.events import Stage

    def history(reference: str) -> Curves:
        from quill.evaluation import curves

        return curves.read(registry.find(reference, in_progress=True).metrics())

    with (
        Signals() as signals,
        ExitStack() as preparing,
        _training_display.watch(output, history) as observer,
    ):
        on_data = preparing.enter_context(watch_data(output))

        def observe(event: Event) -> None:
            # Preparing is over: its progress bar makes room for the run's.
            preparing.close()
            signals.notice(event)
            observer(event)

        observer(Stage("loading torch", 0.0))
        yield {"observer": observe, "on_data": on_data, "poll": signals.poll}


def read_config(session: Session, file: Path | None, name: str | None, what: str | None = None) -> RunConfig:
    """The run that the arguments describe, with a name.

    Args:
        session: With the settings that were given as flags.
        file: The config file.
        name: The model's name.
        what: A text, a dataset, or a config file.

    Raises:
        InputError: A setting is refused, or no name follows from the data.
    """
    from quill.config import reading
    from quill.registry.names import check_name

    overrides: dict[str, Any] = {**session.overrides, **({"name": name} if name is not None else {})}
    if what is not None and what.endswith(".json"):
        if file is not None:
            raise InputError(
                f"'{what}' and --config are mutually exclusive",
                why="both are config files",
                hint=f"quill train --config {shlex.quote(what)}",
            )
        file = Path(what)
    elif what is not None:
        if "data.source" in overrides:
            text = shlex.quote(str(overrides["data.source"]))
            raise InputError(
                f"'{what}' and --data are mutually exclusive",
                why="both name the text; --name names the model",
                hint=f"quill train {text} --name {shlex.quote(name or what)}",
            )
        overrides["data.source"] = what
    if isinstance(overrides.get("data.source"), str):
        overrides["data.source"] = overrides["data.source"].removeprefix(PREFIX)
    run = reading.load(file, overrides) if file else reading.parse({}, overrides, origin="the arguments")
    if run.name is None:
        run = run.model_copy(update={"name": reading.name_after(run.data.source)})
    check_name(str(run.name))
    return run


def _what_next(output: Output, version: Folder, *, fresh: bool, device: str) -> None:
    """After training on a terminal: a sample, where the model is, and what to run next."""
    if fresh and (text := _sample(version, device)):
        output.say(f"\na sample:\n\n{text}\n")
    output.say(f"saved in {version.path}")
    name = version.name
    output.say(f"next:  quill sample {name}\n       quill show {name} --metrics\n       quill export {name}")


def _sample(version: Folder, device: str) -> str:
    """A sample of a model; nothing if there is none, as of a model that does not fit on the device."""
    from quill.checkpoint.load import load_checkpoint
    from quill.config.settings import SampleConfig
    from quill.generation.generator import Generator
    from quill.training.device import find_device

    try:
        loaded = load_checkpoint(version, find_device(device))
        config = SampleConfig(max_new_tokens=_SAMPLE_TOKENS, seed=1)
        [text] = Generator(loaded.model, loaded.tokenizer).generate("", config, "error")
    except (QuillError, RuntimeError) as e:
        if isinstance(e, QuillError) or is_out_of_memory(e):
            return ""
        raise
    return text.strip()


def _seconds(minutes: float | None) -> float | None:
    if minutes is not None and not 0 < minutes < 60 * 24 * 366:
        raise InputError(
            f"--max-minutes {minutes:g} is out of range", why="it is above 0, and at most a year"
        )
    return None if minutes is None else 60 * minutes


def _print_plan(output: Output, plan: Plan) -> None:
    if output.form == "human":
        output.document(plan.config)
    row = asdict(plan)
    output.show("quill.plan/1", row, _PLAN, key="parameters", quiet=[str(plan.config.get("name", ""))])


def _in_each(plan: Any) -> str:
    if plan["processes"] == 1:
        return ""
    return f" in each of {plan['processes']} processes{', which divide the model' if plan['divided'] else ''}"


def _time_per_step(plan: Any) -> str:
    if plan["divided"]:
        return "not measured for a divided model"
    return f"{plan['seconds_per_step']:.3g} s, measured on {plan['measured_on']}"
