"""An explanation as text, 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len

from quill.cli._tables import Canvas, wrap
from quill.cli.output import safe_line
from quill.explanation.explanation import Explanation
from quill.explanation.parts import Part, parts
from quill.explanation.texts import Text, texts
from quill.units import count, plural

_WIDTH = 80
_SHADES = " ░▒▓█"
# From these weights on, the shades after the first.
_STEPS = (0.05, 0.2, 0.4, 0.7)
_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})
_LABELS = {
    "table": "table of what follows",
    "embedding": "token embedding",
    "positions": "+ position embedding",
    "attention": "attention",
    "mlp": "MLP",
    "norm": "norm",
    "head": "head",
}
# Columns of the attention map, parts of the logit, and columns of a bar.
_COLUMNS, _SHARES, _BAR = 40, 8, 24


def draw(explained: Explanation, canvas: Canvas) -> str:
    """Lay out an explanation.

    Args:
        explained: What to show.
        canvas: Where it is drawn; never wider than 80 columns.
    """
    lines = list(_Drawing(explained, canvas).lines())
    return "\n".join(line.rstrip() for line in lines) + "\n"


class _Drawing:
    def __init__(self, explained: Explanation, canvas: Canvas) -> None:
        self.explained, self.canvas = explained, canvas
        self.width = min(canvas.width or _WIDTH, _WIDTH)
        self.shape = explained.model.shape
        self.texts = texts(explained.model)
        self.names = [_visible(explained.tokenizer.spelled(i)) for i in explained.ids]

    def lines(self) -> Iterator[str]:
        """All sections."""
        yield from self._head("model")
        yield from self._model()
        yield from self._head("tokens")
        yield from self._tokens()
        if self.explained.trace.layers:
            yield from self._head("attention")
            yield from self._attention()
            yield from self._head("lens")
            yield from self._layers()
        yield from self._head("sampling")
        yield from self._next()
        if self.explained.trace.layers:
            yield from self._head("contributions")
            yield from self._shares()

    def _head(self, topic: str) -> Iterator[str]:
        text: Text = self.texts[topic]
        if topic != "model":
            yield ""
        yield self.canvas.paint(text.title.upper(), "head")
        for line in wrap(text.body, self.width):
            yield self.canvas.paint(line, "dim")
        for line in wrap(f"({'; '.join(text.sources)})", self.width):
            yield self.canvas.paint(line, "dim")
        yield ""

    def _model(self) -> Iterator[str]:
        found, T = parts(self.explained.model), len(self.names)
        total = sum(p.parameters for p in found)
        yield f"  {safe_line(self.explained.name)}: {count(total)} parameters"
        yield ""
        yield _part_line("tokens", "", f"{T}", None, total)
        for part in (p for p in found if p.layer is None and p.kind in ("table", "embedding", "positions")):
            yield self._part(part, total)
        if blocks := [p for p in found if p.layer == 0]:
            n = self.shape.n_layer
            inside = sum(p.parameters for p in found if p.layer is not None)
            yield _part_line(f"┌ {plural(n, 'block')}{', each:' if n > 1 else ''}", "", "", inside, total)
            for part in blocks:
                yield self._part(part, total)
            yield "  └"
        after = [p for p in found if p.layer is None and p.kind in ("norm", "head")]
        for part in after:
            yield self._part(part, total)
        if after and after[-1].kind != "head":
            result = f"{T} × {self.shape.vocab_size:,}"
            yield _part_line("head", "the embedding table", result, 0, total)

    def _part(self, part: Part, total: int) -> str:
        c, T = self.shape, len(self.names)
        label = _LABELS.get(part.kind, part.name.rpartition(".")[2])
        result = f"{T} × {c.vocab_size if part.kind in ('table', 'head') else c.n_embd:,}"
        sizes = " × ".join(f"{n:,}" for n in next(iter(part.tensors.values()), ()))
        if part.kind == "attention":
            groups = f", {c.n_kv_head} shared" if c.n_kv_head != c.n_head else ""
            sizes = f"{plural(c.n_head, 'head')} of {c.head_size}{groups}"
        elif part.kind == "mlp":
            sizes = f"{c.n_embd:,} → {c.mlp_size:,} → {c.n_embd:,}"
        prefix = "│  " if part.layer is not None else ""
        return _part_line(prefix + label, sizes, result, part.parameters, total)

    def _tokens(self) -> Iterator[str]:
        lines = [""]
        for name, i in zip(self.names, self.explained.ids, strict=True):
            token = f"{self.canvas.paint(name, 'busy')} {i}"
            if lines[-1] and cell_len(lines[-1]) + cell_len(f"{name} {i}") + 4 > self.width:
                lines.append("")
            lines[-1] += f"  {token}"
        yield from lines

    def _attention(self) -> Iterator[str]:
        shown = min(len(self.names), _COLUMNS)
        first = len(self.names) - shown
        yield f"  Where the last token looks: {self._legend()}"
        yield ""
        yield f"{'block.head':>12}  {''.join(map(_one_column, self.names[first:]))}  most"
        for i, layer in enumerate(self.explained.trace.layers):
            for h, weights in enumerate(layer.weights[:, -1].tolist()):
                at = max(range(len(weights)), key=weights.__getitem__)
                row = "".join(_shade(w) for w in weights[first:])
                back = len(weights) - 1 - at
                where = "itself" if not back else f"{back} back"
                name = self.canvas.paint(_fit(self.names[at], 10), "busy")
                yield f"{f'{i + 1}.{h + 1}':>12}  {row}  {weights[at]:>4.0%} {name} {where}"

    def _legend(self) -> str:
        steps = [f"{mark} from {step:.0%}" for mark, step in zip(_SHADES[1:], _STEPS, strict=True)]
        return ", ".join(steps)

    def _layers(self) -> Iterator[str]:
        trace = self.explained.trace
        yield f"  At the last token, {self.canvas.paint(self.names[-1], 'busy')}:"
        yield ""
        yield "  after      length  +attention    +MLP  the head would say"
        added: list[tuple[str, str]] = [("", "")]
        for layer in trace.layers:
            added.append((_length(layer.attention[-1]), _length(layer.mlp[-1])))
        for i, (x, (attention, mlp)) in enumerate(zip(trace.stream, added, strict=True)):
            p = self.explained.read(x[-1:])[0]
            top = p.topk(min(3, len(p)))
            says = "  ".join(
                f"{_fit(self._name(t), 6)} {v:>4.0%}"
                for t, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            )
            where = f"block {i}" if i else "embedding"
            yield f"  {where:<9}{_length(x[-1]):>8}{attention:>12}{mlp:>8}  {says}"

    def _next(self) -> Iterator[str]:
        config = self.explained.config
        filters = f"top-k {config.top_k or 'off'}, top-p {config.top_p or 'off'}"
        yield f"  temperature {config.temperature:g}, {filters}"
        yield ""
        yield "  token           id    logit    model   drawn"
        rows = self.explained.next_tokens()
        for row in rows:
            bar = "█" * round(row["sampled"] * _BAR)
            name = self.canvas.paint(_fit(_visible(row["text"]), 12), "busy")
            figures = f"{row['id']:>6}{row['logit']:>9.2f}{row['probability']:>9.1%}{row['sampled']:>8.1%}"
            yield f"  {name}{figures}  {bar}"
        rest = max(0.0, 1 - sum(row["probability"] for row in rows))
        drawn = max(0.0, 1 - sum(row["sampled"] for row in rows))
        others = self.explained.tokenizer.vocab_size - len(rows)
        if others:
            yield f"  {f'{others:,} others':<12}{'':>15}{rest:>9.1%}{drawn:>8.1%}"

    def _shares(self) -> Iterator[str]:
        token = int(self.explained.logits.argmax())
        found = self.explained.contributions([token])
        shares = [("embedding", float(found.embedding[0]))]
        if found.positions is not None:
            shares.append(("positions", float(found.positions[0])))
        for i in range(self.shape.n_layer):
            shares.append((f"block {i + 1} MLP", float(found.mlp[i, 0])))
            heads = found.heads[i, :, 0].tolist()
            shares += [(f"block {i + 1} head {h + 1}", value) for h, value in enumerate(heads)]
            shares.append((f"block {i + 1} biases", float(found.attention[i, 0]) - sum(heads)))
        shares.append(("last biases", float(found.constant[0])))
        shares.sort(key=lambda share: -abs(share[1]))
        most, rest = shares[:_SHARES], sum(value for _, value in shares[_SHARES:])
        name, total = self.canvas.paint(self._name(token), "busy"), float(found.total()[0])
        yield f"  The logit of {name} is {total:.2f} above the mean of all tokens:"
        yield ""
        most.append(("all others", rest))
        longest = max(abs(value) for _, value in most) or 1.0
        for name, value in most:
            bar = ("█" if value > 0 else "░") * round(abs(value) / longest * _BAR)
            yield f"  {name:<16}{value:>+8.2f}  {bar}"

    def _name(self, token: int) -> str:
        return _visible(self.explained.tokenizer.spelled(token))


def _part_line(label: str, sizes: str, result: str, parameters: int | None, total: int) -> str:
    numbers = "" if parameters is None else f"{parameters:>13,}{parameters / total:>7.1%}"
    return f"  {_fit(label, 22)}{_fit(sizes, 24)}{_fit(result, 12)}{numbers}"


def _length(x: Any) -> str:
    return f"{float(x.norm()):.2f}"


def _shade(weight: float) -> str:
    return _SHADES[sum(weight >= step for step in _STEPS)]


def _visible(text: str) -> str:
    """A token on one line, with its spaces and line breaks."""
    return safe_line(text.translate(_VISIBLE))


def _one_column(name: str) -> str:
    """What of a token's name fits a column."""
    mark = name.lstrip("␣")[:1] or name[:1]
    return mark if cell_len(mark) == 1 else "·"


def _fit(text: str, width: int) -> str:
    """Pad or cut to a number of columns."""
    while cell_len(text) > width:
        text = text[:-2].rstrip("…") + "…"
    return text + " " * (width - cell_len(text))
