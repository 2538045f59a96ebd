"""How commands end on INT, TERM and HUP: they clean up, and a run is saved first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from quill.errors import InterruptedRun
from quill.training import processes

if TYPE_CHECKING:
    from quill.training.events import Event

_SIGNALS = tuple(n for name in ("SIGINT", "SIGTERM", "SIGHUP") if (n := getattr(signal, name, None)))


class Interrupted(KeyboardInterrupt):
    """A signal arrived while there was nothing to save; it ends a command as Ctrl-C does."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """The first INT, TERM or HUP makes a run save and stop; the second ends the process at once.

    Before the first step there is nothing to save, and the first signal ends the process too. A signal that
    is already ignored, as HUP is under nohup, stays ignored.

    Args:
        follows: Whether another process leads the run: once they have met, that one decides when this ends.
    """

    def __init__(self, *, follows: bool = False) -> None:
        self._follows = follows
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self._stepping = False

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:
                # Only the main thread can handle signals.
                break
        return self

    def __exit__(self, *failure: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def notice(self, event: Event) -> None:
        """Follow a run's events: after its first step there is something to save."""
        from quill.training.events import Started

        self._stepping = self._stepping or isinstance(event, Started)

    def poll(self) -> None:
        """Raise InterruptedRun once a signal has arrived."""
        if self._received is not None:
            raise InterruptedRun("interrupted", signum=self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._follows and processes.have_met():
            return
        self._received = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if not self._stepping:
            raise Interrupted(number)


def end_in_order() -> None:
    """Let the first TERM or HUP end a command as Ctrl-C does, with cleanup; the second is final."""
    for number in _SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    for each in _SIGNALS:
        if signal.getsignal(each) == _raise:
            signal.signal(each, signal.SIG_DFL)
    raise Interrupted(number)
