"""Which gang mechanism is chosen: by what the cluster shows, never by its version, and one at a time."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest

from ktrain.errors import ConfigError
from ktrain.launcher.facts import ClusterFacts, served_resources, server_version
from ktrain.launcher.gang import choose
from ktrain.launcher.render.job import render
from ktrain.launcher.spec import GangKind, JobSpec
from tests.unit.launcher import setups
from tests.unit.launcher.test_spec import job

KUEUE = "kueue.x-k8s.io/v1beta2/localqueues"
VOLCANO = "scheduling.volcano.sh/v1beta1/podgroups"
KAI = "scheduling.run.ai/v2alpha2/podgroups"
COSCHEDULING = "scheduling.x-k8s.io/v1alpha1/podgroups"


def native(version: str) -> tuple[str, str]:
    return f"scheduling.k8s.io/{version}/workloads", f"scheduling.k8s.io/{version}/podgroups"


def facts(*served: str, **known: Any) -> ClusterFacts:
    return ClusterFacts(served=frozenset(served), **known)


def two_nodes(**placement: Any) -> JobSpec:
    return job(nodes=2, placement=placement)


EVERYTHING = facts(
    KUEUE, VOLCANO, KAI, COSCHEDULING, *native("v1beta1"), queues=("q",), volcano_queues=("q",), scheduling_group=True
)


@pytest.mark.parametrize(
    ("known", "placement", "kind"),
    [
        (EVERYTHING, {}, GangKind.KUEUE),
        (replace(EVERYTHING, queues=()), {}, GangKind.NATIVE),
        (replace(EVERYTHING, queues=(), scheduling_group=False), {}, GangKind.VOLCANO),
        (replace(EVERYTHING, queues=(), scheduling_group=None), {}, GangKind.VOLCANO),
        (facts(KAI, COSCHEDULING), {"queue": "q", "scheduler": "s"}, GangKind.KAI),
        (facts(KAI, COSCHEDULING), {"scheduler": "s"}, GangKind.COSCHEDULING),
        (facts(KAI, COSCHEDULING), {}, GangKind.BARRIER),
        (facts(VOLCANO), {}, GangKind.BARRIER),  # no queue could be seen
        (facts(KUEUE, queues=("a", "b")), {}, GangKind.BARRIER),  # which one?
        (facts(KUEUE, queues=("a", "default")), {}, GangKind.KUEUE),
        (facts(KUEUE), {"queue": "a"}, GangKind.KUEUE),  # named, and nobody could list
        (facts(KUEUE, queues=("a",)), {"queue": "b"}, GangKind.BARRIER),
        (facts("scheduling.k8s.io/v1beta1/priorityclasses", scheduling_group=True), {}, GangKind.BARRIER),
        (facts(*native("v1alpha1"), scheduling_group=True), {}, GangKind.BARRIER),  # 1.35's is another API
        (ClusterFacts(), {"queue": "q"}, GangKind.BARRIER),
    ],
)
def test_choose_takes_the_first_that_the_cluster_shows(
    known: ClusterFacts, placement: dict[str, Any], kind: GangKind
) -> None:
    assert choose(two_nodes(**placement), known).kind is kind


@pytest.mark.parametrize(
    ("served", "version"),
    [
        (("v1alpha2",), "v1alpha2"),
        (("v1alpha3", "v1alpha2"), "v1alpha3"),
        (("v1alpha3", "v1beta1"), "v1beta1"),
    ],
)
def test_choose_native_takes_the_newest_version_that_has_both_resources(served: tuple[str, ...], version: str) -> None:
    known = facts(*itertools.chain(*(native(name) for name in served)), scheduling_group=True)

    assert choose(two_nodes(), known).native_version == version


def test_choose_kueue_has_a_native_group_beside_it_where_it_was_kept() -> None:
    assert choose(two_nodes(), EVERYTHING).native_version == "v1beta1"
    assert choose(two_nodes(), replace(EVERYTHING, scheduling_group=False)).native_version is None


@pytest.mark.parametrize(
    ("known", "placement", "hint"),
    [
        (facts(), {"gang": "kueue", "queue": "q"}, "does not serve kueue.x-k8s.io"),
        (facts(KUEUE), {"gang": "kueue"}, "its queues could not be listed; name one"),
        (facts(KUEUE, queues=("a", "b")), {"gang": "kueue", "queue": "c"}, "no LocalQueue 'c'; it has a, b"),
        (ClusterFacts(), {"gang": "native"}, "not known which version"),
        (facts(), {"gang": "native"}, "no version of scheduling.k8s.io serves"),
        (facts(*native("v1beta1"), scheduling_group=False), {"gang": "native"}, "drops schedulingGroup"),
        (facts(*native("v1beta1")), {"gang": "native"}, "was not seen to keep schedulingGroup"),
        (facts(), {"gang": "volcano"}, "does not serve scheduling.volcano.sh"),
        (facts(VOLCANO, volcano_queues=("a",)), {"gang": "volcano", "queue": "b"}, "no queue 'b'; it has a"),
        (facts(KAI), {"gang": "kai"}, "it takes a queue"),
        (facts(COSCHEDULING), {"gang": "coscheduling"}, "placement.scheduler=NAME"),
    ],
)
def test_choose_refuses_what_was_asked_for_with_what_is_missing(
    known: ClusterFacts, placement: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        choose(two_nodes(**placement), known)


def test_choose_what_was_asked_for_is_tried_where_nothing_is_known() -> None:
    for kind in ("kueue", "volcano", "kai"):
        assert choose(two_nodes(gang=kind, queue="q"), ClusterFacts()).kind == kind
    assert choose(two_nodes(gang="coscheduling", scheduler="s"), ClusterFacts()).kind is GangKind.COSCHEDULING


def test_choose_barrier_is_said_loudly_but_not_for_one_node() -> None:
    assert "give their nodes back after 1800 s" in str(choose(two_nodes(), facts()).warning)
    assert choose(job(), facts()).warning is None
    assert choose(two_nodes(gang="none"), EVERYTHING).kind is GangKind.BARRIER


def gang_marks(spec: JobSpec, known: ClusterFacts) -> set[str]:
    """The mechanisms that the manifests of a job speak of."""
    done = render(spec, known)
    worker = setups.job_of(done.jobset, "worker")["spec"]["template"]
    pod, about = worker["spec"], worker["metadata"]
    found = {item["apiVersion"].split("/")[0] for item in done.owned if item["kind"] in ("PodGroup", "Workload")}
    found |= {name for name in ("schedulingGroup", "schedulerName") if name in pod}
    keys = {**about["labels"], **about.get("annotations", {}), **done.jobset["metadata"]["labels"]}
    return found | {key for key in keys if "kueue" in key or "kai" in key or "pod-group" in key or "group-name" in key}


@pytest.mark.parametrize(
    ("kind", "marks"),
    [
        ("kueue", {"kueue.x-k8s.io/queue-name", "scheduling.k8s.io", "schedulingGroup"}),
        ("native", {"scheduling.k8s.io", "schedulingGroup"}),
        ("volcano", {"scheduling.volcano.sh", "schedulerName", "scheduling.k8s.io/group-name"}),
        ("kai", {"kai.scheduler/queue", "schedulerName"}),
        ("coscheduling", {"scheduling.x-k8s.io", "schedulerName", "scheduling.x-k8s.io/pod-group"}),
        ("none", set()),
    ],
)
def test_render_marks_a_job_for_one_gang_scheduler_alone(kind: str, marks: set[str]) -> None:
    assert gang_marks(two_nodes(gang=kind, queue="q", scheduler="s"), EVERYTHING) == marks


@pytest.mark.parametrize("version", ["v1alpha2", "v1alpha3", "v1beta1"])
def test_render_native_group_counts_nodes_without_spares_and_head(version: str) -> None:
    known = facts(*native(version), scheduling_group=True)
    workload, group = render(job(nodes=3, spares=2), known).owned[-2:]
    _, whole = render(job(nodes=3), known).owned[-2:]

    assert group["spec"]["schedulingPolicy"] == {"gang": {"minCount": 3}}
    assert workload["spec"]["podGroupTemplates"][0]["schedulingPolicy"] == {"gang": {"minCount": 3}}
    single, together = ("Pod", "PodGroup") if version == "v1alpha2" else ({"single": {}}, {"all": {}})
    assert group["spec"]["disruptionMode"] == single  # a spare takes the place of one that is taken away
    assert whole["spec"]["disruptionMode"] == together


def transcript(name: str) -> list[dict[str, Any]]:
    path = setups.TRANSCRIPTS / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the recorded answers of a real server are not at {setups.TRANSCRIPTS}")
    steps: list[dict[str, Any]] = json.loads(path.read_text())["steps"]
    return steps


def test_facts_read_the_discovery_of_a_real_server() -> None:
    documents = [step["response"]["body"] for step in transcript("discovery-aggregated")]
    served = frozenset().union(*(served_resources(document) for document in documents))
    known = ClusterFacts(served=served, queues=("q",), scheduling_group=True)

    assert "jobset.x-k8s.io/v1alpha2/jobsets" in served and "/v1/pods" in served
    assert known.serves("kueue.x-k8s.io", "localqueues") and known.serves("scheduling.volcano.sh", "podgroups")
    assert known.serves("resource.nvidia.com", "computedomains") is False
    assert known.versions_of("scheduling.k8s.io", "workloads", "podgroups") == ("v1alpha2",)
    gang = choose(two_nodes(), known)
    assert (gang.kind, gang.native_version) == (GangKind.KUEUE, "v1alpha2")


def test_facts_read_the_version_of_a_real_server() -> None:
    assert server_version(transcript("version")[0]["response"]["body"]) == (1, 36)


def test_facts_version_is_the_emulated_one() -> None:
    assert server_version({"major": "1", "minor": "37+", "emulationMajor": "1", "emulationMinor": "36"}) == (1, 36)
    assert server_version({"major": "1", "minor": "37+"}) == (1, 37)


def test_facts_leave_out_groups_that_the_server_could_not_ask() -> None:
    resources = [{"resource": "localqueues"}]
    group = {"metadata": {"name": "g"}, "versions": [{"version": "v1", "freshness": "Stale", "resources": resources}]}

    assert served_resources({"items": [group]}) == frozenset()


@pytest.mark.parametrize("name", setups.NAMES)
def test_facts_value_is_read_back_equal(name: str) -> None:
    known = setups.read_facts(name)

    assert ClusterFacts.from_value(known.to_value()) == known


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ({"serves": []}, "'serves' is none"),
        ({"served": "a"}, "served: cannot use 'a'"),
        ({"restart_rules": 1}, "restart_rules"),
        ({"version": [1]}, "version"),
        ({"queues": [1]}, "queues"),
    ],
)
def test_facts_of_another_form_are_refused(value: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        ClusterFacts.from_value(value)
