"""What the history of a run says about its steps, and jobs that keep failing until a good one is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.base.clock import Deadline
from ktrain.checkpoint.catalog import AttemptRecord
from ktrain.checkpoint.gate import Gate
from ktrain.checkpoint.lineage import on_line
from ktrain.checkpoint.policy import Policies
from ktrain.checkpoint.quarantine import (
    Mark,
    Quarantine,
    Trouble,
    add_marks,
    due,
    find_trouble,
    is_own_fault,
    read_marks,
    trial_of,
)
from ktrain.errors import ConfigError, InternalError, KtrainError, UnavailableError
from tests.unit.checkpoint.builders import identity
from tests.unit.checkpoint.cluster import Cluster, RestoreFailed

NONE = Quarantine()
OWN = {"outcome": "failed", "own_fault": True}


def attempt(epoch: int, restored: tuple[int, int] | None, end: dict[str, Any] | None) -> AttemptRecord:
    at = None if restored is None else {"step": restored[0], "identity": identity(*restored).to_json()}
    return AttemptRecord(epoch, restored=at or {"step": 0, "identity": None}, end=end)


def failed(epoch: int, restored: tuple[int, int] | None, committed: int) -> AttemptRecord:
    return attempt(epoch, restored, {**OWN, "step": committed + 5, "committed_step": committed})


def test_find_trouble_failures_without_a_new_commit_are_booked_on_the_step() -> None:
    found = find_trouble([failed(1, None, 100), failed(2, (100, 1), 100), failed(3, (100, 1), 0)], NONE)
    assert found.farthest == 100 and found.failures == {(100, 1): (2, 3)}


def test_find_trouble_a_commit_that_nobody_had_heard_of_is_no_progress_of_who_restores_it() -> None:
    found = find_trouble([failed(1, None, 90), failed(2, (100, 1), 100)], NONE)
    assert found.farthest == 100 and found.failures == {(100, 1): (2,)}


def test_find_trouble_an_attempt_that_commits_more_ends_it() -> None:
    history = [failed(1, None, 100), failed(2, (100, 1), 100), failed(3, (100, 1), 110)]
    assert find_trouble(history, NONE) == Trouble(farthest=110)


@pytest.mark.parametrize("end", [None, {"outcome": "stopped"}, {"outcome": "failed", "cause": "node-lost"}])
def test_find_trouble_what_is_not_the_jobs_own_fault_is_not_counted(end: dict[str, Any] | None) -> None:
    history = [failed(1, None, 100), attempt(2, (100, 1), end), attempt(3, (100, 1), end)]
    assert find_trouble(history, NONE).failures == {}


def test_find_trouble_what_a_detour_made_blames_the_step_that_it_began_from() -> None:
    history = [failed(1, None, 100), failed(2, (90, 1), 100), failed(3, (100, 2), 100)]
    found = find_trouble(history, NONE)
    assert found.failures == {(90, 1): (2, 3)}
    assert [(mark.step, mark.epoch) for mark in due(found, 2, 3)] == [(90, 1), (None, 2), (None, 3)]


def test_find_trouble_failures_before_a_mark_do_not_count_again() -> None:
    history = [failed(1, None, 100), failed(2, (100, 1), 100), failed(3, (100, 1), 100)]
    trusted = Quarantine((Mark(100, 1, on=False, reason="", after=3),))
    assert find_trouble(history, trusted).failures == {}
    assert find_trouble([*history, failed(4, (100, 1), 100)], trusted).failures == {(100, 1): (4,)}


def test_due_limit_of_zero_is_never() -> None:
    assert due(Trouble(9, {(5, 1): (2, 3, 4)}), 0, 4) == []


def test_trial_last_failure_sets_aside_unless_more_was_committed() -> None:
    trouble = Trouble(100, {(100, 1): (2,)})
    trial = trial_of((100, 1), trouble, 2)
    assert trial is not None and trial.ends_with(100) and trial.ends_with(None) and not trial.ends_with(101)
    first = trial_of((90, 1), trouble, 2)
    assert first is not None and not first.ends_with(100)
    assert trial_of((100, 1), trouble, 0) is None


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (ValueError("nan"), True),
        (KtrainError("step 3: expected finite numbers"), True),
        (InternalError("x"), True),
        (ConfigError("x"), False),
        (UnavailableError("x"), False),
        (RuntimeError("[gloo] Connection closed by peer"), False),
        (KeyboardInterrupt(), False),
        (SystemExit(1), False),
    ],
)
def test_is_own_fault_tells_the_job_from_what_happens_to_it(error: BaseException, own: bool) -> None:
    assert is_own_fault(error) is own


@dataclass
class Job:
    """A run that saves every step in steps of `every` and dies at `dies_at` whenever its state descends from poison."""

    dies_at: int
    poisoned_from: int  # what the first epoch made from this step on is poison
    every: int = 10
    attempts: list[AttemptRecord] = field(default_factory=list)
    marks: Quarantine = NONE
    made: dict[tuple[int, int], bool] = field(default_factory=dict)  # (step, epoch) -> poisoned

    def run(self, limit: int) -> tuple[int, int] | None:
        """One attempt; the key it continued from, or None where nothing is left."""
        epoch = len(self.attempts) + 1
        if epoch > 1:
            fresh = due(find_trouble(self.attempts, self.marks), limit, epoch)
            self.marks = Quarantine((*self.marks.marks, *fresh))
        left = [key for key in self.made if on_line(identity(*key), self.attempts) and self.marks.find(*key) is None]
        start = max(left, default=(0, 0))
        if epoch > 1 and start == (0, 0):
            return None
        poisoned = self.made.get(start, False)
        first, last = None, start[0]
        for step in range(start[0] + 1, self.dies_at + 20):
            poisoned = poisoned or (epoch == 1 and step >= self.poisoned_from)
            if poisoned and step == self.dies_at:
                break
            if step % self.every == 0:
                self.made[(step, epoch)] = poisoned
                first, last = first or {"step": step}, step
        at = {"step": start[0], "identity": identity(*start).to_json() if start[0] else None}
        ended = {**OWN, "committed_step": last} if poisoned else {"outcome": "succeeded", "committed_step": step}
        self.attempts.append(AttemptRecord(epoch, restored=at, committed=first, end=ended))
        return start


@given(st.integers(30, 120), st.integers(1, 120), st.integers(1, 3))
def test_poisoned_job_goes_back_until_it_gets_over_it_or_nothing_is_left(
    dies_at: int, poisoned_from: int, limit: int
) -> None:
    job = Job(dies_at, min(poisoned_from, dies_at))
    num_steps = dies_at // job.every
    for _ in range(2 + limit * (num_steps + 1)):
        start = job.run(limit)
        last = job.attempts[-1].end
        if start is None or (last is not None and last["outcome"] == "succeeded"):
            break
    else:
        raise AssertionError(f"no end after {len(job.attempts)} attempts")
    good = [key for key, poisoned in job.made.items() if key[1] == 1 and not poisoned]
    assert start == max(good, default=None), "the newest good step is found, and no older one is taken"


# In a run


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def fail(cluster: Cluster) -> None:
    """The attempt ends by an exception of its own."""
    committed = max(cluster.committed().values(), default=None)
    cluster.catalog.record(cluster.epoch, "end", {**OWN, "committed_step": committed})


@pytest.fixture
def failing(cluster: Cluster) -> Cluster:
    """Steps 10 and 20 are everywhere; the job died soon after, three times."""
    cluster.restore()
    cluster.save_and_settle(10)
    cluster.save_and_settle(20)
    fail(cluster)
    for _ in range(2):
        assert cluster.restore() == 20
        fail(cluster)
    return cluster


def test_marks_read_back_are_those_written_and_a_torn_one_does_not_count(cluster: Cluster) -> None:
    marks = [Mark(20, 1, on=True, reason="a", attempts=(2, 3), after=3), Mark(None, 2, on=True, reason="b")]
    known = add_marks(cluster.catalog, NONE, marks)
    assert read_marks(cluster.catalog) == known
    cluster.catalog.tier.write("quarantine/mark-000009-0a.json", b"{", deadline=Deadline.after(5.0))
    known = add_marks(cluster.catalog, read_marks(cluster.catalog), [Mark(20, 1, on=False, reason="c")])
    assert read_marks(cluster.catalog).marks == (*marks, known.marks[-1])
    assert known.find(20, 1) is None and known.find(7, 2) == marks[1]


def test_restore_step_that_failed_twice_is_set_aside_and_the_older_one_is_taken(failing: Cluster) -> None:
    assert failing.restore() == 10
    (said,) = [fields for fields in failing.said("quarantined") if fields["step"] == 20]
    assert (said["epoch"], said["attempts"]) == (1, [2, 3]) and "without a commit beyond step 20" in said["reason"]
    assert [commit.identity.step for commit in failing.catalog.listing().commits] == [10, 20], "nothing is deleted"


def test_restore_a_new_head_knows_what_is_set_aside(failing: Cluster) -> None:
    failing.restore()
    for index in (0, 1):
        failing.lose_node(index)
    failing.head.coordinator = failing.new_coordinator()
    assert failing.restore() == 10


def test_restore_everything_set_aside_is_one_error_that_names_the_steps(failing: Cluster) -> None:
    for _ in range(2):
        assert failing.restore() == 10
        fail(failing)
    with pytest.raises(RestoreFailed, match=r"20 \(epoch 1\), 10 \(epoch 1\)") as caught:
        failing.restore()
    assert caught.value.kind == "config"
    assert len(failing.said("fresh_start")) == 1


def test_restore_after_an_undo_takes_the_step_again(failing: Cluster) -> None:
    assert failing.restore() == 10
    known = read_marks(failing.catalog)
    add_marks(failing.catalog, known, [Mark(20, 1, on=False, reason="mended", after=failing.epoch)])
    assert failing.restore() == 20


def test_restore_step_set_aside_goes_off_the_line_once_the_detour_has_committed(failing: Cluster) -> None:
    assert failing.restore() == 10
    failing.save_and_settle(30)
    assert failing.restore() == 30
    known = read_marks(failing.catalog)
    add_marks(failing.catalog, known, [Mark(20, 1, on=False, reason="mended", after=failing.epoch)])
    assert failing.restore() == 30


def test_restore_policy_of_no_quarantine_takes_the_step_for_ever(failing: Cluster) -> None:
    failing.policies = Policies(gate=Gate(failures=0))
    assert failing.restore() == 20 and failing.coordinator.trial is None


def test_trial_of_the_attempt_is_known_to_the_head_and_to_the_next_one(cluster: Cluster) -> None:
    cluster.restore()
    assert cluster.coordinator.trial is None
    cluster.save_and_settle(10)
    fail(cluster)
    cluster.restore()
    fail(cluster)
    cluster.restore()
    trial = cluster.coordinator.trial
    assert trial is not None and (trial.farthest, trial.failures_left) == (10, 1)
    cluster.head.coordinator = cluster.new_coordinator()
    cluster.coordinator.adopt_attempt(cluster.epoch, cluster.assignment)
    cluster.turn(2)
    assert cluster.coordinator.trial == trial


def test_retention_spares_a_step_that_is_set_aside_by_hand_meanwhile(cluster: Cluster) -> None:
    cluster.restore()
    cluster.save_and_settle(10)
    cluster.save_and_settle(20)
    add_marks(cluster.catalog, NONE, [Mark(20, 1, on=True, reason="by hand", after=1)])
    for step in (30, 40, 50):
        cluster.save_and_settle(step)
    assert [commit.identity.step for commit in cluster.catalog.listing().commits] == [20, 30, 40, 50]
    cluster.save(60)
    cluster.turn(8)
    assert [commit.identity.step for commit in cluster.catalog.listing().commits] == [20, 40, 50, 60]


def test_retention_collects_nothing_before_the_trouble_is_over(failing: Cluster) -> None:
    assert failing.restore() == 10
    for step in (12, 14, 16, 18):
        failing.save_and_settle(step)
    assert failing.said("collected") == []
    for step in (27, 28, 29):
        failing.save_and_settle(step)
    left = [commit.identity.step for commit in failing.catalog.listing().commits]
    assert left == [20, 27, 28, 29], "what is set aside is neither collected nor counted"
