"""Coordinator and keepers together, in one process: commits, losses, bad copies, heads that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.errors import ConflictError, UnavailableError
from tests.unit.checkpoint.cluster import Cluster, Node, RestoreFailed


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


@pytest.fixture
def trained(cluster: Cluster) -> Cluster:
    """Steps 10 and 20 are everywhere."""
    assert cluster.restore() == 0
    cluster.save_and_settle(10)
    cluster.save_and_settle(20)
    assert cluster.committed() == {"memory": 20, "peer": 20, "bucket": 20}
    return cluster


def tiers(cluster: Cluster) -> list[dict[int, str]]:
    return [worker.tiers for worker in cluster.workers]


def test_first_attempt_of_a_run_starts_fresh(cluster: Cluster) -> None:
    assert cluster.restore() == 0
    assert cluster.said("fresh_start") == [{"step": 0}]


def test_save_is_committed_tier_by_tier_only_when_every_rank_is_there(cluster: Cluster) -> None:
    cluster.restore()
    cluster.drains = False
    assert cluster.workers[0].save(cluster.catalog.run_id, 10, 2)
    cluster.turn(4)
    assert cluster.committed() == {}
    assert cluster.workers[1].save(cluster.catalog.run_id, 10, 2)
    cluster.turn(4)
    assert cluster.committed() == {"memory": 10, "peer": 10}
    cluster.drains = True
    cluster.turn(4)
    assert cluster.committed() == {"memory": 10, "peer": 10, "bucket": 10}
    assert [(fields["tier"], fields["step"]) for fields in cluster.said("committed")] == [
        ("memory", 10),
        ("peer", 10),
        ("bucket", 10),
    ]


def test_ring_three_nodes_keep_each_the_one_before(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, num_nodes=3, per_node=2)
    cluster.restore()
    cluster.save_and_settle(10)
    held = [sorted(rank for rank, _ in node.held()) for node in cluster.nodes]
    assert held == [[0, 1, 4, 5], [0, 1, 2, 3], [2, 3, 4, 5]]
    cluster.close()


def test_restore_processes_died_reads_the_own_memory(trained: Cluster) -> None:
    assert trained.restore() == 20
    assert tiers(trained) == [{0: "memory"}, {1: "memory"}]


def test_restore_lost_node_reads_its_part_from_the_peer(trained: Cluster) -> None:
    trained.lose_node(1)
    assert trained.restore() == 20
    assert tiers(trained) == [{0: "memory"}, {1: "peer"}]


def test_restore_both_nodes_lost_reads_the_bucket(trained: Cluster) -> None:
    trained.lose_node(0)
    trained.lose_node(1)
    assert trained.restore() == 20
    assert tiers(trained) == [{0: "bucket"}, {1: "bucket"}]


def test_restore_bad_copies_are_passed_over_from_tier_to_tier_to_older_step(trained: Cluster) -> None:
    trained.spoil_memory(0, 0, 20)
    assert trained.restore() == 20
    assert tiers(trained) == [{0: "peer"}, {1: "memory"}]

    trained.spoil_memory(0, 0, 20)  # pulled from the peer meanwhile
    trained.spoil_memory(1, 0, 20)
    assert trained.restore() == 20
    assert tiers(trained)[0] == {0: "bucket"}

    trained.spoil_bucket(20, 0)
    assert trained.restore() == 10


def test_restore_no_good_copy_left_is_corruption_and_everything_stays(trained: Cluster) -> None:
    for step in (10, 20):
        trained.spoil_bucket(step, 1)
    trained.lose_node(0)
    trained.lose_node(1)
    before = trained.catalog.listing()
    with pytest.raises(RestoreFailed) as caught:
        trained.restore()
    assert caught.value.kind == "corruption"
    assert trained.catalog.listing() == before and len(before.commits) == 2
    assert {(failure.copy.identity.step, failure.copy.rank) for failure in trained.refused} == {(10, 1), (20, 1)}
    assert len(trained.said("fresh_start")) == 1  # the first attempt's


def test_restore_bucket_copy_of_another_attempt_is_no_commit_of_this_one(trained: Cluster) -> None:
    """What this attempt counts as durable is on its line: else `close` would believe that nothing is left to do."""
    trained.spoil_bucket(20, 0)
    for index in (0, 1):
        trained.lose_node(index)
    assert trained.restore() == 10
    assert trained.committed() == {"bucket": 10}
    trained.save_and_settle(15)
    assert trained.committed() == {"memory": 15, "peer": 15, "bucket": 15}
    assert trained.restore() == 15


def test_restore_steps_off_the_line_are_never_chosen_again(cluster: Cluster) -> None:
    cluster.restore()
    cluster.save_and_settle(10)
    cluster.drains = False
    cluster.save_and_settle(20)
    away = cluster.nodes.pop()  # unreachable with step 20, not lost
    back = cluster.nodes[0]
    back.close()
    cluster.wire.nodes.clear()
    for node in (back, away):
        cluster.coordinator.forget_node(node.name)
    cluster.folder = cluster.folder / "other machines"
    cluster.nodes = [Node(cluster, "node-0"), Node(cluster, "node-1")]
    assert cluster.restore() == 10
    cluster.save_and_settle(15)
    for node in cluster.nodes:
        node.close()
    cluster.folder = cluster.folder.parent
    away.close()
    cluster.nodes = [Node(cluster, "node-0"), Node(cluster, "node-1")]  # the old machines, with steps 10 and 20
    cluster.drains = True
    assert {identity.step for _, identity in cluster.nodes[0].held()} == {10, 20}
    assert cluster.restore() == 10


def test_peer_unreachable_while_restoring_falls_back_to_the_bucket(trained: Cluster) -> None:
    trained.lose_node(1)
    trained.wire.before_piece = unreachable
    assert trained.restore() == 20
    assert tiers(trained)[1] == {1: "bucket"}
    assert not any(failure.corrupt for failure in trained.refused)


def unreachable(node: str, begin: int, end: int) -> None:
    raise UnavailableError(f"{node}: cut")


def test_answers_of_the_head_lost_events_come_once(cluster: Cluster) -> None:
    cluster.restore()
    for number in range(20):
        cluster.head.lose_answers = number % 3
        cluster.nodes[0].keeper.emit("notice", message=str(number))
        cluster.turn()
    cluster.head.lose_answers = 0
    cluster.turn(2)
    said = [fields["message"] for fields in cluster.said("notice")]
    assert said == [str(number) for number in range(20)]


def test_answers_of_the_keeper_lost_events_of_a_worker_come_once(cluster: Cluster) -> None:
    cluster.restore()
    worker = cluster.workers[0]
    for number in range(5):  # each pulse carries all that no answer has confirmed
        worker.events.append({"time": 1.0, "attempt": 1, "kind": "log", "number": number})
        cluster.turn()
    assert [fields["number"] for fields in cluster.said("log")] == list(range(5))


def test_head_replaced_by_an_empty_one_finds_all_commits_and_goes_on(trained: Cluster) -> None:
    trained.head.coordinator = trained.new_coordinator()
    trained.coordinator.adopt_attempt(trained.epoch, trained.assignment)
    trained.turn(6)
    assert trained.committed()["memory"] == trained.committed()["peer"] == 20
    trained.save_and_settle(30)
    assert trained.committed() == {"memory": 30, "peer": 30, "bucket": 30}
    assert trained.restore() == 30


@pytest.mark.parametrize("turns", range(1, 9))
def test_head_replaced_in_the_middle_of_a_restore_the_ranks_still_agree(trained: Cluster, turns: int) -> None:
    trained.begin()
    trained.turn(turns)
    trained.head.coordinator = trained.new_coordinator()
    trained.coordinator.adopt_attempt(trained.epoch, trained.assignment)
    trained.turn(20)
    assert [worker.restored for worker in trained.workers] == [20, 20]


def test_worker_of_an_older_attempt_is_fenced(trained: Cluster) -> None:
    zombie = trained.workers[0]
    trained.restore()
    with pytest.raises(ConflictError, match="older attempt and must end"):
        zombie.pulse()


def test_head_of_an_older_epoch_is_refused_by_keepers_that_know_better(trained: Cluster) -> None:
    stale = trained.new_coordinator()
    stale.begin_attempt(trained.epoch, trained.assignment)
    trained.restore()
    trained.save_and_settle(30)
    trained.head.coordinator = stale
    trained.turn(2)
    assert stale.committed() == {}


def test_stop_holds_for_its_attempt_and_is_agreed_anew_in_the_next(cluster: Cluster) -> None:
    cluster.restore()
    cluster.coordinator.request_stop("cancel")
    cluster.turn(2)
    first = cluster.workers[0].answer["stop"]
    for worker in cluster.workers:
        worker.stop_ack = [first["step"], True]
    cluster.turn(3)
    assert cluster.workers[0].answer["stop"]["confirmed"]
    cluster.restore()
    cluster.turn(2)
    again = cluster.workers[0].answer["stop"]
    assert again["reason"] == "cancel" and not again["confirmed"], "nobody of this attempt has promised anything"


def test_replica_of_a_step_off_the_line_does_not_hold_its_slot_for_ever(trained: Cluster) -> None:
    """What one node replicated and another did not, a restart passes over; but it is the newest that is kept."""
    trained.drains = False
    trained.save(30)
    trained.spoil_memory(0, 0, 30)
    trained.turn(4)
    assert trained.restore() == 20
    trained.save_and_settle(40)
    assert trained.committed() == {"memory": 40, "peer": 40, "bucket": 20}


def test_committed_file_damaged_is_mended_by_the_next_beat(trained: Cluster) -> None:
    volume = trained.nodes[0].volume
    (volume.path / "committed.json").write_text("{")
    trained.turn()
    assert volume.committed() == {"memory": (20, 1), "peer": (20, 1)}


def test_retention_keeps_the_newest_in_the_bucket(cluster: Cluster) -> None:
    cluster.restore()
    for step in range(10, 70, 10):
        cluster.save_and_settle(step)
    assert [commit.identity.step for commit in cluster.catalog.listing().commits] == [40, 50, 60]
    assert [fields["step"] for fields in cluster.said("collected")] == [10, 20, 30]
