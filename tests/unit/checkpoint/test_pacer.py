"""`every="auto"` in a whole job: measured, decided, heard by every rank, gone on with by new heads and attempts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base.clock import Deadline
from ktrain.base.contract import TIER_MEMORY
from ktrain.base.events import make
from ktrain.checkpoint.cadence import Auto, Cadence
from ktrain.checkpoint.pacer import read_last, write_last
from ktrain.checkpoint.policy import Every, Policies
from tests.unit.checkpoint.cluster import Cluster, Worker

STALL_S = 0.02  # a turn, and so a step, takes 0.5 s
AUTO = Policies(Every(2, auto=Auto(mtbf_s=600.0)))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    made.policies = AUTO
    yield made
    made.close()


def train(cluster: Cluster, begin: int, end: int, *, stall_s: float = STALL_S) -> dict[int, list[int]]:
    """Steps `begin` to `end`; returns what each rank has saved."""
    saved: dict[int, list[int]] = {worker.rank: [] for worker in cluster.workers}
    for step in range(begin, end + 1):
        for worker in cluster.workers:
            worker.step = step
            if worker.rank == 0:
                say(cluster, worker, "step", step=step, loss=1.0)
            if worker.schedule.due(step) and worker.save(cluster.catalog.run_id, step, cluster.world_size):
                saved[worker.rank].append(step)
                say(cluster, worker, "snapshot", rank=worker.rank, step=step, stall_s=stall_s)
        cluster.turn()
    return saved


def say(cluster: Cluster, worker: Worker, kind: str, **fields: object) -> None:
    worker.events.append(make(kind, cluster.epoch, clock=cluster.clock, **fields).to_json())


def test_auto_measures_decides_and_all_ranks_save_the_same_steps(cluster: Cluster) -> None:
    assert cluster.restore() == 0
    saved = train(cluster, 1, 60)
    (said,) = cluster.said("cadence")
    assert saved[0] == saved[1] and saved[0][:5] == [2, 4, 6, 8, 10]
    assert said["memory"] == 10, "sqrt(2 * 0.02 s * 600 s) is 4.9 s, about ten steps of half a second"
    later = [step for step in saved[0] if step >= said["from_step"]]
    assert later == [step for step in range(said["from_step"], 61) if step % 10 == 0]
    assert said["measured"]["step_s"] == pytest.approx(0.5 - STALL_S, rel=0.1)
    assert said["measured"]["stall_s"] == STALL_S and "best every" in said["reason"]
    assert [said for said in cluster.said("save_skipped") if said["tier"] == TIER_MEMORY] == []


def test_auto_numbers_given_are_never_changed(cluster: Cluster) -> None:
    cluster.policies = Policies(Every(2))
    cluster.restore()
    train(cluster, 1, 40)
    assert [worker.schedule.said for worker in cluster.workers] == [None, None] and cluster.said("cadence") == []


def test_auto_stays_within_the_bounds_of_the_user(cluster: Cluster) -> None:
    cluster.policies = Policies(Every(2, auto=Auto(least=1, most=5, mtbf_s=600.0)))
    cluster.restore()
    train(cluster, 1, 40)
    assert cluster.said("cadence")[-1]["memory"] == 5


def test_auto_stall_that_grows_makes_the_saves_rarer(cluster: Cluster) -> None:
    cluster.restore()
    train(cluster, 1, 60)
    train(cluster, 61, 300, stall_s=0.3)
    assert [said["memory"] for said in cluster.said("cadence")][-1] >= 30


def test_auto_next_attempt_begins_with_what_was_chosen(cluster: Cluster) -> None:
    cluster.restore()
    train(cluster, 1, 60)
    assert cluster.restore() == 60
    assert [worker.schedule.due(step) for worker in cluster.workers for step in (62, 70)] == [False, True] * 2
    assert len(cluster.said("cadence")) == 1


def test_auto_next_launch_begins_with_what_the_run_chose_last(cluster: Cluster) -> None:
    cluster.restore()
    train(cluster, 1, 60)
    cluster.head.coordinator = cluster.new_coordinator()
    assert cluster.restore() == 60
    assert [worker.schedule.due(step) for worker in cluster.workers for step in (62, 70)] == [False, True] * 2


def test_auto_new_head_goes_on_with_what_the_ranks_follow(cluster: Cluster) -> None:
    cluster.restore()
    train(cluster, 1, 60)
    cluster.head.coordinator = cluster.new_coordinator()
    cluster.coordinator.adopt_attempt(cluster.epoch, cluster.assignment)
    saved = train(cluster, 61, 130)
    assert saved[0] == saved[1] == [70, 80, 90, 100, 110, 120, 130]


def test_auto_rank_that_hears_late_has_the_change_announced_again(cluster: Cluster) -> None:
    cluster.restore()
    train(cluster, 1, 12)
    deaf = cluster.workers[1]
    deaf.deaf = True
    train(cluster, 13, 30)
    (said,) = cluster.said("cadence")
    deaf.deaf = False
    train(cluster, 31, 40)
    saved = train(cluster, 41, 80)
    assert said["from_step"] <= 30 and saved[0] == saved[1] == [50, 60, 70, 80]
    assert cluster.committed()["memory"] == 80


def test_auto_failures_of_the_run_make_the_saves_more_frequent(cluster: Cluster) -> None:
    for _ in range(30):
        epoch = cluster.catalog.next_epoch({"by": "test"})
        cluster.clock.advance(2.0)
        cluster.catalog.record(epoch, "end", {"outcome": "failed", "cause": "crash"})
    cluster.restore()
    train(cluster, 1, 40)
    measured = cluster.said("cadence")[-1]["measured"]["history"]
    assert measured["failures"] == 30 and measured["observed_s"] == pytest.approx(80, abs=20)
    assert cluster.said("cadence")[-1]["memory"] <= 2


def test_read_last_torn_record_is_passed_over(cluster: Cluster) -> None:
    assert read_last(cluster.catalog) is None
    write_last(cluster.catalog, 1, 20, Cadence(5))
    write_last(cluster.catalog, 2, 10, Cadence(8, bucket=40))
    cluster.catalog.tier.write("cadence/000003-000000000010.json", b"{", deadline=Deadline.after(5.0))
    assert read_last(cluster.catalog) == Cadence(8, bucket=40)
