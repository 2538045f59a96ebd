"""Measure how fast a model trains, samples and evaluates here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from quill import shipped
from quill.cli import _facts, options
from quill.cli._completion import models
from quill.cli._tables import Column
from quill.cli.options import Session
from quill.errors import InputError, NotFoundError
from quill.units import count, plural

if TYPE_CHECKING:
    from quill.cli.output import Output
    from quill.config.settings import RunConfig
    from quill.registry.folder import Folder

_SCHEMA = "quill.bench/1"
_DEFAULT = "quickstart"
_MOST_ROUNDS, _MOST_SECONDS = 1000, 3600


def _rate(value: float, unit: str) -> str:
    """A rate with a prefix: "95.3 GFLOP/s"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def _limit(name: str, title: str) -> Column:
    def text(report: Any) -> str:
        [limit] = [limit for limit in report["limits"] if limit["name"] == name]
        return _rate(limit["median"], {"bytes/s": "B/s"}.get(limit["unit"], limit["unit"]))

    return Column(title, text)


def _step(report: Any) -> str:
    step = report["step"]
    rows, timed = step["batch_size"] * step["gradient_accumulation_steps"], step["timed_sequences"]
    of = f"{timed:,} of {rows:,}" if timed != rows else f"{rows:,}"
    return f"{of} sequences of {report['model']['block_size']:,} tokens, {step['optimizer']}"


def _device(report: Any) -> str:
    device = report["device"]
    threads = f", {plural(device['threads'], 'thread')}" if device["name"] == "cpu" else ""
    return f"{device['name']}, {device['hardware']}{threads}"


def _other(report: Any) -> str:
    other = report["against"]
    if not other:
        return ""
    at = f" at {other['commit'][:10]}" if other["commit"] else ""
    return f"{other['program']}{at}, {count(other['parameters'])} parameters, {other['optimizer']}"


_REPORT = (
    Column("model", lambda r: f"{r['name']}, {count(r['parameters'])} parameters"),
    Column("shape", lambda r: _facts.shape(r["model"])),
    Column("step", _step),
    Column("against", _other),
    Column("device", _device),
    Column("versions", lambda r: _facts.pairs(r["versions"])),
    _limit("float32", "float32 products"),
    _limit("bfloat16", "bfloat16 products"),
    _limit("memory", "memory bandwidth"),
)


def _share(name: str) -> Column:
    def text(row: Any) -> str:
        return "" if row[name] is None else f"{row[name]:.1%}"

    return Column(name.upper(), text, right=True, optional=True)


_PROGRAM = Column("PROGRAM", lambda r: r["program"])
_FIGURES = (
    Column("WORK", lambda r: r["work"]),
    _PROGRAM,
    Column("TOKENS/S", lambda r: f"{r['median']:,.0f}", right=True),
    Column("LOWEST", lambda r: f"{min(r['rounds']):,.0f}", right=True, drop=2),
    Column("HIGHEST", lambda r: f"{max(r['rounds']):,.0f}", right=True, drop=2),
    _share("mfu"),
    _share("mbu"),
    Column("DTYPE", lambda r: r["dtype"], drop=1),
    Column("RATIO", lambda r: "" if r["ratio"] is None else f"{r['ratio']:.2f}", right=True, optional=True),
)


@options.command(
    examples="""
    quill bench
    quill bench configs/shakespeare-cpu.json --rounds 3
    quill bench shakespeare --json
    quill bench configs/shakespeare-cpu.json --against ../nanoGPT
    """,
    topic="bench",
)
def command(
    session: Session,
    what: Annotated[
        str | None,
        Argument(
            metavar="CONFIG|REF",
            help="Config file or name, or model, to measure (default: quickstart).",
            autocompletion=models(),
        ),
    ] = None,
    against: Annotated[
        Path | None,
        Option(metavar="DIR", help="Measure a checkout of nanoGPT as well; its programs are run."),
    ] = None,
    rounds: Annotated[int, Option(metavar="N", help="Measure everything N times.")] = 5,
    seconds: Annotated[
        float, Option(metavar="NUMBER", help="Seconds for each kind of work in each round.")
    ] = 1.0,
    device: options.Device = None,
) -> None:
    """Measure how fast a model trains, samples and evaluates here, next to what the device can do.

    Speeds are in tokens per second, the medians of all rounds. MFU is the share of the measured speed of
    matrix products, MBU that of the measured memory bandwidth, that the model's own arithmetic takes. All is
    measured on the text that comes with quill; nothing is kept.
    """
    if not 1 <= rounds <= _MOST_ROUNDS:
        raise InputError(f"--rounds {rounds} is out of range", why=f"it is from 1 to {_MOST_ROUNDS:,}")
    if not 0 < seconds <= _MOST_SECONDS:
        raise InputError(
            f"--seconds {seconds:g} is out of range", why=f"it is above 0, and at most {_MOST_SECONDS:,}"
        )
    config, version = find(session, what)
    config = _placed(session, config, device, trained=version is not None)
    from quill.benchmark.bench import bench

    output = session.output
    with output.progress(lambda n: f"round {n:.0f}") as report:
        found = asdict(bench(config, version, against=against, rounds=rounds, seconds=seconds, report=report))
    show(output, {**found.pop("facts"), **found})


def show(output: Output, document: dict[str, Any]) -> None:
    """Print what was measured."""
    if output.form != "quiet":
        output.show(_SCHEMA, document, _REPORT, key="name")
    if output.form == "human":
        output.write("\n")
    if output.form != "json":
        figures = document["figures"]
        speeds = [f"{row['program']} {row['work']}: {row['median']:.0f}" for row in figures]
        columns = [c for c in _FIGURES if document["against"] or c is not _PROGRAM]
        output.show(_SCHEMA, figures, columns, key="work", quiet=speeds)


def find(session: Session, what: str | None) -> tuple[RunConfig, Folder | None]:
    """The config that is meant, and the model if it is one's.

    Raises:
        NotFoundError: There is neither.
    """
    from quill.checkpoint.load import read_config
    from quill.config import reading

    if what is not None and what.endswith(".json"):
        return reading.load(Path(what)), None
    missing = None
    if what is not None:
        try:
            version = session.registry().find(what)
            return read_config(version).model_copy(update={"name": version.reference}), version
        except NotFoundError as e:
            missing = e
    file = shipped.configs().get(what or _DEFAULT)
    if file is None:
        raise missing or NotFoundError(
            f"no config '{_DEFAULT}'", why="the configs of quill are not installed", hint="name a config file"
        )
    return reading.load(file), None


def _placed(session: Session, config: RunConfig, device: str | None, *, trained: bool) -> RunConfig:
    """The config on the device that is asked for: a flag's, a config's own, or the fastest."""
    from quill.config import reading

    if device is None and not trained:
        return config
    train = config.train.model_copy(update={"device": reading.device(device)})
    return config.model_copy(update={"train": train})
