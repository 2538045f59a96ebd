"""An explanation of a prompt, of a size that a server can afford."""

from __future__ import annotations

from math import isqrt
from typing import Any

from quill.config.settings import SampleConfig
from quill.config.shape import Shape
from quill.explanation.explanation import Explanation
from quill.generation.generator import Generator
from quill.serving.requests import ExplainRequest

# Numbers in the attention maps, and multiplications of the lens: about 10 MB, and half a second.
_MOST_WEIGHTS = 1 << 20
_MOST_PRODUCTS = 5 * 10**10


def explain(generator: Generator, body: ExplainRequest) -> dict[str, Any]:
    """What `quill explain --json` prints.

    Raises:
        QuillError: As for Explanation.
    """
    last = min(body.last, most_tokens(generator.model.shape))
    return Explanation(generator, body.prompt, SampleConfig(**body.drawing()), last=last).to_dict()


def most_tokens(shape: Shape) -> int:
    """How many tokens of a prompt are explained at most."""
    maps = max(1, shape.n_layer * shape.n_head)
    lens = (shape.n_layer + 1) * shape.vocab_size * shape.n_embd
    return max(1, min(isqrt(_MOST_WEIGHTS // maps), _MOST_PRODUCTS // lens))
