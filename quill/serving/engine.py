"""The thread that owns torch: it loads models and generates for all of them.

The event loop never calls torch. It hands jobs over through a queue and gets what is new once per turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from quill.config.settings import ServeConfig
from quill.registry.folder import Folder
from quill.serving.errors import ApiError
from quill.serving.jobs import Call, Job, Piece
from quill.serving.residents import Resident, Residents

_log = logging.getLogger(__name__)
T = TypeVar("T")

# A thread that gave no sign of life for so many seconds is not ready; loading a model may take longer.
_SILENT_FOR = 5.0
_IDLE = 0.5


class Engine:
    """Runs jobs on a thread of its own.

    Args:
        config: The limits.
        device: The device to compute on.
        on_load: Called on the engine's thread with each model that was loaded or failed to load.

    Attributes:
        failure: The bug that ended the thread.
        on_failure: Called on the loop with it.
    """

    def __init__(
        self, config: ServeConfig, device: str, on_load: Callable[[Resident], None] = lambda resident: None
    ) -> None:
        self.config, self._on_load = config, on_load
        self.residents = Residents(config, device, self._collect)
        self._inbox: deque[tuple[Resident, Job]] = deque()
        self._outbox: list[tuple[Job, list[Piece], Exception | None]] = []
        self._jobs: set[Job] = set()
        # Those that wait, and the one in progress.
        self._calls: deque[Call[Any]] = deque()
        self._queued = 0
        self._wake = threading.Event()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] = lambda failure: None
        self._stopping = False
        self._loading = False
        self._beat = time.monotonic()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="quill-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; called on the loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Ask the thread to end after its current step, and wait for it."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def trouble(self) -> str:
        """Why the engine cannot work; empty if it can."""
        if not self._thread.is_alive():
            return "the engine is not running"
        if not self._loading and time.monotonic() - self._beat > _SILENT_FOR:
            return "the engine does not respond"
        return ""

    @property
    def queued(self) -> int:
        """Requests that wait for a slot or for their model."""
        return self._queued + len(self._calls) + sum(not job.started for job in self._jobs)

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return self._queued + len(self._calls) + len(self._jobs)

    async def acquire(self, version: Folder) -> Resident:
        """Take a lease on a model, and wait until it is loaded.

        Raises:
            ApiError: The queue is full, or the model is loading for longer than requests wait.
            QuillError: It cannot be loaded.
        """
        if self.queued >= self.config.max_queue + self._free_slots():
            raise ApiError(
                429, "the server is busy", "queue_full", headers={"retry-after": str(self.retry_after())}
            )
        resident = self.residents.lease(version)
        self._queued += 1
        try:
            if not resident.settled.is_set():
                self._wake.set()
                await asyncio.wait_for(resident.settled.wait(), self.config.load_wait)
            if resident.error is not None:
                raise resident.error
        except TimeoutError:
            self.residents.release(resident)
            message = f"{version.reference} is loading"
            raise ApiError(503, message, "loading", headers={"retry-after": "5"}) from None
        except BaseException:
            self.residents.release(resident)
            raise
        finally:
            self._queued -= 1
        return resident

    def submit(self, resident: Resident, job: Job) -> None:
        """Hand over a job; called on the loop.

        Raises:
            ApiError: The engine is not running.
        """
        self._require()
        self._jobs.add(job)
        self._inbox.append((resident, job))
        self._wake.set()

    def call(self, work: Callable[[], T]) -> Call[T]:
        """Have something done between two tokens of the samples; called on the loop, under a lease.

        Raises:
            ApiError: The engine is not running.
        """
        self._require()
        call = Call(work)
        self._calls.append(call)
        self._wake.set()
        return call

    def finish(self, resident: Resident, job: Job) -> None:
        """Return the lease of a job that ended or was cancelled; called on the loop."""
        if job.open:
            job.cancel("finished")
        self._jobs.discard(job)
        self.residents.release(resident)
        self._wake.set()

    def cancel_all(self, why: str) -> None:
        """Cancel every job; called on the loop."""
        for job in self._jobs:
            job.cancel(why)
        for call in self._calls:
            call.cancel(why)
        self._wake.set()

    def retry_after(self) -> int:
        """Seconds after which a request may find room."""
        return max(1, min(30, self.queued // max(1, self.config.slots)))

    def _free_slots(self) -> int:
        """Slots that no request has taken, so that requests start even where none may wait."""
        started = sum(job.started for job in self._jobs)
        return max(0, self.config.slots - started)

    def _require(self) -> None:
        if trouble := self.trouble:
            raise ApiError(503, trouble, "engine_down", headers={"retry-after": "5"})

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._beat = time.monotonic()
                if not self._turn():
                    self._wake.wait(_IDLE)
                    self._wake.clear()
        except BaseException as e:
            self.failure = e
            _log.exception("the engine ended")
        self._stopping = True
        error = ApiError(503, "the server is stopping", "server_shutdown")
        if self.failure is not None:
            error = ApiError(500, "the engine ended", "engine_down")
        for job in [*(j for _, j in self._inbox), *self._jobs]:
            self._collect(job, [], error)
        self._send()
        while self._calls:
            self._on_loop(self._calls.popleft().fail, error)
        if self.failure is not None:
            self._on_loop(self.on_failure, self.failure)

    def _turn(self) -> bool:
        """Do a little of everything; return whether there may be more to do at once."""
        while self._inbox:
            resident, job = self._inbox.popleft()
            if resident.lane is not None and not job.cancelled:
                resident.lane.add(job)
        self._loading = True
        loaded = self.residents.load_next()
        self._loading = False
        if loaded is not None:
            self._on_load(loaded)
        busy = loaded is not None or self._do_call()
        for lane in self.residents.lanes():
            if lane.is_busy:
                busy = True
                try:
                    lane.turn()
                except Exception as e:
                    _log.exception("a step of %s failed", lane.generator.name)
                    lane.fail(e)
                self._send()
        if not busy:
            self.residents.evict_idle()
        return busy or bool(self._inbox)

    def _do_call(self) -> bool:
        """Do what waits longest, if anything does."""
        if not self._calls:
            return False
        call = self._calls[0]
        try:
            if not call.cancelled:
                self._on_loop(call.deliver, call.work())
        except Exception as e:
            self._on_loop(call.fail, e)
        self._calls.popleft()
        return True

    def _collect(self, job: Job, pieces: list[Piece], error: Exception | None) -> None:
        self._outbox.append((job, pieces, error))

    def _send(self) -> None:
        """Hand over what is new, once for all jobs."""
        if self._outbox:
            news, self._outbox = self._outbox, []
            self._on_loop(_deliver, news)

    def _on_loop(self, function: Callable[[Any], None], argument: object) -> None:
        if self._loop is None:
            return
        # If the loop is closed, nobody waits any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)


def _deliver(news: list[tuple[Job, list[Piece], Exception | None]]) -> None:
    for job, pieces, error in news:
        job.deliver(pieces, error)
