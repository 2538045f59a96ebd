"""The record of a run: metrics.jsonl for programs, run.log for people."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from quill.evaluation.curves import stream
from quill.registry.draft import Draft
from quill.registry.manifest import LOG, METRICS
from quill.training.events import Evaluated, Event, Finished, Notice, Sampled, Saved, Stage, Started, Stepped
from quill.units import duration, plural


class RunLog:
    """Observer that writes a run's record.

    metrics.jsonl is replaced by a file that only this process has open: if another process takes the run
    over, lines that this one still appends go to no version.

    Args:
        draft: The run's draft.
        log_interval: Steps between lines of metrics.
        step: Steps already done; later lines are dropped, as a resumed run repeats those steps.
    """

    def __init__(self, draft: Draft, log_interval: int, step: int) -> None:
        self._interval = log_interval
        kept = (line for line in stream(draft.metrics()) if line["step"] <= step)
        raw = (f"{json.dumps(line)}\n".encode() for line in kept)
        self._log, self._metrics = draft.open_log(LOG), draft.open_log(METRICS, raw)

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        self._metrics.close()

    def __call__(self, event: Event) -> None:
        """Record one event."""
        match event:
            case Stepped() if is_logged(event, self._interval):
                self._metric(
                    {
                        "step": event.step,
                        "loss": round(event.loss, 6),
                        **({} if event.objective is None else {"objective": round(event.objective, 6)}),
                        "learning_rate": event.learning_rate,
                        "grad_norm": round(event.grad_norm, 6),
                        "tokens_per_second": round(event.tokens_per_second),
                    }
                )
            case Evaluated():
                self._metric({"step": event.step, "val_loss": event.val_loss, **_chosen(event)})
            case Sampled():
                self._metric({"step": event.step, "sample": event.text})
        if text := describe(event):
            for line in text.split("\n"):
                self._log.append(line)

    def _metric(self, line: dict[str, Any]) -> None:
        self._metrics.append(json.dumps(line))


def is_logged(event: Stepped, interval: int) -> bool:
    """Whether a step has a line of metrics: every `interval` steps, and at the end."""
    return event.step % interval == 0 or event.step == event.max_iters


def describe(event: Event) -> str:
    """One line for people, followed by the text of a sample; empty for a Stepped event."""
    match event:
        case Started():
            how = f"resuming at step {event.step:,} of" if event.resumed else "training for"
            compiled = ", compiled" if event.compiled else ""
            return (
                f"{event.reference}: {how} {plural(event.max_iters, 'step')}; "
                f"{event.parameters:,} parameters, "
                f"{event.tokens_per_step:,} tokens per step, {event.device} {event.dtype}{compiled}; "
                f"data {event.dataset}: {event.train_tokens:,} + {event.val_tokens:,} tokens"
            )
        case Evaluated():
            mark = "best" if event.best else f"best {event.best_val_loss:.4f} at step {event.best_step:,}"
            both = ""
            if event.raw_val_loss is not None:
                both = f"; weights {event.raw_val_loss:.4f}, their average {event.averaged_val_loss:.4f}"
            at = "" if event.temperature is None else f" at temperature {event.temperature:.2f}"
            return f"step {event.step:,}: val loss {event.val_loss:.4f}{at} ({mark}){both}"
        case Sampled():
            return f"step {event.step:,}: sample\n" + textwrap.indent(event.text.strip("\n"), "    ")
        case Saved():
            return f"step {event.step:,}: resume state saved"
        case Finished():
            text = f"{event.reference}: {event.reason} after {plural(event.step, 'step')}"
            if event.val_loss is not None:
                averaged = ", averaged weights" if event.averaged else ""
                text += f"; val loss {event.val_loss:.4f} (step {event.best_step:,}{averaged})"
            text += f"; saved in {event.path}" if event.path else ""
            return text + (f"; next: {event.next}" if event.next else "")
        case Stage():
            return f"{event.name} ({duration(event.seconds)})" if event.seconds >= 1 else event.name
        case Notice():
            return event.message
    return ""


def _chosen(event: Evaluated) -> dict[str, Any]:
    """Which weights had the loss, and at what temperature, in a run that chooses between several."""
    names = () if event.averaged_val_loss is None else ("averaged", "raw_val_loss", "averaged_val_loss")
    chosen: dict[str, Any] = {name: getattr(event, name) for name in names}
    return chosen if event.temperature is None else chosen | {"temperature": round(event.temperature, 4)}
