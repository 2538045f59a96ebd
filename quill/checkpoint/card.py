"""The README.md that is generated with each version: what the model is, where it came from, how to use it.

Names, data and the model's own text come from anywhere. In the card they stay text: a table's cells are
plain words or code spans, a sample is in a fence that it cannot close, control characters show as escapes.
Format: GitHub Flavored Markdown 0.29.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import unicodedata
from collections.abc import Mapping
from typing import Any

from quill.config.settings import RunConfig

# What Markdown reads as nothing but words.
_WORDS = re.compile(r"(?!.*www\.)[A-Za-z0-9][A-Za-z0-9 .,:+-]*", re.IGNORECASE)
_MARKUP = re.compile(r"[\\`*_\[\]!|~#]")
_BACKTICKS = re.compile(r"`+")
# Control characters, lone surrogates, and what ends or reorders a line as it is shown.
_UNSAFE = {"Cc", "Cs", "Zl", "Zp"}
_REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def card(
    reference: str, config: RunConfig, facts: Mapping[str, Any], sample: str = "", curve: str = ""
) -> str:
    """A model card in Markdown. What is not known is left out.

    Args:
        reference: "name:vN".
        config: The run as it ran; of an imported model its shape is enough.
        facts: What the manifest says: parameters, data, parent, seeds, device, dtype, steps, best_step,
            best_val_loss, seconds, imported, versions; and bits_per_byte, where it was measured.
        sample: Text the model wrote.
        curve: The loss by step, drawn as text.
    """
    rows = [(name, text) for name, text in _rows(config, facts) if text]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    parts = [f"# {_inline(reference)}", f"| | |\n|---|---|\n{table}"]
    if curve.strip():
        parts += ["## Loss", _fenced(curve.rstrip("\n"), "text")]
    if sample.strip():
        parts += ["## Sample", _fenced(sample.strip(), "text")]
    return "\n\n".join([*parts, "## Use", *_use(reference)]) + "\n"


def _rows(config: RunConfig, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the table; a value that is not known is empty."""
    model, data = config.model, _table(facts.get("data"))
    shape = (
        f"{model.block} block, {_some(model.n_layer, 'layer')}, {_some(model.n_head, 'head')}, "
        f"width {model.n_embd}, context {model.block_size:,} tokens"
    )
    tokenizer = _inline(str(data.get("tokenizer") or facts.get("tokenizer") or config.data.tokenizer or ""))
    if model.vocab_size is not None:
        tokenizer = ", ".join(filter(None, [tokenizer, f"{model.vocab_size:,} tokens"]))
    loss = facts.get("best_val_loss")
    bits = facts.get("bits_per_byte")
    imported = _table(facts.get("imported"))
    return [
        ("architecture", shape),
        ("parameters", _count(facts.get("parameters"))),
        ("tokenizer", tokenizer),
        ("validation loss", f"{loss:.4f} nats per token" if loss is not None else "not measured"),
        ("perplexity", f"{math.exp(loss):,.2f}" if loss is not None and loss < 700 else ""),
        ("bits per byte", f"{bits:.4f}" if bits is not None else ""),
        ("data", _data(data)),
        ("training", _training(facts)),
        ("imported" if imported else "parent", _parent(_table(facts.get("parent")), imported)),
        *(("note", _prose(str(note))) for note in imported.get("notes") or ()),
        ("seeds", _pairs(facts.get("seeds"))),
        ("made with", _pairs(facts.get("versions"))),
    ]


def _data(data: Mapping[str, Any]) -> str:
    tokens = f"{_count(data.get('tokens'))} tokens" if data.get("tokens") is not None else ""
    digest = f"sha256 {_inline(str(data['sha256']))}" if data.get("sha256") else ""
    return ", ".join(filter(None, [_inline(str(data.get("name") or "")), tokens, digest]))


def _training(facts: Mapping[str, Any]) -> str:
    steps = facts.get("steps")
    if steps is None:
        return ""
    took = f" in {facts['seconds']:,.0f} s" if facts.get("seconds") is not None else ""
    where = " ".join(_inline(str(facts[k])) for k in ("device", "dtype") if facts.get(k))
    best = facts.get("best_step")
    kept = f"; the weights are those of step {best:,}, the best" if best and best != steps else ""
    return f"{_count(steps)} steps{took}" + (f" on {where}" if where else "") + kept


def _parent(parent: Mapping[str, Any], imported: Mapping[str, Any]) -> str:
    kind = f"as {_inline(str(imported['format']))}" if imported.get("format") else ""
    digest = f"sha256 {_inline(str(parent['digest']))}" if parent.get("digest") else ""
    source = _inline(str(parent.get("reference") or ""))
    return ", ".join(filter(None, [f"from {source}" if kind and source else source, kind, digest]))


def _use(reference: str) -> list[str]:
    shown = _harmless(reference).replace("\n", "\\n")
    name = shlex.quote(shown)
    shell = f'quill sample {name} --prompt "..."\nquill eval {name}\nquill show {name} --metrics'
    python = f'import quill\n\nmodel = quill.load({json.dumps(shown)})\nprint(model.generate("...")[0])'
    return [_fenced(shell, "sh"), _fenced(python, "python")]


def _pairs(values: Any) -> str:
    return ", ".join(_inline(f"{k} {v}") for k, v in _table(values).items() if v is not None)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _some(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _inline(text: str) -> str:
    """Text for a line or a table's cell, that no reader takes for markup."""
    text = _harmless(text).replace("\n", " ").replace("\t", " ").strip()
    if not text or _WORDS.fullmatch(text):
        return text
    # In a table a bar ends the cell, also in a code span, unless a backslash is before it.
    text = text.replace("|", "\\|")
    fence = "`" * (1 + _longest(text))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def _prose(text: str) -> str:
    """A sentence with whatever is in it as words; CommonMark 0.31, 2.4 and 2.5."""
    text = _harmless(text).replace("\n", " ").replace("\t", " ").strip()
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, entity)
    return _MARKUP.sub(r"\\\g<0>", text)


def _fenced(text: str, language: str) -> str:
    """A block of text as it is, in a fence that is longer than any in it."""
    text = _harmless(text)
    fence = "`" * max(3, 1 + _longest(text))
    return f"{fence}{language}\n{text}\n{fence}"


def _longest(text: str) -> int:
    return max(map(len, _BACKTICKS.findall(text)), default=0)


def _harmless(text: str) -> str:
    return "".join(_escape(c) for c in text)


def _escape(c: str) -> str:
    unsafe = unicodedata.category(c) in _UNSAFE or unicodedata.bidirectional(c) in _REORDERING
    return c.encode("unicode_escape").decode() if unsafe and c not in "\n\t" else c
