"""The gang test of `ktrain doctor --active` on a cluster whose pods run: whole, not at all, and half."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from ktrain.base.clock import Deadline
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import Door, Reply, connect
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.doctor.gang_trial import CHECK, Terms, try_gang
from ktrain.launcher.doctor.looks import Looks
from ktrain.launcher.doctor.scratch import Scratch
from ktrain.testing.fake_cluster import Offer
from ktrain.testing.running_cluster import RunningCluster

NATIVE = "scheduling.k8s.io/v1alpha2"
OFFER = Offer(version="1.36", apis=frozenset({NATIVE}), gates={"GenericWorkload": True, "GangScheduling": True})
SIZE = {"cpu": "2", "memory": "8Gi", "pods": "9"}
TERMS = Terms(fits_s=60.0, settle_s=1.5, clear_s=60.0)


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCluster]:
    with RunningCluster([NodeSpec("n0", SIZE), NodeSpec("n1", SIZE)], OFFER) as found:
        yield found


class MiscountingDoor:
    """A cluster whose groups are placed with one pod, whatever was asked: gangs do not hold there."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float) -> Reply:
        if method == "POST" and "podgroups" in path and body is not None:
            body = json.dumps(json.loads(body.replace(b'"minCount": 2', b'"minCount": 1'))).encode()
        return self._door.send(method, path, headers, body, timeout_s)


def trial(running: RunningCluster, folder: Path, through: Callable[[Door], Door] = lambda door: door) -> Finding:
    """What the gang test finds; its namespace is gone afterwards."""
    client = Client(through(connect(running.api.write_kubeconfig(folder / "config"))), call_s=30.0)
    scratch = Scratch(client)
    scratch.open()
    try:
        [found] = try_gang(Looks(client, "default"), scratch, None, TERMS)
    finally:
        left = scratch.clear(Deadline.after(TERMS.clear_s))
    names = [item["metadata"]["name"] for item in running.api.store.list(known.NAMESPACE).items]
    assert left == [] and scratch.name not in names and found.check == CHECK
    return found


def test_gang_that_fits_runs_whole_and_one_that_does_not_fit_does_not_run(
    running: RunningCluster, tmp_path: Path
) -> None:
    found = trial(running, tmp_path)

    assert found.outcome is Outcome.OK, found
    assert "native: a group of 2 pods ran whole" in found.evidence and "none got a node" in found.evidence


def test_scheduler_that_starts_half_a_gang_is_found_out(running: RunningCluster, tmp_path: Path) -> None:
    found = trial(running, tmp_path, MiscountingDoor)

    assert found.outcome is Outcome.FAILED, found
    assert "1 of 2 pods of a group that does not fit" in found.evidence


def test_queue_admits_what_is_within_its_quota_and_nothing_else(tmp_path: Path) -> None:
    quotas = [{"name": name, "nominalQuota": amount} for name, amount in (("cpu", "1"), ("memory", "1Gi"))]
    group = {"coveredResources": ["cpu", "memory"], "flavors": [{"name": "f", "resources": quotas}]}
    with RunningCluster([NodeSpec("n0", SIZE)], Offer(version="1.36", kueue=True)) as running:
        for resource, name, spec in (
            (known.RESOURCE_FLAVOR, "f", {}),
            (known.CLUSTER_QUEUE, "cq", {"namespaceSelector": {}, "resourceGroups": [group]}),
            (known.LOCAL_QUEUE, "q", {"clusterQueue": "cq"}),
        ):
            about = {"name": name, **({"namespace": "default"} if resource.namespaced else {})}
            running.api.store.create(resource, {"metadata": about, "spec": spec})
        found = trial(running, tmp_path)

    assert found.outcome is Outcome.OK, found
    assert "kueue: a group of 2 pods ran whole" in found.evidence and "1 CPUs of quota" in found.evidence
