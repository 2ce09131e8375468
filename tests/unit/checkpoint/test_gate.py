"""The first losses after a restore against those of before: pure, and in a whole job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.base.events import Event, FileSink, make
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import AttemptRecord
from ktrain.checkpoint.gate import Gate, LossGate, Mismatch, OnMismatch, as_gate, is_same, recorded_losses
from ktrain.checkpoint.log import read_backwards
from ktrain.checkpoint.policy import Policies
from ktrain.errors import ConfigError
from ktrain.testing.fake_bucket import FakeBucket
from tests.unit.checkpoint.builders import identity
from tests.unit.checkpoint.cluster import Cluster, RestoreFailed

NAN = float("nan")


def step(number: int, loss: float | None, attempt: int = 1) -> Event:
    return make("step", attempt, step=number, loss=loss)


# Policy and comparison


def test_gate_crosses_the_channel_unchanged() -> None:
    policies = Policies(gate=Gate(failures=3, steps=5, then="step-back", tolerance=0.1))
    assert Policies.from_json(policies.to_json()) == policies
    assert as_gate("step-back") == Gate(then=OnMismatch.STEP_BACK) and as_gate(policies.gate) is policies.gate


@pytest.mark.parametrize("values", [{"failures": -1}, {"steps": -1}, {"tolerance": NAN}, {"then": "stop"}])
def test_gate_impossible_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="gate: expected"):
        Gate(**values)  # type: ignore[arg-type]


@given(st.floats(allow_nan=True), st.floats(0, 1))
def test_is_same_every_loss_is_the_same_as_itself(loss: float, tolerance: float) -> None:
    assert is_same(loss, loss, tolerance)


@pytest.mark.parametrize(
    ("expected", "found", "tolerance", "same"),
    [
        (1.0, math.nextafter(1.0, 2), 0.0, False),
        (1.0, 1.04, 0.05, True),
        (1.0, 1.06, 0.05, False),
        (-2.0, -2.05, 0.05, True),
        (1.0, NAN, 0.5, False),
        (math.inf, 1.0, 0.5, False),
        (math.inf, -math.inf, 0.5, False),
    ],
)
def test_is_same_bits_or_within_the_tolerance(expected: float, found: float, tolerance: float, same: bool) -> None:
    assert is_same(expected, found, tolerance) is same


def test_loss_gate_compares_the_first_steps_whenever_it_learns_what_to_expect() -> None:
    gate = LossGate(Gate(steps=3), restored=10)
    for number, loss in ((11, 1.0), (12, 9.0), (13, None), (14, 7.0)):
        gate.take(number, loss)
    assert gate.compare() == []
    gate.know({11: (1.0, True), 12: (2.0, True), 13: (3.0, True), 14: (4.0, True)})
    assert gate.compare() == [Mismatch(12, expected=2.0, found=9.0, exact=True)]
    assert gate.compare() == [], "said once"


def test_loss_gate_other_layouts_are_compared_with_tolerance() -> None:
    gate = LossGate(Gate(tolerance=0.05), restored=0)
    gate.know({1: (1.0, False), 2: (1.0, True)})
    gate.take(1, 1.01)
    gate.take(2, 1.01)
    assert [item.step for item in gate.compare()] == [2]


# What was recorded


def test_recorded_losses_are_those_of_attempts_on_the_restored_state() -> None:
    restored = identity(10, 1)
    history = [
        AttemptRecord(1, restored={"step": 0, "identity": None}),
        AttemptRecord(2, restored={"step": 10, "identity": restored.to_json()}),
        AttemptRecord(3, restored={"step": 5, "identity": identity(5, 1).to_json()}),
    ]
    blocks = [
        [step(11, 77.0, 3), step(12, 78.0, 3)],  # on another state
        [step(11, 1.1, 2)],
        [step(10, 1.0), step(11, 1.1), make("log", 1, step=12), step(12, 1.2), step(13, None)],
    ]
    assert recorded_losses(blocks, restored, history, range(11, 14)) == {11: (1.1, False), 12: (1.2, True)}


def test_recorded_losses_read_no_further_back_than_the_restored_step() -> None:
    def blocks() -> Iterator[list[Event]]:
        yield [step(10, 1.0), step(11, 1.1)]
        raise AssertionError("what is older cannot help")

    assert recorded_losses(blocks(), identity(10, 1), [], range(11, 14)) == {11: (1.1, True)}


def test_recorded_losses_are_found_behind_what_an_older_attempt_said_and_was_logged_late() -> None:
    blocks = [[step(12, 1.2, 2), step(9, 0.9, 1)], [make("attempt_started", 2), step(10, 1.0, 2), step(11, 1.1, 2)]]

    assert recorded_losses(blocks, identity(10, 2), [], range(11, 13)) == {11: (1.1, True), 12: (1.2, True)}


def test_recorded_losses_read_no_further_back_than_the_attempt_that_made_the_state() -> None:
    def blocks() -> Iterator[list[Event]]:
        yield [make("attempt_started", 2), step(11, 1.1, 2)]
        raise AssertionError("what is older cannot help")

    assert recorded_losses(blocks(), identity(10, 2), [], range(11, 13)) == {11: (1.1, True)}


@given(st.lists(st.integers(1, 400), max_size=30))
def test_read_backwards_finds_every_event_of_a_file_once(lengths: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sink = FileSink(Path(folder) / "events.jsonl")
        for number, length in enumerate(lengths):
            sink.emit(make("log", 1, number=number, text="x" * length * 1000))
        sink.close()
        blocks = list(read_backwards(folder, FakeBucket(), timeouts=Timeouts()))
    found = [event.fields["number"] for block in reversed(blocks) for event in block]
    assert found == list(range(len(lengths)))


# In a run


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


@pytest.fixture
def trained(cluster: Cluster) -> Cluster:
    """Steps 10 and 20 are everywhere, and the losses of 1 to 25 are in the log."""
    cluster.restore()
    for number in range(1, 26):
        if number % 10 == 0:
            cluster.save_and_settle(number)
        report(cluster, number, 1 / number)
    return cluster


def report(cluster: Cluster, number: int, loss: float | None) -> None:
    """Rank 0 makes a step; the log of the run has it as a head's would."""
    event = step(number, loss, cluster.epoch)
    for worker in cluster.workers:
        worker.step = number
    cluster.workers[0].events.append(event.to_json())
    sink = FileSink(cluster.folder / "run" / "events.jsonl")
    sink.emit(event)
    sink.close()
    cluster.turn()


def test_restore_losses_of_before_pass_the_gate(trained: Cluster) -> None:
    assert trained.restore() == 20
    for number in range(21, 26):
        report(trained, number, 1 / number)
    trained.turn(3)
    assert trained.said("loss_mismatch") == [] and trained.said("notice") == []


def test_restore_loss_that_differs_in_its_last_bit_is_reported_once_and_training_goes_on(trained: Cluster) -> None:
    assert trained.restore() == 20
    expected = 1 / 22
    found = math.nextafter(expected, 1)
    for number in range(21, 26):
        report(trained, number, found if number == 22 else 1 / number)
    trained.turn(3)
    assert trained.said("loss_mismatch") == [
        {"step": 22, "expected": expected, "found": found, "exact": True, "restored": 20, "from_epoch": 1}
    ]
    assert trained.workers[1].answer["refusal"] is None and trained.restore() == 20


def test_restore_loss_that_is_not_given_is_not_compared(trained: Cluster) -> None:
    assert trained.restore() == 20
    for number in range(21, 26):
        report(trained, number, None)
    assert trained.said("loss_mismatch") == []


def test_restore_ranks_on_devices_that_round_differently_have_a_tolerance(trained: Cluster) -> None:
    trained.begin()
    trained.workers[1].exact = False
    trained.turn(12)
    report(trained, 21, 1.01 / 21)
    report(trained, 22, 2 / 22)
    trained.turn(3)
    assert [(said["step"], said["exact"]) for said in trained.said("loss_mismatch")] == [(22, False)]


def test_gate_that_steps_back_refuses_the_state_and_the_next_attempt_is_older(trained: Cluster) -> None:
    trained.policies = Policies(gate=as_gate("step-back"))
    assert trained.restore() == 20
    report(trained, 21, 5.0)
    trained.turn(3)
    for worker in trained.workers:
        assert "the state of step 20 (epoch 1) is not what it was" in worker.answer["refusal"]
    trial = trained.coordinator.trial
    assert trial is not None and trial.ends_with(21), "the launcher spends no restart on it"
    trained.save_and_settle(24)  # before the ranks had heard of it
    assert trained.restore() == 10, "what was made from the refused state goes with it"
    assert trained.workers[0].answer["refusal"] is None
    report(trained, 11, 1 / 11)
    trained.turn(3)
    assert len(trained.said("loss_mismatch")) == 1


def test_gate_that_steps_back_to_nothing_is_one_clear_stop(trained: Cluster) -> None:
    trained.policies = Policies(gate=as_gate("step-back"))
    for restored in (20, 10):
        assert trained.restore() == restored
        report(trained, restored + 1, 5.0)
        trained.turn(3)
    with pytest.raises(RestoreFailed, match="every step that is left is set aside"):
        trained.restore()


def test_gate_of_no_steps_compares_nothing(trained: Cluster) -> None:
    trained.policies = Policies(gate=Gate(steps=0))
    assert trained.restore() == 20
    report(trained, 21, 5.0)
    trained.turn(3)
    assert trained.said("loss_mismatch") == []
