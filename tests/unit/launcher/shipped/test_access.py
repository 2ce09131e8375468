"""launch/cluster/access: who submits and who reads may do exactly what the commands ask of a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError
from ktrain.errors import ForbiddenError
from ktrain.launcher.backends.kubernetes import act, logs, remote
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.collect import plan_collection
from ktrain.launcher.backends.kubernetes.find import find_job
from ktrain.launcher.backends.kubernetes.status import assess
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.backends.kubernetes.view import events_of, jobset_path, look
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render.job import render
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from ktrain.testing.fake_cluster.access import Ask
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of, job, needs_definitions
from tests.unit.launcher.on_cluster.resumes import go_on
from tests.unit.launcher.shipped.kustomize import CLUSTER, resolve

pytestmark = needs_definitions  # Kueue, Volcano and JobSet are served with them

Grant = tuple[str, str, str]  # verb, group, resource
POD = "net-worker-0-0-abcde"
NATIVE = "scheduling.k8s.io/v1alpha2"


@dataclass(frozen=True, slots=True)
class Recorder(Access):
    """Access that remembers what was asked for."""

    asked: set[Grant] = field(default_factory=set)

    def allows(self, user: str, ask: Ask) -> bool:
        self.asked.add((ask.verb, ask.group, ask.resource))
        return Access.allows(self, user, ask)


def rules(*names: str) -> list[dict[str, Any]]:
    found = [
        rule
        for item in resolve(CLUSTER / "access")
        if item["metadata"]["name"] in names
        for rule in item.get("rules", ())
    ]
    assert found, names
    return found


def grants(*names: str) -> set[Grant]:
    """Everything that roles grant, one by one."""
    return _expanded(rules(*names))


def _expanded(found: list[dict[str, Any]]) -> set[Grant]:
    return {
        (verb, group, resource)
        for rule in found
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def access(*names: str, user: str) -> Recorder:
    held = tuple(Rule(tuple(r["verbs"]), tuple(r["apiGroups"]), tuple(r["resources"])) for r in rules(*names))
    return Recorder({user: held}, {"admin": "admin", user: user})


SETUPS: dict[str, tuple[Offer, dict[str, Any]]] = {
    "barrier": (Offer(version="1.36", jobset="0.12.0"), {}),
    "kueue": (
        Offer(version="1.36", jobset="0.12.0", kueue=True),
        {"placement": {"topology": {"label": "kubernetes.io/hostname", "mode": "preferred"}}},
    ),
    "native": (
        Offer(version="1.36", jobset="0.12.0", apis=frozenset({NATIVE}), gates={"GenericWorkload": True}),
        {"placement": {"gang": "native"}},
    ),
    "volcano": (Offer(version="1.36", jobset="0.12.0", volcano=True), {"placement": {"gang": "volcano"}}),
    "coscheduling": (
        Offer(version="1.36", jobset="0.12.0", coscheduling=True),
        {"placement": {"gang": "coscheduling", "scheduler": "gangs"}},
    ),
    "claims": (
        Offer(version="1.36", jobset="0.12.0", more=("resource.nvidia.com_computedomains",)),
        {"accelerator": "gb200:4", "code": {"archive": "a" * 64}},
    ),
    "alternatives": (Offer(version="1.36", jobset="0.12.0"), {"accelerator": "h200:8,h100:8"}),
}


@contextmanager
def cluster_of(name: str) -> Iterator[tuple[FakeCluster, dict[str, Any]]]:
    offer, changes = SETUPS[name]
    with FakeCluster(offer, crds=CRDS) as cluster:
        if name == "kueue":
            put_queue(cluster)
        if name == "volcano":
            cluster.store.create(known.VOLCANO_QUEUE, {"metadata": {"name": "default"}, "spec": {}})
        info = {"nodeInfo": {"kubeletVersion": "v1.36.0"}}
        cluster.store.create(known.NODE, {"metadata": {"name": "n"}, "status": info})
        yield cluster, changes


def put_queue(cluster: FakeCluster) -> None:
    for item in resolve(CLUSTER / "queues"):
        kind = {
            "Topology": known.TOPOLOGY,
            "ResourceFlavor": known.RESOURCE_FLAVOR,
            "ClusterQueue": known.CLUSTER_QUEUE,
        }
        if item["kind"] in kind:
            cluster.store.create(kind[item["kind"]], item)
    [queue] = [item for item in resolve(CLUSTER / "team") if item["kind"] == "LocalQueue"]
    cluster.store.create(known.LOCAL_QUEUE, {**queue, "metadata": {"name": "default", "namespace": "default"}})


def put_workload(cluster: FakeCluster, uid: str) -> None:
    """What Kueue makes of the JobSet."""
    owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": "net", "uid": uid, "controller": True}
    sets = [{"name": "worker", "count": 2, "template": {"spec": {"containers": [{"name": "a", "image": "x"}]}}}]
    about = {"name": "jobset-net-abcde", "namespace": "default", "ownerReferences": [owner]}
    cluster.store.create(known.KUEUE_WORKLOAD, {"metadata": about, "spec": {"active": True, "podSets": sets}})


def put_pod(cluster: FakeCluster) -> None:
    """A trainer that runs, so that there are logs."""
    labels = {
        "ktrain.dev/run": "net", "ktrain.dev/role": "worker", "jobset.sigs.k8s.io/job-index": "0",
        "jobset.sigs.k8s.io/replicatedjob-name": "worker", "batch.kubernetes.io/job-completion-index": "0",
    }  # fmt: skip
    about = {"name": POD, "namespace": "default", "labels": labels, "annotations": labels}
    status = {
        "phase": "Running",
        "containerStatuses": [{"name": "trainer", "restartCount": 0, "state": {"running": {}}}],
    }
    spec = {"containers": [{"name": "trainer", "image": "x"}]}
    cluster.store.create(known.POD, {"metadata": about, "spec": spec, "status": status})


def undo(cluster: FakeCluster, client: Client, changes: dict[str, Any]) -> None:
    """A submission of which every step is taken back."""
    tried = try_job(client, job(**changes), archive_of(changes))
    last = {"method": "POST", "path": "/configmaps"} if tried.rendered.released_by == "Kueue" else {"method": "PATCH"}
    cluster.put_fault(Fault(status=503, times=100, **last))
    with pytest.raises(BusyError):
        submit(client, tried, archive_of(changes))
    cluster.clear_faults()


def archive_of(changes: dict[str, Any]) -> bytes | None:
    return b"code" if "code" in changes else None


def look_on(client: Client) -> None:
    """What a reader does."""
    assert find_job(client, "default", "s3://bucket/net") == "net"
    view = look(client, "default", "net")
    assert view.pods is not None and view.jobs is not None and view.events is not None and view.spec is not None
    assess(view)
    events_of(client, "default", "net")
    for source in logs.workers(view):
        b"".join(logs.read(client, "default", source))
    changes = client.watch(jobset_path("default"), "0", deadline=Deadline.after(60, client.clock))
    assert next(changes).obj["metadata"]["name"] == "net"
    changes.close()


def reach_into(client: Client, folder: Path) -> None:
    """A command in a pod, and a port of it."""
    deadline = Deadline.after(60, client.clock)
    source = remote.find_pod(client, "default", "net", logs.workers)
    with open(folder / "said", "wb") as out:
        streams = remote.Streams(None, out, out)
        assert remote.run_command(client, "default", source, ["true"], streams=streams, deadline=deadline) == 0
    remote.connect_port(client, "default", source, 1).close()


def go_on_and_look_for_litter(cluster: FakeCluster, client: Client, archive: bytes | None) -> None:
    """`ktrain resume` of a cancelled job, the first one cut off, and `ktrain gc`, which finds nothing to remove."""
    cluster.put_fault(Fault(status=503, times=100, method="DELETE", path="/jobsets"))
    with pytest.raises(BusyError):
        go_on(client, archive=archive)
    cluster.clear_faults()
    _, sent = go_on(client, archive=archive)
    assert sent is not None and sent.sent.submission.number == 3
    found = plan_collection(client, "default", older_s=0.0, has_record=lambda run, submission: True)
    assert found.unknown == () and found.removals == ()


def live(name: str, folder: Path, allowed: Recorder, user: str) -> list[str]:
    """A job's life by all commands, as somebody; the warnings of its dry run."""
    with cluster_of(name) as (cluster, changes):
        cluster.access = allowed
        client = client_of(cluster, folder, user)
        undo(cluster, client, changes)
        archive = archive_of(changes)
        tried = try_job(client, job(**changes), archive)
        sent = submit(client, tried, archive)
        put_pod(cluster)
        if name == "kueue":
            put_workload(cluster, sent.uid)
        look_on(client)
        reach_into(client, folder)
        cluster.store.delete(known.POD, "default", POD)
        assert act.cancel(client, "default", "net", deadline=Deadline.after(60, client.clock)).exit_code == 130
        go_on_and_look_for_litter(cluster, client, archive)
        act.delete(client, "default", "net", deadline=Deadline.after(60, client.clock))
        return tried.warnings


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[Grant]]:
    """What each set-up asks for, by somebody with exactly the submitter's roles."""
    found = {}
    for name in SETUPS:
        allowed = access("ktrain-submitter", "ktrain-cluster-facts", user="sub")
        assert live(name, tmp_path_factory.mktemp(name), allowed, "sub") == []
        found[name] = allowed.asked
    return found


def test_submitter_lacks_nothing_that_any_command_asks_for(asked: dict[str, set[Grant]]) -> None:
    allowed = grants("ktrain-submitter", "ktrain-cluster-facts")

    assert {name: sorted(found - allowed) for name, found in asked.items()} == dict.fromkeys(SETUPS, [])


def test_submitter_has_nothing_that_no_command_asks_for(asked: dict[str, set[Grant]]) -> None:
    """But what a job's own role gives: who makes a role has to hold what it grants."""
    [role] = [item for item in render(job(), ClusterFacts()).owned if item["kind"] == "Role"]
    passed_on = _expanded(role["rules"])

    assert grants("ktrain-submitter", "ktrain-cluster-facts") - set().union(*asked.values()) == passed_on


@pytest.mark.parametrize("name", ["barrier", "kueue", "native", "volcano"])
def test_reader_sees_a_job_whole_and_changes_nothing(name: str, tmp_path: Path) -> None:
    with cluster_of(name) as (cluster, changes):
        client = client_of(cluster, tmp_path)
        sent = submit(client, try_job(client, job(**changes)))
        put_pod(cluster)
        if name == "kueue":
            put_workload(cluster, sent.uid)
        cluster.access = access("ktrain-reader", user="reader")
        reader = client_of(cluster, tmp_path, "reader")
        look_on(reader)
        with pytest.raises(ForbiddenError):
            act.cancel(reader, "default", "net", deadline=Deadline.after(60, reader.clock))
        with pytest.raises(ForbiddenError):
            act.delete(reader, "default", "net", deadline=Deadline.after(60, reader.clock))
    assert {verb for verb, *_ in grants("ktrain-reader")} == {"get", "list", "watch"}
    assert not any("secrets" in grant for grant in grants("ktrain-reader"))


def test_reader_has_nothing_that_looking_does_not_ask_for(tmp_path: Path) -> None:
    asked: set[Grant] = set()
    for name in ("kueue", "native", "volcano"):
        with cluster_of(name) as (cluster, changes):
            client = client_of(cluster, tmp_path)
            sent = submit(client, try_job(client, job(**changes)))
            put_pod(cluster)
            if name == "kueue":
                put_workload(cluster, sent.uid)
            cluster.access = access("ktrain-reader", user="reader")
            look_on(client_of(cluster, tmp_path, "reader"))
            asked |= cluster.access.asked
    assert sorted(grants("ktrain-reader") - asked) == []
