"""A model and a prompt, explained: figures for people, and one JSON document for programs and pages.

Legend: T tokens, C n_embd, L layers, H n_head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any, Literal

import torch
from torch import Tensor

from quill.config import blocks
from quill.config.settings import SampleConfig
from quill.errors import InputError
from quill.explanation import page
from quill.explanation.contributions import Contributions, contributions
from quill.explanation.parts import parts
from quill.explanation.texts import texts
from quill.explanation.trace import trace
from quill.generation.generator import Generator
from quill.generation.sampling import check_finite, probabilities

SCHEMA = "quill.explain/1"
# Default and largest number of tokens that are explained.
TOKENS, MOST_TOKENS = 64, 256

# Logits in the document; of a larger vocabulary the likeliest, and the rest by how many are about equal.
_ALL_LOGITS, _LIKELIEST = 2048, 1024
_RESTS = 200
# Numbers of a vector in the document.
_STRIP = 48
# Tokens in a cell of the lens, hidden units of a position, and tokens whose logits are split.
_LENS, _UNITS, _SPLIT = 3, 5, 8


class Explanation:
    """What happens in a model between a prompt and the next token.

    Args:
        generator: The model with its tokenizer.
        prompt: The text; empty for the start of a text.
        config: Temperature and filters of the next token.
        last: How many tokens at the end of the prompt are explained; the model reads no others.
        unknown: What to do with characters of the prompt that have no token.

    Attributes:
        ids: Token ids, T of them.
        left_out: Tokens of the prompt before these.
        trace: Every intermediate result, with `layers[i].weights` the attention of block i, (H, T, T).

    Raises:
        InputError: The block does not show what happens inside, or a character has no token.
        DivergedError: The model's weights contain NaN or infinity.
    """

    def __init__(
        self,
        generator: Generator,
        prompt: str = "",
        config: SampleConfig | None = None,
        *,
        last: int = TOKENS,
        unknown: Literal["error", "skip"] = "error",
    ) -> None:
        if not 1 <= last <= MOST_TOKENS:
            raise InputError(
                f"last={last} is out of range", why=f"1 to {MOST_TOKENS} tokens can be explained"
            )
        self.model, self.tokenizer = generator.model, generator.tokenizer
        self.name, self.prompt, self.config = generator.name, prompt, config or SampleConfig()
        ids = self.tokenizer.encode(prompt, unknown=unknown) or [generator.first_token()]
        self.ids = ids[-min(last, self.model.shape.block_size) :]
        self.left_out = len(ids) - len(self.ids)
        self.trace = trace(self.model, torch.tensor(self.ids, device=generator.device))
        check_finite(self.trace.logits.double())

    def __repr__(self) -> str:
        likeliest = ", ".join(f"{row['text']!r} {row['probability']:.1%}" for row in self.next_tokens(3))
        return f"<{self.name or 'model'} after {len(self.ids)} tokens: {likeliest}>"

    def _repr_html_(self) -> str:
        frame = "width:100%;height:85vh;border:1px solid #8886;border-radius:8px"
        return f'<iframe sandbox="allow-scripts" style="{frame}" srcdoc="{escape(self.html())}"></iframe>'

    def html(self) -> str:
        """A page that shows everything, in one file without links to others."""
        return page.render(self.to_dict())

    @property
    def logits(self) -> Tensor:
        """The logits of the next token, (V)."""
        return self.trace.logits[-1, : self.tokenizer.vocab_size]

    def next_tokens(self, count: int = 10) -> list[dict[str, Any]]:
        """The likeliest next tokens: the model's probability, and that after temperature and filters."""
        logits = self.logits.double()
        plain, sampled = logits.softmax(-1), probabilities(logits[None], self.config)[0]
        return [
            {
                "id": i,
                "text": self.tokenizer.spelled(i),
                "logit": round(float(logits[i]), 4),
                "probability": float(plain[i]),
                "sampled": float(sampled[i]),
            }
            for i in logits.topk(min(count, len(logits))).indices.tolist()
        ]

    @property
    def lens(self) -> list[Tensor]:
        """Probabilities after the embedding and after each block, through the last norm and head, (T, V)."""
        return [self.read(x) for x in self.trace.stream]

    @torch.inference_mode()
    def read(self, x: Tensor) -> Tensor:
        """What the last norm and the head make of a residual stream, (T, C) to (T, V)."""
        weight = self.model.wte.weight
        logits = self.model.head(x.to(weight.device, weight.dtype))
        return logits[:, : self.tokenizer.vocab_size].float().softmax(-1).cpu()

    @property
    def surprise(self) -> list[float | None]:
        """For each token of the prompt, -ln of the probability that the model gave it."""
        logits = self.trace.logits[:, : self.tokenizer.vocab_size].log_softmax(-1)
        return [None, *(-float(logits[t, i]) for t, i in enumerate(self.ids[1:]))]

    def contributions(self, tokens: list[int]) -> Contributions:
        """How much each part raises the logits of tokens at the last position; the model has layers."""
        return contributions(self.model, self.trace, tokens, self.tokenizer.vocab_size)

    def to_dict(self) -> dict[str, Any]:
        """Everything as one JSON document, numbers rounded."""
        layers = len(self.trace.layers)
        return {
            "schema": SCHEMA,
            "reference": self.name,
            "prompt": self.prompt,
            "left_out": self.left_out,
            "model": self._model(),
            "parts": [asdict(part) for part in parts(self.model)],
            "tokens": [
                {"id": i, "text": self.tokenizer.spelled(i), "surprise": _number(nats)}
                for i, nats in zip(self.ids, self.surprise, strict=True)
            ],
            "embedding": self._embedding() if layers else None,
            "layers": [self._layer(i) for i in range(layers)],
            "lens": self._lens(),
            "contributions": self._contributions() if layers else None,
            "next": self._next(),
            "texts": {name: asdict(text) for name, text in texts(self.model).items()},
        }

    def _model(self) -> dict[str, Any]:
        shape = self.model.shape
        facts = blocks.facts(shape.block)
        return {
            **asdict(shape),
            "family": facts.summary,
            "positions": facts.positions if shape.n_layer else None,
            "norm": type(self.model.ln_f).__name__ if shape.n_layer else None,
            "gated": shape.activation in facts.gated,
            "tokenizer": self.tokenizer.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def _embedding(self) -> dict[str, Any]:
        token, positions = self.trace.embedding, self.trace.positions
        return {
            "token": _strips(token),
            "token_norm": _numbers(token.norm(dim=-1)),
            "position": None if positions is None else _strips(positions),
            "position_norm": None if positions is None else _numbers(positions.norm(dim=-1)),
            "sum": _strips(self.trace.stream[0]),
            "sum_norm": _numbers(self.trace.stream[0].norm(dim=-1)),
        }

    def _layer(self, i: int) -> dict[str, Any]:
        layer, last = self.trace.layers[i], len(self.ids) - 1
        shared = self.model.shape.n_head // self.model.shape.n_kv_head
        entropy = -(layer.weights * layer.weights.clamp_min(1e-30).log()).sum(-1).mean(-1)
        previous = layer.weights.diagonal(-1, 1, 2).mean(-1) if last else torch.zeros(len(entropy))
        heads = [
            {
                "group": h // shared,
                "previous": _number(float(previous[h])),
                "first": _number(float(layer.weights[h, :, 0].mean())),
                "self": _number(float(layer.weights[h].diagonal().mean())),
                "entropy": _number(float(entropy[h])),
                "strongest": int(layer.weights[h, last].argmax()),
                "norm": _numbers(layer.by_head[h].norm(dim=-1)),
            }
            for h in range(self.model.shape.n_head)
        ]
        square = layer.hidden.square()
        share = square.sort(-1, descending=True).values.cumsum(-1) / square.sum(-1, keepdim=True)
        units = layer.hidden.abs().topk(min(_UNITS, layer.hidden.shape[-1])).indices
        return {
            "scale": layer.scale,
            "scores": _triangles(layer.scores, 4),
            "weights": _triangles(layer.weights, 5),
            "heads": heads,
            "attention": _strips(layer.attention),
            "attention_norm": _numbers(layer.attention.norm(dim=-1)),
            "mlp": _strips(layer.mlp),
            "mlp_norm": _numbers(layer.mlp.norm(dim=-1)),
            "units_for_90_percent": ((share < 0.9).sum(-1) + 1).clamp_max(share.shape[-1]).tolist(),
            "units": [
                [[unit, _number(float(layer.hidden[t, unit]))] for unit in row]
                for t, row in enumerate(units.tolist())
            ],
            "stream": _strips(layer.after),
            "stream_norm": _numbers(layer.after.norm(dim=-1)),
        }

    def _lens(self) -> list[dict[str, Any]]:
        final = self.trace.logits[:, : self.tokenizer.vocab_size].argmax(-1, keepdim=True)
        rows = []
        # One at a time: those of a large vocabulary take much memory.
        for i, p in enumerate(map(self.read, self.trace.stream)):
            top = p.topk(min(_LENS, p.shape[-1]))
            given = p.gather(-1, final)
            ids, values = top.indices.tolist(), top.values.tolist()
            rows.append(
                {
                    "after": f"block {i}" if i else "embedding" if self.trace.layers else "table",
                    "top": [
                        [[self.tokenizer.spelled(k), _number(v)] for k, v in zip(*pair, strict=True)]
                        for pair in zip(ids, values, strict=True)
                    ],
                    "final": _numbers(given[:, 0]),
                    "rank": ((p > given).sum(-1) + 1).tolist(),
                }
            )
        return rows

    def _contributions(self) -> dict[str, Any]:
        ids = self.logits.topk(min(_SPLIT, len(self.logits))).indices.tolist()
        found = self.contributions(ids)
        return {
            "tokens": [[i, self.tokenizer.spelled(i)] for i in ids],
            "embedding": _numbers(found.embedding),
            "positions": None if found.positions is None else _numbers(found.positions),
            "attention": _numbers(found.attention),
            "heads": _numbers(found.heads),
            "mlp": _numbers(found.mlp),
            "constant": _numbers(found.constant),
            "total": _numbers(found.total()),
        }

    def _next(self) -> dict[str, Any]:
        logits = self.logits.double()
        shown = len(logits) if len(logits) <= _ALL_LOGITS else _LIKELIEST
        values, ids = logits.sort(descending=True)
        rest = [[round(float(b.mean()), 4), len(b)] for b in values[shown:].tensor_split(_RESTS) if len(b)]
        return {
            "logits": [
                [i, self.tokenizer.spelled(i), round(value, 4)]
                for i, value in zip(ids[:shown].tolist(), values[:shown].tolist(), strict=True)
            ],
            "rest": rest,
            "temperature": self.config.temperature,
            "top_k": self.config.top_k,
            "top_p": self.config.top_p,
            "likeliest": self.next_tokens(),
        }


def _number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def _numbers(x: Tensor) -> Any:
    """A tensor as nested lists of rounded numbers."""
    return [_numbers(row) for row in x] if x.dim() > 1 else [_number(v) for v in x.tolist()]


def _strips(x: Tensor) -> Any:
    """The first numbers of each token's vector."""
    return [[round(v, 3) for v in row] for row in x[:, :_STRIP].tolist()]


def _triangles(x: Tensor, digits: int) -> Any:
    """For each head the rows up to the diagonal; what follows is hidden from the token."""
    return [[[round(v, digits) for v in row[: t + 1]] for t, row in enumerate(head)] for head in x.tolist()]
