"""Core objects are completed as the recorded API server completes them."""

from __future__ import annotations

from typing import Any

import pytest

from ktrain.launcher.cluster.defaults import MAX_INT32, complete
from ktrain.launcher.cluster.resources import CONFIG_MAP, JOB, POD, POD_GROUP, SECRET

METADATA = {"name": "a", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}


def pod(*resources: dict[str, Any], **spec: Any) -> dict[str, Any]:
    containers = [{"name": f"c{i}", "image": "image:1", "resources": each} for i, each in enumerate(resources)]
    return {"metadata": dict(METADATA), "spec": {"containers": containers, **spec}}


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("a", "Always"),
        ("a:latest", "Always"),
        ("a:1", "IfNotPresent"),
        ("host:5000/a", "Always"),
        ("host:5000/a:1", "IfNotPresent"),
        ("a@sha256:0", "IfNotPresent"),
    ],
)
def test_image_is_pulled_by_its_tag(image: str, policy: str) -> None:
    obj = {"metadata": dict(METADATA), "spec": {"containers": [{"name": "c", "image": image}]}}
    complete(POD, obj)
    assert obj["spec"]["containers"][0]["imagePullPolicy"] == policy  # type: ignore[index]


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ([{}], "BestEffort"),
        ([{"limits": {"nvidia.com/gpu": "8"}}], "BestEffort"),
        ([{"requests": {"cpu": "1"}}], "Burstable"),
        ([{"limits": {"cpu": "1", "memory": "1Gi"}}], "Guaranteed"),
        ([{"limits": {"cpu": "1", "memory": "1Gi"}}, {}], "Burstable"),
        ([{"limits": {"cpu": "2", "memory": "1Gi"}, "requests": {"cpu": "1"}}], "Burstable"),
    ],
)
def test_class_of_a_pod_follows_its_bounds(resources: list[dict[str, Any]], expected: str) -> None:
    obj = pod(*resources)
    complete(POD, obj)
    assert obj["status"]["qosClass"] == expected


def test_limits_are_requests_where_none_are_named() -> None:
    obj = pod({"limits": {"cpu": "2", "nvidia.com/gpu": "8"}, "requests": {"cpu": "1"}})
    complete(POD, obj)
    assert obj["spec"]["containers"][0]["resources"]["requests"] == {"cpu": "1", "nvidia.com/gpu": "8"}


def test_tolerations_of_lost_nodes_are_added_unless_the_pod_has_its_own() -> None:
    own = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 9}
    obj = pod({}, tolerations=[own])
    complete(POD, obj, toleration_s=5)
    seconds = {each["key"]: each["tolerationSeconds"] for each in obj["spec"]["tolerations"]}
    assert seconds == {"node.kubernetes.io/unreachable": 9, "node.kubernetes.io/not-ready": 5}


def test_pod_behind_a_gate_says_so() -> None:
    obj = pod({}, schedulingGates=[{"name": "x/y"}])
    complete(POD, obj)
    assert [(each["type"], each["reason"]) for each in obj["status"]["conditions"]] == [
        ("PodScheduled", "SchedulingGated")
    ]


def test_job_counts_failures_by_pod_or_by_index() -> None:
    for extra, limit in (({}, 6), ({"backoffLimitPerIndex": 1}, MAX_INT32)):
        job = {"metadata": dict(METADATA), "spec": {"template": pod({}), **extra}}
        complete(JOB, job)
        assert job["spec"]["backoffLimit"] == limit and job["spec"]["completions"] == 1


def test_job_with_a_failure_policy_waits_for_the_end_of_its_pods() -> None:
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    job: dict[str, Any] = {
        "metadata": dict(METADATA),
        "spec": {"template": pod({}), "podFailurePolicy": {"rules": [rule]}},
    }
    complete(JOB, job)
    assert job["spec"]["podReplacementPolicy"] == "Failed"
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_texts_of_a_secret_become_its_data() -> None:
    secret: dict[str, Any] = {"metadata": dict(METADATA), "stringData": {"k": "v"}, "data": {"m": "eA=="}}
    complete(SECRET, secret)
    assert secret["data"] == {"m": "eA==", "k": "dg=="} and "stringData" not in secret


def test_mode_of_a_gang_has_its_default_in_the_version_that_writes_it_as_text() -> None:
    for resource, expected in ((POD_GROUP, "Pod"), (POD_GROUP.at("v1beta1"), None)):
        group: dict[str, Any] = {"metadata": dict(METADATA), "spec": {}}
        complete(resource, group)
        assert group["spec"].get("disruptionMode") == expected


def test_other_kinds_stay_as_they_are() -> None:
    obj = {"metadata": dict(METADATA), "data": {"k": "v"}}
    complete(CONFIG_MAP, obj)
    assert obj == {"metadata": METADATA, "data": {"k": "v"}}
