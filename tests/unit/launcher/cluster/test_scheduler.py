"""Where pods go, gangs whole or not at all, and why one waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktrain.launcher.cluster import fitting
from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.launcher.cluster.resources import COSCHEDULING_POD_GROUP, POD_GROUP, VOLCANO_POD_GROUP
from tests.unit.launcher.cluster.making import JOB, POD, Made, Object, conditions, job_spec, pod_spec

GPU = "nvidia.com/gpu"
TAINT = {"key": GPU, "value": "present", "effect": "NoSchedule"}


def node(name: str, gpus: int = 8, *, taints: tuple[dict[str, str], ...] = (), **labels: str) -> NodeSpec:
    return NodeSpec(name, {"cpu": "8", "memory": "32Gi", GPU: str(gpus), "pods": "110"}, labels, taints)


def gpus(number: int, **more: Any) -> Object:
    return pod_spec(container={"resources": {"limits": {GPU: str(number)}}}, **more)


def where(made: Made) -> dict[str, str | None]:
    return {pod["metadata"]["name"]: pod["spec"].get("nodeName") for pod in made.pods()}


def apart(key: str = fitting.HOST_LABEL) -> Object:
    term = {"labelSelector": {"matchLabels": {"app": "w"}}, "topologyKey": key}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def near(key: str) -> Object:
    term = {"labelSelector": {"matchLabels": {"app": "w"}}, "topologyKey": key}
    return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def test_pod_too_large_waits_and_says_why_until_there_is_room(tmp_path: Path) -> None:
    made = Made(tmp_path, nodes=[node("a", 2), node("b", 4)])
    made.create(POD, "first", gpus(4))
    made.create(POD, "second", gpus(4))
    assert where(made) == {"first": "b", "second": None}
    words = (
        "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. no new claims to deallocate, preemption: "
        "0/2 nodes are available: 2 No preemption victims found for incoming pod."
    )
    assert conditions(made.get(POD, "second"))["PodScheduled"] == ("False", "Unschedulable", words)
    assert ("FailedScheduling", words) in made.events()
    made.exit("first", 0)
    assert where(made)["second"] == "b"
    assert conditions(made.get(POD, "second"))["PodScheduled"] == ("True", "", "")


@pytest.mark.parametrize(
    ("spec", "place", "words"),
    [
        (pod_spec(nodeSelector={"pool": "x"}), "b", ""),
        (pod_spec(nodeSelector={"pool": "nosuch"}), None, "2 node(s) didn't match Pod's node affinity/selector"),
        (gpus(1), "b", ""),
        (gpus(1, nodeSelector={"pool": "tainted"}), None, "untolerated taint(s) {nvidia.com/gpu: present}"),
        (gpus(1, nodeSelector={"pool": "tainted"}, tolerations=[{"key": GPU, "operator": "Exists"}]), "a", ""),
        (gpus(1, nodeSelector={"pool": "tainted"}, tolerations=[{**TAINT, "operator": "Equal"}]), "a", ""),
        (gpus(1, nodeSelector={"pool": "tainted"}, tolerations=[{"key": GPU, "value": "absent"}]), None, "taint"),
    ],
)
def test_pod_goes_where_its_selectors_and_tolerations_allow(
    tmp_path: Path, spec: Object, place: str | None, words: str
) -> None:
    made = Made(tmp_path, nodes=[node("a", taints=(TAINT,), pool="tainted"), node("b", pool="x")])
    made.create(POD, "p", spec)
    assert where(made) == {"p": place}
    assert words in conditions(made.get(POD, "p"))["PodScheduled"][2]


@pytest.mark.parametrize(
    ("operator", "values", "place"),
    [("In", ["1"], "a"), ("NotIn", ["1"], "b"), ("Gt", ["1"], "b"), ("Lt", ["2"], "a"), ("DoesNotExist", [], None)],
)
def test_pod_node_affinity_operators(tmp_path: Path, operator: str, values: list[str], place: str | None) -> None:
    made = Made(tmp_path, nodes=[node("a", rank="1"), node("b", rank="2")])
    term = {"matchExpressions": [{"key": "rank", "operator": operator, "values": values}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    made.create(POD, "p", pod_spec(affinity={"nodeAffinity": required}))
    assert where(made) == {"p": place}


def test_pods_that_stay_apart_take_a_node_each_and_the_next_waits(tmp_path: Path) -> None:
    made = Made(tmp_path, nodes=[node("a"), node("b")])
    for name in ("p", "q", "r"):
        made.create(POD, name, pod_spec(affinity=apart()), labels={"app": "w"})
    assert where(made) == {"p": "a", "q": "b", "r": None}
    assert "pod anti-affinity" in conditions(made.get(POD, "r"))["PodScheduled"][2]


def test_gang_that_must_be_near_finds_the_domain_with_room(tmp_path: Path) -> None:
    made = Made(tmp_path, nodes=[node("a", 4, rack="1"), node("b", 4, rack="2"), node("c", 4, rack="2")])
    made.create(POD_GROUP, "g", {"schedulingPolicy": {"gang": {"minCount": 2}}})
    for name in ("p", "q"):
        spec = gpus(4, affinity=near("rack"), schedulingGroup={"podGroupName": "g"})
        made.create(POD, name, spec, labels={"app": "w"})
    assert where(made) == {"p": "b", "q": "c"}


Join = Callable[[Object], tuple[Object, Object]]  # a pod's spec -> its spec and metadata in the group


def native(spec: Object) -> tuple[Object, Object]:
    return {**spec, "schedulingGroup": {"podGroupName": "g"}}, {}


def volcano(spec: Object) -> tuple[Object, Object]:
    return {**spec, "schedulerName": "volcano"}, {"annotations": {"scheduling.k8s.io/group-name": "g"}}


def coscheduling(spec: Object) -> tuple[Object, Object]:
    return spec, {"labels": {"scheduling.x-k8s.io/pod-group": "g"}}


@pytest.mark.parametrize(
    ("resource", "group", "join"),
    [
        (POD_GROUP, {"schedulingPolicy": {"gang": {"minCount": 3}}}, native),
        (VOLCANO_POD_GROUP, {"minMember": 3}, volcano),
        (COSCHEDULING_POD_GROUP, {"minMember": 3}, coscheduling),
    ],
)
def test_gang_waits_for_its_members_then_for_room_for_all(
    tmp_path: Path, resource: Any, group: Object, join: Join
) -> None:
    made = Made(tmp_path, nodes=[node("a", 8), node("b", 4)])
    made.create(POD, "other", gpus(4, nodeSelector={fitting.HOST_LABEL: "b"}))
    made.create(resource, "g", group)
    spec, metadata = join(gpus(4))
    for name in ("p0", "p1", "p2"):
        made.create(POD, name, spec, **metadata)
        assert {where(made)[item] for item in where(made) if item != "other"} == {None}
    made.exit("other", 0)
    assert sorted(str(where(made)[name]) for name in ("p0", "p1", "p2")) == ["a", "a", "b"]


def test_gang_of_kai_is_the_whole_job(tmp_path: Path) -> None:
    made = Made(tmp_path, nodes=[node("a", 4)])
    made.create(JOB, "big", job_spec(2, pod=gpus(4, schedulerName="kai-scheduler")))
    assert set(where(made).values()) == {None}
    made.create(JOB, "small", job_spec(2, pod=gpus(2, schedulerName="kai-scheduler")))
    assert [place for name, place in where(made).items() if name.startswith("small")] == ["a", "a"]


def test_gang_without_its_group_waits_in_silence(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.create(POD, "p", pod_spec(schedulingGroup={"podGroupName": "missing"}))
    assert where(made) == {"p": None}
    assert "PodScheduled" not in conditions(made.get(POD, "p"))


def test_gang_group_says_how_it_stands_as_recorded(tmp_path: Path) -> None:
    made = Made(tmp_path, nodes=[node("a")])
    made.create(POD_GROUP, "g", {"schedulingPolicy": {"gang": {"minCount": 1}}})
    made.create(POD, "p", pod_spec(schedulingGroup={"podGroupName": "g"}, nodeSelector={"pool": "nosuch"}))
    refused = ("False", "Unschedulable", "pod group is unschedulable")
    assert conditions(made.get(POD_GROUP, "g"))["PodGroupScheduled"] == refused
    made.create(POD, "q", pod_spec(schedulingGroup={"podGroupName": "g"}))
    assert conditions(made.get(POD_GROUP, "g"))["PodGroupScheduled"] == ("True", "Scheduled", "")
    assert where(made) == {"p": None, "q": "a"}
    made.create(VOLCANO_POD_GROUP, "g", {"minMember": 3})
    spec, metadata = volcano(pod_spec())
    for name in ("v0", "v1"):
        made.create(POD, name, spec, **metadata)
    words = "pod group is not ready, 2 Pending, 3 minAvailable; Pending: 2 Unschedulable"
    assert conditions(made.get(POD, "v0"))["PodScheduled"] == ("False", "Unschedulable", words)
    group = made.get(VOLCANO_POD_GROUP, "g")
    said = ("True", "NotEnoughResources", f"3/2 tasks in gang unschedulable: {words}")
    assert (group["status"]["phase"], conditions(group)["Unschedulable"]) == ("Inqueue", said)
