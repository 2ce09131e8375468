"""A job goes to a cluster: tried, created in order, released; or nothing of it stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError
from ktrain.errors import ConflictError, ForbiddenError
from ktrain.launcher.backends.kubernetes import act
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.status import State, assess
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.backends.kubernetes.view import look
from ktrain.launcher.cluster import resources as known
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of, job

KINDS = (
    known.JOB_SET, known.SECRET, known.SERVICE_ACCOUNT, known.ROLE, known.ROLE_BINDING, known.NETWORK_POLICY,
    known.CONFIG_MAP,
)  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    return client_of(cluster, tmp_path)


def stored(cluster: FakeCluster) -> dict[str, list[str]]:
    """Names of what lies in the namespace, by kind."""
    return {
        kind.kind: [item["metadata"]["name"] for item in cluster.store.list(kind, "default").items] for kind in KINDS
    }


def test_submit_creates_the_jobset_suspended_first_and_releases_it_last(cluster: FakeCluster, client: Client) -> None:
    tried = try_job(client, job())
    before = len(cluster.requests())
    sent = submit(client, tried)
    writes = [item for item in cluster.requests()[before:] if item.method != "GET"]
    jobset = cluster.store.get(known.JOB_SET, "default", "net")
    secret = cluster.store.get(known.SECRET, "default", "net-token")

    assert writes[0].path.endswith("/jobsets") and writes[-1].method == "PATCH"
    assert sent.uid == jobset["metadata"]["uid"] and jobset["spec"]["suspend"] is False
    assert jobset["metadata"]["annotations"][contract.ANNOTATION_RUN] == "s3://bucket/net"
    assert all(names for names in stored(cluster).values())
    for kind in KINDS[1:]:
        for item in cluster.store.list(kind, "default").items:
            assert item["metadata"]["ownerReferences"][0]["uid"] == sent.uid
    assert "dry-run" not in str(secret) and tried.warnings == []


def test_objects_go_with_their_jobset(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    cluster.store.delete(known.JOB_SET, "default", "net")

    assert not any(stored(cluster).values())


def test_dry_run_creates_nothing(cluster: FakeCluster, client: Client) -> None:
    try_job(client, job())

    assert not any(stored(cluster).values())
    assert all("dryRun" in item.query for item in cluster.requests(lambda item: item.method != "GET"))


@pytest.mark.parametrize("step", range(8))
def test_submit_undoes_what_was_made_when_a_step_is_refused(cluster: FakeCluster, client: Client, step: int) -> None:
    tried = try_job(client, job())
    paths = ("/jobsets", "/secrets", "/serviceaccounts", "/roles", "/rolebindings", "/networkpolicies", "/configmaps")
    fault = (
        Fault(status=503, method="POST", path=paths[step], times=100)
        if step < len(paths)
        else Fault(status=503, method="PATCH", times=100)
    )
    cluster.put_fault(fault)

    with pytest.raises(BusyError):
        submit(client, tried)
    assert not any(stored(cluster).values())


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_submit_goes_on_when_an_answer_was_lost(cluster: FakeCluster, client: Client, method: str) -> None:
    tried = try_job(client, job())
    cluster.put_fault(Fault(status=None, method=method, performed=True, times=3))
    submit(client, tried)

    assert cluster.store.get(known.JOB_SET, "default", "net")["spec"]["suspend"] is False
    assert all(len(names) == 1 for names in stored(cluster).values())


def test_name_that_is_taken_is_a_conflict_and_stays_as_it_was(cluster: FakeCluster, client: Client) -> None:
    tried = try_job(client, job())
    submit(client, tried)
    before = stored(cluster)

    with pytest.raises(ConflictError, match="ktrain delete"):
        submit(client, tried)
    assert stored(cluster) == before


# Queues


@pytest.fixture
def queued(cluster: FakeCluster, client: Client) -> Client:
    """A client of a cluster with Kueue and one queue."""
    cluster.offer = Offer(version="1.36", jobset="0.12.0", kueue=True)
    queue = {"metadata": {"name": "team", "namespace": "default"}, "spec": {"clusterQueue": "all"}}
    cluster.store.create(known.LOCAL_QUEUE, queue)
    return client


def test_submit_leaves_the_release_to_kueue(cluster: FakeCluster, queued: Client) -> None:
    sent = submit(queued, try_job(queued, job()))

    assert sent.released_by == "Kueue"
    assert cluster.store.get(known.JOB_SET, "default", "net")["spec"]["suspend"] is True
    assert assess(look(queued, "default", "net")).state is State.QUEUED


def test_cancel_of_a_queued_job_deactivates_its_workload(cluster: FakeCluster, queued: Client) -> None:
    sent = submit(queued, try_job(queued, job()))
    owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": "net", "uid": sent.uid}
    about = {"name": "jobset-net-abcde", "namespace": "default", "ownerReferences": [{**owner, "controller": True}]}
    cluster.store.create(known.KUEUE_WORKLOAD, {"metadata": about, "spec": {"active": True, "podSets": POD_SETS}})
    found = act.cancel(queued, "default", "net", deadline=Deadline.after(60, queued.clock))

    assert found.state is State.CANCELLED
    assert cluster.store.get(known.KUEUE_WORKLOAD, "default", "jobset-net-abcde")["spec"]["active"] is False


POD_SETS = [{"name": "worker", "count": 2, "template": {"spec": {"containers": [{"name": "a", "image": "x"}]}}}]


# Rights


def test_submit_that_may_not_make_roles_leaves_nothing(cluster: FakeCluster, client: Client, tmp_path: Path) -> None:
    tried = try_job(client, job())
    groups = ("", "jobset.x-k8s.io", "networking.k8s.io")
    cluster.access = Access(rules={"weak": (Rule(("*",), groups, ("*",)),)}, tokens={"admin": "admin", "weak": "weak"})
    weak = client_of(cluster, tmp_path, "weak")

    with pytest.raises(ForbiddenError, match="roles"):
        submit(weak, tried)
    assert not any(stored(cluster).values())


def test_undo_that_fails_names_what_is_left(cluster: FakeCluster, client: Client) -> None:
    tried = try_job(client, job())
    cluster.put_fault(Fault(status=503, method="POST", path="/configmaps", times=100))
    cluster.put_fault(Fault(status=503, method="DELETE", path="/jobsets", times=100))

    with pytest.raises(BusyError) as caught:
        submit(client, tried)
    assert "JobSet net" in "".join(getattr(caught.value, "__notes__", ()))


def test_jobset_of_which_nothing_is_known_is_named(cluster: FakeCluster, client: Client) -> None:
    tried = try_job(client, job())
    cluster.put_fault(Fault(status=503, path="/jobsets", times=100))

    with pytest.raises(BusyError) as caught:
        submit(client, tried)
    assert "if the server made it before it fell silent" in "".join(getattr(caught.value, "__notes__", ()))
