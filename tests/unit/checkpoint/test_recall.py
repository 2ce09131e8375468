"""The search for the step to restore: what is chosen, what is awaited, and which error says that nothing is."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ktrain.base.settings import Timeouts
from ktrain.checkpoint.agreement import RestoreAgreement
from ktrain.checkpoint.direct import Desk, RestoreDirector
from ktrain.checkpoint.pacer import Pacer
from ktrain.checkpoint.recall import Outcome, Recall
from ktrain.checkpoint.roster import Attempt, Roster
from ktrain.errors import UnavailableError
from ktrain.format.manifest import Identity
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from tests.unit.checkpoint.builders import Log, catalog, commit_name, deadline, flip, identity, put_checkpoint, snapshot
from tests.unit.checkpoint.test_catalog import reseal

ALWAYS = 10**6


@pytest.fixture
def bucket() -> FakeBucket:
    return FakeBucket()


def plan(
    tier: Any,
    held: dict[str, list[tuple[int, Identity]]] | None = None,
    texts: dict[tuple[str, int, Identity], str] | None = None,
    agreement: RestoreAgreement | None = None,
) -> Outcome | None:
    return Recall(catalog(tier)).plan(held or {}, {}, texts or {}, agreement or RestoreAgreement(2, 60.0))


def step_of(outcome: Outcome | None) -> int:
    assert outcome is not None and outcome.candidate is not None and outcome.error is None
    return outcome.candidate.identity.step


def error_of(outcome: Outcome | None) -> tuple[str, str]:
    assert outcome is not None and outcome.candidate is None and outcome.error is not None
    return outcome.error


def spoil(bucket: FakeBucket, name: str) -> None:
    bucket.objects[name] = flip(bucket.objects[name])


def test_plan_nothing_was_ever_committed_is_fresh(bucket: FakeBucket) -> None:
    catalog(bucket).next_epoch({})
    assert plan(bucket) == Outcome()


def test_plan_newest_commit_is_loaded_with_the_manifests_of_all_ranks(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(10))
    put_checkpoint(bucket, identity(20))
    outcome = plan(bucket)
    assert step_of(outcome) == 20 and outcome is not None
    assert outcome.manifests == {rank: snapshot(rank, identity(20))[1].to_bytes().decode() for rank in (0, 1)}


def test_plan_manifests_in_memory_are_asked_for_and_awaited(bucket: FakeBucket) -> None:
    at = identity(30)
    put_checkpoint(bucket, identity(20))
    recall = Recall(catalog(bucket))
    held = {"node-0": [(0, at)], "node-1": [(1, at)]}
    agreement = RestoreAgreement(2, 60.0)
    assert recall.plan(held, {}, {}, agreement) is None
    assert recall.wanted_from("node-1") == [{"rank": 1, "identity": at.to_json()}]
    texts = {(f"node-{rank}", rank, at): snapshot(rank, at)[1].to_bytes().decode() for rank in (0, 1)}
    assert recall.plan(held, {}, {("node-0", 0, at): texts[("node-0", 0, at)]}, agreement) is None
    assert recall.wanted_from("node-0") == []
    assert step_of(recall.plan(held, {}, texts, agreement)) == 30


def test_plan_node_that_lost_the_snapshot_meanwhile_is_not_awaited(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(20))
    recall, agreement, at = Recall(catalog(bucket)), RestoreAgreement(2, 60.0), identity(30)
    assert recall.plan({"a": [(0, at), (1, at)]}, {}, {}, agreement) is None
    assert step_of(recall.plan({"a": [(0, at)]}, {}, {}, agreement)) == 20


def test_plan_damaged_manifest_in_memory_is_named_and_the_bucket_is_used(bucket: FakeBucket) -> None:
    at = identity(20)
    put_checkpoint(bucket, at)
    texts = {("a", rank, at): snapshot(rank, at)[1].to_bytes().decode() for rank in (0, 1)}
    texts["a", 1, at] = texts["a", 1, at].replace("model", "modem", 1)
    outcome = plan(bucket, {"a": [(0, at), (1, at)]}, texts)
    assert step_of(outcome) == 20 and outcome is not None and outcome.candidate is not None
    assert [copy.tier for copy in outcome.candidate.copies[1]] == ["bucket"]
    assert [(bad["tier"], bad["where"], bad["rank"]) for bad in outcome.bad_copies] == [("memory", "a", 1)]


def test_plan_damaged_manifest_in_the_bucket_gives_the_older_step_and_is_named(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(10))
    spoil(bucket, put_checkpoint(bucket, identity(20)).ranks[1].manifest)
    outcome = plan(bucket)
    assert step_of(outcome) == 10 and outcome is not None
    assert [(bad["step"], bad["rank"], bad["tier"]) for bad in outcome.bad_copies] == [(20, 1, "bucket")]


def test_plan_damaged_record_gives_the_older_step_and_is_named(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(10))
    name = commit_name(put_checkpoint(bucket, identity(20)))
    spoil(bucket, name)
    outcome = plan(bucket)
    assert step_of(outcome) == 10 and outcome is not None
    assert [(bad["step"], bad["where"]) for bad in outcome.bad_copies] == [(20, name)]


@pytest.mark.parametrize("what", ["record", "manifest", "excluded"])
def test_plan_no_good_copy_left_is_corruption_and_never_fresh(bucket: FakeBucket, what: str) -> None:
    commit = put_checkpoint(bucket, identity(20))
    agreement = RestoreAgreement(2, 60.0)
    if what == "record":
        spoil(bucket, commit_name(commit))
    elif what == "manifest":
        spoil(bucket, commit.ranks[0].manifest)
    else:
        agreement.excluded = agreement.corrupt = {("bucket", commit.write_id, 0, 20, 1)}
    before = dict(bucket.objects)
    kind, message = error_of(plan(bucket, agreement=agreement))
    assert kind == "corruption" and "nothing was deleted" in message
    assert bucket.objects == before


def test_plan_record_gone_after_a_durable_commit_is_corruption(bucket: FakeBucket) -> None:
    found = catalog(bucket)
    found.record(found.next_epoch({}), "durable", {"step": 20})
    kind, message = error_of(plan(bucket))
    assert kind == "corruption" and "attempt 1 committed step 20" in message


def test_plan_torn_record_of_a_first_commit_that_never_was_is_fresh(bucket: FakeBucket) -> None:
    name = commit_name(put_checkpoint(bucket, identity(20)))
    bucket.objects[name] = bucket.objects[name][:-30]
    outcome = plan(bucket)
    assert outcome is not None and outcome.candidate is None and outcome.error is None
    assert [bad["where"] for bad in outcome.bad_copies] == [name]


def test_plan_every_copy_unreachable_is_unavailable(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(20))
    agreement = RestoreAgreement(2, 60.0, excluded={("bucket", "0a1b", 1, 20, 1)})
    assert error_of(plan(bucket, agreement=agreement))[0] == "unavailable"


@pytest.mark.parametrize("operation", ["list", "read"])
def test_plan_store_that_cannot_be_asked_is_tried_again(bucket: FakeBucket, operation: str) -> None:
    put_checkpoint(bucket, identity(10))
    put_checkpoint(bucket, identity(20))
    recall = Recall(catalog(FaultyTier(bucket, TierFault(operation, Fault.UNAVAILABLE, count=2))))
    for _ in range(2):
        with pytest.raises(UnavailableError):
            recall.plan({}, {}, {}, RestoreAgreement(2, 60.0))
    assert step_of(recall.plan({}, {}, {}, RestoreAgreement(2, 60.0))) == 20


def test_plan_manifest_unreachable_does_not_give_its_step_up(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(10))
    commit = put_checkpoint(bucket, identity(20))
    faulty = FaultyTier(bucket, TierFault("read", Fault.UNAVAILABLE, name=commit.ranks[1].manifest, count=ALWAYS))
    with pytest.raises(UnavailableError):
        plan(faulty)


def test_plan_snapshots_of_another_run_are_left_out(bucket: FakeBucket) -> None:
    foreign = Identity("cd" * 16, 50, 1, 2)
    put_checkpoint(bucket, identity(10))
    assert step_of(plan(bucket, {"a": [(0, foreign), (1, foreign)]})) == 10


def make_newer(bucket: FakeBucket, name: str) -> None:
    bucket.objects[name] = reseal(bucket.objects[name].replace(b'"format":1', b'"format":9'))


def test_plan_newer_format_beyond_what_is_readable_is_refused(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(10))
    make_newer(bucket, commit_name(put_checkpoint(bucket, identity(20))))
    kind, message = error_of(plan(bucket))
    assert kind == "config" and "upgrade ktrain" in message and "step-00000020" in message


def test_plan_newer_format_off_the_line_or_older_is_no_obstacle(bucket: FakeBucket) -> None:
    found = catalog(bucket)
    make_newer(bucket, commit_name(put_checkpoint(bucket, identity(5))))
    make_newer(bucket, commit_name(put_checkpoint(bucket, identity(40, 1))))
    put_checkpoint(bucket, identity(20, 2))
    found.record(2, "restored", {"step": 10})
    found.record(2, "committed", {"step": 20})
    assert step_of(plan(bucket)) == 20


# The director, which asks again


class Scene:
    """A director whose two ranks ask at once."""

    def __init__(self, tier: Any, *, rank_count: int = 2) -> None:
        self.clock = FakeClock()
        self.log = Log()
        timeouts = Timeouts(patience_s=20)
        pacer = Pacer(self.log, timeouts=timeouts, clock=self.clock)
        self.desk = Desk(catalog(tier, self.clock), Roster(), threading.RLock(), self.log, pacer, timeouts, self.clock)
        tier.write("attempts/attempt-000002-start.json", b"{}", deadline=deadline())
        self.director = RestoreDirector(self.desk, Attempt.of(2, {"node-0": [0], "node-1": [1]}))
        for rank in range(rank_count):
            self.tell(rank, "waiting", 0)

    def tell(self, rank: int, status: str, round: int, **fields: Any) -> None:
        self.director.take(rank, {"status": status, "round": round, **fields})

    def answer(self) -> dict[str, Any]:
        return self.director.answer("node-0", -1)

    def work_until_told(self) -> dict[str, Any]:
        for _ in range(1000):
            try:
                self.director.work()
            except UnavailableError:
                self.clock.advance(1.0)
            else:
                if self.answer()["state"] not in ("gathering", "planning"):
                    return self.answer()
                self.clock.advance(1.0)
        raise AssertionError(f"no word in the end: {self.answer()}")


@pytest.mark.parametrize("operation", ["list", "read"])
def test_director_store_away_for_ever_is_unavailable_and_never_fresh(bucket: FakeBucket, operation: str) -> None:
    put_checkpoint(bucket, identity(20))
    faulty = FaultyTier(bucket, TierFault(operation, Fault.UNAVAILABLE, count=ALWAYS))
    word = Scene(faulty).work_until_told()
    assert word["state"] == "failed" and word["error"]["kind"] == "unavailable"
    assert "cannot tell" in word["error"]["message"] and "status 503" in word["error"]["message"]


def test_director_store_away_for_a_while_costs_only_time(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(20))
    word = Scene(FaultyTier(bucket, TierFault("list", Fault.UNAVAILABLE, count=10))).work_until_told()
    assert word["state"] == "loading" and word["identity"]["step"] == 20


def test_director_late_rank_is_named_with_its_node(bucket: FakeBucket) -> None:
    word = Scene(bucket, rank_count=1).work_until_told()
    assert word["error"]["kind"] == "deadline" and "late: rank 1 on node-1" in word["error"]["message"]


def test_director_choice_is_recorded_before_anybody_applies(bucket: FakeBucket) -> None:
    at = identity(20)
    put_checkpoint(bucket, at)
    faulty = FaultyTier(bucket)
    scene = Scene(faulty)
    assert scene.work_until_told()["round"] == 1
    faulty.add(TierFault("write", Fault.UNAVAILABLE, name="attempts/*-restored.json"))
    for rank in (0, 1):
        scene.tell(rank, "ready", 1)
    with pytest.raises(UnavailableError):
        scene.director.work()
    assert scene.answer()["state"] == "settled"
    scene.director.work()
    assert scene.answer()["state"] == "go"
    assert scene.desk.catalog.attempts()[-1].restored_step == 20
    assert scene.director.durable == at


def test_director_fresh_start_is_recorded_as_step_0(bucket: FakeBucket) -> None:
    scene = Scene(bucket)
    assert scene.work_until_told()["state"] == "fresh"
    assert scene.desk.catalog.attempts()[-1].restored_step == 0
    assert scene.log.of("fresh_start") == [{"step": 0}]


def test_director_restored_is_said_once_when_all_have_applied(bucket: FakeBucket) -> None:
    put_checkpoint(bucket, identity(20))
    scene = Scene(bucket)
    scene.work_until_told()
    for rank in (0, 1):
        scene.tell(rank, "ready", 1)
    scene.director.work()
    for rank, tier in ((0, "memory"), (1, "bucket")):
        assert scene.log.of("restored") == []
        read = {"nbytes": 10, "wanted_nbytes": 9, "num_reads": 2, "wire_nbytes": rank, "bucket_nbytes": 0}
        scene.tell(rank, "applied", 1, tier=tier, **read, seconds=1.0 + rank)
        scene.director.work()
    scene.director.work()
    (said,) = scene.log.of("restored")
    assert (said["step"], said["tier"], said["nbytes"], said["wire_bytes"]) == (20, "bucket", 20, 1)
