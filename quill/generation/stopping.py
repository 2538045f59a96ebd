"""Texts that end a sample, found while it streams."""

from __future__ import annotations

from collections.abc import Sequence

from quill.errors import InputError


class StopStrings:
    """Passes text on up to the first stop string, and nothing that could be the beginning of one.

    Args:
        stops: Texts that end a sample; they are no part of it.

    Attributes:
        hit: Whether one has appeared.

    Raises:
        InputError: One is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InputError(
                "a stop string is ''", why="an empty text appears at once, so nothing would be drawn"
            )
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def feed(self, piece: str) -> str:
        """What is certain to come before any stop string, once this piece is known."""
        if self.hit or not self._stops:
            return "" if self.hit else piece
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            # The one that is complete first, however the text is cut in pieces.
            return text[: min(found)[1]]
        cut = len(text) - max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for n in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0
