"""The observer that passes a run's figures to loggers; in a thread, as some of them wait for a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from quill.errors import ResourceError
from quill.loggers import base
from quill.training.events import Evaluated, Event, Sampled, Stepped
from quill.training.log import is_logged

# Longer than an upload of the last figures takes, shorter than a person waits for a published run to end.
_LAST_SECONDS = 30.0

_Call = Callable[[base.Logger], None]


def check(names: Sequence[str]) -> None:
    """Raise InputError for a logger that does not exist or whose package is not installed."""
    for name in names:
        base.find(name)


class Loggers:
    """Observer that logs what metrics.jsonl has; a logger that fails is left out with a warning.

    Args:
        names: Of the loggers.
        run: What they are told of the run.
        log_interval: Steps between the figures of training.

    Attributes:
        where: Where their figures are found, by name.

    Raises:
        ResourceError: A logger cannot be opened.
    """

    def __init__(self, names: Sequence[str], run: base.LoggedRun, log_interval: int) -> None:
        self._interval, self._open = log_interval, [_Worker(name) for name in dict.fromkeys(names)]
        self.where: dict[str, str] = {}
        for worker in self._open:
            try:
                self.where[worker.name] = worker.start(run)
            except Exception as e:  # of any program, for any reason
                self.close()
                raise ResourceError(
                    f"cannot log to {worker.name}",
                    why=_reason(e),
                    hint=f"train without {worker.name} in log_to; it can be added when the run is resumed",
                ) from e

    def __call__(self, event: Event) -> list[str]:
        """Log one event; returns a warning for each logger that has failed since."""
        if call := self._translated(event):
            for worker in self._open:
                worker.put(call)
        return self._failed()

    def close(self) -> list[str]:
        """Wait until everything is logged; returns a warning for each logger that has failed."""
        warnings = self._failed()
        closed, self._open = self._open, []
        for worker in closed:
            worker.close()
        return warnings + [_warning(worker, worker.error) for worker in closed if worker.error is not None]

    def _translated(self, event: Event) -> _Call | None:
        step, values = getattr(event, "step", 0), {}
        match event:
            case Stepped() if is_logged(event, self._interval):
                values = {
                    "train/loss": event.loss,
                    "train/objective": event.objective,
                    "train/learning_rate": event.learning_rate,
                    "train/grad_norm": event.grad_norm,
                    "train/tokens_per_second": event.tokens_per_second,
                }
            case Evaluated():
                values = {
                    "val/loss": event.val_loss,
                    "val/raw_loss": event.raw_val_loss,
                    "val/averaged_loss": event.averaged_val_loss,
                }
            case Sampled():
                text = event.text
                return lambda logger: logger.text(step, "sample", text)
        numbers = {name: value for name, value in values.items() if value is not None}
        return (lambda logger: logger.numbers(step, numbers)) if numbers else None

    def _failed(self) -> list[str]:
        failed = [(worker, worker.error) for worker in self._open if worker.error is not None]
        for worker, _ in failed:
            self._open.remove(worker)
            worker.close()
        return [_warning(worker, error) for worker, error in failed]


class _Worker:
    """A logger in a thread of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: Exception | None = None
        self._logger: base.Logger | None = None
        self._thread: threading.Thread | None = None
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()

    def start(self, run: base.LoggedRun) -> str:
        """Open the logger; returns where its figures are."""
        self._logger = base.find(self.name)(run)
        # A daemon, which a hung connection cannot keep from ending with the process.
        self._thread = threading.Thread(target=self._work, args=[self._logger], name=self.name, daemon=True)
        self._thread.start()
        return self._logger.where

    def put(self, call: _Call) -> None:
        """Have something logged."""
        self._calls.put(call)

    def close(self) -> None:
        """End the thread, or give it up, and close the logger where it was opened."""
        if self._thread is None or self._logger is None:
            return
        self._calls.put(None)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            self.error = TimeoutError(f"no answer within {_LAST_SECONDS:.0f} seconds")
            return
        try:
            self._logger.close()
        except Exception as e:  # of any program, for any reason
            self.error = self.error or e

    def _work(self, logger: base.Logger) -> None:
        try:
            while (call := self._calls.get()) is not None:
                call(logger)
        except Exception as e:  # of any program, for any reason
            self.error = e


def _warning(worker: _Worker, error: Exception) -> str:
    return f"warning: logging to {worker.name} has ended: {_reason(error)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
