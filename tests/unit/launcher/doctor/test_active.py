"""Tests that try something leave nothing behind, and name what they could not remove."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.doctor.active import run_tests
from ktrain.launcher.doctor.finding import Finding
from ktrain.launcher.doctor.gang_trial import Terms
from ktrain.launcher.doctor.looks import Looks
from ktrain.launcher.doctor.scratch import PREFIX
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from tests.unit.launcher.doctor.looking import add_node, by_check

TERMS = Terms(fits_s=5.0, settle_s=2.0, clear_s=5.0)


class BusyClock(FakeClock):
    """A clock on which the cluster works while somebody sleeps."""

    def __init__(self, work: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.work = work

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.work()


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36")) as found:
        add_node(found, "n0", **{"nvidia.com/gpu": "1"})
        yield found


def trial(
    cluster: FakeCluster, folder: Path, clock: FakeClock, user: str = "admin"
) -> tuple[dict[str, Finding], list[str]]:
    said: list[str] = []
    door = connect(cluster.write_kubeconfig(folder / "config", user))
    found = run_tests(Looks(Client(door, clock=clock), "default"), None, TERMS, said.append)
    return by_check(found), said


def spaces(cluster: FakeCluster) -> list[str]:
    names = [item["metadata"]["name"] for item in cluster.store.list(known.NAMESPACE).items]
    return [name for name in names if name.startswith(PREFIX)]


def ending_pods(cluster: FakeCluster, seen: dict[str, str]) -> Callable[[], None]:
    """What runs the pods of the isolation test: each container says how many devices it sees."""

    def work() -> None:
        for pod in cluster.store.list(known.POD).items:
            if pod.get("status", {}).get("phase") != "Succeeded":
                for container in pod["spec"]["containers"]:
                    cluster.logs.write(pod, container["name"], seen[container["name"]] + "\n")
                name, space = pod["metadata"]["name"], pod["metadata"]["namespace"]
                cluster.store.mutate(known.POD, space, name, lambda obj: obj["spec"].update(nodeName="n0"))
                cluster.store.mutate(
                    known.POD, space, name, lambda obj: obj["status"].update(phase="Succeeded"), status=True
                )

    return work


@pytest.mark.parametrize(
    ("seen", "outcome", "words"),
    [
        ({"has": "1", "beside": "0", "alone": "0"}, "ok", "who did not sees none"),
        ({"has": "1", "beside": "8", "alone": "0"}, "failed", "a container beside the one that asked sees 8 devices"),
        ({"has": "1", "beside": "0", "alone": "8"}, "failed", "a pod that asked for none sees 8 devices"),
        ({"has": "0", "beside": "0", "alone": "0"}, "unknown", "none of the device files"),
        ({"has": "sh: not found", "beside": "0", "alone": "0"}, "unknown", "container has did not say"),
    ],
)
def test_isolation_is_judged_by_what_each_container_sees(
    cluster: FakeCluster, tmp_path: Path, seen: dict[str, str], outcome: str, words: str
) -> None:
    found, _ = trial(cluster, tmp_path, BusyClock(ending_pods(cluster, seen)))

    assert (found["isolation test"].outcome, words in found["isolation test"].evidence) == (outcome, True)
    assert spaces(cluster) == [] and cluster.store.list(known.POD).items == []


def test_pods_that_never_run_show_nothing_and_are_removed(cluster: FakeCluster, tmp_path: Path) -> None:
    found, said = trial(cluster, tmp_path, FakeClock())

    assert found["isolation test"].outcome == "unknown" and "did not end within 5 s" in found["isolation test"].evidence
    assert found["gang test"].outcome == "warning"  # this cluster has no gang scheduler
    assert spaces(cluster) == [] and len(said) == 1


def test_tests_ask_for_nothing_where_namespaces_may_not_be_made(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.access = Access({"eve": (Rule(("get", "list"), ("*",), ("*",)),)}, {"e": "eve"})
    found, said = trial(cluster, tmp_path, FakeClock(), "eve")

    assert found["tests"].outcome == "unknown" and "create namespaces" in found["tests"].evidence
    assert said == [] and spaces(cluster) == []


def test_what_cannot_be_removed_is_named(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.put_fault(Fault(403, "DELETE", times=1000))
    found, said = trial(cluster, tmp_path, FakeClock())
    [space] = spaces(cluster)

    assert found["tests"].outcome == "warning" and any(
        space in line and "could not be removed" in line for line in said
    )
    assert f"kubectl delete namespace/{space}" in {item.remedy for item in found.values()}


def test_namespace_of_an_earlier_test_is_named_and_not_touched(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.put_fault(Fault(403, "DELETE", times=1000))
    trial(cluster, tmp_path, FakeClock())
    cluster.clear_faults()
    [space] = spaces(cluster)
    found, _ = trial(cluster, tmp_path, FakeClock())

    assert space in found["left by an earlier test"].evidence and spaces(cluster) == [space]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_tests_and_everything_is_removed_first(
    cluster: FakeCluster, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        trial(cluster, tmp_path, BusyClock(lambda: signal.raise_signal(number)))

    assert spaces(cluster) == [] and cluster.store.list(known.POD).items == []
    assert signal.getsignal(number) == before


def test_second_signal_does_not_stop_the_removal_and_what_is_late_is_named(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    """A pod with a finalizer keeps the namespace: the removal waits, is signalled again and again, and says so."""

    def hold_and_signal() -> None:
        for pod in cluster.store.list(known.POD).items:
            if not pod["metadata"].get("deletionTimestamp"):
                name, space = pod["metadata"]["name"], pod["metadata"]["namespace"]
                cluster.store.mutate(known.POD, space, name, lambda obj: obj["metadata"].update(finalizers=["a/b"]))
        signal.raise_signal(signal.SIGINT)

    said: list[str] = []
    clock = BusyClock(hold_and_signal)
    door = connect(cluster.write_kubeconfig(tmp_path / "config"))
    with pytest.raises(KeyboardInterrupt):
        run_tests(Looks(Client(door, clock=clock), "default"), None, TERMS, said.append)

    assert "still terminating after 5 s" in said[-1]
