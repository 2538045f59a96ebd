"""Stop strings, found while a sample streams."""

from __future__ import annotations

from collections.abc import Sequence

from quill.errors import InputError


class StopStrings:
    """Passes text through up to the first stop string, holding back what may be the start of one.

    Args:
        stops: Texts that end a sample; they are not part of it.

    Attributes:
        hit: Whether one has appeared.

    Raises:
        InputError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InputError("a stop string is empty", why="it would end every sample before the first token")
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def feed(self, chunk: str) -> str:
        """Add a chunk; return the text that certainly comes before any stop string."""
        if self.hit or not self._stops:
            return "" if self.hit else chunk
        text = self._held + chunk
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            # The first to be complete, however the text is cut into chunks.
            return text[: min(found)[1]]
        cut = len(text) - max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text held back, once no more is coming."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest suffix of the text that is a prefix of the stop string."""
        for n in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0
