"""The text of one sample while it is generated."""

from __future__ import annotations

from collections.abc import Sequence

from quill.generation.stopping import StopStrings
from quill.tokenizers.base import StreamDecoder, Tokenizer


class Row:
    """One sample in progress: its text so far, and whether it has ended.

    Args:
        tokenizer: The tokenizer of the tokens.
        stops: Texts that end the sample.
        ends: Whether the end-of-text token ends it too.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, ends: bool = True) -> None:
        self._eot = tokenizer.eot_id if ends else None
        self._characters = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self._chunks: list[str] = []
        self.done = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended it."""
        return self._stops.hit

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._chunks)

    def feed(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        if self.done:
            return ""
        if token == self._eot:
            self.done = True
            return self.flush()
        chunk = self._stops.feed(self._characters.feed(token))
        self.done = self._stops.hit
        self._chunks.append(chunk)
        return chunk

    def flush(self) -> str:
        """End the sample; return the text that was still held back."""
        self.done = True
        chunk = self._stops.feed(self._characters.flush()) + self._stops.flush()
        self._chunks.append(chunk)
        return chunk
