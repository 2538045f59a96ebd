"""The threads of a CPU that other processes use too: how many compute, and how they wait for each other.

Both are settings of the whole process. What is chosen here lasts as long as the work and is then restored.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from threading import Event, Lock, Thread
from time import perf_counter, process_time
from types import TracebackType
from typing import Self, TypeVar

import torch

# Pieces of work between two trials: few after a change, which may have been a mistake, and more after each
# trial that confirms it.
_FIRST_WAIT, _LAST_WAIT = 8, 192
# Pieces that a trial takes. It ends after a few if all of them are slow, which is all that it costs then.
_TRIAL, _FEW = 8, 2
# The last pieces, which a trial is compared with.
_RECENT = 15
# Threads that spin while they wait use up to 0.92 of their cores on an idle computer, and half of two cores
# beside one busy process.
_IDLE_SHARE = 0.8
# torch lets each thread have at least so many elements.
_GRAIN = 1 << 15

_Clock = Callable[[], float]
_Change = Callable[[], object]
T = TypeVar("T")


class Pace:
    """Does like pieces of work in the faster of two ways, whichever that is at the moment.

    Trials of a few pieces decide. The ways must give the same results.

    Args:
        ways: Functions that change to a way of working, the first one to begin with; None if there is no
            choice.
        restore: Called by `close`.
        clock: Seconds.
        is_in_doubt: Whether a trial is worth its time; called a while after the last one.
    """

    def __init__(
        self,
        ways: tuple[_Change, _Change] | None = None,
        restore: _Change = lambda: None,
        clock: _Clock = perf_counter,
        is_in_doubt: Callable[[], bool] = lambda: True,
    ) -> None:
        self._restore, self._clock = restore, clock
        self._trials = None if ways is None else _trials(*ways, is_in_doubt)
        if self._trials is not None:
            next(self._trials)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the settings of the process."""
        self._restore()

    @contextmanager
    def piece(self) -> Iterator[None]:
        """The context in which a piece of the work is done."""
        started = self._clock()
        yield
        if self._trials is not None:
            self._trials.send(self._clock() - started)

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items of a loop whose body is a piece of the work."""
        for item in items:
            with self.piece():
                yield item


def best_number(clock: _Clock = perf_counter) -> Pace:
    """A pace with one thread or with all of them, for work whose results do not depend on their number.

    Args:
        clock: Seconds.
    """
    most = torch.get_num_threads()
    one, every = partial(torch.set_num_threads, 1), partial(torch.set_num_threads, most)
    return Pace((one, every), every, clock) if most > 1 else Pace()


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread for PyTorch's operations.

    The operations for a single token take microseconds: sharing them among threads gains little while the
    other cores are idle, and stalls decoding while they are busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def best_waiting(device: str, clock: _Clock = perf_counter) -> Pace:
    """A pace in which threads that wait for each other spin, or sleep so that other processes can compute.

    The number of threads stays the same, and with it every bit of the results. Only GNU OpenMP on Linux can
    be changed. Within another such pace, its choice is used.

    Args:
        device: The kind of device that computes; on others than "cpu" there is nothing to choose.
        clock: Seconds.
    """
    if device != "cpu" or not _counts_teams() or not _turn.acquire(blocking=False):
        return Pace()

    def restore() -> None:
        _let_sleep(False)
        _turn.release()

    ways = partial(_let_sleep, False), partial(_let_sleep, True)
    return Pace(ways, restore, clock, _Cores().are_shared)


def _trials(best: _Change, other: _Change, is_in_doubt: Callable[[], bool]) -> Generator[None, float, None]:
    """Choose the way of each piece; receives the seconds that the piece took."""
    best()
    wait, recent = _FIRST_WAIT, deque[float](maxlen=_RECENT)
    while True:
        for _ in range(wait):
            recent.append((yield))
        if not is_in_doubt():
            wait = _FIRST_WAIT
            continue
        usual = median(recent)
        other()
        # The first piece also pays for the change.
        yield
        tried: list[float] = []
        while len(tried) < _FEW or (len(tried) < _TRIAL and min(tried) < usual):
            tried.append((yield))
        if median(tried) < usual:
            best, other, wait = other, best, _FIRST_WAIT
            recent.clear()
        else:
            wait = min(2 * wait, _LAST_WAIT)
        best()


class _Cores:
    """How much of its cores this process gets while its threads spin."""

    def __init__(self) -> None:
        self._wall, self._used = perf_counter(), process_time()

    def are_shared(self) -> bool:
        """Whether other processes have had a part of them since the last call."""
        wall, used = self._wall, self._used
        self._wall, self._used = perf_counter(), process_time()
        most = torch.get_num_threads() * (self._wall - wall)
        return _idle_team is not None or self._used - used < _IDLE_SHARE * most


class _IdleTeam:
    """A second team of OpenMP threads, which does nothing.

    While GNU OpenMP counts more threads than processors, those that wait go to sleep at once.
    """

    def __init__(self) -> None:
        self._ready, self._done = Event(), Event()
        self._thread = Thread(target=self._run, name="quill-idle", daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self) -> None:
        torch.empty(_GRAIN * torch.get_num_threads(), dtype=torch.int8).fill_(0)
        self._ready.set()
        self._done.wait()

    def end(self) -> None:
        self._done.set()
        self._thread.join()


# The process has at most one, as it has one number of threads; who has the turn starts and ends it.
_idle_team: _IdleTeam | None = None
_turn = Lock()


def _let_sleep(asleep: bool) -> None:
    """Let waiting threads sleep, or spin."""
    global _idle_team
    if _idle_team is None and asleep:
        _idle_team = _IdleTeam()
    elif _idle_team is not None and not asleep:
        _idle_team.end()
        _idle_team = None


def _counts_teams() -> bool:
    """Whether a second team makes OpenMP count more threads than processors."""
    threads = torch.get_num_threads()
    return sys.platform == "linux" and threads > 1 and 2 * threads - 1 > len(os.sched_getaffinity(0))
