"""The model card: a README.md for each version. What the model is, where it came from, and how to use it.

Names, data and generated text may contain anything, and stay text in the card: table cells are plain words or
code spans, a sample is in a fence that it cannot close, and control characters are escaped.
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
from quill.units import duration, plural

# Text without any Markdown syntax.
_WORDS = re.compile(r"(?!.*www\.)[A-Za-z0-9][A-Za-z0-9 .,:+-]*", re.IGNORECASE)
_MARKUP = re.compile(r"[\\`*_\[\]!|~#]")
_BACKTICKS = re.compile(r"`+")
# Control characters, lone surrogates, and characters that end or reorder a line.
_UNSAFE = {"Cc", "Cs", "Zl", "Zp"}
_REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def card(
    reference: str, config: RunConfig, facts: Mapping[str, Any], sample: str = "", curve: str = ""
) -> str:
    """Write a model card in Markdown. Unknown facts are left out.

    Args:
        reference: "name:vN".
        config: The config of the run; for an imported model its shape is enough.
        facts: Facts from the manifest: parameters, data, parent, teachers, seeds, device, dtype, steps,
            best_step, averaged, held_out, best_val_loss, bits_per_byte, seconds, imported, versions.
        sample: Text that the model generated.
        curve: The loss curve, drawn as text.
    """
    rows = [(name, text) for name, text in _rows(config, facts) if text]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    parts = [f"# {_inline(reference)}", f"| | |\n|---|---|\n{table}", "## Usage", *_usage(reference, facts)]
    if sample.strip():
        parts += ["## Sample", _fenced(sample.strip(), "text")]
    if curve.strip():
        parts += ["## Loss curve", _fenced(curve.rstrip("\n"), "text")]
    return "\n\n".join(parts) + "\n"


def _rows(config: RunConfig, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the table's rows; the text of an unknown fact is empty."""
    model, data = config.model, _table(facts.get("data"))
    architecture = (
        f"{model.block}, {plural(model.n_layer, 'layer')}, {plural(model.n_head, 'head')}, "
        f"embedding size {model.n_embd:,}, context length {model.block_size:,}"
    )
    tokenizer = _inline(str(data.get("tokenizer") or facts.get("tokenizer") or config.data.tokenizer or ""))
    if model.vocab_size is not None:
        tokenizer = ", ".join(filter(None, [tokenizer, f"vocabulary of {model.vocab_size:,}"]))
    loss, bits = facts.get("best_val_loss"), facts.get("bits_per_byte")
    imported = _table(facts.get("imported"))
    held_out = facts.get("held_out") or ""
    if held_out:
        held_out = f", on the last {held_out:,} tokens of the training text, which were held out of training"
    return [
        ("Architecture", architecture),
        ("Parameters", _number(facts.get("parameters"))),
        ("Tokenizer", tokenizer),
        (
            "Held-out loss" if held_out else "Validation loss",
            f"{loss:.4f} nats per token{held_out}" if loss is not None else "not measured",
        ),
        ("Perplexity", f"{math.exp(loss):,.2f}" if loss is not None and loss < 700 else ""),
        ("Bits per byte", f"{bits:.4f}" if bits is not None else ""),
        ("Dataset", _dataset(data)),
        ("Training", _training(facts)),
        ("Imported from" if imported else "Fine-tuned from", _origin(_table(facts.get("parent")), imported)),
        *(("Taught by", _origin(_table(t), {})) for t in facts.get("teachers") or ()),
        *(("Note", _prose(str(note))) for note in imported.get("notes") or ()),
        ("Seeds", _pairs(facts.get("seeds"))),
        ("Versions", _pairs(facts.get("versions"))),
    ]


def _dataset(data: Mapping[str, Any]) -> str:
    tokens = f"{_number(data.get('tokens'))} tokens" if data.get("tokens") is not None else ""
    return ", ".join(
        filter(None, [_inline(str(data.get("name") or "")), tokens, _sha256(data.get("sha256"))])
    )


def _training(facts: Mapping[str, Any]) -> str:
    steps, best = facts.get("steps"), facts.get("best_step")
    if steps is None:
        return ""
    took = f" in {duration(facts['seconds'])}" if facts.get("seconds") is not None else ""
    device = f" on {_inline(str(facts['device']))}" if facts.get("device") else ""
    dtype = f" in {_inline(str(facts['dtype']))}" if facts.get("dtype") else ""
    kept = f"; weights from step {best:,}, which had the lowest loss" if best and best != steps else ""
    averaged = "; a moving average of the weights" if facts.get("averaged") else ""
    temperature = facts.get("temperature")
    calibrated = f"; logits divided by {temperature:.3g} to fit it" if temperature is not None else ""
    return f"{plural(steps, 'step')}{took}{device}{dtype}{kept}{averaged}{calibrated}"


def _origin(parent: Mapping[str, Any], imported: Mapping[str, Any]) -> str:
    kind = f"format {_inline(str(imported['format']))}" if imported.get("format") else ""
    source = _inline(str(parent.get("reference") or ""))
    return ", ".join(filter(None, [source, kind, _sha256(parent.get("digest"))]))


def _usage(reference: str, facts: Mapping[str, Any]) -> list[str]:
    shown = _harmless(reference).replace("\n", "\\n")
    name = shlex.quote(shown)
    # Without --data, eval needs the dataset that the model was trained on.
    commands = ("sample", "eval", "show") if facts.get("data") else ("sample", "show")
    shell = "\n".join(f"quill {command} {name}" for command in commands)
    python = (
        f"import quill\n\nmodel = quill.load({json.dumps(shown)})\nprint(model.generate(temperature=0.8)[0])"
    )
    return [_fenced(shell, "sh"), _fenced(python, "python")]


def _sha256(digest: Any) -> str:
    return f"sha256 {_inline(str(digest))}" if digest else ""


def _pairs(values: Any) -> str:
    return ", ".join(_inline(f"{k} {v}") for k, v in _table(values).items() if v is not None)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _inline(text: str) -> str:
    """Write text for a line or a table cell so that no reader takes it for markup."""
    text = _harmless(text).replace("\n", " ").replace("\t", " ").strip()
    if not text or _WORDS.fullmatch(text):
        return text
    # In a table a bar ends the cell, even in a code span, unless it is escaped.
    text = text.replace("|", "\\|")
    fence = "`" * (1 + _longest(text))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def _prose(text: str) -> str:
    """Write a sentence with all its markup escaped; CommonMark 0.31, 2.4 and 2.5."""
    text = _harmless(text).replace("\n", " ").replace("\t", " ").strip()
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, entity)
    return _MARKUP.sub(r"\\\g<0>", text)


def _fenced(text: str, language: str) -> str:
    """Write text as it is, in a fence that is longer than any in it."""
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
