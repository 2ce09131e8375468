"""Retention of a whole job: policies from rank 0, metrics from its events, and what dead attempts left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base.events import make
from ktrain.checkpoint.marks import metrics_name, pin_name, write_mark
from ktrain.checkpoint.policy import Every, Keep, Policies
from ktrain.checkpoint.retention import AnyOf, Best, EverySteps, Latest, Retention
from tests.unit.checkpoint.builders import deadline
from tests.unit.checkpoint.cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def begin(cluster: Cluster, keep: Retention) -> None:
    cluster.policies = Policies(Every(10), Keep(bucket=keep))
    cluster.restore()


def log(cluster: Cluster, kind: str, step: int, **values: float) -> None:
    """Rank 0 says something of a step."""
    cluster.workers[0].events.append(make(kind, cluster.epoch, step=step, **values).to_json())


def in_bucket(cluster: Cluster) -> list[int]:
    return [commit.identity.step for commit in cluster.catalog.listing().commits]


def names(cluster: Cluster, folder: str) -> list[str]:
    return [stored.name for stored in cluster.catalog.tier.list(folder, deadline=deadline())]


def test_policy_of_rank_0_reaches_the_head(cluster: Cluster) -> None:
    begin(cluster, AnyOf(Latest(1), EverySteps(30)))
    for step in (10, 20, 30, 40, 50, 60, 70):
        cluster.save_and_settle(step)
    assert in_bucket(cluster) == [30, 60, 70]
    assert [fields["step"] for fields in cluster.said("collected")] == [10, 20, 40, 50]


def test_loss_of_the_step_is_in_the_commit_record_and_decides(cluster: Cluster) -> None:
    begin(cluster, AnyOf(Latest(1), Best(1, "loss")))
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5)):
        log(cluster, "step", step, loss=loss)
        cluster.save_and_settle(step)
    assert in_bucket(cluster) == [20, 40]
    assert [commit.origin for commit in cluster.catalog.listing().commits] == [
        {"metrics": {"loss": 1.0}},
        {"metrics": {"loss": 2.5}},
    ]


def test_metric_logged_after_the_commit_counts_also_for_the_next_head(cluster: Cluster) -> None:
    begin(cluster, AnyOf(Latest(2), Best(1, "val_loss")))
    for step, value in ((10, 0.1), (20, 0.9), (30, 0.5)):
        cluster.save_and_settle(step)
        log(cluster, "log", step, val_loss=value)
    cluster.save_and_settle(40)
    assert in_bucket(cluster) == [10, 30, 40] and metrics_name(10, 1) in names(cluster, "marks")
    cluster.head.coordinator = cluster.new_coordinator()
    cluster.coordinator.adopt_attempt(cluster.epoch, cluster.assignment)
    cluster.turn(3)
    cluster.save_and_settle(50)
    assert sorted(set(in_bucket(cluster))) == [10, 40, 50], "the new head drained step 40 once more"


def test_pinned_step_stays_while_the_job_goes_on(cluster: Cluster) -> None:
    begin(cluster, Latest(1))
    cluster.save_and_settle(10)
    write_mark(cluster.catalog, pin_name(10), {})
    for step in (20, 30):
        cluster.save_and_settle(step)
    assert in_bucket(cluster) == [10, 30]


def test_upload_of_an_attempt_that_died_goes_some_time_after_the_next_has_committed(cluster: Cluster) -> None:
    begin(cluster, Latest(2))
    cluster.save_and_settle(10)
    cluster.drains = False
    cluster.save_and_settle(20)
    cluster.turn()
    cluster.nodes[0].carry(drain=True)  # rank 0 has uploaded its part, and everything dies
    upload = "checkpoints/step-00000020/data-000001-"
    assert len([name for name in names(cluster, "checkpoints") if name.startswith(upload)]) == 2
    cluster.coordinator.end_attempt()
    cluster.drains = True
    assert cluster.restore() == 20
    cluster.save_and_settle(30)
    cluster.clock.advance(cluster.timeouts.drain_s)
    cluster.save_and_settle(40)
    cluster.clock.advance(cluster.timeouts.drain_s)
    cluster.save_and_settle(50)
    assert in_bucket(cluster) == [40, 50]
    assert not [name for name in names(cluster, "checkpoints") if "step-00000020" in name]
    assert 20 in [fields["step"] for fields in cluster.said("collected")], "the step itself was committed by attempt 2"


def test_mark_that_nobody_knows_is_said_once_and_training_goes_on(cluster: Cluster) -> None:
    begin(cluster, Latest(1))
    cluster.catalog.tier.write("marks/hold.json", b"{}", deadline=deadline())
    for step in (10, 20, 30):
        cluster.save_and_settle(step)
    assert in_bucket(cluster) == [10, 20, 30] and cluster.said("collected") == []
    (notice,) = cluster.said("notice")
    assert "marks/hold.json is a mark of another ktrain" in notice["message"]
