"""The record of a submission: read back whole, refused by name, and compared in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ktrain.errors import ConfigError
from ktrain.launcher.backends.kubernetes.submission import Submission, changes, new_sending
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.gang import choose
from ktrain.launcher.spec import JobSpec
from tests.unit.launcher.on_cluster.clusters import job

FACTS = ClusterFacts(version=(1, 36), served=frozenset({"batch/v1/jobs", "kueue.x-k8s.io/v1beta1/localqueues"}))


def made(spec: JobSpec | None = None, facts: ClusterFacts = FACTS, **more: Any) -> Submission:
    spec = job() if spec is None else spec
    return new_sending(spec, facts, choose(spec, facts), time=5.0, **more).submission


def said(before: Submission, spec: JobSpec, facts: ClusterFacts) -> tuple[str, ...]:
    return changes(before, spec, facts, choose(spec, facts))


def test_record_is_read_back_and_what_a_newer_ktrain_added_is_left_out() -> None:
    record = made()

    assert Submission.from_value({**record.to_value(), "colour": "red"}) == record
    assert record.facts is not None and record.facts["served"] == ["kueue.x-k8s.io/v1beta1/localqueues"]


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"format": 2}, "written in format 2, this ktrain knows up to 1"),
        ({"format": None}, "expected an object with a format"),
        ({"number": "many"}, "lacks a part or has a wrong one"),
        ({"spec": None}, "lacks a part or has a wrong one"),
    ],
)
def test_record_that_is_none_is_refused(change: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        Submission.from_value({**made().to_value(), **change})


def test_job_of_a_newer_ktrain_is_refused_with_the_field() -> None:
    record = made()

    with pytest.raises(ConfigError, match="submission 1 of net: colour: there is no such field"):
        _ = replace(record, spec={**record.spec, "colour": "red"}).job


def test_change_is_named_by_its_field_however_deep() -> None:
    before = made(job(limits={"max_restarts": 5}))
    after = job(nodes=3, limits={"patience_s": 10.0}, placement={"node_selector": {"pool": "a"}})

    assert said(before, after, FACTS) == (
        "limits.max_restarts: 5 -> the default",
        "limits.patience_s: the default -> 10.0",
        "nodes: 2 -> 3",
        "placement.node_selector.pool: the default -> a",
    )


def test_facts_of_a_newer_ktrain_are_not_known() -> None:
    before = replace(made(), facts={"weather": "fine"})

    assert said(before, job(), FACTS) == ("nothing is known of the cluster of submission 1",)


def test_what_is_served_is_compared_where_both_are_known() -> None:
    unknown = replace(FACTS, served=None)

    assert "what the cluster serves is not known now" in said(made(), job(), unknown)
    assert "what the cluster serves is known now" in said(made(facts=unknown), job(), FACTS)


def test_submission_that_never_came_to_be_hands_on_what_it_knew() -> None:
    first = made()
    second = made(job(nodes=3), after=first, ended={"state": "failed"})
    third = made(job(nodes=4), after=second)

    assert third.number == 3 and third.before == second.before == {"id": first.id, "number": 1, "state": "failed"}
    assert third.changes == ("nodes: 2 -> 3", "nodes: 3 -> 4")


def test_memory_tier_that_auto_chose_otherwise_is_said_with_its_reason() -> None:
    spec = job(memory={"state": "1Gi", "scope": "auto"})
    lends, lends_none = replace(FACTS, node_memory=1 << 50), replace(FACTS, node_memory=0)
    before = made(spec, lends)

    (lost,) = said(before, spec, lends_none)
    assert lost.startswith("memory tier: pod, it was node: namespace default has no bound claim")
    (gained,) = said(made(spec, lends_none), spec, lends)
    assert gained.startswith("memory tier: node, it was pod: nodes lend ")
    assert said(before, spec, replace(lends, node_memory=1 << 49)) == ()
    newer = replace(before, spec={**before.spec, "colour": "red"})
    assert said(newer, spec, lends_none) == ("colour: red -> the default",)
