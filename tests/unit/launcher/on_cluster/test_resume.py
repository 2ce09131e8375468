"""A job goes on as another submission: from the cluster or the run, whole or not at all, wherever a resume died."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.errors import ConfigError, ConflictError, DeadlineError, ForbiddenError, NotFoundError
from ktrain.launcher.backends.kubernetes import act, stored
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.resume import find_last
from ktrain.launcher.backends.kubernetes.submission import Submission
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.cluster import resources as known
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of, job
from tests.unit.launcher.on_cluster.resumes import Died, RunRecords, config_maps, dying_client, end, go_on, strays

CODE = b"not really a zip"


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    return client_of(cluster, tmp_path)


def jobset_of(cluster: FakeCluster, name: str = "net") -> dict[str, Any]:
    found: dict[str, Any] = cluster.store.get(known.JOB_SET, "default", name)
    return found


def annotations(cluster: FakeCluster, name: str = "net") -> dict[str, str]:
    found: dict[str, str] = jobset_of(cluster, name)["metadata"]["annotations"]
    return found


def make_pod(cluster: FakeCluster, name: str = "net", **about: Any) -> None:
    labels = {contract.LABEL_RUN: name, contract.LABEL_ROLE: "worker"}
    owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": name, "blockOwnerDeletion": True}
    owner["uid"] = jobset_of(cluster, name)["metadata"]["uid"]
    metadata = {
        "name": f"{name}-worker-0-0-abcde",
        "namespace": "default",
        "labels": labels,
        "ownerReferences": [owner],
    }
    spec = {"nodeName": "n7", "containers": [{"name": "trainer", "image": "x"}]}
    cluster.store.create(known.POD, {"metadata": {**metadata, **about}, "spec": spec, "status": {"phase": "Running"}})


# What is stored


def test_submission_lies_beside_the_job_with_the_cluster_and_without_the_token(
    cluster: FakeCluster, client: Client
) -> None:
    sent = submit(client, try_job(client, job(secrets=[{"env": "HF_TOKEN", "secret": "hub", "key": "token"}])))
    data = cluster.store.get(known.CONFIG_MAP, "default", "net")["data"]
    token = cluster.store.get(known.SECRET, "default", "net-token")
    read = stored.try_read_submission(client, jobset_of(cluster))

    assert read == sent.submission and read.number == 1 and read.gang is not None and read.gang["kind"] == "none"
    assert read.facts is not None and read.facts["version"] == [1, 36]
    assert read.job == job(secrets=[{"env": "HF_TOKEN", "secret": "hub", "key": "token"}])
    assert json.loads(data["job.json"]) == read.spec
    assert all(value not in str(data) for value in {**token.get("data", {}), **token.get("stringData", {})}.values())


def test_job_of_an_older_ktrain_is_resumed_from_its_specification_alone(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))

    def forget(obj: dict[str, Any]) -> None:
        del obj["data"][contract.SUBMISSION_FILE]

    cluster.store.mutate(known.CONFIG_MAP, "default", "net", forget)
    end(cluster, "net")
    _, done = go_on(client)

    assert done is not None and done.sent.submission.number == 2
    assert done.sent.submission.changes == ("nothing is known of the cluster of submission 1",)


# From where


def test_failed_job_is_replaced_by_its_second_submission(cluster: FakeCluster, client: Client) -> None:
    first = submit(client, try_job(client, job()))
    end(cluster, "net")
    records = RunRecords()
    _, done = go_on(client, records=records, change={"nodes": 4})
    assert done is not None
    second = done.sent.submission

    assert jobset_of(cluster)["metadata"]["uid"] == done.sent.uid != first.uid
    assert jobset_of(cluster)["spec"]["suspend"] is False
    assert annotations(cluster)[contract.ANNOTATION_NUMBER] == "2"
    assert second.before is not None
    assert (second.before["id"], second.before["state"], second.before["restarts"]) == (
        first.submission.id,
        "failed",
        2,
    )
    assert second.changes == ("nodes: 2 -> 4",) and second.launch != first.submission.launch
    assert records.found == [second] and list(strays(cluster)) == []


def test_cancelled_job_is_resumed(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    act.cancel(client, "default", "net", deadline=Deadline.after(60, client.clock))
    last, done = go_on(client)

    assert last.status is not None and last.status.state == "cancelled" and done is not None
    assert jobset_of(cluster)["spec"]["suspend"] is False
    assert contract.ANNOTATION_CANCELLED not in annotations(cluster)


def test_deleted_job_is_resumed_from_its_run(cluster: FakeCluster, client: Client) -> None:
    records = RunRecords()
    records.keep(submit(client, try_job(client, job())).submission)
    act.delete(client, "default", "net", deadline=Deadline.after(60, client.clock))
    _, done = go_on(client, records=records)

    assert done is not None and done.sent.submission.number == 2 and done.sent.submission.changes == ()
    assert annotations(cluster)[contract.ANNOTATION_NUMBER] == "2"


def test_job_that_nobody_knows_is_not_found(client: Client) -> None:
    with pytest.raises(NotFoundError, match="by the URL of its run"):
        go_on(client)


def test_code_goes_with_the_job_that_is_replaced(cluster: FakeCluster, client: Client) -> None:
    digest = hashlib.sha256(CODE).hexdigest()
    spec = job(code={"archive": digest})
    submit(client, try_job(client, spec, CODE), CODE)
    end(cluster, "net")
    carried = stored.try_read_code(client, "default", spec)
    _, done = go_on(client, archive=carried)

    assert carried == CODE and done is not None
    assert config_maps(cluster, "net") == ["net", f"net-code-{digest[:10]}"]


# What is refused


def test_running_job_is_refused_with_what_to_do_and_left_alone(cluster: FakeCluster, client: Client) -> None:
    first = submit(client, try_job(client, job()))
    before = len(cluster.requests(lambda item: item.method != "GET"))

    with pytest.raises(ConflictError, match="ktrain cancel --backend kubernetes --namespace default net"):
        go_on(client)
    assert jobset_of(cluster)["metadata"]["uid"] == first.uid
    assert len(cluster.requests(lambda item: item.method != "GET")) == before


def test_job_that_is_done_is_refused(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    end(cluster, "net", "Completed")

    with pytest.raises(ConfigError, match="nothing to resume"):
        go_on(client)


def test_job_that_still_saves_is_refused(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    make_pod(cluster)
    with pytest.raises(DeadlineError):
        act.cancel(client, "default", "net", deadline=Deadline.after(0, client.clock))

    with pytest.raises(ConflictError, match="its pods still save"):
        go_on(client)


def test_queued_job_is_refused(cluster: FakeCluster, client: Client) -> None:
    cluster.offer = Offer(version="1.36", jobset="0.12.0", kueue=True)
    about = {"name": "team", "namespace": "default"}
    cluster.store.create(known.LOCAL_QUEUE, {"metadata": about, "spec": {"clusterQueue": "all"}})
    submit(client, try_job(client, job()))

    with pytest.raises(ConflictError, match="queued and starts by itself"):
        go_on(client)


def test_run_that_lives_as_another_job_is_refused(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    submit(client, try_job(client, job(name="other")))
    end(cluster, "net")

    with pytest.raises(ConflictError, match="it is live as job other"):
        go_on(client)


def test_submission_that_may_not_be_read_is_unknown_and_not_absent(
    cluster: FakeCluster, client: Client, tmp_path: Path
) -> None:
    submit(client, try_job(client, job()))
    end(cluster, "net")
    jobsets = Rule(("*",), ("jobset.x-k8s.io",), ("jobsets",))
    cluster.access = Access(rules={"weak": (jobsets,)}, tokens={"admin": "admin", "weak": "weak"})

    with pytest.raises(ForbiddenError, match="configmaps"):
        find_last(client_of(cluster, tmp_path, "weak"), "default", "net")


def test_misspelt_override_leaves_the_old_job_as_it_was(cluster: FakeCluster, client: Client) -> None:
    first = submit(client, try_job(client, job()))
    end(cluster, "net")

    with pytest.raises(ConfigError, match="hostNetwrok"):
        go_on(client, change={"overlay": {"worker": {"hostNetwrok": True}}})
    assert jobset_of(cluster)["metadata"]["uid"] == first.uid and config_maps(cluster, "net") == ["net"]


# Never two


def test_job_that_somebody_let_go_on_meanwhile_is_not_deleted(cluster: FakeCluster, client: Client) -> None:
    first = submit(client, try_job(client, job()))
    act.cancel(client, "default", "net", deadline=Deadline.after(60, client.clock))

    def let_go(jobset: dict[str, Any]) -> None:
        jobset["spec"]["suspend"] = False
        del jobset["metadata"]["annotations"][contract.ANNOTATION_CANCELLED]

    class Meanwhile(RunRecords):
        def keep(self, submission: Submission) -> str | None:
            cluster.store.mutate(known.JOB_SET, "default", "net", let_go)
            return super().keep(submission)

    with pytest.raises(ConflictError, match="somebody let it go on"):
        go_on(client, records=Meanwhile())
    assert jobset_of(cluster)["metadata"]["uid"] == first.uid

    end(cluster, "net")
    last, done = go_on(client)
    assert last.is_cut_off and done is not None and config_maps(cluster, "net") == ["net"]


def test_job_whose_status_changes_as_it_is_deleted_is_looked_at_again(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    end(cluster, "net")
    changes = iter(range(2))

    class Changing:
        """Lets the job's status change just before a deletion gets there."""

        def send(self, method: str, path: str, headers: Any, body: bytes | None, timeout_s: float) -> Any:
            if method == "DELETE" and path.endswith("/jobsets/net") and next(changes, None) is not None:
                end(cluster, "net", since="2026-01-02T00:00:00Z")
                cluster.store.mutate(known.JOB_SET, "default", "net", touch)
            return door.send(method, path, headers, body, timeout_s)

    def touch(jobset: dict[str, Any]) -> None:
        jobset["metadata"].setdefault("labels", {})[f"touched-{client.clock.monotonic():.0f}"] = "yes"

    door = client._door
    _, done = go_on(Client(Changing(), clock=client.clock))
    assert done is not None and next(changes, None) is None
    assert jobset_of(cluster)["metadata"]["uid"] == done.sent.uid


def test_job_whose_pods_stay_is_not_replaced_and_they_are_named(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    make_pod(cluster, finalizers=["example.org/held"])
    end(cluster, "net")

    with pytest.raises(DeadlineError, match="net-worker-0-0-abcde on node n7"):
        go_on(client)
    assert jobset_of(cluster)["metadata"].get("deletionTimestamp")

    def let_go(pod: dict[str, Any]) -> None:
        pod["metadata"]["finalizers"] = []

    cluster.store.mutate(known.POD, "default", "net-worker-0-0-abcde", let_go)
    cluster.store.delete(known.POD, "default", "net-worker-0-0-abcde", grace_s=0)
    last, done = go_on(client)
    assert last.is_cut_off and done is not None and annotations(cluster)[contract.ANNOTATION_NUMBER] == "3"
    assert config_maps(cluster, "net") == ["net"]


def test_left_over_of_the_old_job_is_swept_and_what_ktrain_did_not_make_stays(
    cluster: FakeCluster, client: Client
) -> None:
    records = RunRecords()
    records.keep(submit(client, try_job(client, job())).submission)
    role = cluster.store.get(known.ROLE, "default", "net")
    act.delete(client, "default", "net", deadline=Deadline.after(60, client.clock))
    foreign = {"metadata": {"name": "net-token", "namespace": "default"}, "stringData": {"a": "b"}}
    cluster.store.create(known.SECRET, foreign)
    slow = {key: role["metadata"][key] for key in ("name", "namespace", "labels", "annotations")}
    cluster.store.create(known.ROLE, {"metadata": slow, "rules": []})

    def own(obj: dict[str, Any]) -> None:
        obj["metadata"]["ownerReferences"] = role["metadata"]["ownerReferences"]

    cluster.store.mutate(known.ROLE, "default", "net", own)
    with pytest.raises(ConflictError, match="Secret net-token: there is one that ktrain did not make"):
        go_on(client, records=records)
    assert cluster.store.list(known.JOB_SET, "default").items == []

    cluster.store.delete(known.SECRET, "default", "net-token")
    _, done = go_on(client, records=records)
    assert done is not None and list(strays(cluster)) == []


def test_of_two_resumes_at_once_one_wins_and_the_other_touches_nothing_of_it(
    cluster: FakeCluster, client: Client, tmp_path: Path
) -> None:
    submit(client, try_job(client, job()))
    end(cluster, "net")
    other = client_of(cluster, tmp_path)

    class Overtaken(RunRecords):
        def keep(self, submission: Submission) -> str | None:
            go_on(other)  # all of it, while this one is between its ticket and the deletion
            return super().keep(submission)

    with pytest.raises(ConflictError):
        go_on(client, records=Overtaken())
    assert annotations(cluster)[contract.ANNOTATION_NUMBER] in ("2", "3")
    assert [item for item in strays(cluster) if "resume" not in item] == []


# Death at every step


@pytest.fixture
def plain_cluster() -> Iterator[FakeCluster]:
    """Without schemas of custom resources: three times as fast, and nothing here rests on them."""
    with FakeCluster(Offer(version="1.36", jobset="0.12.0")) as found:
        yield found


def test_resume_that_died_at_any_write_is_ended_by_the_next(plain_cluster: FakeCluster, tmp_path: Path) -> None:
    """Wherever it dies, another resume leaves one job, whole and released, and no ticket."""
    cluster, told, num_writes = plain_cluster, set[str](), 0
    client = client_of(cluster, tmp_path)
    while True:
        name = f"net{num_writes}"
        digest = hashlib.sha256(CODE).hexdigest()
        spec = job(name=name, run=f"s3://bucket/{name}", code={"archive": digest})
        submit(client, try_job(client, spec, CODE), CODE)
        end(cluster, name)
        dying = dying_client(cluster, tmp_path, num_writes)
        try:
            go_on(dying, name, archive=CODE, change={"nodes": 3})
        except Died:
            pass
        else:
            break
        archive = stored.try_read_code(client, "default", spec)
        last, done = go_on(client, name, archive=archive)
        told.add("sent" if last.is_sent else "cut off" if last.is_cut_off else "not begun")
        stamps = {item["metadata"]["annotations"][contract.ANNOTATION_SUBMISSION] for item in _mine(cluster, name)}
        assert archive == CODE and jobset_of(cluster, name)["spec"]["suspend"] is False
        assert config_maps(cluster, name) == [name, f"{name}-code-{digest[:10]}"] and len(stamps) == 1, num_writes
        if done is not None:
            begun = last.is_cut_off
            assert done.sent.submission.spec["nodes"] == (3 if begun else 2), num_writes
            assert (done.sent.submission.before or {})["state"] == "failed"
        num_writes += 1
    assert num_writes >= 12 and told == {"not begun", "cut off", "sent"}


def _mine(cluster: FakeCluster, name: str) -> list[dict[str, Any]]:
    found = [cluster.store.get(known.JOB_SET, "default", name)]
    for kind in (known.SECRET, known.ROLE, known.NETWORK_POLICY, known.SERVICE_ACCOUNT, known.ROLE_BINDING):
        found += [
            item
            for item in cluster.store.list(kind, "default").items
            if item["metadata"]["labels"][contract.LABEL_RUN] == name
        ]
    assert len(found) == 6
    return found


def test_answer_that_is_lost_doubles_nothing(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    end(cluster, "net")
    for method in ("POST", "PATCH", "DELETE"):
        cluster.put_fault(Fault(status=None, method=method, performed=True, times=3))
    _, done = go_on(client)

    assert done is not None and jobset_of(cluster)["metadata"]["uid"] == done.sent.uid
    assert list(strays(cluster)) == [] and config_maps(cluster, "net") == ["net"]
