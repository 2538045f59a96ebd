"""What a format is: one file in this folder that holds one class, reading and writing over one name table.

A file's name is the format's registered name. `exporting` and `importing` do what all formats share:
staging, refusing to overwrite, checking names and shapes, publishing into the registry. A format only
translates, and asks the foreign program what it makes of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quill import discovery
from quill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.config.settings import ModelConfig
    from quill.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Incoming:
    """A foreign model in quill's terms, before it is checked and published.

    Attributes:
        model: Its shape; vocab_size is set.
        weights: Tensors by quill's names, shaped as quill has them; `LazyTensors` for large models.
        tokenizer: Its own.
        facts: What else the source tells, for the manifest: "steps", "best_val_loss", "seconds".
        notes: What a person should know of the translation, a sentence each.
    """

    model: ModelConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Supplied:
    """What a person may give beside the file to be imported.

    Attributes:
        config: A config file of the foreign project, `--config`.
        tokenizer: `--tokenizer`: the name of a published tokenizer (gpt2), a tokenizer.json, a meta.pkl,
            or the text whose sorted characters are the vocabulary.
    """

    config: Path | None = None
    tokenizer: str | None = None


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors by name, each made when it is looked up, so that a large model is never in memory whole.

    Args:
        makers: The function that makes each tensor.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Format:
    """One foreign format. Stateless; a direction that the format has not is not overridden.

    Attributes:
        suffix: What the default name of an export ends in: ".gguf" for a file, "-hf" for a folder.
        dtypes: What `--dtype` may be, the default first; empty where nothing is written.
        extra: The extra of quill that writing or reading needs, for the hint; "" for none.
        runtime: The foreign program that `logits` runs, and its package, such as "onnxruntime".
        tolerance: The largest difference of logits that `--verify` lets pass, by dtype; of the largest
            logit's magnitude where that is above 1.
    """

    suffix: ClassVar[str] = ""
    dtypes: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    runtime: ClassVar[str] = ""
    tolerance: ClassVar[Mapping[str, float]] = {}

    @property
    def name(self) -> str:
        """The registered name: the file's."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def writes(self) -> bool:
        """Whether models can be exported to it."""
        return bool(self.dtypes)

    @property
    def reads(self) -> bool:
        """Whether models can be imported from it."""
        return type(self).read is not Format.read

    def refusal(self, config: ModelConfig, tokenizer: Tokenizer) -> str | None:
        """Why the format cannot hold a model exactly, as a clause; None where it can.

        Asked before anything is written; no weights are needed to answer.
        """
        return None

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write a model.

        Args:
            checkpoint: The model; float32, on the CPU.
            path: A file or folder to make, in a place of its own that is discarded on failure. Nobody
                else sees it until it is whole; syncing and renaming are the caller's.
            dtype: One of `dtypes`.

        Returns:
            What a person should know of the translation, a sentence each.
        """
        raise NotImplementedError

    def logits(self, path: Path, idx: Tensor) -> Tensor:
        """What the foreign program makes of token ids, from an export.

        Args:
            path: What `write` made.
            idx: Token ids, (1, T).

        Returns:
            Float32 logits, (1, T, V), V at least the tokenizer's size.

        Raises:
            InputError: The foreign program is not installed; the hint says how to.
        """
        raise NotImplementedError

    def modelfile(self, name: str, checkpoint: Checkpoint) -> str | None:
        """What Ollama makes a model of from an export; None where it does not load the format.

        Args:
            name: The export's file name; it lies beside.
            checkpoint: The model.
        """
        return None

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like this format, from names and first bytes alone; never raises."""
        return False

    def read(self, path: Path, supplied: Supplied) -> Incoming:
        """Read a foreign model. What is wrong with a file is a CorruptError, whatever it holds.

        Args:
            path: A file or folder that exists.
            supplied: What was given with it.

        Raises:
            CorruptError: It is damaged, or not safe to read.
            InputError: Something is missing that only the caller can give, or quill has no such model.
        """
        raise NotImplementedError


def names() -> tuple[str, ...]:
    """Every format, by name."""
    return discovery.names("formats")


def load(name: str) -> Format:
    """A format by its registered name.

    Raises:
        InputError: Nothing is registered under it.
    """
    module = discovery.load("formats", name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Format) and value.__module__ == module.__name__:
            return value()
    raise AssertionError(f"quill/formats/{name}.py holds no Format")


def needs(package: str, extra: str = "") -> InputError:
    """The refusal of what needs a package that is not installed; `extra` of quill has it, where one does."""
    return InputError(
        f"the package {package} is not installed",
        why="this format needs it, and quill does without it otherwise",
        hint=f"pip install 'quill-gpt[{extra}]'" if extra else f"pip install {package}",
    )
