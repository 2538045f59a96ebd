"""A version on disk becomes a model in memory, after every way its files can disagree was ruled out.

A flipped bit changes a weight silently, and another run's vocabulary decodes to gibberish. So a model is
loaded only if its files have the published hashes, and its tensors and tokenizer are those of its config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quill.checkpoint.weights import StoredWeights, read_tensors
from quill.errors import CorruptError, InputError, shorten
from quill.registry import manifest, migrations
from quill.registry.folder import Folder
from quill.registry.tensors import TensorInfo, read_layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quill.config.settings import RunConfig
    from quill.model.gpt import GPT
    from quill.tokenizers.base import Tokenizer

CONFIG, WEIGHTS, TOKENIZER = manifest.REQUIRED
_WEIGHT_DTYPES = ("F32", "F16", "BF16")
# Of n-gram counts.
_DTYPES = {"torch.int64": ("I64",), "torch.int32": ("I32",)}
_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """A model loaded into memory.

    Attributes:
        config: The config of the run that made it.
        model: The model, in eval mode and float32.
        tokenizer: The tokenizer it was trained with.
        version: Where it was loaded from.
    """

    config: RunConfig
    model: GPT
    tokenizer: Tokenizer
    version: Folder

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The model's weights by name, float32."""
        return self.model.state_dict()


@dataclass(frozen=True)
class StoredCheckpoint(Checkpoint):
    """A model of which only the outline is in memory, on the meta device.

    Attributes:
        stored: Its weights, each read when it is looked up.
    """

    stored: Mapping[str, Tensor]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The stored weights."""
        return self.stored


@contextmanager
def open_checkpoint(version: Folder) -> Iterator[StoredCheckpoint]:
    """Open a model whose weights are read one at a time; its files are checked as by `load_checkpoint`.

    Args:
        version: A version from `Registry.resolve`, or a draft.

    Raises:
        QuillError: As for `load_checkpoint`.
    """
    tokenizer = read_tokenizer(version)
    with version.reading():
        config = fit_vocabulary(read_config(version), tokenizer, version)
        with version.open_file(WEIGHTS) as file:
            layout = read_layout(file.path)
            model = outline_model(config, layout, file.path).eval()
            file.sha256()
            yield StoredCheckpoint(config, model, tokenizer, version, StoredWeights(file, layout))


def load_checkpoint(version: Folder, device: str | torch.device = "cpu") -> Checkpoint:
    """Load a model: read each file once, hash it, and check that all fit before allocating memory.

    Args:
        version: A version from `Registry.resolve`, or a draft.
        device: The device to load the weights to.

    Raises:
        NotFoundError: It was renamed or removed in the meantime.
        CorruptError: A file is damaged, or does not belong with the others.
        InputError: A newer quill made it.
        ResourceError: It cannot be read, or does not fit in memory.
    """
    import torch

    tokenizer = read_tokenizer(version)
    with version.reading():
        config = fit_vocabulary(read_config(version), tokenizer, version)
        with version.open_file(WEIGHTS) as file:
            layout = read_layout(file.path)
            model = outline_model(config, layout, file.path)
            weights = read_tensors(file, layout)
        for name, t in weights.items():
            weights[name] = t.to(device=device, dtype=torch.float32 if t.is_floating_point() else t.dtype)
        model.load_state_dict(weights, assign=True)
        if model.shape.ngram and (why := model.ngram.why_invalid()):
            raise CorruptError(f"'{version.path / WEIGHTS}' does not fit its config", why=why)
        return Checkpoint(config, model.eval(), tokenizer, version)


def read_config(version: Folder) -> RunConfig:
    """Read the config of the run that made a version. Flags and the environment do not change it.

    Raises:
        CorruptError: It is damaged, or is not the config of a model.
        InputError: A newer quill wrote it.
    """
    from quill.config import flat, reading
    from quill.config.settings import RunConfig

    origin = str(version.path / CONFIG)
    document = version.read_object(CONFIG)
    if flat.is_flat(document):
        try:
            document = flat.to_sections(document)
        except InputError as e:
            raise CorruptError(e.what, why=e.why, hint=e.hint) from None
    document = migrations.migrate(document, "config", origin=origin)
    return reading.check(RunConfig, document, origin=origin, error=CorruptError)


def read_tokenizer(version: Folder) -> Tokenizer:
    """Read the tokenizer that a version was trained with.

    Raises:
        CorruptError: It is damaged.
        InputError: A newer quill wrote it.
    """
    from quill.tokenizers import base

    return base.read(version.read_object(TOKENIZER), origin=str(version.path / TOKENIZER))


def fit_vocabulary(config: RunConfig, tokenizer: Tokenizer, version: Folder) -> RunConfig:
    """Return the config with the tokenizer's vocabulary size where it leaves the size open.

    The model may have more rows than the tokenizer has tokens: these are padding, and never sampled.

    Raises:
        CorruptError: The tokenizer has more tokens than the model.
    """
    rows = config.model.vocab_size
    if rows is None:
        model = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
        return config.model_copy(update={"model": model})
    if rows < tokenizer.vocab_size:
        raise CorruptError(
            f"'{version.path}' contains the tokenizer of another model",
            why=f"it has {tokenizer.vocab_size} tokens, and the config's model.vocab_size is {rows}",
            hint="put back the tokenizer.json that the model was trained with",
        )
    return config


def outline_model(config: RunConfig, layout: Mapping[str, TensorInfo], path: Path) -> GPT:
    """Build the config's model without memory, if a file's tensors are exactly the model's.

    Args:
        config: The config, with its vocabulary size.
        layout: The file's tensors.
        path: The file, for messages.

    Raises:
        CorruptError: A tensor is missing, unknown, or has another shape or dtype; three are named.
    """
    from quill.model.gpt import outline

    if config.model.n_layer > len(layout):
        # A layer has at least one tensor. Even without memory, building a million layers takes minutes.
        why = f"the config has {config.model.n_layer} layers, the file {len(layout)} tensors"
        raise CorruptError(f"'{path}' does not fit its config", why=why)
    model = outline(config.model.shape())
    counted = layout.get("ngram.grams")
    if model.shape.ngram and counted and len(counted.shape) == 1:
        # How many there are depends on the training text.
        model.ngram.resize(counted.shape[0])
    tensors = model.state_dict()
    wanted = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = [f"{name} is missing" for name in wanted if name not in layout]
    wrong += [f"{shorten(name, 60)} is not in this model" for name in layout if name not in wanted]
    for name, shape in wanted.items():
        found = layout.get(name)
        if found and found.shape != shape:
            wrong.append(f"{name} is {_shape(found.shape)}, the config makes it {_shape(shape)}")
        elif found and found.dtype not in (right := _DTYPES.get(str(tensors[name].dtype), _WEIGHT_DTYPES)):
            wrong.append(f"{name} is {found.dtype}, not {' or '.join(right)}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CorruptError(f"'{path}' does not fit its config", why="; ".join(wrong[:_SHOWN]) + more)
    return model


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
