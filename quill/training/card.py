"""The README.md that is generated with each version: what the model is and how to use it."""

from __future__ import annotations

from typing import Any

from quill.config.settings import RunConfig


def card(reference: str, config: RunConfig, facts: dict[str, Any], sample: str) -> str:
    """A model card in Markdown.

    Args:
        reference: "name:vN".
        config: The run as it ran.
        facts: What the manifest says: parameters, data, steps, best_val_loss, seconds, device.
        sample: Text the model wrote.
    """
    m, data = config.model, facts["data"]
    name = reference.partition(":")[0]
    loss = facts.get("best_val_loss")
    rows = {
        "parameters": f"{facts['parameters']:,}",
        "architecture": f"{m.block}, {m.n_layer} layers of {m.n_embd}, {m.n_head} heads, "
        f"context {m.block_size}",
        "tokenizer": f"{data['tokenizer']}, {m.vocab_size:,} tokens",
        "trained on": f"{data['name']}, {data['tokens']:,} tokens (sha256 {data['sha256'][:12]}...)",
        "validation loss": f"{loss:.4f} nats per token" if loss is not None else "not measured",
        "steps": f"{facts['steps']:,} in {facts['seconds']:,.0f} s on {facts['device']}",
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items())
    # A fence longer than any in the text keeps the model from closing it.
    fence = "`" * max(3, 1 + max((len(run) for run in _backticks(sample)), default=0))
    return (
        f"# {reference}\n\n| | |\n|---|---|\n{table}\n\n"
        f'## Use\n\n```sh\nquill sample {name} --prompt "..."\nquill eval {name}\n```\n\n'
        f"## Sample\n\n{fence}text\n{sample.strip()}\n{fence}\n"
    )


def _backticks(text: str) -> list[str]:
    runs, run = [], ""
    for c in text + " ":
        if c == "`":
            run += c
        elif run:
            runs.append(run)
            run = ""
    return runs
