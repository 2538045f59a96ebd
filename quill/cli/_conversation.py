"""A text that a user and a model write in turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from quill.cli import options
from quill.config import reading
from quill.config.settings import SampleConfig
from quill.errors import InputError

if TYPE_CHECKING:
    from quill.cli._generator import TextGenerator

# A conversation has one text.
UNUSED = frozenset({"num_samples"})
# Far more than any context; what came before costs time and memory, and changes nothing.
_MOST_CHARACTERS = 1 << 18


class Conversation:
    """What was said so far, by both.

    Base models know no roles: what the user says is appended on its own line, the model continues, and
    its words are appended as they are.

    Args:
        config: How to sample.
        unknown: What to do with characters that have no token.

    Attributes:
        text: All of it.
    """

    def __init__(self, config: SampleConfig, unknown: Literal["error", "skip"] = "error") -> None:
        self.config, self.unknown = config, unknown
        self.text = ""
        self._continued: str | None = None

    def say(self, generator: TextGenerator, words: str) -> Iterator[str]:
        """Append words, and let the model continue; no words: continue the text as it ends.

        Raises:
            QuillError: The model cannot continue it. Nothing is appended then.
        """
        gap = "\n" if words and self.text and not self.text.endswith("\n") else ""
        return self._continue(generator, self.text + gap + words)

    def retry(self, generator: TextGenerator) -> tuple[Iterator[str], str]:
        """Let the model continue again what it continued last, with the next seed if there is one.

        Returns:
            The new text, and the line that it continues.

        Raises:
            InputError: It has not continued anything yet.
            QuillError: As for `say`.
        """
        if self._continued is None:
            raise InputError("there is nothing to try again", why="the model has not said anything yet")
        if self.config.seed is not None:
            self.config = self.config.model_copy(update={"seed": (self.config.seed + 1) % 2**63})
        return self._continue(generator, self._continued), self._continued.rpartition("\n")[2]

    def settings(self) -> dict[str, Any]:
        """Its settings by name."""
        return {**self.config.model_dump(exclude=set(UNUSED)), "unknown": self.unknown}

    def set(self, name: str, values: list[str]) -> None:
        """Change a setting.

        Args:
            name: Its name.
            values: What was typed for it: one word, or several for several stops; "none" unsets it.

        Raises:
            InputError: There is no such setting, or it does not take this.
        """
        known = self.settings()
        if name not in known or not values:
            what = f"no value for '{name}'" if name in known else f"no setting '{name}'"
            raise InputError(what, why=f"the settings are {', '.join(known)}")
        if name == "unknown":
            if values not in (["error"], ["skip"]):
                raise InputError(f"unknown={' '.join(values)} is invalid", why="choose error, skip")
            self.unknown = "skip" if values == ["skip"] else "error"
            return
        convert = options.converter(SampleConfig.model_fields[name])
        if isinstance(known[name], list):
            # A line cannot contain a newline.
            value = convert([] if values == ["none"] else [v.replace("\\n", "\n") for v in values])
        else:
            value = convert(" ".join(values))
        self.config = reading.check(SampleConfig, {**self.config.model_dump(), name: value}, origin="/set")

    def clear(self) -> None:
        """Forget everything."""
        self.text, self._continued = "", None

    def _continue(self, generator: TextGenerator, prompt: str) -> Iterator[str]:
        prompt = prompt[-_MOST_CHARACTERS:]
        with closing(generator.stream(prompt, self.config, self.unknown)) as chunks:
            # What the model cannot continue raises here.
            first = next(chunks, "")
            self.text = self._continued = prompt
            for chunk in chain([first], chunks):
                self.text += chunk
                yield chunk
