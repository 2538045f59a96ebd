"""The models in memory: loaded on demand, kept while they are used, and removed when they are not.

A lease is taken before a request waits for anything, so that no model leaves memory while a request needs it.
Leases are taken and returned on the event loop; models are loaded and removed on the engine's thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quill.config.settings import ServeConfig
from quill.config.shape import Shape
from quill.errors import QuillError, ResourceError
from quill.registry.folder import Folder

if TYPE_CHECKING:
    from quill.serving.lane import Deliver, Lane

# A model that cannot be loaded is not tried again for so many seconds.
_FAILED_FOR = 30.0


@dataclass(eq=False)
class Resident:
    """A model in memory, or on its way there.

    Attributes:
        version: Where it comes from.
        lane: Its samples, once it is loaded.
        error: Why it could not be loaded.
        leases: Requests that need it.
        used: When it was last needed, on the monotonic clock.
        bytes: Memory that it takes, with its caches.
    """

    version: Folder
    loop: asyncio.AbstractEventLoop
    lane: Lane | None = None
    error: Exception | None = None
    leases: int = 0
    used: float = field(default_factory=time.monotonic)
    bytes: int = 0
    seconds: float = 0.0
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Residents:
    """All models in memory.

    Args:
        config: The limits.
        device: The device of the weights.
        deliver: As for Lane.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        config: ServeConfig,
        device: str,
        deliver: Deliver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._device, self._deliver, self._clock = config, device, deliver, clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str | None], Resident] = {}

    def lease(self, version: Folder) -> Resident:
        """Note that a request needs a model; the engine loads it if it has to."""
        key = (str(version.path), version.digest)
        with self._lock:
            found = self._known.get(key)
            if found is not None and found.error is not None and self._clock() - found.used > _FAILED_FOR:
                found = None
            if found is None:
                found = self._known[key] = Resident(version, asyncio.get_running_loop())
            found.leases += 1
            if found.error is None:
                found.used = self._clock()
            return found

    def release(self, resident: Resident) -> None:
        """Note that a request no longer needs a model."""
        with self._lock:
            resident.leases -= 1
            if resident.error is None:
                resident.used = self._clock()

    def loaded(self) -> list[Resident]:
        """The models that are loaded."""
        with self._lock:
            return [r for r in self._known.values() if r.lane is not None]

    def lanes(self) -> list[Lane]:
        """Their samples."""
        return [r.lane for r in self.loaded() if r.lane is not None]

    def load_next(self) -> Resident | None:
        """Load the model that was asked for first, if there is room; called by the engine.

        Returns:
            What was loaded or failed to load; None if nothing was to do.
        """
        with self._lock:
            wanted = next((r for r in self._known.values() if r.lane is None and r.error is None), None)
        if wanted is None:
            return None
        began = self._clock()
        try:
            if not self._make_room(wanted):
                self._forget_unwanted(wanted)
                return None
            self._load(wanted)
        except (QuillError, MemoryError, RuntimeError) as e:
            # PyTorch raises RuntimeError where memory runs out.
            wanted.error = e
        wanted.seconds = self._clock() - began
        wanted.used = self._clock()
        wanted.loop.call_soon_threadsafe(wanted.settled.set)
        return wanted

    def evict_idle(self) -> None:
        """Remove the models that were not used for the keep-alive time, and failures that are old."""
        now = self._clock()
        with self._lock:
            for key, resident in list(self._known.items()):
                limit = _FAILED_FOR if resident.error is not None else self._config.keep_alive
                settled = resident.lane is not None or resident.error is not None
                if settled and not resident.leases and now - resident.used > limit:
                    del self._known[key]

    def _forget_unwanted(self, wanted: Resident) -> None:
        """Give up a model that does not fit now, if everyone who waited for it has left."""
        with self._lock:
            if not wanted.leases:
                self._known = {k: r for k, r in self._known.items() if r is not wanted}

    def _load(self, wanted: Resident) -> None:
        from quill.checkpoint.load import load_checkpoint
        from quill.generation.generator import Generator
        from quill.serving.lane import Lane

        loaded = load_checkpoint(wanted.version, self._device)
        generator = Generator(loaded.model, loaded.tokenizer, name=wanted.version.reference)
        slots = self._slots(loaded.model.shape)
        lane = Lane(generator, slots, self._deliver)
        lane.warm_up()
        wanted.lane = lane

    def _slots(self, shape: Shape) -> int:
        from quill.generation.generator import rows_at_once

        return max(1, min(self._config.slots, rows_at_once(shape)))

    def _make_room(self, wanted: Resident) -> bool:
        """Remove models that nobody uses, the longest unused first, until the limits allow another.

        Returns:
            Whether there is room now.

        Raises:
            ResourceError: The model alone is larger than the limit.
        """
        from quill.checkpoint.load import fit_vocabulary, read_config, read_tokenizer
        from quill.generation.cpu import MAX_COPIED_BYTES

        config = fit_vocabulary(read_config(wanted.version), read_tokenizer(wanted.version), wanted.version)
        shape = config.model.shape()
        # A second cache, of half of the context, reads ahead.
        cached = 12 * shape.n_layer * shape.n_kv_head * shape.head_size * shape.block_size
        weights = 4 * (wanted.version.facts["parameters"] or 0)
        # Small weights have two copies, which make one sample faster, and several.
        copies = 3 if weights <= MAX_COPIED_BYTES else 1
        wanted.bytes = copies * weights + self._slots(shape) * cached
        limit = None if self._config.max_memory is None else int(self._config.max_memory * 2**30)
        if limit is not None and wanted.bytes > limit:
            raise ResourceError(
                f"'{wanted.version.reference}' needs {wanted.bytes:,} bytes of memory",
                why=f"max_memory allows {limit:,}",
            )
        with self._lock:
            while True:
                held = {k: r for k, r in self._known.items() if r.lane is not None}
                total = sum(r.bytes for r in held.values()) + wanted.bytes
                if len(held) < self._config.max_models and (limit is None or total <= limit):
                    return True
                idle = [(r.used, k) for k, r in held.items() if not r.leases]
                if not idle:
                    return False
                del self._known[min(idle)[1]]
