"""The plan before the launch: the tier of each failure, and what is missing for better."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.launcher import budget
from ktrain.launcher.explain import Level, Plan, Recovery, explain
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render.job import render
from ktrain.launcher.spec import JobSpec
from tests.unit.launcher import setups
from tests.unit.launcher.test_spec import job

ALL = ClusterFacts(restart_rules=True, message_patterns=True, served=frozenset())
LENT = "memory that nodes lend (claim ktrain-memory)"
KNOWN = {"saving": {"every": 10, "step_s": 2.0, "bucket_bytes_per_s": 10**9}}


def plan(spec: JobSpec, facts: ClusterFacts = ALL) -> Plan:
    return explain(spec, facts, render(spec, facts))


def tiers(found: Plan) -> dict[str, str | None]:
    return {item.failure: item.tier for item in found.recoveries}


def one(found: Plan, words: str) -> Recovery:
    [item] = [item for item in found.recoveries if words in item.failure]
    return item


def test_plan_small_failures_are_mended_from_memory() -> None:
    found = tiers(plan(job(nodes=2)))

    assert found["a worker process dies"] == found["a worker hangs"] == contract.TIER_MEMORY
    assert found["the trainer's container ends (out of memory)"] == contract.TIER_MEMORY
    assert found["an agent or the head ends"] is None


@pytest.mark.parametrize(
    ("changes", "tier"),
    [
        ({"nodes": 2}, contract.TIER_PEER),
        ({"nodes": 1}, contract.TIER_BUCKET),
        ({"nodes": 2, "memory": {"state": "1Gi", "replicas": 0}}, contract.TIER_BUCKET),
        ({"tpu": "v6e:4x4"}, contract.TIER_BUCKET),  # its hosts go together
        ({"tpu": "v6e:4x4", "slices": 2}, contract.TIER_PEER),
    ],
)
def test_plan_a_lost_node_is_mended_from_the_nearest_other_place(changes: dict[str, Any], tier: str) -> None:
    found = tiers(plan(job(**changes)))
    assert found["a TPU slice is lost" if "tpu" in changes else "a node is lost"] == tier


def test_plan_memory_of_the_node_outlives_pods_where_a_driver_keeps_it() -> None:
    pods, node, driver = (job(nodes=2, memory={"state": "1Gi", "scope": scope}) for scope in ("pod", "node", "mtc"))

    assert tiers(plan(node)) == tiers(plan(driver))
    assert one(plan(pods), "evicted").tier == contract.TIER_PEER
    assert one(plan(node), "evicted").tier == contract.TIER_MEMORY
    assert one(plan(pods), "preempted").tier == contract.TIER_BUCKET
    assert one(plan(node), "preempted").tier == contract.TIER_MEMORY
    assert one(plan(node), "a node is lost").tier == contract.TIER_PEER


def test_plan_names_the_failures_that_memory_of_the_node_would_mend() -> None:
    """And says so where it is there and not used, where it is not there, and where nobody knows."""
    for facts, feature, is_known in (
        (replace(ALL, node_memory=1 << 40), "use of the memory that nodes lend (--memory-scope node)", True),
        (replace(ALL, node_memory=0), LENT, True),
        (ALL, LENT, False),
    ):
        [item] = [item for item in plan(job(nodes=2), facts).missing if "lend" in item.feature]
        assert (item.feature, item.is_known) == (feature, is_known)
        assert "a pod is deleted or evicted" in item.cost and "the job is preempted" in item.cost
        assert "a node is lost" not in item.cost and "a worker process" not in item.cost

    node = job(nodes=2, memory={"state": "1Gi", "scope": "node"})
    assert not any("lend" in item.feature for item in plan(node).missing)
    assert plan(node).scope == "node: asked for"


def test_plan_steps_and_seconds_follow_from_the_numbers_of_the_job() -> None:
    found = plan(job(nodes=2, memory={"state": 10**10}, **KNOWN))
    process, cluster = one(found, "process"), one(found, "cluster is lost")

    assert process.steps_lost == 11  # one interval, and the step in which the snapshot is sealed
    assert process.seconds == pytest.approx(1 + 20 + 2 + 22)  # notice, start, 10 GB from memory, the steps again
    assert cluster.steps_lost == 11 + 10  # two drains of 10 s, at 2 s a step
    assert cluster.seconds == pytest.approx(60 + 20 + 10 + 42)


def test_plan_says_nothing_of_steps_where_their_time_is_not_known() -> None:
    found = plan(job(nodes=2))

    assert one(found, "process").steps_lost == 11 and one(found, "process").seconds is None
    assert one(found, "cluster is lost").steps_lost is None
    assert any("give saving.step_s" in text for text in found.assumed)


def test_plan_preemption_costs_what_is_not_in_the_bucket_yet() -> None:
    found = plan(job(nodes=2, memory={"state": 10**10}, **KNOWN))
    preempted = one(found, "preempted")

    assert preempted.steps_lost == one(found, "cluster is lost").steps_lost == 11 + 10
    assert "not in the bucket" in preempted.note


def test_plan_a_spare_takes_a_lost_place_before_the_cluster_notices() -> None:
    seconds = [one(plan(job(nodes=2, spares=spares, **KNOWN)), "a node is lost").seconds for spares in (0, 1)]

    assert None not in seconds and seconds[0] - seconds[1] > 100  # type: ignore[operator]


def test_plan_names_what_is_missing_and_whether_it_was_asked() -> None:
    def missing(facts: ClusterFacts, **changes: Any) -> dict[str, bool]:
        return {item.feature: item.is_known for item in plan(job(nodes=2, **changes), facts).missing}

    assert missing(ALL) == {"a gang scheduler": True, LENT: False}
    asked = ClusterFacts(restart_rules=False, message_patterns=False, served=frozenset(), node_memory=0)
    assert missing(asked) == dict.fromkeys(missing(ClusterFacts()), True) and len(missing(asked)) == 4
    assert not any(missing(ClusterFacts()).values())
    assert "ComputeDomain" in missing(ALL, accelerator="gb200:4")
    assert "another node" in missing(ALL, memory={"state": "1Gi", "replicas": 2})


@pytest.mark.parametrize("name", setups.NAMES)
def test_plan_of_a_setup_has_its_memory_and_every_failure_a_tier(name: str) -> None:
    spec = setups.read_spec(name)
    found = plan(spec, setups.read_facts(name))

    chosen = render(spec, setups.read_facts(name)).scope.scope
    assert found.memory == budget.memory_budget(spec, chosen) and found.bucket_bytes >= 4 * spec.memory.state
    assert all(item.tier in (*contract.TIERS, None) for item in found.recoveries) and len(found.recoveries) == 10


@pytest.mark.parametrize(
    ("rules", "spares", "level", "tier"),
    [
        (True, 0, Level.POD, contract.TIER_PEER),
        (False, 0, Level.CONTAINER, contract.TIER_MEMORY),
        (False, 1, Level.POD, contract.TIER_PEER),
    ],
)
def test_plan_a_suspected_node_is_left_as_cluster_and_spares_allow(
    rules: bool, spares: int, level: Level, tier: str
) -> None:
    found = one(plan(job(nodes=2, spares=spares, **KNOWN), ClusterFacts(restart_rules=rules)), "suspected")

    assert (found.restart, found.tier) == (level, tier)
