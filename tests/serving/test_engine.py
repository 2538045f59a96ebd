"""Loading on demand, the queue, clients that leave, and what happens when something inside breaks."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from quill.checkpoint.load import load_checkpoint
from quill.config.settings import SampleConfig, ServeConfig
from quill.errors import DivergedError, ResourceError
from quill.generation.generator import Generator
from quill.registry.store import Registry
from quill.serving import lane, streams
from quill.serving.engine import Engine
from quill.serving.errors import ApiError
from quill.serving.jobs import Gone, Job, Piece


def in_engine(work: Callable[[Engine], Awaitable[None]], **settings: Any) -> None:
    """Run something with an engine."""

    async def main() -> None:
        engine = Engine(ServeConfig(**settings), "cpu")
        engine.start()
        try:
            await asyncio.wait_for(work(engine), 60)
        finally:
            engine.stop()

    asyncio.run(main())


def job(tokens: int = 20, seed: int = 1, n: int = 1, **more: Any) -> Job:
    """A job of three tokens' prompt."""
    return Job([[3, 4, 5]], SampleConfig(max_new_tokens=tokens, seed=seed), n=n, **more)


async def text_of(engine: Engine, version: Any, made: Job) -> str:
    """The text of a job's samples."""
    resident = await engine.acquire(version)
    engine.submit(resident, made)
    try:
        return "|".join(p.text for p in await streams.collect(made, 30) if p.text)
    finally:
        engine.finish(resident, made)


def wait_for(condition: Callable[[], bool]) -> Awaitable[None]:
    """Wait up to ten seconds for something to come true."""

    async def wait() -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.01)

    return wait()


def test_many_jobs_side_by_side_have_the_texts_of_each_alone(tiny):
    async def work(engine: Engine) -> None:
        alone = [(await text_of(engine, tiny, job(40, seed))).replace("|", "") for seed in range(20)]
        found = await asyncio.gather(*(text_of(engine, tiny, job(40, seed)) for seed in range(20)))
        together = [text.replace("|", "") for text in found]
        # A batch rounds differently, which may change a token now and then.
        assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 18

    in_engine(work, slots=6)


def test_h5_a_full_queue_and_a_stopped_engine(tiny):
    async def work(engine: Engine) -> None:
        resident = await engine.acquire(tiny)
        running = job(4000)
        engine.submit(resident, running)
        await running.news()
        waiting = job(1)
        engine.submit(await engine.acquire(tiny), waiting)
        with pytest.raises(ApiError) as e:
            await engine.acquire(tiny)
        assert (e.value.status, e.value.code) == (429, "queue_full")
        assert 1 <= int(e.value.headers["retry-after"]) <= 30
        with pytest.raises(ApiError) as late:
            await streams.begin(waiting, 0.05)
        assert (late.value.status, late.value.code) == (429, "queue_timeout")
        engine.stop()
        with pytest.raises(ApiError) as down:
            engine.submit(resident, job())
        assert down.value.status == 503

    in_engine(work, slots=1, max_queue=1)


def test_h5_a_model_that_loads_for_too_long(tiny):
    async def work(engine: Engine) -> None:
        with pytest.raises(ApiError) as e:
            await engine.acquire(tiny)
        assert (e.value.status, e.value.code) == (503, "loading")
        # The load goes on for those who come later.
        await wait_for(lambda: bool(engine.residents.loaded()))
        await engine.acquire(tiny)

    in_engine(work, load_wait=0.0)


def test_one_row_of_every_job_comes_before_the_second_of_any(tiny):
    async def work(engine: Engine) -> None:
        resident = await engine.acquire(tiny)
        order: list[str] = []

        async def follow(name: str, made: Job) -> None:
            deliver = made.deliver

            def note(pieces: Sequence[Piece], error: Exception | None = None) -> None:
                order.extend(f"{name}{p.index}" for p in pieces if p.finish)
                deliver(pieces, error)

            made.deliver = note  # type: ignore[method-assign]
            engine.submit(resident, made)
            await streams.collect(made, 30)

        blocker = asyncio.create_task(follow("x", job(50)))
        await asyncio.sleep(0)
        await asyncio.gather(follow("a", job(5, n=4)), follow("b", job(5, n=2)), blocker)
        assert order == ["x0", "a0", "b0", "a1", "b1", "a2", "a3"]

    in_engine(work, slots=1)


def test_short_prompts_are_read_together_and_long_ones_in_chunks(tiny, monkeypatch):
    monkeypatch.setattr(lane, "_CHUNK", 10)
    loaded = load_checkpoint(tiny)
    turned = lane.Lane(Generator(loaded.model, loaded.tokenizer), 8, lambda *_: None)
    long = Job([[3] * 16], SampleConfig(max_new_tokens=5, seed=1))
    for made in (job(), job(), job(), job(), long):
        turned.add(made)
    begun = []
    for _ in range(4):
        turned.turn()
        begun.append(sum(sample.has_drawn for sample in turned._samples))
    # Three of three tokens, and one of the fourth's; its other two, and eight of sixteen; the other eight.
    assert begun == [3, 4, 5, 5]


def test_h6_a_job_that_is_cancelled_frees_its_slots(tiny):
    async def work(engine: Engine) -> None:
        resident = await engine.acquire(tiny)
        made, other = job(4000, n=3), job(300, seed=2)
        engine.submit(resident, made)
        engine.submit(resident, other)
        await made.news()
        assert resident.lane is not None
        made.cancel("disconnect")
        with pytest.raises(Gone):
            await made.news()
        await wait_for(lambda: resident.lane is not None and resident.lane.running <= 1)
        assert sum(p.drawn for p in await streams.collect(other, 30)) == 300
        await wait_for(lambda: resident.lane is not None and resident.lane.running == 0)

    in_engine(work)


def test_h6_calls_are_done_in_turn_between_the_tokens_of_samples(tiny):
    done: list[int] = []
    hold = threading.Event()

    def broken() -> None:
        raise DivergedError("broken")

    async def work(engine: Engine) -> None:
        resident = await engine.acquire(tiny)
        running = job(4000)
        engine.submit(resident, running)
        held = engine.call(hold.wait)
        left = engine.call(lambda: done.append(1))
        wrong = engine.call(broken)
        last = engine.call(lambda: done.append(2))
        assert engine.queued >= 4
        left.cancel("disconnect")
        hold.set()
        assert await held.result() is True
        with pytest.raises(Gone):
            await left.result()
        with pytest.raises(DivergedError):
            await wrong.result()
        await last.result()
        assert done == [2]
        # The samples went on.
        await running.news()
        assert await running.news(10)
        engine.finish(resident, running)
        hold.clear()
        waiting = [engine.call(hold.wait), engine.call(lambda: done.append(3))]
        engine.cancel_all("shutdown")
        hold.set()
        for call in waiting:
            with pytest.raises(Gone, match="shutdown"):
                await call.result()
        await wait_for(lambda: not engine.unfinished)
        engine.stop()
        with pytest.raises(ApiError):
            engine.call(broken)

    in_engine(work)


def test_a_sample_that_diverges_leaves_the_others_alone(tiny):
    async def work(engine: Engine) -> None:
        resident = await engine.acquire(tiny)
        assert resident.lane is not None
        lane, seen = resident.lane, []
        finite = lane._finite

        def poisoned(ready: Any) -> Any:
            for sample in ready:
                if sample.job is bad and sample.has_drawn:
                    sample.logits = sample.logits * float("nan")
                    seen.append(sample)
            return finite(ready)

        bad, good = job(50), job(50, seed=2)
        wanted = await text_of(engine, tiny, job(50, seed=2))
        lane._finite = poisoned  # type: ignore[method-assign]
        engine.submit(resident, bad)
        engine.submit(resident, good)
        with pytest.raises(DivergedError):
            await streams.collect(bad, 30)
        pieces = await streams.collect(good, 30)
        assert "".join(p.text for p in pieces) == wanted.replace("|", "")
        assert seen

    in_engine(work)


def test_a_step_that_fails_ends_the_jobs_of_its_model_alone(tiny):
    async def work(engine: Engine) -> None:
        resident = await engine.acquire(tiny)
        assert resident.lane is not None
        step = resident.lane.batch.step

        def broken(*_: Any) -> Any:
            raise RuntimeError("the step failed")

        resident.lane.batch.step = broken  # type: ignore[method-assign]
        made = job()
        engine.submit(resident, made)
        with pytest.raises(RuntimeError):
            await streams.collect(made, 30)
        assert engine.trouble == ""
        resident.lane.batch.step = step  # type: ignore[method-assign]
        again = job()
        engine.submit(resident, again)
        assert await streams.collect(again, 30)

    in_engine(work)


def test_an_engine_that_dies_says_so_within_two_seconds(tiny, caplog):
    async def work(engine: Engine) -> None:
        resident = await engine.acquire(tiny)
        made = job(4000)
        engine.submit(resident, made)
        await made.news()

        def die() -> None:
            raise SystemError("killed")

        engine.residents.evict_idle = die  # type: ignore[method-assign]
        engine.residents.load_next = die  # type: ignore[method-assign, assignment]
        began = time.monotonic()
        with pytest.raises(ApiError) as e:
            await streams.collect(made, 30)
        assert e.value.status == 500
        await wait_for(lambda: bool(engine.trouble))
        assert time.monotonic() - began < 2

    in_engine(work)


@pytest.fixture
def several(tiny_registry, tmp_path) -> Registry:
    """A registry of three models."""
    shutil.copytree(tiny_registry.root, tmp_path / "weights")
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "weights" / "tiny", tmp_path / "weights" / name)
    return Registry(tmp_path / "weights")


def names(engine: Engine) -> set[str]:
    """The models in memory."""
    return {r.version.name for r in engine.residents.loaded()}


def test_models_are_kept_within_the_limit_and_never_leave_while_used(several):
    async def work(engine: Engine) -> None:
        a, b, c = (several.resolve(n) for n in ("tiny", "b", "c"))
        first = await engine.acquire(a)
        engine.residents.release(await engine.acquire(b))
        assert names(engine) == {"tiny", "b"}
        third = await engine.acquire(c)
        assert names(engine) == {"tiny", "c"}
        with pytest.raises(ApiError) as e:
            await engine.acquire(b)
        assert e.value.code == "loading"
        assert names(engine) == {"tiny", "c"}
        engine.residents.release(first)
        await engine.acquire(b)
        assert names(engine) == {"b", "c"}
        engine.residents.release(third)

    in_engine(work, max_models=2, load_wait=1.0)


def test_an_idle_model_leaves_memory(tiny):
    async def work(engine: Engine) -> None:
        engine.residents.release(await engine.acquire(tiny))
        await wait_for(lambda: not engine.residents.loaded())
        assert await text_of(engine, tiny, job())

    in_engine(work, keep_alive=0.0)


def test_a_model_larger_than_the_limit_is_refused(tiny):
    async def work(engine: Engine) -> None:
        with pytest.raises(ResourceError, match="bytes of memory"):
            await engine.acquire(tiny)

    in_engine(work, max_memory=1e-6)


def test_a_job_of_no_tokens_ends_at_once(tiny):
    async def work(engine: Engine) -> None:
        resident = await engine.acquire(tiny)
        made = job(0, n=2, score=True, logprobs=1)
        engine.submit(resident, made)
        pieces: list[Piece] = await streams.collect(made, 30)
        assert sorted(p.index for p in pieces if p.finish == "length") == [0, 1]
        assert all(sum(len(p.tokens) for p in pieces if p.index == i) == 3 for i in range(2))

    in_engine(work)


def test_many_streams_write_less_often():
    assert streams.interval(1) == streams.interval(5) == 0.015
    assert streams.interval(16) == pytest.approx(0.032)
    assert streams.interval(1000) == 0.05
