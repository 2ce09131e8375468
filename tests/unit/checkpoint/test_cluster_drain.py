"""Drains that lose their nodes, copies, heads and attempts on the way, and are finished by others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.checkpoint.cluster import Cluster


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


@pytest.fixture
def draining(cluster: Cluster) -> Cluster:
    """Step 10 is in memory and at peers; its drain has begun, nothing is uploaded yet."""
    cluster.restore()
    cluster.drains = False
    cluster.save_and_settle(10)
    assert cluster.committed() == {"memory": 10, "peer": 10}
    return cluster


def write_id(cluster: Cluster) -> str:
    drain = cluster.coordinator._drains.current
    assert drain is not None
    return drain.write_id


def payload(cluster: Cluster, rank: int, step: int = 10) -> Path:
    """The only payload of a rank's step in the bucket."""
    folder = cluster.folder / "run" / "checkpoints" / f"step-{step:08d}"
    (found,) = folder.glob(f"data-*/rank-{rank:05d}.safetensors")
    return found


def finish(cluster: Cluster, turns: int = 12) -> None:
    cluster.drains = True
    cluster.turn(turns)


def lose_untold(cluster: Cluster, index: int) -> None:
    """The machine is gone before it could say what it has uploaded."""
    cluster.nodes[index].keeper._drained.clear()
    cluster.lose_node(index)


def test_drain_node_lost_before_its_upload_is_finished_from_the_replica(draining: Cluster) -> None:
    begun = write_id(draining)
    draining.nodes[0].carry(drain=True)
    first = payload(draining, 0).stat()
    draining.workers.pop()  # rank 1 dies with its node
    draining.lose_node(1)
    finish(draining)
    assert draining.committed()["bucket"] == 10
    (commit,) = draining.catalog.listing().commits
    assert commit.write_id == begun
    again = payload(draining, 0).stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns), "what was there was not sent again"
    assert draining.said("tier_failed") == []
    draining.lose_node(0)
    assert draining.restore() == 10


def test_drain_node_lost_after_its_upload_untold_is_taken_over_unsent(draining: Cluster) -> None:
    draining.nodes[1].carry(drain=True)
    first = payload(draining, 1).stat()
    draining.workers.pop()
    lose_untold(draining, 1)
    finish(draining)
    assert draining.committed()["bucket"] == 10
    again = payload(draining, 1).stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


@pytest.mark.parametrize("damage", ["short payload", "foreign manifest", "torn manifest", "no manifest"])
def test_drain_files_that_are_not_proven_are_not_taken_over(draining: Cluster, damage: str) -> None:
    draining.nodes[1].carry(drain=True)
    file = payload(draining, 1)
    whole, manifest = file.read_bytes(), file.with_suffix(".json")
    if damage == "short payload":
        file.write_bytes(whole[:-1])
    elif damage == "no manifest":
        manifest.unlink()
        file.write_bytes(b"left by a writer that died")
    else:
        text = manifest.read_bytes()
        manifest.write_bytes(text[:-20] if damage == "torn manifest" else b"{}")
        file.write_bytes(whole[:-1])
    draining.workers.pop()
    lose_untold(draining, 1)
    finish(draining)
    assert draining.committed()["bucket"] == 10
    assert file.read_bytes() == whole
    draining.lose_node(0)
    assert draining.restore() == 10


def test_drain_goes_on_under_its_write_id_in_the_next_attempt(draining: Cluster) -> None:
    begun = write_id(draining)
    draining.nodes[0].carry(drain=True)
    draining.lose_node(1)
    assert draining.restore() == 10
    finish(draining)
    assert draining.committed() == {"memory": 10, "peer": 10, "bucket": 10}
    (commit,) = draining.catalog.listing().commits
    assert (commit.write_id, commit.identity.epoch) == (begun, 1)


def test_drain_finished_between_two_attempts_counts_for_the_one_that_restores_it(draining: Cluster) -> None:
    draining.coordinator.end_attempt()
    draining.workers = []
    finish(draining, 6)
    assert [commit.identity.step for commit in draining.catalog.listing().commits] == [10]
    assert draining.restore() == 10
    assert draining.committed()["bucket"] == 10
    draining.turn(4)
    assert len(draining.catalog.listing().commits) == 1, "it is not drained a second time"


def test_drain_of_a_step_that_the_next_attempt_did_not_continue_from_is_dropped(cluster: Cluster) -> None:
    cluster.restore()
    cluster.save_and_settle(10)
    cluster.drains = False
    cluster.save_and_settle(20)
    cluster.nodes[0].carry(drain=True)
    for index in (0, 1):
        cluster.lose_node(index)
    assert cluster.restore() == 10
    assert cluster.committed()["bucket"] == 10
    cluster.drains = True
    cluster.save_and_settle(15)
    cluster.turn(4)
    assert cluster.committed()["bucket"] == 15
    assert [commit.identity.step for commit in cluster.catalog.listing().commits] == [10, 15]


def test_drain_head_replaced_in_the_middle_goes_on_with_what_is_uploaded(draining: Cluster) -> None:
    begun = write_id(draining)
    draining.nodes[0].carry(drain=True)
    first = payload(draining, 0).stat()
    draining.head.coordinator = draining.new_coordinator()
    draining.coordinator.adopt_attempt(draining.epoch, draining.assignment)
    finish(draining)
    assert draining.committed()["bucket"] == 10
    (commit,) = draining.catalog.listing().commits
    assert commit.write_id == begun
    assert payload(draining, 0).stat().st_mtime_ns == first.st_mtime_ns


def test_drain_worker_that_died_is_finished_by_its_keeper(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, num_nodes=1, per_node=2)
    cluster.restore()
    cluster.save(10)
    cluster.workers.clear()  # both died with the save
    cluster.turn(12)
    assert cluster.committed()["bucket"] == 10
    cluster.close()


def test_bad_slot_is_not_drained_but_named_and_the_peers_copy_is(draining: Cluster) -> None:
    draining.spoil_memory(0, 0, 10)
    finish(draining, 4)
    assert draining.committed()["bucket"] == 10
    (bad,) = draining.said("bad_copy")
    assert (bad["rank"], bad["step"], bad["where"]) == (0, 10, "node-0")
    assert draining.said("tier_failed") == []
    for index in (0, 1):
        draining.lose_node(index)
    assert draining.restore() == 10


def test_bad_slots_everywhere_fail_the_drain_and_the_next_step_is_drained(draining: Cluster) -> None:
    draining.spoil_memory(0, 0, 10)
    draining.spoil_memory(1, 0, 10)
    finish(draining, 6)
    assert "bucket" not in draining.committed()
    assert [bad["where"] for bad in draining.said("bad_copy")] == ["node-0", "node-1"]
    assert len(draining.said("tier_failed")) == 1
    draining.save_and_settle(20)
    draining.turn(8)
    assert draining.committed()["bucket"] == 20 and len(draining.said("tier_recovered")) == 1
