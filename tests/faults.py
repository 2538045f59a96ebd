"""The faults that quill survives, row by row, and the report of which tests hold it to each.

A test that carries a row in its name, as `test_f07_...` or `test_f26_f27_...` do, counts for that row. At
the end of a whole run, or with --faults, every row is listed with what became of its tests; a row without
a test has its reason in ROWS. This file is a pytest plugin, loaded by conftest.py.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class Row(NamedTuple):
    """One fault.

    Attributes:
        what: What happens to quill.
        uncovered: Why no test carries the row's name; empty where one does.
        missing: What of the row its tests do not cover, and why; empty where that is nothing.
    """

    what: str
    uncovered: str = ""
    missing: str = ""


ROWS = {
    "F1": Row("weights empty, cut off, longer, zeros, a web page, a Git LFS pointer"),
    "F2": Row("a safetensors header that lies"),
    "F3": Row("one bit flipped in the weights"),
    "F4": Row("tensors or tokenizer of another model"),
    "F5": Row("weights that are not finite"),
    "F6": Row("settings NaN, 1e999, Infinity"),
    "F7": Row("settings of the wrong kind, or unknown"),
    "F8": Row("a key twice"),
    "F9": Row("a config that is no JSON object"),
    "F10": Row("a byte order mark, UTF-16"),
    "F11": Row("a model that no machine holds"),
    "F12": Row("a layout of a newer quill"),
    "F13": Row("names that are none"),
    "F14": Row("links in the registry that point outside"),
    "F15": Row("control sequences and markup in names, configs, metadata, model text"),
    "F16": Row("too little text"),
    "F17": Row("text that is not text, a folder, a FIFO, a missing file"),
    "F18": Row("text that changes while it is prepared"),
    "F19": Row("a megabyte of spaces, a megabyte without one"),
    "F20": Row("special tokens inside text"),
    "F21": Row("a vocabulary too small, or out of reach"),
    "F22": Row("characters without a token"),
    "F23": Row("a prompt that is empty, or longer than the context"),
    "F24": Row("sampling settings at and beyond their limits"),
    "F25": Row("a character split over tokens"),
    "F26": Row("a full disk, at the start and at any write"),
    "F27": Row("EIO on write, fsync, close"),
    "F28": Row("kill -9 at any operation"),
    "F29": Row("power loss, unsynced writes reordered"),
    "F30": Row("two trainings of one name"),
    "F31": Row("8 writers x 50 publishes, with readers"),
    "F32": Row("flock that does nothing"),
    "F33": Row("a process number again, another host's lock, a lock file deleted"),
    "F34": Row("INT, TERM, HUP at any time of a run"),
    "F35": Row("Ctrl-C twice; TERM, then KILL"),
    "F36": Row("nohup, setsid, closed standard streams"),
    "F37": Row("a pipe whose reader leaves"),
    "F38": Row("a clock that goes back, forward, or through DST"),
    "F39": Row("a loss or gradient that is not finite"),
    "F40": Row("out of memory"),
    "F41": Row("a registry that is read-only, missing, or a file"),
    "F42": Row("rm and mv during a training", missing="while serving: no test yet"),
    "F43": Row("resuming with other settings, data or tokenizer; a damaged newest state"),
    "F44": Row("a malicious .pt"),
    "F45": Row("a .pt that would take all memory"),
    "F46": Row("a GGUF that lies"),
    "F47": Row("a Hugging Face folder with code, holes, ways out"),
    "F48": Row("an export that is killed, or meets an existing file"),
    "F49": Row("unwritable HOME, C locale, cron's environment, 20 columns"),
    "F50": Row("no network"),
    "F51": Row("a dataset with damaged bytes"),
    "F52": Row("a dataset file that shrinks while it is read"),
    "F53": Row("a model.json that is missing or damaged"),
    "F54": Row("a power cut that takes the status of a run and leaves its resume states"),
    "F55": Row("a folder that is replaced, as by export --force, and a fault at any operation"),
    "F56": Row("a FIFO, a device, a folder or an endless file in a registry or a dataset"),
    "F57": Row("links in the place of a dataset and of its folders"),
    "F58": Row("a clock that jumps while gc looks for leftovers"),
    "F59": Row("a model that is renamed or removed while it is exported, copied or read"),
    "F60": Row("settings of a size that no machine holds, alone and together"),
    "F61": Row("lone surrogates and arguments of 70,000 characters"),
    "F62": Row("runs of blanks, signs or letters of any length, for bpe"),
    "F63": Row("a stored tokenizer with a hostile pattern"),
    "F64": Row("a registry or dataset in a lower layer of overlayfs, whose folders cannot be renamed"),
    "F65": Row("weights of one seed from processors of different instruction sets"),
    "F66": Row("a registry that a group of users shares, whatever their umask"),
    "F67": Row("10,000 models, metrics of a gigabyte, a manifest of 100 megabytes"),
    "F68": Row("command lines and artifacts of every kind that are fuzzed"),
    "F69": Row("a prompt of half a million characters, of which a model reads the end"),
    "F70": Row("a server that answers quill sample with anything"),
    "F71": Row("a resume state whose files are whole and whose content is not that of its run"),
    "H1": Row("a request that is no JSON, or holds NaN or lone surrogates"),
    "H2": Row("an oversized request"),
    "H3": Row("a wrong or missing key"),
    "H4": Row("a foreign Host or Origin"),
    "H5": Row("a full queue; loading; draining"),
    "H6": Row("a client that leaves"),
    "H7": Row("a slow reader, slow headers"),
    "H8": Row("a model that is unknown or corrupt"),
    "H9": Row("a way out of the static files"),
    "H10": Row("SIGTERM with streams open"),
    "H11": Row("a port in use"),
    "H12": Row("streaming to the end, errors in band"),
    "H13": Row("200 clients for minutes, an engine that dies"),
    "H14": Row("markup from a model or a name in a page"),
}

TESTS = Path(__file__).resolve().parent
_NAMED = re.compile(r"test((?:_[fh]\d+)+)(?:_|$)")


def rows_of(name: str) -> list[str]:
    """The rows that a test's name carries: ["F26", "F27"] for "test_f26_f27_no_room[publish]"."""
    found = _NAMED.match(name)
    return [part[0].upper() + str(int(part[1:])) for part in found[1].split("_")[1:]] if found else []


def written_tests() -> dict[str, list[str]]:
    """The tests that carry each row's name, as "file::function", read from the files without running them."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for row in rows_of(node.name):
                    found[row].append(f"{path.relative_to(TESTS)}::{node.name}")
    return found


class Injections:
    """How many faults were injected, by what was going on; printed after the tests.

    Attributes:
        counts: By action, how many faults of each kind.
        notes: Lines to print as they are.
    """

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.notes: list[str] = []

    def add(self, action: str, way: str, count: int) -> None:
        """Count faults.

        Args:
            action: What they were injected into, such as "publish".
            way: What they were, such as "exit".
            count: How many.
        """
        self.counts[action][way] += count

    def note(self, line: str) -> None:
        """Have a line printed after the tests."""
        self.notes.append(line)


_INJECTIONS = pytest.StashKey[Injections]()


@pytest.fixture(scope="session")
def injections(request: pytest.FixtureRequest) -> Injections:
    """Where tests count the faults that they inject."""
    return request.config.stash[_INJECTIONS]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --faults."""
    parser.addoption(
        "--faults", action="store_true", help="list every fault and the tests that carry its name"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count."""
    config.stash[_INJECTIONS] = Injections()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Print the table after a whole run, and whatever was injected after any."""
    lines = list(_injected(config.stash[_INJECTIONS]))
    if config.getoption("faults") or _is_whole(terminalreporter, config):
        lines = [*_table(terminalreporter), "", *lines]
    if lines:
        terminalreporter.section("faults")
        for line in lines:
            terminalreporter.line(line)


def _is_whole(reporter: pytest.TerminalReporter, config: pytest.Config) -> bool:
    """Whether every test was asked for."""
    asked = {Path(config.invocation_params.dir, a).resolve() for a in config.args}
    return bool(asked & {TESTS, TESTS.parent}) and not reporter.stats.get("deselected")


def _table(reporter: pytest.TerminalReporter) -> Iterator[str]:
    """A line for every row: how many tests carry its name, and what became of them."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in reporter.stats.get(outcome, []):
            for row in rows_of(str(report.nodeid).rpartition("::")[2].split("[")[0]):
                outcomes[row][outcome] += 1
    written = written_tests()
    bare = []
    for name, row in ROWS.items():
        if not written.get(name):
            bare.append(f"{name:<4} NOT COVERED: {row.uncovered or 'no reason is given'} ({row.what})")
            continue
        became = ", ".join(f"{n} {outcome}" for outcome, n in outcomes[name].items()) or "not run"
        rest = f"; NOT COVERED: {row.missing}" if row.missing else ""
        yield f"{name:<4} {became:<24} {row.what}{rest}"
    yield from bare


def _injected(injections: Injections) -> Iterator[str]:
    operations = {a: {w: n for w, n in c.items() if w != "power loss"} for a, c in injections.counts.items()}
    lost = sum(c["power loss"] for c in injections.counts.values())
    if injections.counts:
        total = sum(sum(c.values()) for c in operations.values())
        yield f"crash injection: {total:,} points, and {lost:,} disks as a power loss may leave them"
    for action, ways in injections.counts.items():
        yield f"  {action}: " + ", ".join(f"{way} {n:,}" for way, n in ways.items())
    yield from injections.notes
