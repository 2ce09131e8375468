from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.checkpoint.agreement import RestoreAgreement, RestoreState, StopAgreement
from ktrain.checkpoint.lineage import Candidate, Copy
from ktrain.testing.fake_clock import FakeClock
from tests.unit.checkpoint.builders import identity

WORLD = 3
COPY = Copy(contract.TIER_MEMORY, "node-0", 1, identity(10, world_size=WORLD))
BAD = {"key": list(COPY.key()), "corrupt": True, "reason": "flipped"}
AWAY_KEY = ("bucket", "0a1b", 2, 10, 1)
AWAY = {"key": list(AWAY_KEY), "corrupt": False, "reason": "503"}


def agreement() -> RestoreAgreement:
    return RestoreAgreement(WORLD, 60.0)


def tell(found: RestoreAgreement, rank: int, status: str, round: int, **fields: Any) -> None:
    found.report(rank, {"status": status, "round": round, **fields}, Deadline.after(60.0, FakeClock()))


def loading() -> RestoreAgreement:
    found = agreement()
    for rank in range(WORLD):
        tell(found, rank, "waiting", 0)
    found.load(Candidate(identity(10, world_size=WORLD)), "")
    return found


@given(st.permutations(range(WORLD)), st.lists(st.sampled_from(["ready", "failed"]), min_size=WORLD, max_size=WORLD))
def test_restore_any_order_of_answers_settles_only_when_all_are_ready(order: list[int], answers: list[str]) -> None:
    found = loading()
    for count, rank in enumerate(order):
        assert found.state is RestoreState.LOADING, f"decided after {count} of {WORLD} answers"
        assert sorted(found.late_ranks()) == sorted(order[count:])
        fields = {"copies": [BAD]} if answers[rank] == "failed" else {}
        tell(found, rank, answers[rank], 1, **fields)
    assert found.state is (RestoreState.PLANNING if "failed" in answers else RestoreState.SETTLED)
    assert found.excluded == ({COPY.key()} if "failed" in answers else set())


def test_restore_answers_of_an_older_round_do_not_count() -> None:
    found = loading()
    for rank in range(WORLD):
        tell(found, rank, "failed", 1, copies=[BAD])
    found.load(Candidate(identity(5, world_size=WORLD)), "")
    tell(found, 0, "ready", 2)
    tell(found, 1, "ready", 2)
    tell(found, 2, "ready", 1)
    assert found.state is RestoreState.LOADING and found.late_ranks() == [2]
    tell(found, 2, "ready", 2)
    assert found.state is RestoreState.SETTLED


def test_restore_copy_in_the_bucket_that_cannot_be_read_is_tried_twice_and_never_called_bad() -> None:
    """Else one refused request would cost the steps since the checkpoint before."""
    found = loading()
    for number in (1, 2):
        assert AWAY_KEY not in found.excluded
        tell(found, 0, "ready", number)
        tell(found, 1, "failed", number, copies=[BAD, AWAY])
        tell(found, 2, "failed", number, copies=[AWAY])  # two ranks say it of the same round
        found.load(Candidate(identity(10, world_size=WORLD)), "")
    assert found.corrupt == {COPY.key()} and found.excluded == {COPY.key(), AWAY_KEY}


def test_restore_peer_that_cannot_be_reached_is_left_out_at_once_and_not_called_bad() -> None:
    """A rank has waited for it as long as is reasonable before it says so."""
    found = loading()
    tell(found, 0, "ready", 1)
    tell(found, 1, "failed", 1, copies=[{**BAD, "corrupt": False}])
    tell(found, 2, "ready", 1)
    assert found.corrupt == set() and found.excluded == {COPY.key()}


def test_restore_nothing_is_planned_before_every_rank_asked() -> None:
    found = agreement()
    for rank in (2, 0):
        tell(found, rank, "waiting", 0)
    assert found.state is RestoreState.GATHERING and found.late_ranks() == [1]


def test_restore_patience_begins_with_the_first_rank() -> None:
    found, clock = agreement(), FakeClock()
    found.report(0, {"status": "waiting", "round": 0}, Deadline.after(5.0, clock))
    clock.advance(4.0)
    found.report(1, {"status": "waiting", "round": 0}, Deadline.after(5.0, clock))
    assert found.deadline is not None and found.deadline.remaining_s() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("statuses", "state"),
    [
        (["ready", "ready", "ready"], RestoreState.PLANNING),  # the old head may not have recorded its choice
        (["ready", "applied", "ready"], RestoreState.GO),  # it had: nobody applies before it is recorded
        (["applied", "applied", "applied"], RestoreState.GO),
        (["waiting", "failed", "ready"], RestoreState.PLANNING),
    ],
)
def test_restore_new_head_in_the_middle_goes_on_from_what_ranks_say(statuses: list[str], state: RestoreState) -> None:
    found = agreement()
    for rank, status in enumerate(statuses):
        tell(found, rank, status, 4)
    assert found.state is state and found.round == 4
    assert found.done() == (statuses == ["applied"] * 3)


class Stop(RuleBasedStateMachine):
    """Ranks step, hear and answer in any order. Whoever stops, stops where all stop."""

    def __init__(self) -> None:
        super().__init__()
        self.found = StopAgreement("test")
        self.steps = [0] * WORLD
        self.heard: list[dict[str, Any] | None] = [None] * WORLD  # the newest announcement that reached a rank
        self.acks: list[tuple[int, bool] | None] = [None] * WORLD
        self.told: dict[int, tuple[int, tuple[int, bool] | None]] = {}  # what reached the head, perhaps long ago

    @rule(rank=st.integers(0, WORLD - 1), count=st.integers(1, 30))
    def step(self, rank: int, count: int) -> None:
        for _ in range(count):
            heard = self.heard[rank]
            if heard is not None and heard["step"] == self.steps[rank] and self.steps[rank] > 0:
                return  # it waits there for the word of the others
            self.steps[rank] += 1

    @rule(rank=st.integers(0, WORLD - 1))
    def hear_and_answer(self, rank: int) -> None:
        word = self.found.to_json()
        if word["step"] is None:
            return
        self.heard[rank] = word
        ack = self.acks[rank]
        if ack is None or ack[0] != word["step"]:
            self.acks[rank] = (word["step"], self.steps[rank] < word["step"])

    @rule(rank=st.integers(0, WORLD - 1))
    def report(self, rank: int) -> None:
        self.told[rank] = (self.steps[rank], self.acks[rank])
        steps = {rank: step for rank, (step, _) in self.told.items()}
        acks = {rank: ack for rank, (_, ack) in self.told.items() if ack is not None}
        self.found.advance(steps, acks, range(WORLD))

    @precondition(lambda self: self.found.confirmed)
    @invariant()
    def nobody_is_beyond_a_confirmed_step(self) -> None:
        assert self.found.step is not None and max(self.steps) <= self.found.step

    @precondition(lambda self: self.found.confirmed)
    @invariant()
    def everybody_knows_a_confirmed_step(self) -> None:
        assert all(heard is not None and heard["step"] == self.found.step for heard in self.heard)


TestStop = Stop.TestCase
TestStop.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("steps_per_word", [1, 10, 1000])
def test_stop_ranks_that_step_faster_than_word_travels_are_caught(steps_per_word: int) -> None:
    found, step, ack = StopAgreement("test"), 0, None
    for _ in range(20):
        found.advance({0: step}, {} if ack is None else {0: ack}, [0])
        if found.confirmed:
            break
        step += steps_per_word  # until the word arrives
        assert found.step is not None
        ack = (found.step, step < found.step)
    assert found.confirmed


def test_stop_rank_that_takes_its_promise_back_gets_a_later_step() -> None:
    found = StopAgreement("test")
    found.advance({0: 3, 1: 4}, {}, [0, 1])
    first = found.step
    assert first is not None
    found.advance({0: 3, 1: 4}, {0: (first, True)}, [0, 1])
    assert not found.confirmed
    found.advance({0: first, 1: 4}, {0: (first, False), 1: (first, True)}, [0, 1])
    assert not found.confirmed and found.step is not None and found.step > first


def test_stop_closed_rank_takes_part_no_more() -> None:
    found = StopAgreement("test")
    views = {rank: {"step": 5, "stop_ack": None, "closed": rank == 1} for rank in (0, 1)}
    found.hear(views, [0, 1])
    views[0]["stop_ack"] = [found.step, True]
    found.hear(views, [0, 1])
    assert found.confirmed
