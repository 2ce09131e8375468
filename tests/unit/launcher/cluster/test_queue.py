"""Queues: suspended until the whole fits, evicted for others, and admitted again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktrain.launcher.cluster.resources import (
    CLUSTER_QUEUE,
    KUEUE_WORKLOAD,
    LOCAL_QUEUE,
    RESOURCE_FLAVOR,
    WORKLOAD_PRIORITY_CLASS,
)
from tests.unit.launcher.cluster.making import JOB_SET, SPACE, Made, Object, conditions, job_spec, jobset_spec, pod_spec

ADMITTED = ("True", "Admitted", "The workload is admitted")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path)
    quota = {"name": "f", "resources": [{"name": "cpu", "nominalQuota": "2"}]}
    groups = [{"coveredResources": ["cpu"], "flavors": [quota]}]
    preemption = {"withinClusterQueue": "LowerPriority"}
    made.create(RESOURCE_FLAVOR, "f", {"nodeLabels": {"kubernetes.io/hostname": "n2"}})
    made.create(CLUSTER_QUEUE, "cq", {"resourceGroups": groups, "preemption": preemption})
    made.create(LOCAL_QUEUE, "queue", {"clusterQueue": "cq"})
    for name, value in (("low", 1), ("high", 9)):
        made.store.create(WORKLOAD_PRIORITY_CLASS, {"metadata": {"name": name}, "value": value})
    return made


def submit(made: Made, name: str, cpu: str = "1", *, queue: str = "queue", **labels: Any) -> None:
    pod = pod_spec(container={"resources": {"requests": {"cpu": cpu}}})
    all_labels = {"kueue.x-k8s.io/queue-name": queue, **labels}
    made.create(JOB_SET, name, jobset_spec(("workers", job_spec(2, pod=pod))), labels=all_labels)


def priority(name: str) -> dict[str, str]:
    return {"kueue.x-k8s.io/priority-class": name}


def workload(made: Made, name: str) -> Object:
    (found,) = [
        item
        for item in made.store.list(KUEUE_WORKLOAD, SPACE).items
        if item["metadata"]["name"].startswith(f"jobset-{name}-")
    ]
    return found


def finish(made: Made, name: str) -> None:
    for index in (0, 1):
        made.exit(f"{name}-workers-0-{index}", 0)


def test_queue_second_jobset_waits_until_the_first_has_finished(made: Made) -> None:
    submit(made, "first")
    submit(made, "second")
    assert conditions(workload(made, "first"))["Admitted"] == ADMITTED
    assert {pod["spec"]["nodeName"] for pod in made.pods()} == {"n2"}
    waits = (
        "False",
        "WaitingForQuota",
        "couldn't assign flavors to pod set workers: insufficient unused quota for cpu in flavor f, 2 more needed",
    )
    assert conditions(workload(made, "second"))["QuotaReserved"] == waits
    assert made.get(JOB_SET, "second")["spec"]["suspend"]
    assert not made.pods("second")
    finish(made, "first")
    done = ("True", "Succeeded", "jobset completed successfully")
    assert conditions(workload(made, "first"))["Finished"] == done
    assert conditions(workload(made, "second"))["Admitted"] == ADMITTED
    running = ("True", "Started", "All pods reached readiness and the workload is running")
    assert conditions(workload(made, "second"))["PodsReady"] == running
    assert len(made.pods("second")) == 2


@pytest.mark.parametrize(
    ("cpu", "queue", "reason", "words"),
    [
        ("1", "nosuch", "Misconfigured", "LocalQueue nosuch doesn't exist"),
        ("4", "queue", "ExceedsMaxQuota", "6 more needed"),
    ],
)
def test_queue_jobset_that_can_not_be_admitted_says_why(
    made: Made, cpu: str, queue: str, reason: str, words: str
) -> None:
    submit(made, "a", cpu, queue=queue)
    status, found, message = conditions(workload(made, "a"))["QuotaReserved"]
    assert (status, found) == ("False", reason)
    assert words in message
    assert not made.pods()


def test_queue_higher_priority_evicts_the_lower_which_comes_back(made: Made) -> None:
    submit(made, "low", **priority("low"))
    assert len(made.pods("low")) == 2
    submit(made, "high", **priority("high"))
    made.settle()
    evicted = conditions(workload(made, "low"))["Evicted"]
    assert evicted[:2] == ("True", "Preempted")
    assert evicted[2].endswith("preemptor path: /cq; preemptee path: /cq")
    assert conditions(workload(made, "low"))["Admitted"] == (
        "False",
        "NoReservation",
        "The workload has no reservation",
    )
    assert not made.pods("low")
    assert len(made.pods("high")) == 2
    finish(made, "high")
    low = conditions(workload(made, "low"))
    assert low["Admitted"] == ADMITTED
    assert low["Evicted"] == ("False", "QuotaReserved", f"Previously: {evicted[2]}")
    assert len(made.pods("low")) == 2


def test_queue_deactivated_workload_is_evicted_and_stays_out(made: Made) -> None:
    submit(made, "a")
    name = workload(made, "a")["metadata"]["name"]
    made.store.mutate(KUEUE_WORKLOAD, SPACE, name, lambda obj: obj["spec"].update(active=False))
    made.settle()
    said = conditions(workload(made, "a"))
    assert said["Evicted"] == ("True", "Deactivated", "The workload is deactivated")
    assert said["QuotaReserved"] == ("False", "Deactivated", "The workload is deactivated")
    assert said["Requeued"][0] == "False"
    assert not made.pods()
