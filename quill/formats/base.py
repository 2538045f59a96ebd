"""A format is one file or folder here that defines one class, which reads and writes by one table of names.

The name of the file is the format's registered name. `exporting` and `importing` do what all formats share:
staging, refusing to overwrite, checking names and shapes, publishing into the registry. A format only
translates, and runs the foreign program to compare results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from quill import discovery
from quill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from quill.checkpoint.load import Checkpoint
    from quill.config.settings import ModelConfig
    from quill.config.shape import Shape
    from quill.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Incoming:
    """A foreign model in quill's terms, before it is checked and published.

    Attributes:
        model: Its settings; vocab_size is set.
        weights: Tensors by quill's names, shaped as quill has them; `LazyTensors` for large models.
        tokenizer: Its tokenizer.
        facts: What else the source says, for the manifest: "steps", "best_val_loss", "seconds".
        notes: What the user should know about the translation, a sentence each.
    """

    model: ModelConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Supplied:
    """What the user passes to an import in addition to the source.

    Attributes:
        config: A config file of the foreign project.
        tokenizer: A published tokenizer (gpt2), a tokenizer.json, a meta.pkl, or the text whose sorted
            characters are the vocabulary.
    """

    config: Path | None = None
    tokenizer: str | None = None


class LazyTensors(Mapping[str, "Tensor"]):
    """Tensors by name, each made when it is looked up, so that a large model is never in memory twice.

    Args:
        makers: The function that makes each tensor.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> Self:
        """Tensors by the same names, each changed when it is looked up."""

        def changed(name: str) -> Tensor:
            return change(name, tensors[name])

        return cls({name: partial(changed, name) for name in tensors})

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Format:
    """A foreign format, without state; a subclass overrides only the directions that it supports.

    Attributes:
        suffix: The end of an export's default name: ".gguf" for a file, "-hf" for a folder.
        dtypes: The dtypes that weights can be exported in, the default first; empty if it is import-only.
        extra: The extra of quill that exporting or importing needs, for the hint; "" for none.
        runtime: The foreign program that `logits` runs, and its package, such as "onnxruntime".
        tolerance: The largest difference of logits that verifying an export accepts, by dtype; relative to
            the largest logit's magnitude where that is above 1.
        log_probabilities: Whether the foreign program only reports log probabilities, not logits.
        streams: Whether `write` looks each weight up when it is written, so that they need not fit in memory.
    """

    suffix: ClassVar[str] = ""
    dtypes: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    runtime: ClassVar[str] = ""
    tolerance: ClassVar[Mapping[str, float]] = {}
    streams: ClassVar[bool] = False
    log_probabilities: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The registered name, which is that of the file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def writes(self) -> bool:
        """Whether models can be exported to it."""
        return bool(self.dtypes)

    @property
    def reads(self) -> bool:
        """Whether models can be imported from it."""
        return type(self).read is not Format.read

    def refusal(self, shape: Shape, tokenizer: Tokenizer) -> str | None:
        """Why the format cannot represent a model exactly, as a clause; None if it can.

        A format has one table per block, and refuses a block that it has no table for.
        """
        return None

    def write(self, checkpoint: Checkpoint, path: Path, dtype: str) -> tuple[str, ...]:
        """Write a model.

        Args:
            checkpoint: The model; float32, on the CPU.
            path: The file or folder to create, in a staging folder. The caller syncs it and moves it to
                its place, or deletes it on failure.
            dtype: One of `dtypes`.

        Returns:
            What the user should know about the translation, a sentence each.
        """
        raise NotImplementedError

    def logits(self, path: Path, idx: Tensor) -> Mapping[int, Tensor]:
        """Run an export in the foreign program.

        Args:
            path: The export that `write` made.
            idx: Token ids, (1, T).

        Returns:
            Float32 logits, (V), by position; V is at least the tokenizer's size. All T positions, unless the
            program can only report some.

        Raises:
            InputError: The foreign program is not installed; the hint says how to.
        """
        raise NotImplementedError

    def modelfile(self, name: str, checkpoint: Checkpoint) -> str | None:
        """The Modelfile that Ollama needs for an export; None if Ollama does not load the format.

        Args:
            name: The export's file name, in the same folder.
            checkpoint: The model.
        """
        return None

    def recognises(self, path: Path) -> bool:
        """Whether a file or folder looks like this format, by names and first bytes; never raises."""
        return False

    def read(self, path: Path, supplied: Supplied) -> Incoming:
        """Read a foreign model.

        Args:
            path: A file or folder that exists.
            supplied: What the user passed in addition.

        Raises:
            CorruptError: It is damaged or not safe to read, whatever it contains.
            InputError: Only the user can supply what is missing, or quill has no such model.
        """
        raise NotImplementedError


def without_unused_rows(
    shape: Shape, weights: Mapping[str, Tensor], rows: int
) -> tuple[Shape, Mapping[str, Tensor], tuple[str, ...]]:
    """Drop the rows of embedding and head beyond the tokenizer's ids, which other programs would draw.

    Args:
        shape: The model's shape.
        weights: By quill's names.
        rows: The tokenizer's size.

    Returns:
        The smaller model, and a note if it is smaller.
    """
    if shape.vocab_size <= rows:
        return shape, weights, ()

    def smaller(name: str, value: Tensor) -> Tensor:
        if not name.startswith(("wte.", "lm_head.")):
            return value
        return value[:rows] if shape.n_layer else value[:rows, :rows]

    note = f"{shape.vocab_size - rows} rows of the embedding without a token were left out"
    return replace(shape, vocab_size=rows), LazyTensors.of(weights, smaller), (note,)


def unused_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids between a tokenizer's tokens that no token has, and that must never be drawn."""
    return [i for i in range(tokenizer.vocab_size) if not tokenizer.token_bytes(i)]


def names() -> tuple[str, ...]:
    """The names of all formats."""
    return discovery.names("formats")


def load(name: str) -> Format:
    """A format by its registered name.

    Raises:
        InputError: There is no such format.
    """
    module = discovery.load("formats", name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Format) and value.__module__ == module.__name__:
            return value()
    raise AssertionError(f"quill/formats/{name} defines no Format")


def needs(package: str, extra: str = "") -> InputError:
    """The refusal for a package that is not installed, and the extra of quill that installs it, if any."""
    return InputError(
        f"the package {package} is not installed",
        why="only this format needs it, so quill does not install it by default",
        hint=f"pip install 'quill-gpt[{extra}]'" if extra else f"pip install {package}",
    )
