"""Models to disk and back, with every way in which their files can disagree checked first.

A bit flip loads in silence and a vocabulary of another run decodes to gibberish, so a model is read only
if its files hash to what was published and its tensors and tokenizer are those of its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quill.checkpoint import weights as tensors
from quill.errors import CorruptError, InputError
from quill.registry import manifest, migrations
from quill.registry.folder import Folder

if TYPE_CHECKING:
    import torch

    from quill.config.settings import RunConfig
    from quill.model.gpt import GPT
    from quill.tokenizers.base import Tokenizer

CONFIG, WEIGHTS, TOKENIZER = manifest.REQUIRED
_WEIGHT_TYPES = ("F32", "F16", "BF16")
_SHOWN = 3


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to use, and what is known of it.

    Attributes:
        config: The run that made it.
        model: In eval mode, float32.
        tokenizer: Its own.
        version: Where it came from.
    """

    config: RunConfig
    model: GPT
    tokenizer: Tokenizer
    version: Folder


def load_checkpoint(version: Folder, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a model: each file once, hashed, and checked against the others before room is made for it.

    Args:
        version: A version from `Registry.resolve`, or a draft.
        device: Where its weights shall be.

    Raises:
        CorruptError: A file is damaged, or does not belong with the others.
        InputError: A newer quill made it.
        ResourceError: It cannot be read or does not fit in memory.
    """
    import torch

    config = read_config(version)
    tokenizer = read_tokenizer(version)
    config = fit_vocabulary(config, tokenizer, version)
    with version.open_file(WEIGHTS) as reading:
        layout = tensors.read_layout(reading.file, reading.size, reading.path)
        model = blank_model(config, layout, reading.path)
        buffer = reading.whole()
    weights = {n: t.to(device=device, dtype=torch.float32) for n, t in tensors.views(layout, buffer)}
    model.load_state_dict(weights, assign=True)
    return Checkpoint(config, model.eval(), tokenizer, version)


def read_config(version: Folder) -> RunConfig:
    """The config a version was made by; neither flags nor the environment change it.

    Raises:
        CorruptError: It is damaged, or describes no model.
        InputError: A newer quill wrote it.
    """
    from quill.config import flat as lineage
    from quill.config import reading
    from quill.config.settings import RunConfig

    origin = str(version.path / CONFIG)
    document = version.read_object(CONFIG)
    if lineage.is_flat(document):
        try:
            document = lineage.to_sections(document)
        except InputError as e:
            raise CorruptError(e.what, why=e.why, hint=e.hint) from None
    document = migrations.migrate(document, "config", origin=origin)
    return reading.check(RunConfig, document, origin=origin, error=CorruptError)


def read_tokenizer(version: Folder) -> Tokenizer:
    """The tokenizer that a version was trained with.

    Raises:
        CorruptError: It is damaged.
        InputError: A newer quill wrote it.
    """
    from quill.tokenizers import base

    return base.read(version.read_object(TOKENIZER), origin=str(version.path / TOKENIZER))


def fit_vocabulary(config: RunConfig, tokenizer: Tokenizer, version: Folder) -> RunConfig:
    """Hold the model's vocabulary to the tokenizer's; rows beyond it are padding and never drawn."""
    rows = config.model.vocab_size
    if rows is None:
        model = config.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
        return config.model_copy(update={"model": model})
    if rows < tokenizer.vocab_size:
        raise CorruptError(
            f"'{version.path}' holds a tokenizer of another model",
            why=f"it has {tokenizer.vocab_size} tokens, the config's vocab_size is {rows}",
            hint="put back the tokenizer.json that the model was trained with",
        )
    return config


def blank_model(config: RunConfig, layout: Mapping[str, tensors.Tensor], path: Path) -> GPT:
    """The config's model without memory, once the file's tensors are known to be exactly its own."""
    from quill.model.gpt import outline

    if config.model.n_layer > len(layout):
        # Each layer has a tensor at least; even without memory, a million of them take minutes.
        why = f"the config has {config.model.n_layer} layers, the file {len(layout)} tensors"
        raise CorruptError(f"'{path}' does not fit its config", why=why)
    model = outline(config.model.shape())
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    wrong = [f"{n} is missing" for n in wanted if n not in layout]
    wrong += [f"{ascii(n)[1:-1][:60]} is in no such model" for n in layout if n not in wanted]
    for name, shape in wanted.items():
        found = layout.get(name)
        if found and found.shape != shape:
            wrong.append(f"{name} is {_shape(found.shape)}, the config makes it {_shape(shape)}")
        elif found and found.dtype not in _WEIGHT_TYPES:
            wrong.append(f"{name} is {found.dtype}, weights are {', '.join(_WEIGHT_TYPES)}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CorruptError(f"'{path}' does not fit its config", why="; ".join(wrong[:_SHOWN]) + more)
    return model


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
