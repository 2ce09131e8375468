"""A job is submitted on one version of a cluster and resumed on another: upgraded, rolled back, emulated, skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.clock import Deadline
from ktrain.launcher.backends.kubernetes import act
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.status import State, assess
from ktrain.launcher.backends.kubernetes.submission import Submission
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.backends.kubernetes.view import look
from ktrain.launcher.cluster import resources as known
from ktrain.testing.fake_cluster import FakeCluster, Offer
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of, job, needs_definitions
from tests.unit.launcher.on_cluster.resumes import end, go_on, strays

GROUP = "scheduling.k8s.io"
NATIVE = {"GenericWorkload": True}
V31 = Offer(version="1.31", jobset="0.8.2")
V35 = Offer(version="1.35", jobset="0.11.1")
V36 = Offer(version="1.36", jobset="0.12.0", apis=frozenset({f"{GROUP}/v1alpha2"}), gates=NATIVE)
V37_ALPHA = Offer(version="1.37", jobset="0.13.0-devel", apis=frozenset({f"{GROUP}/v1alpha3"}), gates=NATIVE)
V37 = Offer(version="1.37", jobset="0.13.0-devel", apis=frozenset({f"{GROUP}/v1beta1"}), gates=NATIVE)
V37_GATE_OFF = replace(V37, gates={"GenericWorkload": False})
V37_OLD_JOBSET = replace(V37, jobset="0.10.1")


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(V36, crds=CRDS) as found:
        add_node(found, "v1.37.0")
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    return client_of(cluster, tmp_path)


def add_node(cluster: FakeCluster, kubelet: str) -> None:
    info = {"nodeInfo": {"kubeletVersion": kubelet}}
    cluster.store.create(known.NODE, {"metadata": {"name": "n1"}, "status": info})


def resumed_on(cluster: FakeCluster, client: Client, first: Offer, second: Offer, **spec: Any) -> Submission:
    cluster.offer = first
    submit(client, try_job(client, job(**spec)))
    end(cluster, "net")
    cluster.offer = second
    _, done = go_on(client)
    assert done is not None
    jobset = cluster.store.get(known.JOB_SET, "default", "net")
    assert jobset["metadata"]["uid"] == done.sent.uid and jobset["spec"]["suspend"] is False
    assert list(strays(cluster)) == [] and assess(look(client, "default", "net")).state is State.STARTING
    return done.sent.submission


def gang_of(submission: Submission) -> str:
    assert submission.gang is not None
    return " ".join(filter(None, (submission.gang["kind"], submission.gang["native"])))


RULES_LOST = "restart rules of containers: dropped, it was kept: a suspected node is no longer replaced alone"
PATTERNS_LOST = "message patterns of failure rules: dropped, it was kept: a disruption counts as a restart"
GROUP_LOST = "the pods' schedulingGroup: dropped, it was kept: there is no native gang"
GROUP_UNKNOWN = "the pods' schedulingGroup: not known, it was kept"


@needs_definitions
@pytest.mark.parametrize(
    ("first", "second", "gang", "words"),
    [
        (V36, V37_ALPHA, "native v1alpha3", ("Kubernetes 1.37, it was 1.36", "v1alpha2 is no longer served")),
        (V37_ALPHA, V37, "native v1beta1", ("v1beta1 is served now", "gang native v1beta1, it was native v1alpha3")),
        (V37, V36, "native v1alpha2", ("Kubernetes 1.36, it was 1.37", "v1beta1 is no longer served")),
        (V37, V35, "none", (GROUP_UNKNOWN, "gang none, it was native v1beta1")),
        (V37, V37_GATE_OFF, "none", (GROUP_LOST, "gang none, it was native v1beta1")),
        (V37, V37_OLD_JOBSET, "none", (GROUP_LOST,)),
        (V31, V37, "native v1beta1", ("Kubernetes 1.37, it was 1.31", "gang native v1beta1, it was none")),
        (V36, V31, "none", ("Kubernetes 1.31, it was 1.36", RULES_LOST, PATTERNS_LOST)),
    ],
)
def test_job_is_resumed_on_another_version_and_what_changed_is_said(
    cluster: FakeCluster, client: Client, first: Offer, second: Offer, gang: str, words: tuple[str, ...]
) -> None:
    found = resumed_on(cluster, client, first, second)

    assert gang_of(found) == gang
    for text in words:
        assert any(text in line for line in found.changes), (text, found.changes)


@needs_definitions
def test_job_resumed_on_the_same_cluster_has_nothing_to_say(cluster: FakeCluster, client: Client) -> None:
    assert resumed_on(cluster, client, V37, V37).changes == ()


@needs_definitions
@pytest.mark.parametrize(("kueue", "volcano"), [(True, False), (False, True)])
def test_job_is_resumed_by_the_mechanism_that_is_there_now(
    cluster: FakeCluster, client: Client, kueue: bool, volcano: bool
) -> None:
    cluster.offer = V31
    submit(client, try_job(client, job()))
    end(cluster, "net")
    cluster.offer = Offer(version="1.36", jobset="0.12.0", kueue=kueue, volcano=volcano)
    if kueue:
        about = {"name": "team", "namespace": "default"}
        cluster.store.create(known.LOCAL_QUEUE, {"metadata": about, "spec": {"clusterQueue": "all"}})
    else:
        cluster.store.create(known.VOLCANO_QUEUE, {"metadata": {"name": "team"}, "spec": {"weight": 1}})
    _, done = go_on(client)

    assert done is not None and gang_of(done.sent.submission) == ("kueue" if kueue else "volcano")
    state = assess(look(client, "default", "net")).state
    assert state is (State.QUEUED if kueue else State.STARTING)


@needs_definitions
def test_queue_that_is_gone_is_refused_before_the_old_job_is_touched(cluster: FakeCluster, client: Client) -> None:
    cluster.offer = Offer(version="1.36", jobset="0.12.0", kueue=True)
    about = {"name": "team", "namespace": "default"}
    cluster.store.create(known.LOCAL_QUEUE, {"metadata": about, "spec": {"clusterQueue": "all"}})
    first = submit(client, try_job(client, job(placement={"queue": "team", "gang": "kueue"})))
    end(cluster, "net")
    cluster.store.delete(known.LOCAL_QUEUE, "default", "team")

    with pytest.raises(ValueError, match="no LocalQueue 'team'"):
        go_on(client)
    assert cluster.store.get(known.JOB_SET, "default", "net")["metadata"]["uid"] == first.uid


@pytest.mark.parametrize("minor", range(31, 39))
def test_client_submits_cancels_and_resumes_on_every_version(minor: int, tmp_path: Path) -> None:
    """From more than four minors older than the newest tested one, 1.37, to one newer."""
    with FakeCluster(Offer(version=f"1.{minor}", jobset="0.12.0")) as cluster:
        client = client_of(cluster, tmp_path)
        submit(client, try_job(client, job()))
        act.cancel(client, "default", "net", deadline=Deadline.after(60, client.clock))
        _, done = go_on(client)
        assert done is not None and assess(look(client, "default", "net")).state is State.STARTING
        assert done.sent.submission.facts is not None and done.sent.submission.facts["version"] == [1, minor]
