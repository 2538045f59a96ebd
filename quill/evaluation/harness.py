"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model in this process.

The requests are those that its `hf` model answers, in the same way: a text and its continuation are encoded
together, a text without context begins with the end-of-text token, and a long text is read in windows.
https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from quill.errors import InputError, NotFoundError, QuillError, ResourceError
from quill.evaluation import scoring
from quill.generation.generator import Generator, generate

# Continuations that are scored before the progress is reported.
_GROUP = 64
# Tokens that the harness generates where a task sets no number.
_NEW_TOKENS = 256

Report = Callable[[str, int, int], None]


def measure(
    generator: Generator,
    tasks: Sequence[str],
    report: Report = lambda stage, done, total: None,
) -> list[dict[str, Any]]:
    """Measure a model on tasks.

    Args:
        generator: The model.
        tasks: Names that the harness knows, or YAML files of tasks.
        report: Called with the stage, how much of it is done, and the total.

    Returns:
        For each task and metric `task`, `metric`, `filter`, `value`, `standard_error` (None without one) and
        `examples`.

    Raises:
        InputError: The harness is not installed, or a character of a task has no token.
        NotFoundError: There is no such task.
        ResourceError: A task fails, for example because its data cannot be downloaded.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found, unused-ignore]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise InputError(
            "cannot run tasks",
            why="lm-evaluation-harness is not installed",
            hint="pip install 'quill-gpt[lm-eval]'",
        ) from None
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_name(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise NotFoundError(f"no task '{unknown[0]}'", hint="lm_eval ls tasks")
    try:
        # It prints what it bootstraps, in the middle of what a program reads from stdout.
        with redirect_stdout(io.StringIO()):
            found = simple_evaluate(
                _model(generator, report), tasks=names, task_manager=manager, log_samples=False
            )
    except QuillError:
        raise
    except Exception as e:
        # Tasks are programs and data of others, and fail in any way.
        raise ResourceError(
            f"cannot run {', '.join(names)}", why=f"lm-evaluation-harness: {type(e).__name__}: {e}"
        ) from e
    return _rows(found)


def _name(file: Path) -> str:
    """The name of the task in a YAML file."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for line in text.splitlines():
        if line.startswith("task:"):
            return line.removeprefix("task:").strip().strip("\"'")
    raise NotFoundError(f"no task in '{file}'", why="it must be a file with a line `task: NAME`")


def _rows(found: Any) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": chosen,
                    "value": float(value),
                    "standard_error": float(error) if isinstance(error, int | float) else None,
                    "examples": found.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    return rows


def _model(generator: Generator, report: Report) -> Any:
    """The model as the harness sees it."""
    from lm_eval.api.model import LM  # type: ignore[import-not-found, unused-ignore]

    class Model(LM):  # type: ignore[misc, unused-ignore]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [_pair(generator, *request.args) for request in requests]
            return [(-s.nats, s.greedy) for s in _scores(generator, pairs, report)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            windows = [_windows(generator, request.args[0]) for request in requests]
            scores = iter(_scores(generator, [pair for pairs in windows for pair in pairs], report))
            return [-sum(next(scores).nats for _ in pairs) for pairs in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            found: list[str] = []
            for request in requests:
                report("generating", len(found), len(requests))
                found.append(_generate(generator, *request.args))
            return found

    return Model()


def _prefix(generator: Generator) -> int:
    eot = generator.tokenizer.eot_id
    return generator.first_token() if eot is None else eot


def _pair(generator: Generator, context: str, continuation: str) -> scoring.Pair:
    if context:
        before, after = scoring.split(generator.tokenizer, context, continuation)
        return before or [_prefix(generator)], after
    ids, prefix = generator.tokenizer.encode(continuation), _prefix(generator)
    return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)


def _windows(generator: Generator, text: str) -> list[scoring.Pair]:
    """A text in windows; the last one reads again what fits in front of it."""
    T = generator.model.shape.block_size
    ids = [_prefix(generator), *generator.tokenizer.encode(text)]
    return [(ids[max(0, end - 1 - T) : first], ids[first:end]) for first, end in _spans(len(ids), T)]


def _spans(n: int, T: int) -> list[tuple[int, int]]:
    return [(first, min(first + T, n)) for first in range(1, n, T)]


def _scores(generator: Generator, pairs: Sequence[scoring.Pair], report: Report) -> list[scoring.Score]:
    T = generator.model.shape.block_size
    found: list[scoring.Score] = []
    for before, after in pairs:
        if len(after) > T:
            raise InputError(
                f"a continuation has {len(after):,} tokens",
                why=f"the context of the model is {T:,} tokens, {len(before):,} of them before it",
            )
    for first in range(0, len(pairs), _GROUP):
        report("scoring", first, len(pairs))
        found += scoring.score(generator.model, pairs[first : first + _GROUP])
    return found


def _generate(generator: Generator, context: str, asked: dict[str, Any]) -> str:
    """Continue a text, of which only what leaves room in the context is read."""
    new = asked.get("max_gen_toks", asked.get("max_new_tokens", _NEW_TOKENS))
    samples = bool(asked.get("do_sample", asked.get("temperature", 0) > 0))
    room = max(1, generator.model.shape.block_size - new)
    ids = (generator.tokenizer.encode(context) or [_prefix(generator)])[-room:]
    drawn = generate(
        generator.model,
        torch.tensor([ids], device=generator.device),
        new,
        temperature=asked.get("temperature", 1.0) if samples else 0.0,
        top_k=asked.get("top_k") if samples else None,
        top_p=asked.get("top_p") if samples else None,
        seed=0,
    )[0, len(ids) :].tolist()
    if generator.tokenizer.eot_id in drawn:
        drawn = drawn[: drawn.index(generator.tokenizer.eot_id)]
    text, stops = generator.tokenizer.decode(drawn), asked.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
