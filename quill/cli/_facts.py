"""Facts of a manifest or a config in one line for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quill.units import plural

_UNITS = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"))


def ago(created: str | None, now: float) -> str:
    """A time in UTC, ISO 8601, as a distance: "3 hours ago"; empty if it is not known.

    Args:
        created: As the manifest has it.
        now: Seconds since the epoch.
    """
    if not created:
        return ""
    from datetime import datetime

    try:
        passed = now - datetime.fromisoformat(created).timestamp()
    except ValueError:
        return created
    if passed < -60:
        # The clock was set back: the distance would be wrong.
        return created
    for seconds, unit in _UNITS:
        if passed >= seconds:
            return f"{plural(int(passed // seconds), unit)} ago"
    return "just now"


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: Any, short: Callable[[float], str] | None = None) -> str:
    """A number with separators, and its short form behind it where that helps."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:,}" + (f" ({short(value)})" if short and value >= 1000 else "")


def loss(value: Any) -> str:
    """A loss."""
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def held_out(tokens: Any) -> str:
    """What a loss was measured on, where that is not the validation split."""
    return f" on {tokens:,} held-out tokens of the training split" if isinstance(tokens, int) else ""


def pairs(values: Any) -> str:
    """A small object: "quill 0.1.0, python 3.11.7"."""
    return ", ".join(f"{k} {v}" for k, v in mapping(values).items() if v not in (None, ""))


def commit(git: Any) -> str:
    """A state of the code: its commit, and whether there were changes."""
    git = mapping(git)
    return str(git.get("commit", "")) + (" with local changes" if git.get("dirty") else "") if git else ""


def references(sources: Any, *, digests: bool = False) -> str:
    """Other models by their references, and the hashes of their weights."""
    found = [mapping(source) for source in sources or ()]
    return ", ".join(
        f"{s.get('reference')} {sha256(s.get('digest'))}" if digests else str(s.get("reference"))
        for s in found
    )


def sha256(digest: Any) -> str:
    """A hash."""
    return f"sha256 {digest}" if digest else ""


def data(facts: Any) -> str:
    """The data that a model was trained on."""
    facts = mapping(facts)
    tokens = facts.get("tokens")
    found = [str(facts.get("name") or ""), f"{tokens:,} tokens" if isinstance(tokens, int) else ""]
    return ", ".join(filter(None, found))


def shape(model: Any) -> str:
    """The shape of a model from the section of its config."""
    get = mapping(model).get
    if not model:
        return ""
    return (
        f"{get('block', '?')}, {plural(get('n_layer', '?'), 'layer')}, {plural(get('n_head', '?'), 'head')}, "
        f"width {get('n_embd', '?')}, context {get('block_size', '?')}, vocabulary {get('vocab_size', '?')}"
    )


def at_once(facts: Any, train: Any) -> str:
    """How many sequences of a batch were computed at once, and why; empty for a whole batch, as usual.

    Args:
        facts: What the manifest says of the run.
        train: The training settings of its config.
    """
    facts, train = mapping(facts), mapping(train)
    rows, batch, given = facts.get("micro_batch_size"), train.get("batch_size"), train.get("micro_batch_size")
    said = []
    if isinstance(rows, int) and isinstance(batch, int) and rows < batch:
        said.append(f"{rows:,} of {batch:,} sequences, {'as set' if rows == given else 'to fit in memory'}")
    if facts.get("gradient_checkpointing"):
        is_set = train.get("gradient_checkpointing") == "on"
        said.append(f"with gradient checkpointing, {'as set' if is_set else 'to fit in memory'}")
    return "; ".join(said)


def progress(row: Any) -> str:
    """The state of a listed model: "ok", "training, step 1,500/2,000", "damaged: ..."."""
    if row["state"] == "damaged":
        return f"damaged: {row['damage']}"
    if row.get("step") is not None:
        of = f"/{row['max_iters']:,}" if row.get("max_iters") else ""
        return f"{row['state']}, step {row['step']:,}{of}"
    return str(row["state"])


def dropped(found: Mapping[str, int] | None) -> str:
    """The duplicates that a dataset leaves out, as `Dataset.duplicates`; empty if none were sought."""
    if not found:
        return ""
    documents = plural(found["documents"], "document")
    return f"{found['exact']:,} exact and {found['near']:,} near duplicates of {documents}"
