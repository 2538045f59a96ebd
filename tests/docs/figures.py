"""Draw the pictures of `how-a-gpt-works.md` from the shipped model: `python tests/docs/figures.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

import quill
from quill.explanation.explanation import Explanation
from quill.generation.generator import Generator
from quill.generation.sampling import apply_temperature
from quill.shipped import folder

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "quill" / "docs" / "images"

ECHO = "O Romeo, Rome"
QUESTION = "To be, or not to be: that is the question"
KING = "The king is d"

_STYLE = """
  .bg { fill: #ffffff } .t { fill: #1c2733 } .s { fill: #51606f } .soft { fill: #eef2f6 }
  .l { stroke: #c3ccd6; fill: none } .box { fill: #f3f6fa; stroke: #8aa0b8 }
  .stream { stroke: #1f6fc0; stroke-width: 5; fill: none } .arm { stroke: #8aa0b8; fill: none }
  .hot { fill: #d9600f } .cold { fill: #1f6fc0 } .third { fill: #2c8a57 } .fourth { fill: #7a5ab5 }
  @media (prefers-color-scheme: dark) {
    .bg { fill: #0f141a } .t { fill: #e6edf3 } .s { fill: #a3b1be } .soft { fill: #1b242d }
    .l { stroke: #35414d } .box { fill: #18212a; stroke: #5b7288 } .stream { stroke: #5ca2ee }
    .arm { stroke: #5b7288 } .hot { fill: #f58a3e } .cold { fill: #5ca2ee } .third { fill: #5cc48d }
    .fourth { fill: #b69af0 }
  }
"""


def draw() -> dict[str, str]:
    """Every picture by the name of its file."""
    shipped = folder("weights")
    model = quill.load("shakespeare", registry=shipped, device="cpu")
    return {
        "gpt-model.svg": model_picture(model),
        "gpt-embedding.svg": embedding_picture(model),
        "gpt-attention.svg": attention_picture(Explanation(model, ECHO)),
        "gpt-lens.svg": lens_picture(Explanation(model, KING)),
        "gpt-sampling.svg": sampling_picture(Explanation(model, KING)),
        "gpt-training.svg": training_picture(Explanation(model, QUESTION)),
    }


def model_picture(model: Generator) -> str:
    """The way of a token through the model, with the sizes and parameters of each part."""
    c = model.model.shape
    V, C = c.vocab_size, c.n_embd

    def params(part: torch.nn.Module) -> str:
        return f"{sum(p.numel() for p in part.parameters()):,} parameters"

    block = model.model.h[0]
    attention, mlp = block.self_attn, block.mlp
    body = [
        _path("stream", "M150 52 V560"),
        _box(60, 20, 180, "token", "a number from 0 to " + str(V - 1)),
        _box(60, 80, 180, "embedding", f"{V} × {C}, {V * C:,} parameters"),
        '<rect class="l" x="20" y="138" width="620" height="262" rx="12" stroke-dasharray="5 4"/>',
        _text(630, 160, f"{c.n_layer} times", "s", anchor="end"),
        *_branch(
            190,
            "norm, attention",
            f"{c.n_head} heads of {c.head_size}, {params(attention)}",
            "reads from the tokens before",
        ),
        *_branch(300, "norm, MLP", f"{C} → {c.mlp_size} → {C}, {params(mlp)}", "works on each token alone"),
        _box(60, 420, 180, "norm", f"{C} parameters"),
        _box(60, 480, 180, "head", f"{C} → {V}, the embedding again"),
        _box(60, 560, 180, "probabilities", f"{V} numbers that sum to 1"),
        _text(270, 450, "The blue line is the residual stream: one vector of", "s"),
        _text(270, 468, f"{C} numbers for each token. Parts read it and add to it.", "s"),
    ]
    return _svg(660, 622, "The shipped model, from a token to probabilities", body)


def _branch(y: int, name: str, facts: str, note: str) -> list[str]:
    """A part that reads the stream above and adds to it below."""
    return [
        _path("arm", f"M150 {y} H300"),
        _path("arm", f"M460 {y + 44} V{y + 72} H164"),
        f'<rect class="box" x="300" y="{y - 22}" width="320" height="66" rx="8"/>',
        _text(316, y, name, "t", bold=True),
        _text(316, y + 18, facts, "s", size=12),
        _text(316, y + 34, note, "s", size=12),
        *(f'<circle class="{kind}" cx="150" cy="{y + 72}" r="12"/>' for kind in ("bg", "arm")),
        _text(150, y + 77, "+", "t", anchor="middle", bold=True),
    ]


def embedding_picture(model: Generator) -> str:
    """The embeddings in the two directions in which they differ most."""
    vectors = model.model.wte.weight.detach().float().cpu()
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    names = [model.tokenizer.spelled(i) for i in range(len(vectors))]
    kept = [i for i, name in enumerate(names) if name.isalpha() or name in " \n.,;:!?'-"]
    flat = _principal(vectors[kept])
    low, high = flat.amin(0), flat.amax(0)
    spots = ((flat - low) / (high - low) * torch.tensor([560.0, 330.0]) + torch.tensor([40.0, 60.0])).tolist()
    body = []
    for i, (x, y) in zip(kept, spots, strict=True):
        name = names[i]
        kind = (
            "third"
            if not name.isalpha()
            else "fourth"
            if name.isupper()
            else "hot"
            if name in "aeiou"
            else "cold"
        )
        body.append(_text(x, y, _visible(name), kind, anchor="middle", size=13, bold=True, mono=True))
    for at, (kind, label) in enumerate(
        (("hot", "vowels"), ("cold", "consonants"), ("fourth", "capitals"), ("third", "space and marks"))
    ):
        body.append(_text(40 + 130 * at, 26, label, kind, size=13, bold=True))
    title = f"The embeddings of the characters, in two of {vectors.shape[1]} dimensions"
    return _svg(640, 420, title, body)


def _principal(x: Tensor) -> Tensor:
    """The first two principal components; the sign of each is that of its largest number."""
    x = x - x.mean(0)
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)
    flat = u[:, :2] * s[:2]
    return flat * flat.gather(0, flat.abs().argmax(0)[None]).sign()


def attention_picture(seen: Explanation) -> str:
    """The head that looks most at the token before, and the one that looks most at the start of the word."""
    names = [seen.tokenizer.spelled(i) for i in seen.ids]
    starts = []
    for t in range(1, len(names)):
        start = t
        while start and names[start - 1].isalpha():
            start -= 1
        if names[t].isalpha() and start < t - 1:
            starts.append((t, start))

    def before(weights: Tensor) -> float:
        return float(weights.diagonal(-1).mean())

    def first(weights: Tensor) -> float:
        return sum(float(weights[pair]) for pair in starts) / len(starts)

    body = []
    heads = [(i, h) for i, layer in enumerate(seen.trace.layers) for h in range(len(layer.weights))]
    wanted = ((before, "reads the token before"), (first, "reads the first letter of the word"))
    for at, (score, note) in enumerate(wanted):
        i, h = max(heads, key=lambda pair: score(seen.trace.layers[pair[0]].weights[pair[1]]))
        x = 40 + 350 * at
        body += [
            _text(x, 24, f"block {i + 1}, head {h + 1}", "t", bold=True),
            _text(x, 42, note, "s", size=13),
            *_map(x + 10, 74, 290, [*map(_visible, names)], seen.trace.layers[i].weights[h]),
        ]
    return _svg(720, 384, "Two heads of the shipped model", body)


def _map(x: int, y: int, size: int, names: Sequence[str], weights: Tensor) -> Iterable[str]:
    cell = size / len(names)
    for t, row in enumerate(weights.tolist()):
        for s, w in enumerate(row[: t + 1]):
            place = f'x="{x + s * cell:.1f}" y="{y + t * cell:.1f}" width="{cell:.1f}" height="{cell:.1f}"'
            yield f'<rect class="soft" {place}/><rect class="hot" fill-opacity="{w:.2f}" {place}/>'
        yield _text(x - 8, y + (t + 0.5) * cell + 5, names[t], "s", anchor="end", size=14, mono=True)
        yield _text(x + (t + 0.5) * cell, y - 6, names[t], "s", anchor="middle", size=14, mono=True)


def lens_picture(seen: Explanation) -> str:
    """The likeliest next token after each block, at each position."""
    names = [_visible(seen.tokenizer.spelled(i)) for i in seen.ids]
    width, x, y = 38, 110, 40
    body = [
        _text(x + (t + 0.5) * width, 28, name, "t", anchor="middle", mono=True, bold=True)
        for t, name in enumerate(names)
    ]
    for r, p in enumerate(seen.lens):
        body.append(
            _text(x - 12, y + r * 34 + 22, f"block {r}" if r else "embedding", "s", anchor="end", size=13)
        )
        for t in range(len(names)):
            value, token = (v.item() for v in p[t].max(-1))
            place = f'x="{x + t * width + 1}" y="{y + r * 34 + 1}" width="{width - 2}" height="32" rx="4"'
            body.append(
                f'<rect class="soft" {place}/><rect class="hot" fill-opacity="{0.45 * value:.2f}" {place}/>'
            )
            shown = _visible(seen.tokenizer.spelled(int(token)))
            body.append(_text(x + (t + 0.5) * width, y + r * 34 + 22, shown, "t", anchor="middle", mono=True))
    return _svg(
        x + width * len(names) + 20,
        y + 34 * len(seen.lens) + 16,
        "What the head would say after each block",
        body,
    )


def sampling_picture(seen: Explanation) -> str:
    """The likeliest next tokens at three temperatures."""
    logits = seen.logits.double()[None]
    order = logits[0].topk(8).indices.tolist()
    body = []
    for at, temperature in enumerate((0.5, 1.0, 2.0)):
        p = apply_temperature(logits, temperature).softmax(-1)[0]
        x = 30 + 215 * at
        body.append(_text(x, 26, f"temperature {temperature:g}", "t", bold=True))
        for r, token in enumerate(order):
            y, share = 44 + r * 24, float(p[token])
            body += [
                _text(
                    x + 12, y + 13, _visible(seen.tokenizer.spelled(token)), "t", anchor="middle", mono=True
                ),
                f'<rect class="hot" x="{x + 28}" y="{y}" width="{110 * share:.1f}" height="16" rx="3"/>',
                _text(x + 34 + 110 * share, y + 13, f"{share:.0%}", "s", size=12),
            ]
    return _svg(660, 246, f"The next character after “{KING}”", body)


def training_picture(seen: Explanation) -> str:
    """How surprised the model is by each character of a sentence."""
    body, width = [], 17
    known = [nats for nats in seen.surprise if nats is not None]
    most, mean = max(known), sum(known) / len(known)
    for t, (i, nats) in enumerate(zip(seen.ids, seen.surprise, strict=True)):
        x, height = 24 + t * width, 130 * (nats or 0.0) / most
        place = f'x="{x}" y="{174 - height:.1f}" width="{width - 5}" height="{height:.1f}"'
        name = _visible(seen.tokenizer.spelled(i))
        body += [
            f'<rect class="hot" {place} rx="2"/>',
            _text(x + (width - 5) / 2, 194, name, "t", anchor="middle", mono=True, size=14),
        ]
    y, right = 174 - 130 * mean / most, 24 + width * len(seen.ids)
    note = f"surprise in nats, up to {most:.1f}; the line is the mean, {mean:.2f} nats: the loss"
    body += [_path("arm", f"M20 {y:.1f} H{right}"), _text(20, 24, note, "s", size=13)]
    return _svg(right + 24, 210, "How surprised the model is by each character", body)


def _visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "⏎")


def _svg(width: int, height: int, title: str, body: Iterable[str]) -> str:
    lines = "\n".join(body)
    font = "ui-sans-serif, system-ui, sans-serif"
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    return (
        f'{start} aria-labelledby="t" font-family="{font}">\n<title id="t">{escape(title)}</title>\n'
        f'<style>{_STYLE}</style>\n<rect class="bg" width="{width}" height="{height}"/>\n{lines}\n</svg>\n'
    )


def _text(
    x: float,
    y: float,
    text: str,
    kind: str,
    *,
    anchor: str = "start",
    size: int = 15,
    bold: bool = False,
    mono: bool = False,
) -> str:
    look = f'class="{kind}" font-size="{size}" text-anchor="{anchor}"'
    if bold:
        look += ' font-weight="600"'
    if mono:
        look += ' font-family="ui-monospace, DejaVu Sans Mono, monospace"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(text)}</text>'


def _path(kind: str, path: str) -> str:
    return f'<path class="{kind}" d="{path}"/>'


def _box(x: int, y: int, width: int, name: str, facts: str) -> str:
    return (
        f'<rect class="box" x="{x}" y="{y}" width="{width}" height="44" rx="8"/>'
        + _text(x + width / 2, y + 19, name, "t", anchor="middle", bold=True)
        + _text(x + width / 2, y + 35, facts, "s", anchor="middle", size=11)
    )


if __name__ == "__main__":
    for name, picture in draw().items():
        (IMAGES / name).write_text(picture, encoding="utf-8")
