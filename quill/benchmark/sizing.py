"""A config whose run takes a given time here: the largest model that the time and the text can train.

Steps of several sizes are timed for some seconds; `quill.training.recipe` has the rule for everything else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quill.benchmark import flops
from quill.benchmark.subject import Subject
from quill.benchmark.work import Piece, Work, evaluation, training
from quill.config import reading
from quill.config.settings import RunConfig
from quill.config.shape import Shape
from quill.data import prepare
from quill.errors import InputError
from quill.evaluation import measure
from quill.model.gpt import GPT, n_params
from quill.training import autotune, memory
from quill.training.device import Device, find_device
from quill.training.inputs import Inputs, settle
from quill.training.recipe import (
    MOST_EPOCHS,
    MOST_EVALUATIONS,
    PARAMETERS_PER_TOKEN,
    TOKENS_PER_PARAMETER,
    WIDTHS,
    Recipe,
)
from quill.units import count, duration

# The width that is timed first, and the speed it is thought to have before that.
_FIRST_WIDTH, _FIRST_SPEED = 128, 10_000.0
# Evaluations of a run, at least, and the share of its time that they may take together.
_FEWEST_EVALUATIONS, _EVALUATION_SHARE = 4, 0.05
# The share of the time that is left for steps, before it is known.
_STEP_SHARE = 0.9
_FEWEST_STEPS = 20
# Starting Python and importing torch.
_IMPORT_SECONDS = 3.0
# Seconds for each timing of a size that is considered, and of the one that is chosen.
_TRIAL_SECONDS, _FINAL_SECONDS = 0.7, 3.0

Progress = Callable[[str, float, float | None], None]


@dataclass(frozen=True)
class Sized:
    """A config for a text and a time, and what it follows from.

    Attributes:
        document: The config as a file has it.
        parameters: Number of parameters.
        epochs: How often the run reads its text.
        tokens_per_second: The speed of training that was measured.
        seconds: The time that the run is expected to take, from the command to the published version.
        reasons: How the settings follow, a sentence each.
    """

    document: dict[str, Any]
    parameters: int
    epochs: float
    tokens_per_second: float
    seconds: float
    reasons: tuple[str, ...]


def size_config(
    data: Mapping[str, Any],
    seconds: float,
    data_root: Path,
    *,
    name: str | None = None,
    on_data: prepare.Observer | None = None,
    report: Progress = lambda stage, done, total: None,
) -> Sized:
    """Size a config for a text and a time.

    Args:
        data: Fields of DataConfig, the source among them; the text is prepared as for a run.
        seconds: The time that the run is to take.
        data_root: Where prepared datasets are.
        name: The model's name.
        on_data: Receives the progress of preparing the data.
        report: Receives what is being timed.

    Raises:
        InputError: The text or the time is too short, or a setting is invalid.
    """
    shape = Recipe(WIDTHS[0], 1.0, 1, 1, 1).model()
    document = {"data": dict(data), "model": {**shape, "ngram": 0}}
    inputs = settle(reading.parse(document, origin="the arguments"), data_root, None, on_data)
    head = {"name": name} if name else {}
    return _Sizing(inputs, {**head, "data": dict(data)}, seconds, report).sized()


@dataclass(frozen=True)
class _Timed:
    """A recipe that was timed.

    Attributes:
        recipe: What was timed.
        subject: The model and how it computes.
        per_second: Tokens per second of training.
    """

    recipe: Recipe
    subject: Subject
    per_second: float

    @property
    def shape(self) -> Shape:
        """Sizes of the model."""
        return self.subject.model.shape

    @property
    def parameters(self) -> int:
        """Number of parameters, without those of n-gram counts."""
        return n_params(replace(self.shape, ngram=0))

    def reads(self, seconds: float) -> float:
        """Tokens that the run reads in a time."""
        return min(self.per_second * seconds, MOST_EPOCHS * self.recipe.train_tokens)


@dataclass(frozen=True)
class _Costs:
    """Seconds of a run that are no steps.

    Attributes:
        start: From the command to the first step.
        evaluations: Number of evaluations.
        evaluation: One of them.
        iters: Batches of each; None for the whole split.
        publishing: The last one, of the published weights.
    """

    start: float
    evaluations: int
    evaluation: float
    iters: int | None
    publishing: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.start + self.evaluations * self.evaluation + self.publishing


class _Sizing:
    """The search for a size.

    Args:
        inputs: The data, and settings with which it was prepared.
        document: What the config begins with.
        seconds: The time of a run.
        report: Receives what is being timed.
    """

    def __init__(self, inputs: Inputs, document: dict[str, Any], seconds: float, report: Progress) -> None:
        self._inputs, self._document, self._seconds, self._report = inputs, document, seconds, report
        self._name = find_device(inputs.config.train.device)
        # Found with the first size: every run compares precisions again.
        self._dtype = ""

    def sized(self) -> Sized:
        """The config."""
        chosen, larger = self._largest()
        self._report("timing the chosen size", 0, None)
        planned = chosen.reads(_STEP_SHARE * self._seconds)
        timed, start = self._time_start(replace(chosen.recipe, read=planned))
        costs, recipe = self._costs(timed, start), timed.recipe
        steps = int(timed.reads(self._seconds - costs.total) / recipe.tokens_per_step)
        step = recipe.tokens_per_step / timed.per_second
        if steps < _FEWEST_STEPS:
            raise InputError(
                f"{duration(self._seconds)} are too short for a run",
                why=f"{_FEWEST_STEPS} steps take {duration(_FEWEST_STEPS * step)} here, and all else "
                f"{duration(costs.total)}",
                hint="allow more time",
            )
        return Sized(
            document=self._described(recipe, steps, costs),
            parameters=timed.parameters,
            epochs=steps * recipe.tokens_per_step / recipe.train_tokens,
            tokens_per_second=timed.per_second,
            seconds=steps * step + costs.total,
            reasons=(
                *_reasons(timed, larger, self._inputs.dataset.name, steps, self._seconds),
                _expected(steps, step, costs),
            ),
        )

    def _largest(self) -> tuple[_Timed, _Timed | None]:
        """The largest size that the time and the text train, and the next one if it was timed."""
        passed, failed, at = -1, len(WIDTHS), WIDTHS.index(_FIRST_WIDTH)
        seconds = _STEP_SHARE * self._seconds
        read, found = _FIRST_SPEED * seconds, dict[int, _Timed | None]()
        while failed - passed > 1:
            self._report(f"timing a model of width {WIDTHS[at]}", 0, None)
            timed = found[at] = self._time(self._recipe(WIDTHS[at], read))
            if timed is not None and self._is_trained(timed.parameters, timed.reads(seconds)):
                passed = at
            else:
                failed = at
            if timed is not None:
                read, at = timed.reads(seconds), self._predicted(timed, seconds)
            at = min(max(at, passed + 1), failed - 1)
        smallest = max(passed, 0)
        chosen = found[smallest]
        if chosen is None:
            raise InputError(
                "no model fits in memory",
                why=f"the vocabulary has {self._inputs.tokens.dataset.tokenizer.vocab_size:,} tokens",
                hint="set data.vocab_size=4096",
            )
        return chosen, found.get(smallest + 1)

    def _is_trained(self, parameters: int, read: float) -> bool:
        """Whether so many tokens train so many parameters, and the text is long enough for them."""
        most = PARAMETERS_PER_TOKEN * self._inputs.tokens.train_tokens
        return parameters <= min(most, read / TOKENS_PER_PARAMETER)

    def _predicted(self, timed: _Timed, seconds: float) -> int:
        """The largest size that would be trained if operations took as long as those that were timed."""
        rate = timed.per_second * flops.training(timed.shape)
        for at in reversed(range(len(WIDTHS))):
            shape = self._settled(replace(timed.recipe, width=WIDTHS[at])).model.shape()
            if self._is_trained(n_params(shape), rate / flops.training(shape) * seconds):
                return at
        return 0

    def _recipe(self, width: int, read: float) -> Recipe:
        tokens = self._inputs.tokens
        most = MOST_EPOCHS * tokens.train_tokens
        vocab_size = tokens.dataset.tokenizer.vocab_size
        return Recipe(width, min(read, most), tokens.train_tokens, tokens.val_tokens, vocab_size)

    def _settled(self, recipe: Recipe, *, ngram: bool = False) -> RunConfig:
        """The config of a run with a recipe, as the run settles it."""
        run = reading.parse(
            self._described(recipe, max(1, int(recipe.read / recipe.tokens_per_step))), origin="the config"
        )
        shape = {"vocab_size": recipe.vocab_size, **({} if ngram else {"ngram": 0})}
        model = run.model.model_copy(update=shape)
        return run.model_copy(update={"data": self._inputs.config.data, "model": model})

    def _described(self, recipe: Recipe, steps: int, costs: _Costs | None = None) -> dict[str, Any]:
        """The config as a file has it."""
        train = recipe.train(steps, costs.evaluations if costs else MOST_EVALUATIONS)
        if costs and costs.iters is not None:
            train["eval_iters"] = costs.iters
        if self._name == "cpu":
            # Compiling takes a minute, and gains little there.
            train["compile"] = "off"
        return {**self._document, "model": recipe.model(), "train": train}

    def _time(self, recipe: Recipe) -> _Timed | None:
        """Time a recipe, without n-gram counts; None if it does not fit in memory."""
        config = self._settled(recipe)
        if not self._fits(config, Device(self._name, self._dtype or "float32", False)):
            return None
        model = GPT(config.model.shape(), config.train.seed).to(self._name)
        share = autotune.share_of(model, config.train)
        if not self._dtype:
            trial = config.model_copy(update={"train": share.model_copy(update={"compile": "off"})})
            self._dtype = autotune.choose(model, trial, self._inputs.dataset, self._name).dtype
        device = memory.fit(config, Device(self._name, self._dtype, False))
        subject = Subject(config, model, self._inputs.dataset, device, share)
        return _Timed(recipe, subject, _speed(training(subject, whole_steps=True), _TRIAL_SECONDS))

    def _fits(self, config: RunConfig, device: Device) -> bool:
        with suppress(InputError):
            memory.check(config, self._name)
            memory.fit(config, device)
            return True
        return False

    def _time_start(self, recipe: Recipe) -> tuple[_Timed, float]:
        """Start a run with a recipe and time its steps; returns the seconds of the start as well."""
        config = self._settled(recipe, ngram=True)
        clock = time.perf_counter()
        model = GPT(config.model.shape(), config.train.seed)
        if config.model.ngram:
            model.ngram.count(self._inputs.tokens.train[:])
        model.to(self._name)
        device = autotune.choose(model, config, self._inputs.dataset, self._name)
        start = time.perf_counter() - clock
        share = autotune.share_of(model, config.train)
        subject = Subject(config, model, self._inputs.dataset, device, share)
        return _Timed(recipe, subject, _speed(training(subject, whole_steps=True), _FINAL_SECONDS)), start

    def _costs(self, timed: _Timed, start: float) -> _Costs:
        """What the run does besides steps."""
        subject, tokens = timed.subject, self._inputs.tokens.val_tokens
        if not tokens:
            return _Costs(_IMPORT_SECONDS + start, MOST_EVALUATIONS, 0.0, None, 0.0)
        per_second = _speed(evaluation(subject), _TRIAL_SECONDS)
        exact = replace(subject, device=replace(subject.device, dtype="float32"))
        whole, share = tokens / per_second, _EVALUATION_SHARE * self._seconds
        times = max(_FEWEST_EVALUATIONS, min(MOST_EVALUATIONS, int(share / whole)))
        iters = None
        if times * whole > 2 * share:
            times, batch = MOST_EVALUATIONS, measure.ROWS_OF_ESTIMATE * timed.recipe.block_size
            iters = max(1, int(share / times * per_second / batch))
            whole = iters * batch / per_second
        # The published weights are measured once more, in float32.
        last = per_second if exact.device == subject.device else _speed(evaluation(exact), _TRIAL_SECONDS)
        return _Costs(_IMPORT_SECONDS + start, times, whole, iters, tokens / last)


def _speed(piece: Piece, seconds: float) -> float:
    """Tokens per second of a kind of work, without its first piece, which allocates what later ones reuse."""
    work = Work("", piece, "", None, None)
    work.speed(0.0)
    return work.speed(seconds)


def _reasons(timed: _Timed, larger: _Timed | None, name: str, steps: int, seconds: float) -> Iterator[str]:
    """How the settings follow from the text, the time and the speed."""
    recipe, device = timed.recipe, timed.subject.device
    read = steps * recipe.tokens_per_step
    epochs = read / recipe.train_tokens
    yield (
        f"text: dataset {name} has {recipe.train_tokens:,} tokens to train on and {recipe.val_tokens:,} to "
        f"evaluate on, of a vocabulary of {recipe.vocab_size:,}"
    )
    yield f"speed: {timed.per_second:,.0f} tokens/s on {device.name} in {device.dtype}"
    each = read / timed.parameters
    yield (
        f"size: {count(timed.parameters)} parameters, which leaves {each:.2g} tokens for each of them"
        f"{_why_not_larger(timed, larger, seconds)}"
    )
    often = f"the text is read {epochs:.1f} times"
    if epochs > 0.97 * MOST_EPOCHS:
        often += ", and more would teach it by heart: a longer text would use more time"
    elif epochs <= 1:
        often = f"the run is {epochs:.0%} as long as the text"
    regular = f"dropout {recipe.dropout:g}, weight decay {recipe.weight_decay(steps):g}"
    yield f"repetition: {often}, therefore {regular}"
    if recipe.ngram:
        yield f"counts: of {recipe.ngram} tokens, mixed in, as they help a network that has read little"


def _why_not_larger(timed: _Timed, larger: _Timed | None, seconds: float) -> str:
    """Why the next size was not chosen, if it was timed."""
    if larger is None:
        return ""
    if larger.parameters > PARAMETERS_PER_TOKEN * timed.recipe.train_tokens:
        return f"; the text is too short for the next size of {count(larger.parameters)}"
    each = larger.reads(_STEP_SHARE * seconds) / larger.parameters
    return f"; the next size of {count(larger.parameters)} would have {each:.2g}"


def _expected(steps: int, step: float, costs: _Costs) -> str:
    """What the expected time is made of."""
    total = duration(steps * step + costs.total)
    return (
        f"time: {total} expected, {duration(costs.start)} to start, {duration(steps * step)} for {steps:,} "
        f"steps, {duration(costs.evaluations * costs.evaluation)} for {costs.evaluations} evaluations, "
        f"{duration(costs.publishing)} to publish"
    )
