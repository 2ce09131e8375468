"""What goes from the nodes' disks: the head's decisions, and a whole job that carries them out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.base import contract
from ktrain.base.events import make
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.catalog import AttemptRecord
from ktrain.checkpoint.disks import DiskView, given_up
from ktrain.checkpoint.log import open_log
from ktrain.checkpoint.policy import Every, Keep, Policies
from ktrain.checkpoint.quarantine import Mark, Review, add_marks, read_marks
from ktrain.checkpoint.retention import AnyOf, Best, Committed, EverySeconds, EverySteps, Latest, Retention
from ktrain.checkpoint.roster import Attempt
from ktrain.format.manifest import Identity
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from ktrain.tier.disk import NodeDisk
from tests.unit.checkpoint.builders import identity
from tests.unit.checkpoint.cluster import Cluster

NEWEST = Latest(1)


class Dying(FaultPoints):
    """A process that dies at a point."""

    def __init__(self, point: str) -> None:
        super().__init__([], epoch=1)
        self.point = point

    def reached(self, point: str, *, step: int | None = None, rank: int | None = None) -> None:
        if point == self.point:
            raise SystemExit(9)


def view(
    *whole: Identity,
    policy: Retention = NEWEST,
    epoch: int = 1,
    restored: Identity | None = None,
    partly: tuple[Identity, ...] = (),
    attempts: tuple[AttemptRecord, ...] = (),
) -> DiskView:
    """Both nodes hold what is whole; node-1 lacks its part of the rest."""
    disks = {
        "node-0": [(0, at) for at in (*whole, *partly)],
        "node-1": [(1, at) for at in whole],
    }
    attempt = Attempt.of(epoch, {"node-0": [0], "node-1": [1]})
    return DiskView(attempt, disks, restored, Review(attempts=attempts), policy)


def gone(seen: DiskView, set_aside: tuple[Identity, ...] = (), unknown: tuple[Identity, ...] = ()) -> list[Any]:
    def fact_of(at: Identity) -> Committed | None:
        return None if at in unknown else Committed(at.step, at.epoch)

    return given_up(seen, lambda at: at in set_aside, fact_of)


def test_given_up_is_what_the_policy_does_not_keep_of_whole_steps() -> None:
    steps = [identity(step) for step in (10, 20, 30, 40, 50)]
    assert gone(view(*steps, policy=AnyOf(Latest(2), EverySteps(20)))) == [(10, 1), (30, 1)]


def test_given_up_steps_that_are_not_whole_do_not_count_and_go_once_a_newer_one_is_whole() -> None:
    """Two nodes that lost different steps would each have kept the newest two of their own: together no checkpoint."""
    seen = view(identity(10), identity(30), policy=Latest(2), partly=(identity(20), identity(40)))
    assert gone(seen) == [(20, 1)]


def test_given_up_without_a_whole_step_is_nothing() -> None:
    assert gone(view(partly=(identity(10), identity(20)))) == []


def test_given_up_copies_on_a_node_where_the_rank_does_not_run_now_make_nothing_whole() -> None:
    seen = view(identity(10))
    moved = {"node-0": [(1, identity(20)), *seen.disks["node-0"]], "node-1": [(0, identity(20)), *seen.disks["node-1"]]}
    assert gone(DiskView(seen.attempt, moved, None, Review(), Latest(1))) == []


def test_given_up_steps_off_the_line_go_and_what_cannot_be_told_stays() -> None:
    old, left, new = identity(10), identity(30), identity(20, epoch=2)
    attempts = (AttemptRecord(1, committed={"step": 10}, restored={"step": 0}),)
    assert gone(view(old, left, new, policy=Latest(2), epoch=2, restored=old, attempts=attempts)) == [(30, 1)]
    assert gone(view(old, left, new, policy=Latest(1), epoch=2)) == [], "what the attempt continued from is not known"


def test_given_up_set_aside_and_unknown_steps_neither_go_nor_count() -> None:
    steps = [identity(step) for step in (10, 20, 30, 40)]
    assert gone(view(*steps), set_aside=(steps[3],)) == [(10, 1), (20, 1)]
    assert gone(view(*steps), unknown=(steps[0],)) == [(20, 1), (30, 1)]


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from(["whole", "partly"])), max_size=12, unique_by=lambda x: x[0]
    ),
    st.sampled_from(
        [Latest(1), Latest(3), EverySteps(7), EverySeconds(5), Best(1, "loss"), AnyOf(Latest(2), Best(2, "x"))]
    ),
)
def test_given_up_never_names_the_newest_whole_step_or_a_newer_one(found: list[Any], policy: Retention) -> None:
    sides = {kind: tuple(identity(step) for step, each in found if each == kind) for kind in ("whole", "partly")}
    named = gone(view(*sides["whole"], policy=policy, partly=sides["partly"]))
    newest = max((at.step for at in sides["whole"]), default=0)
    assert all(step < newest for step, _ in named)
    left = [at for at in sides["whole"] if (at.step, 1) not in named]
    assert gone(view(*left, policy=policy)) == [], "asked again of what is left, it gives up nothing more"


# A whole job


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv(contract.ENV_DISK, str(tmp_path / "disks"))
    made = Cluster(tmp_path)
    yield made
    made.close()


def begin(cluster: Cluster, disk: Retention | int) -> None:
    cluster.policies = Policies(Every(10), Keep(bucket=20, disk=disk))
    cluster.restore()


def save(cluster: Cluster, *steps: int, **values: float) -> None:
    for step in steps:
        cluster.workers[0].events.append(make("step", cluster.epoch, step=step, **values).to_json())
        cluster.save_and_settle(step)
        cluster.turn(2)


def disk(cluster: Cluster, index: int) -> NodeDisk:
    found = cluster.nodes[index].keeper._disk
    assert found is not None
    return found


def on_disks(cluster: Cluster) -> list[list[int]]:
    return [sorted(at.step for _, at in disk(cluster, index).scan()) for index in (0, 1)]


def test_disk_policy_of_rank_0_is_carried_out_by_every_node(cluster: Cluster) -> None:
    begin(cluster, AnyOf(Latest(1), EverySteps(30)))
    save(cluster, 10, 20, 30, 40, 50)
    assert on_disks(cluster) == [[30, 50], [30, 50]]
    collected = [fields["step"] for fields in cluster.said("collected") if fields["tier"] == "disk"]
    assert sorted(collected) == [10, 10, 20, 20, 40, 40]
    assert not list((cluster.folder / "disks").rglob("marks/*"))


def test_disk_policy_by_a_metric_knows_it_also_after_the_head_was_replaced(cluster: Cluster) -> None:
    begin(cluster, AnyOf(Latest(1), Best(1, "loss")))
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.9)):
        save(cluster, step, loss=loss)
    assert on_disks(cluster) == [[20, 30], [20, 30]]
    log = open_log(cluster.url, cluster.catalog.tier, timeouts=cluster.timeouts, clock=cluster.clock)
    for event in cluster.events:
        log.emit(event)
    log.close()
    cluster.head.coordinator = cluster.new_coordinator()
    cluster.coordinator.adopt_attempt(cluster.epoch, cluster.assignment)
    cluster.turn(3)
    save(cluster, 40, loss=0.7)
    assert on_disks(cluster) == [[20, 40], [20, 40]]


def test_disk_steps_of_which_a_new_head_knows_no_metric_stay(cluster: Cluster) -> None:
    begin(cluster, Best(1, "loss"))
    save(cluster, 10, loss=0.5)
    cluster.head.coordinator = cluster.new_coordinator()
    cluster.coordinator.adopt_attempt(cluster.epoch, cluster.assignment)
    cluster.turn(3)
    save(cluster, 20, loss=0.6)
    save(cluster, 30, loss=0.7)
    assert on_disks(cluster) == [[10, 20, 30]] * 2, "20 is the best that is known, 30 the newest"


def test_nothing_goes_from_disks_before_every_node_has_said_what_it_holds(cluster: Cluster) -> None:
    begin(cluster, AnyOf(Latest(1), EverySteps(20)))
    save(cluster, 10, 20, 30)
    assert on_disks(cluster) == [[20, 30], [20, 30]] and cluster.coordinator._sweeps.disks.gone(cluster.epoch) == ()
    cluster.nodes[1].end_agent()
    cluster.nodes[1].start_agent()
    cluster.nodes[1].keeper._carrier.look_at_disk = lambda: None  # it answers before it has looked
    cluster.nodes[1].keeper.flush()
    cluster.coordinator._work_once()
    assert cluster.coordinator._sweeps.disks.gone(cluster.epoch) == ()


def test_disk_step_that_a_person_sets_aside_neither_goes_nor_counts(cluster: Cluster) -> None:
    begin(cluster, 1)
    save(cluster, 10)
    add_marks(cluster.catalog, read_marks(cluster.catalog), [Mark(20, 1, on=True, reason="by hand", after=1)])
    save(cluster, 20)
    assert on_disks(cluster) == [[10, 20], [10, 20]]
    save(cluster, 30)
    assert on_disks(cluster) == [[20, 30], [20, 30]]


def test_bucket_that_is_away_stops_no_removal_from_disks_and_is_said_once(cluster: Cluster) -> None:
    begin(cluster, 1)
    save(cluster, 10)
    cluster.catalog.tier = FaultyTier(cluster.catalog.tier, TierFault("list", Fault.UNAVAILABLE, count=10_000))
    save(cluster, 20, 30)
    assert on_disks(cluster) == [[30], [30]]
    assert len([said for said in cluster.said("notice") if "nodes' disks" in said["message"]]) == 1


@pytest.mark.parametrize(("point", "counts"), [("disk.doomed", True), ("disk.manifest", False)])
def test_agent_that_dies_while_it_removes_leaves_what_its_successor_finishes(
    cluster: Cluster, point: str, counts: bool
) -> None:
    begin(cluster, 1)
    save(cluster, 10)
    cluster.nodes[0].keeper._carrier._faults = Dying(point)
    with pytest.raises(SystemExit):
        save(cluster, 20)
    assert on_disks(cluster)[0] == ([10, 20] if counts else [20])
    files = cluster.folder / "disks" / cluster.catalog.run_id / "node-0"
    assert len(list(files.rglob("marks/*"))) == 1 and len(list(files.rglob("*.safetensors"))) == 2
    cluster.nodes[0].end_agent()
    cluster.nodes[0].start_agent()
    cluster.turn(6)
    assert on_disks(cluster) == [[20], [20]]
    assert not list(files.rglob("marks/*")) and len(list(files.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("name", ["*.json", "*.safetensors"])
def test_disk_that_refuses_a_removal_once_is_asked_again(cluster: Cluster, name: str) -> None:
    begin(cluster, 1)
    save(cluster, 10)
    disk(cluster, 0).tier = FaultyTier(disk(cluster, 0).tier, TierFault("delete", Fault.IO_ERROR, name=name))
    save(cluster, 20)
    cluster.turn(40)
    assert on_disks(cluster) == [[20], [20]]
    assert len(list(disk(cluster, 0).path.rglob("*"))) == 5, "two folders deep, one payload and one manifest"
    assert [said["tier"] for said in cluster.said("tier_failed")] == ["disk"]


def test_files_beside_a_step_that_goes_stay(cluster: Cluster) -> None:
    begin(cluster, 1)
    save(cluster, 10)
    (payload,) = disk(cluster, 0).path.rglob("rank-00000.safetensors")
    mine = payload.with_name("rank-notes.safetensors")
    mine.write_text("not ktrain's")
    save(cluster, 20)
    assert on_disks(cluster) == [[20], [20]] and mine.read_text() == "not ktrain's" and not payload.exists()
