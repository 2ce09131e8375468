"""A worker's pulse against a keeper that the test plays: nothing is said twice, nothing promised is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.policy import Policies, as_every
from ktrain.checkpoint.pulse import Pulse
from ktrain.errors import ConflictError, DeadlineError, KtrainError, UnavailableError

TIMEOUTS = Timeouts(patience_s=8)


class Keeper:
    """Answers what the test put in `answer`; loses answers or refuses where told to."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {"ready": True, "committed": {}, "stop": None, "restore": None}
        self.said: list[dict[str, Any]] = []
        self.events: dict[int, Any] = {}  # index -> event, as a real keeper tells them apart
        self.lose = 0
        self.came = threading.Event()  # an event
        self.refusal: KtrainError | None = None

    def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        self.said.append(params)
        for index, event in enumerate(params["events"], start=params["events_from"]):
            assert self.events.setdefault(index, event) == event, "two events under one number"
        if self.events:
            self.came.set()
        if self.lose:
            self.lose -= 1
            raise UnavailableError("the answer was lost")
        stand = {"events_taken": len(self.events), "events_heard": 0, "events_logged": 0}
        return {**stand, **self.answer}


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


@pytest.fixture
def pulse(keeper: Keeper) -> Iterator[Pulse]:
    made = Pulse(keeper, rank=0, epoch=3, policies=Policies(), timeouts=TIMEOUTS, clock=SYSTEM_CLOCK)
    made.start()
    yield made
    made.end()


def soon() -> Deadline:
    return Deadline.after(30.0)


def announce(keeper: Keeper, pulse: Pulse, step: int | None, *, confirmed: bool = False) -> None:
    """Puts an announcement before the pulse and waits until it was heard and answered."""
    keeper.answer["stop"] = {"step": step, "confirmed": confirmed, "reason": "test"}
    for _ in range(2):
        pulse.wait_answer(soon(), "hear")


def test_events_whose_answers_were_lost_arrive_once_and_in_order(keeper: Keeper, pulse: Pulse) -> None:
    for number in range(30):
        keeper.lose = number % 3
        pulse.emit("log", number=number)
        if number % 7 == 0:
            pulse.wait_answer(soon(), "answer")
    keeper.lose = 0
    assert pulse.flush(soon())
    assert [keeper.events[index]["number"] for index in range(30)] == list(range(30)) and len(keeper.events) == 30


def test_what_steps_say_is_taken_along_by_few_pulses_and_awaited_by_nobody(keeper: Keeper, pulse: Pulse) -> None:
    pulse.wait_answer(soon(), "first")
    before = len(keeper.said)
    for step in range(1, 1001):
        pulse.emit("step", step=step, loss=1.0, samples=None)
        pulse.note_step(step)
    assert keeper.came.wait(30) and len(keeper.said) - before <= 100
    assert pulse.flush(soon())
    assert [keeper.events[index]["step"] for index in range(1000)] == list(range(1, 1001))


def test_end_hands_over_the_last_word(keeper: Keeper, pulse: Pulse) -> None:
    pulse.note_closed()
    pulse.emit("log", number=1)
    pulse.end()
    pulse.end()
    assert keeper.said[-1]["closed"] and len(keeper.events) == 1


def test_fence_ends_every_wait_of_a_worker_of_an_older_attempt(keeper: Keeper, pulse: Pulse) -> None:
    pulse.wait_answer(soon(), "first")
    pulse.check_fence()
    keeper.refusal = ConflictError("rank 0: the run is in epoch 4")
    with pytest.raises(ConflictError, match="epoch 4"):
        pulse.wait_answer(soon(), "next")
    with pytest.raises(ConflictError):
        pulse.check_fence()
    assert not pulse.flush(soon()) or keeper.events == {}


def test_keeper_away_is_named_with_the_cause_when_the_wait_ends(keeper: Keeper, pulse: Pulse) -> None:
    keeper.refusal = UnavailableError("agent.sock: connection refused")
    with pytest.raises(DeadlineError, match="rank 0, join the head: not done within 1 s.*connection refused"):
        pulse.wait_answer(Deadline.after(1.0), "join the head")


def test_stop_step_not_reached_yet_is_promised_and_met(keeper: Keeper, pulse: Pulse) -> None:
    assert pulse.note_step(4) is None
    announce(keeper, pulse, None)  # asked for, and no step chosen yet
    assert keeper.said[-1]["stop_ack"] is None
    announce(keeper, pulse, 6)
    assert keeper.said[-1]["stop_ack"] == [6, True]
    assert pulse.note_step(5) is None
    met = pulse.note_step(6)
    assert met is not None and met["step"] == 6


@pytest.mark.parametrize("step", [6, 7])
def test_stop_step_reached_already_is_refused(keeper: Keeper, pulse: Pulse, step: int) -> None:
    pulse.note_step(step)
    announce(keeper, pulse, 6)
    assert keeper.said[-1]["stop_ack"] == [6, False]
    announce(keeper, pulse, 9)
    assert keeper.said[-1]["stop_ack"] == [9, True]


def test_stop_promised_is_not_unsaid_by_a_keeper_that_came_back_empty(keeper: Keeper, pulse: Pulse) -> None:
    pulse.note_step(4)
    announce(keeper, pulse, 6)
    keeper.answer |= {"stop": None, "ready": False}
    pulse.wait_answer(soon(), "hear")
    met = pulse.note_step(6)
    assert met is not None, "the others may have been told that this rank stops at step 6"
    assert keeper.said[-1]["stop_ack"] == [6, True]


def test_stop_promise_taken_back_is_told(keeper: Keeper, pulse: Pulse) -> None:
    announce(keeper, pulse, 6)
    pulse.refuse_stop(6)
    pulse.wait_answer(soon(), "tell")
    assert keeper.said[-1]["stop_ack"] == [6, False]


def test_restore_word_keeps_its_long_part_for_its_round_alone(keeper: Keeper, pulse: Pulse) -> None:
    keeper.answer["restore"] = {"round": 1, "state": "loading", "sources": {"0": []}}
    pulse.wait_answer(soon(), "hear")
    keeper.answer["restore"] = {"round": 1, "state": "go"}
    pulse.wait_answer(soon(), "hear")
    word = pulse.wait_answer(soon(), "hear")["restore"]
    assert word["state"] == "go" and "sources" in word
    keeper.answer["restore"] = {"round": 2, "state": "failed"}
    for _ in range(2):
        word = pulse.wait_answer(soon(), "hear")["restore"]
    assert "sources" not in word


def test_request_stop_is_carried_by_the_next_pulse(keeper: Keeper, pulse: Pulse) -> None:
    pulse.request_stop("SIGTERM")
    for _ in range(2):
        pulse.wait_answer(soon(), "carry")
    assert keeper.said[-1]["stop_wanted"] == "SIGTERM"


def test_cadence_of_numbers_is_not_changed_by_an_announcement(keeper: Keeper, pulse: Pulse) -> None:
    keeper.answer["cadence"] = [1, 5, 3]
    pulse.wait_answer(soon(), "hear")
    assert pulse.schedule.said is None and pulse.schedule.due(10) and not pulse.schedule.due(9)


def test_cadence_auto_is_changed_ahead_and_said_back(keeper: Keeper) -> None:
    policies = Policies(as_every("auto"))
    pulse = Pulse(keeper, rank=0, epoch=3, policies=policies, timeouts=TIMEOUTS, clock=SYSTEM_CLOCK)
    pulse.start()
    pulse.note_step(4)
    keeper.answer["cadence"] = [1, 12, 6]
    for _ in range(2):
        pulse.wait_answer(soon(), "hear")
    pulse.end()
    assert [step for step in range(5, 25) if pulse.schedule.due(step)] == [10, 12, 18, 24]
    assert keeper.said[-1]["cadence"] == [1, 12, 6, True]


def test_refusal_of_what_was_restored_ends_the_rank_at_its_next_step(keeper: Keeper, pulse: Pulse) -> None:
    pulse.check_fence()
    keeper.answer["refusal"] = "the state of step 20 is not what it was"
    pulse.wait_answer(soon(), "hear")
    with pytest.raises(KtrainError, match="step 20") as caught:
        pulse.check_fence()
    assert caught.value.kind == "error"
    pulse.emit("log", number=1)
    with pytest.raises(KtrainError):
        pulse.wait_answer(soon(), "hand over")


def test_wait_for_the_log_ends_once_the_head_has_them_in_time_or_hurried(keeper: Keeper, pulse: Pulse) -> None:
    pulse.emit("log", value=1)
    pulse.emit("log", value=2)
    assert pulse.log.num_said == 2
    hurried = threading.Event()
    assert not pulse.log.wait(2, Deadline.after(0.05), hurried)
    keeper.answer["events_heard"] = 1
    assert pulse.log.wait(1, soon(), hurried) and pulse.log.num_heard == 1
    hurried.set()
    assert not pulse.log.wait(2, soon(), hurried)
    keeper.answer["events_heard"] = 2
    assert pulse.log.wait(2, soon(), threading.Event())
