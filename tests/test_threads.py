"""The threads of a CPU: the faster way to use them is found, changes no result, and is restored."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import quill
from quill import threads
from quill.config.settings import ModelConfig, TrainConfig
from quill.evaluation import measure
from quill.model.gpt import GPT
from quill.training.device import Device
from quill.training.trainer import Trainer

TOKENS = torch.randint(0, 29, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.int16).numpy()


class Computer:
    """A computer on which one way is faster, and the clock that shows it."""

    def __init__(self, faster: str = "first") -> None:
        self.way, self.faster, self.now = "", faster, 0.0
        self.done: list[str] = []
        self.is_in_doubt = True

    def pace(self) -> threads.Pace:
        def change(way: str) -> None:
            self.way = way

        return threads.Pace(
            (lambda: change("first"), lambda: change("second")),
            lambda: change("restored"),
            lambda: self.now,
            lambda: self.is_in_doubt,
        )

    def work(self, pace: threads.Pace, pieces: int) -> list[str]:
        """The ways in which so many pieces were done."""
        done = []
        for _ in range(pieces):
            with pace.piece():
                done.append(self.way)
                self.now += 1.0 if self.way == self.faster else 1.5
        return done


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads on two processors, whatever there is."""
    before = torch.get_num_threads()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads._Cores, "are_shared", lambda self: True)


def is_asleep() -> bool:
    return threads._idle_team is not None


class TestPace:
    @pytest.mark.parametrize("faster", ["first", "second"])
    def test_nearly_all_pieces_are_done_in_the_faster_way(self, faster: str) -> None:
        computer = Computer(faster)
        with computer.pace() as pace:
            done = computer.work(pace, 2000)
        assert done[0] == "first"
        assert set(done) == {"first", "second"}
        assert done[100:].count(faster) > 0.97 * len(done[100:])
        assert computer.way == "restored"

    def test_a_change_is_noticed_within_two_hundred_pieces(self) -> None:
        computer = Computer("second")
        with computer.pace() as pace:
            computer.work(pace, 2000)
            computer.faster = "first"
            assert computer.work(pace, 210)[-1] == "first"

    def test_a_change_is_doubted_sooner_than_what_was_confirmed(self) -> None:
        computer = Computer("second")
        with computer.pace() as pace:
            assert computer.work(pace, 30)[-1] == "second"
            computer.faster = "first"
            assert computer.work(pace, 30)[-1] == "first"

    def test_nothing_is_tried_without_doubt(self) -> None:
        computer = Computer("second")
        computer.is_in_doubt = False
        with computer.pace() as pace:
            assert set(computer.work(pace, 500)) == {"first"}
            computer.is_in_doubt = True
            assert computer.work(pace, 30)[-1] == "second"

    def test_one_slow_piece_in_a_trial_decides_nothing(self) -> None:
        computer = Computer("second")
        with computer.pace() as pace:
            done = computer.work(pace, 13)
            assert done[-1] == "second"
            with pace.piece():
                computer.now += 50.0
            assert computer.work(pace, 20)[-1] == "second"

    def test_the_body_of_a_loop_is_a_piece(self) -> None:
        computer = Computer("second")
        with computer.pace() as pace:
            for _ in pace.each(range(100)):
                computer.done.append(computer.way)
                computer.now += 1.0 if computer.way == "second" else 1.5
        assert len(computer.done) == 100
        assert computer.done[-1] == "second"

    def test_a_piece_that_fails_is_not_counted(self) -> None:
        computer = Computer()
        with computer.pace() as pace:
            for _ in range(100):
                with suppress(ZeroDivisionError), pace.piece():
                    raise ZeroDivisionError
            assert set(computer.work(pace, threads._FIRST_WAIT)) == {"first"}

    def test_without_a_choice_nothing_changes(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with threads.best_number() as pace, threads.best_waiting("cpu") as other:
                for _ in pace.each(other.each(range(50))):
                    assert torch.get_num_threads() == 1
                    assert not is_asleep()
        finally:
            torch.set_num_threads(before)


def test_one_thread_is_restored_afterwards() -> None:
    before = torch.get_num_threads()
    with suppress(ZeroDivisionError), threads.one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("two_threads", "in_doubt")
class TestWaiting:
    def test_threads_sleep_while_that_is_faster(self) -> None:
        now, slept = 0.0, []
        with suppress(ZeroDivisionError), threads.best_waiting("cpu", lambda: now) as pace:
            for _ in pace.each(range(100)):
                slept.append(is_asleep())
                now += 1.0 if is_asleep() else 2.0
                assert torch.get_num_threads() == 2
            raise ZeroDivisionError
        assert not slept[0]
        assert sum(slept) > 75
        assert not is_asleep(), "restored after an error"

    def test_there_is_one_choice_at_a_time(self) -> None:
        with threads.best_waiting("cpu") as outer:
            assert outer._trials is not None
            with threads.best_waiting("cpu") as inner:
                assert inner._trials is None
        with threads.best_waiting("cpu") as next_one:
            assert next_one._trials is not None

    @pytest.mark.parametrize("device", ["cuda", "mps", "none"])
    def test_other_devices_have_none(self, device: str) -> None:
        with threads.best_waiting(device) as pace:
            assert pace._trials is None

    def test_too_few_threads_for_the_processors_spin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
        with threads.best_waiting("cpu") as pace:
            assert pace._trials is None

    def test_an_idle_team_ends(self) -> None:
        torch.zeros(1 << 17).add_(1)
        tasks = Path("/proc/self/task")
        if not tasks.is_dir():
            pytest.skip("threads are counted in /proc")
        team = threads._IdleTeam()
        assert team._thread.is_alive()
        assert len(list(tasks.iterdir())) >= 3
        team.end()
        assert not team._thread.is_alive()

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_results_are_the_same_bits(self, dtype: str) -> None:
        """Wide enough that threads share each operation."""
        shape = ModelConfig(
            n_layer=1, n_head=2, n_embd=128, block_size=64, dropout=0.1, vocab_size=29
        ).shape()
        config = TrainConfig(batch_size=8, max_iters=9)
        results = []
        for asleep in (False, True):
            threads._let_sleep(asleep)
            try:
                trainer = Trainer(GPT(shape, 1), config, TOKENS, Device("cpu", dtype, False))
                steps = [trainer.advance() for _ in range(3)]
                loss = measure.evaluate(trainer.model, TOKENS, n_bytes=5000).loss
            finally:
                threads._let_sleep(False)
            results.append((steps, loss, torch.cat([p.flatten() for p in trainer.model.parameters()])))
        assert results[0][:2] == results[1][:2]
        assert torch.equal(results[0][2], results[1][2])

    def test_a_run_of_the_library_leaves_nothing_behind(
        self, tmp_path: Path, tiny_text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def always(best: object, other: threads._Change, is_in_doubt: object) -> Generator[None, float, None]:
            while True:
                other()
                yield

        monkeypatch.setattr(threads, "_trials", always)
        slept: dict[str, bool] = {}
        (tmp_path / "text.txt").write_text(tiny_text, encoding="utf-8")
        quill.train(
            data=str(tmp_path / "text.txt"),
            registry=tmp_path / "weights",
            observer=lambda event: slept.update({type(event).__name__: is_asleep()}),
            max_iters=4, eval_interval=2, n_layer=1, n_head=1, n_embd=8, block_size=8, batch_size=2,
            dtype="float32", device="cpu",
        )  # fmt: skip
        assert slept["Stepped"] and slept["Evaluated"]
        assert not is_asleep()
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("used", "shared"), [(20.0, False), (18.0, False), (15.0, True), (9.8, True)])
def test_cores_are_shared_when_threads_that_spin_get_less(
    used: float, shared: bool, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    wall, cpu = iter([100.0, 110.0]), iter([7.0, 7.0 + used])
    monkeypatch.setattr(threads, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(threads, "process_time", lambda: next(cpu))
    assert threads._Cores().are_shared() == shared
