"""The end of a run: measure its best weights, write the model card, publish the version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quill.checkpoint.card import card
from quill.checkpoint.load import Checkpoint, load_checkpoint
from quill.config.settings import RunConfig, SampleConfig
from quill.evaluation import chart, curves, measure
from quill.generation.generator import Generator
from quill.model.gpt import GPT
from quill.registry import locks, manifest
from quill.registry.draft import Draft
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.training.device import Device
from quill.training.splits import Splits

_SAMPLE_TOKENS = 300


def publish(
    config: RunConfig,
    tokens: Splits,
    draft: Draft,
    device: Device,
    *,
    steps: int,
    best_step: int,
    best_loss: float | None,
    exact: bool,
    fits: bool,
    averaged: bool,
    temperature: float,
    ended: str,
    elapsed: Callable[[], float],
    poll: Callable[[], None],
) -> Version:
    """Publish the weights in a draft.

    Args:
        config: The run as it ran.
        tokens: What it trains on and is evaluated on.
        draft: With config, tokenizer, metrics and the best weights.
        device: Where it ran.
        steps: Optimizer steps done.
        best_step: The step of the best weights.
        best_loss: Their validation loss as estimated during the run, in nats per token; None without one.
        exact: Whether it was estimated in float32.
        fits: Whether one device has room for the weights; if not, the estimated loss is published.
        averaged: Whether they are a moving average.
        temperature: The divisor of the logits that they include.
        ended: Why the run ended: "max_iters", "patience" or "time limit".
        elapsed: Returns the seconds of the run so far.
        poll: Called wherever publishing can be interrupted; what it raises passes through.

    Raises:
        CorruptError: The weights are damaged.
        LockedError: Another process has taken over the draft.
        ResourceError: The disk refused; the draft is unchanged.
    """
    best = load_checkpoint(draft, device.name if fits else "cpu")
    loss = _published_loss(best.model, config, tokens, best_loss, exact, poll) if fits else best_loss
    facts = describe(
        config,
        tokens,
        draft,
        device,
        steps=steps,
        best_step=best_step,
        loss=loss,
        averaged=averaged,
        temperature=temperature,
    )
    facts |= {
        "parameters": sum(p.numel() for p in best.model.parameters()),
        "ended": ended,
        "seconds": round(elapsed(), 1),
    }
    return _publish(draft, best, facts, poll)


def describe(
    config: RunConfig,
    tokens: Splits,
    draft: Draft,
    device: Device,
    *,
    steps: int,
    best_step: int,
    loss: float | None,
    averaged: bool,
    temperature: float,
) -> dict[str, Any]:
    """What a manifest says of a run, finished or not.

    Args:
        config: The run as it ran.
        tokens: What it trains on and is evaluated on.
        draft: Where it is written.
        device: Where it ran.
        steps: Optimizer steps done.
        best_step: The step of the best weights.
        loss: Their validation loss in nats per token; None without one.
        averaged: Whether they are a moving average.
        temperature: The divisor of the logits that they include.
    """
    status, dataset = draft.status(), tokens.dataset
    return {
        "data": {
            "name": dataset.name,
            "key": dataset.key,
            "sha256": dataset.manifest["source"]["sha256"],
            "tokens": dataset.count("train") + dataset.count("val"),
            "tokenizer": dataset.tokenizer.kind,
            "tokenizer_sha256": dataset.tokenizer.fingerprint,
        },
        "parent": status["parent"] if status else None,
        "extends": status["extends"] if status else None,
        "teachers": status["teachers"] if status else None,
        "seeds": {"train": config.train.seed},
        "device": device.name,
        "instructions": device.instructions,
        "dtype": device.dtype,
        "compiled": device.compiled,
        "micro_batch_size": device.micro_batch_size,
        "gradient_checkpointing": device.checkpointing,
        "steps": steps,
        "best_step": best_step,
        "averaged": averaged,
        "temperature": round(temperature, 4) if config.train.calibrate and tokens.val_tokens else None,
        "held_out": tokens.held_out,
        "best_val_loss": loss,
        "bits_per_byte": _bits_per_byte(loss, tokens),
    }


def publish_run(
    registry: Registry, reference: str, device: str = "cpu", poll: Callable[[], None] = lambda: None
) -> Version:
    """Publish the best weights of an unfinished run, which ends it.

    Its validation loss is the one that was estimated during the run: the text need not be there any more.

    Args:
        registry: Where it is.
        reference: The run; a name alone means its unfinished run, if that is newer than its newest version.
        device: Where to generate the sample in the model card.
        poll: Called wherever publishing can be interrupted; what it raises passes through.

    Returns:
        The version; the one that the reference means if that is published already.

    Raises:
        NotFoundError: There is no such run, or it has no weights yet.
        LockedError: A process is training it.
        CorruptError: Its weights are damaged.
        ResourceError: The disk refused; it is still an unfinished run.
    """
    found = registry.find(reference, in_progress=True)
    if not found.is_published:
        with locks.hold(found.root, found.name):
            # The process that held the lock may have published or discarded it.
            found = registry.find(reference if found.label else found.reference)
            if not found.is_published and found.has(manifest.WEIGHTS):
                draft = Draft(found.root, found.name, found.number)
                draft.take()
                best = load_checkpoint(draft, device)
                return _publish(draft, best, _recorded(draft, best), poll)
        # Not while it is locked, as if it were being trained.
        found.require_weights()
    return registry.resolve(found.reference)


def _recorded(draft: Draft, best: Checkpoint) -> dict[str, Any]:
    """What an unfinished run has recorded for its manifest."""
    status, losses = draft.status(), curves.read(draft.metrics())
    facts = {k: v for k, v in draft.facts.items() if v is not None and k not in ("schema", "files")}
    if not facts and losses.best:
        # A run of an earlier quill, which recorded less.
        facts = {"best_step": losses.best.step, "best_val_loss": losses.best.loss}
    facts |= {
        "parameters": sum(p.numel() for p in best.model.parameters()),
        "seeds": {"train": best.config.train.seed},
        "parent": status["parent"] if status else None,
        "extends": status["extends"] if status else None,
        "teachers": status["teachers"] if status else None,
        "ended": "publish",
    }
    return facts | ({"steps": draft.step} if draft.step is not None else {})


def _publish(draft: Draft, best: Checkpoint, facts: dict[str, Any], poll: Callable[[], None]) -> Version:
    """Write the model card and publish."""
    sample = _sample(Generator(best.model, best.tokenizer), best.config.train.seed, poll)
    losses = curves.read(draft.metrics())
    # Browsers draw the finer block characters at a different width from letters.
    curve = chart.draw(losses, plain=True)
    text = card(draft.reference, best.config, facts | {"versions": manifest.versions()}, sample, curve)
    draft.write_bytes(manifest.CARD, text.encode("utf-8", "replace"))
    return draft.publish(**facts)


def _published_loss(
    model: GPT,
    config: RunConfig,
    tokens: Splits,
    estimate: float | None,
    exact: bool,
    poll: Callable[[], None],
) -> float | None:
    """The loss on the whole split in float32, measured on the weights as written unless it is known."""
    c = config.train
    is_measured = exact and c.eval_iters is None and c.weights_dtype == "float32" and not c.calibrate
    if estimate is None or is_measured:
        return estimate
    return float(measure.evaluate(model, tokens.val, n_bytes=tokens.val_bytes, poll=poll).loss)


def _bits_per_byte(loss: float | None, tokens: Splits) -> float | None:
    """A loss in nats per token as bits per byte of the validation text, as `quill eval` counts them."""
    if loss is None or not tokens.val_bytes:
        return None
    return measure.bits_per_byte(loss * (tokens.val_tokens - 1), tokens.val_bytes)


def _sample(generator: Generator, seed: int, poll: Callable[[], None]) -> str:
    """Text for the model card."""
    text = ""
    for chunk in generator.stream("", SampleConfig(max_new_tokens=_SAMPLE_TOKENS, seed=seed)):
        poll()
        text += chunk
    return text
