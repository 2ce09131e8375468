"""A cluster as a whole: conformance, clocks, odd answers; reads alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.retry import BusyError
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.doctor import conformance
from ktrain.launcher.doctor.cluster import report
from ktrain.launcher.doctor.finding import Finding, Outcome, Report, Shows, Standing
from ktrain.launcher.doctor.looks import Looks
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from tests.unit.launcher.doctor.looking import OtherDoor, add_jobset, add_node, by_check, looks_of, outcomes

LEVELS = {  # of the lists of github.com/cncf/k8s-ai-conformance
    (1, 33): (8, 1),
    (1, 34): (9, 0),
    (1, 35): (9, 3),
    (1, 36): (8, 6),
    (1, 37): (8, 7),
}


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.35")) as found:
        yield found


def reported(cluster: FakeCluster, folder: Path, user: str = "admin", **door: Any) -> Report:
    inner = connect(cluster.write_kubeconfig(folder / "config", user))
    other = OtherDoor(inner, **door)
    return report(Looks(Client(other, clock=FakeClock()), "default"), other, None)


def standings(found: Report) -> dict[str, Standing]:
    return {item.id: item for item in found.conformance}


# The lists


@pytest.mark.parametrize("version", sorted(LEVELS))
def test_requirements_of_a_version_are_as_many_as_the_programme_has(version: tuple[int, int]) -> None:
    name, listed = conformance.requirements(version)
    levels = [item.level for item in listed]

    assert name == "{}.{}".format(*version)
    assert (levels.count("MUST"), levels.count("SHOULD")) == LEVELS[version]
    assert all(item.proofs for item in listed)


def test_requirements_of_an_older_or_newer_cluster() -> None:
    assert conformance.requirements((1, 32)) == (None, ())
    assert conformance.requirements((1, 40))[0] == "1.37"
    assert conformance.requirements(None)[0] == "1.37"


def test_proofs_are_of_a_known_form() -> None:
    keys = {
        "serves": {"group", "plurals"},
        "objects": {"group", "plural", "condition", "status", "labels", "inside", "name"},
        "labels": {"prefix", "unless"},
        "allocates": {"prefixes"},
        "devices": {"drivers", "attribute"},
        "tests": {"test"},
    }
    for _, listed in map(conformance.requirements, LEVELS):
        for proof in (proof for item in listed for proof in item.proofs):
            assert set(proof) <= keys[proof["look"]] | {"look", "shows", "absent"}
            assert proof.get("shows", "met") == Shows.MET and proof.get("absent", "not met") == Shows.NOT_MET


# What a cluster shows


def test_bare_cluster_is_never_said_to_meet_what_was_not_seen(cluster: FakeCluster, tmp_path: Path) -> None:
    found = standings(reported(cluster, tmp_path))

    assert {name: item.status.value for name, item in found.items() if item.status is not Shows.NOT_SHOWN} == {
        "dra_support": "met",
        "ai_inference": "not met",
    }
    assert "resource.k8s.io/v1 serves deviceclasses" in found["dra_support"].evidence[0]
    assert "ktrain doctor --active" in found["gang_scheduling"].evidence[0]
    assert "not there: " in found["cluster_autoscaling"].evidence[0]


def test_statuses_that_controllers_wrote_are_evidence(cluster: FakeCluster, tmp_path: Path) -> None:
    add_jobset(cluster, status={"conditions": [{"type": "Completed", "status": "True"}]})
    add_node(cluster, "a", labels={"nvidia.com/gpu.sharing-strategy": "time-slicing"})
    add_node(cluster, "b", labels={"nvidia.com/vgpu.present": "false"})
    device = {"name": "gpu-0", "attributes": {"gpu.nvidia.com/driverVersion": {"version": "580.0.0"}}}
    spec = {"driver": "gpu.nvidia.com", "devices": [device]}
    cluster.store.create(known.RESOURCE_SLICE, {"metadata": {"name": "s"}, "spec": spec})
    found = standings(reported(cluster, tmp_path))

    assert found["robust_controller"].status is Shows.MET
    assert found["gpu_sharing"].status is Shows.MET and "time-slicing on 1" in found["gpu_sharing"].evidence[0]
    assert found["driver_runtime_management"].status is Shows.MET
    assert found["virtualized_accelerator"].status is Shows.NOT_SHOWN


def test_forbidden_is_unknown_and_never_absent(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.access = Access({"eve": (Rule(("list",), ("",), ("configmaps",)),)}, {"e": "eve"})
    found = standings(reported(cluster, tmp_path, "eve"))

    assert found["gpu_sharing"].status is Shows.UNKNOWN and "403" in found["gpu_sharing"].evidence[0]
    assert found["robust_controller"].status is Shows.UNKNOWN
    assert found["dra_support"].status is Shows.MET  # discovery is open to all
    assert found["cluster_autoscaling"].status is Shows.NOT_SHOWN


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome.OK, Shows.MET), (Outcome.FAILED, Shows.NOT_MET), (Outcome.UNKNOWN, Shows.NOT_SHOWN)],
)
def test_a_test_shows_what_reading_cannot(
    cluster: FakeCluster, tmp_path: Path, outcome: Outcome, status: Shows
) -> None:
    tests = [Finding("gang test", outcome, "as it was", "cost", "remedy")]
    _, listed = conformance.stand(looks_of(cluster, tmp_path), tests)
    found = next(item for item in listed if item.id == "gang_scheduling")

    assert found.status is status and found.evidence[0] == "gang test: as it was"


# Clocks


@pytest.mark.parametrize(
    ("skew_s", "outcome", "words"),
    [
        (0, "ok", "within"),
        (-120, "warning", "behind"),
        (3600, "warning", "3600 s ahead"),
        (None, "unknown", "no answer"),
    ],
)
def test_clock_of_the_server_is_held_against_this_machine(
    cluster: FakeCluster, tmp_path: Path, skew_s: int | None, outcome: str, words: str
) -> None:
    clock = FakeClock()
    date = {} if skew_s is None else {"date": formatdate(clock.wall() + skew_s, usegmt=True)}
    door = OtherDoor(connect(cluster.write_kubeconfig(tmp_path / "config")), headers=date)
    found = by_check(report(Looks(Client(door, clock=clock), "default"), door, None).findings)[
        "clock of the API server"
    ]

    assert found.outcome == outcome and words in found.evidence


# Odd answers


@pytest.mark.parametrize(
    "bodies",
    [
        {"/api/v1/nodes": b'{"items": [{"metadata": {"name": "n"}, "status": 5}]}'},
        {"/api/v1/nodes": b'{"items": ["n"]}'},
        {"/api/v1/nodes": b'{"items": 7}'},
        {"/api/v1/nodes": b"[1]"},
        {"/apis/resource.k8s.io/v1/resourceslices": b'{"items": [{"spec": {}}]}'},
        {"/apis/jobset.x-k8s.io/v1alpha2/jobsets": b'{"items": [{"status": "yes"}]}'},
    ],
)
def test_odd_answer_leaves_what_rests_on_it_unknown_and_ends_nothing(
    cluster: FakeCluster, tmp_path: Path, bodies: Mapping[str, bytes]
) -> None:
    add_node(cluster, "n")
    found = reported(cluster, tmp_path, bodies=bodies)

    assert found.conformance and outcomes(found.findings)["API server"] == "ok"
    assert Outcome.FAILED not in {item.outcome for item in found.findings}
    assert (
        Shows.UNKNOWN in {item.status for item in found.conformance} or "unknown" in outcomes(found.findings).values()
    )


def test_report_is_json_and_reads_alone(cluster: FakeCluster, tmp_path: Path) -> None:
    add_node(cluster, "n")
    found = reported(cluster, tmp_path)
    value = json.loads(json.dumps(found.to_value()))

    assert value["failed"] == [] and value["target"] == "Kubernetes 1.35, namespace default"
    assert {item.method for item in cluster.requests()} == {"GET"}


def test_cluster_out_of_reach_is_no_finding(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.put_fault(Fault(None, times=1000))
    with pytest.raises(BusyError):
        reported(cluster, tmp_path)


def test_cluster_without_ready_nodes_and_jobset_fails(tmp_path: Path) -> None:
    with FakeCluster(Offer(jobset=None)) as cluster:
        found = by_check(reported(cluster, tmp_path).findings)

    assert found["JobSet"].outcome == "failed" and found["nodes"].outcome == "failed"
