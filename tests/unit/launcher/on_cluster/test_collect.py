"""What ktrain left on a cluster: found, spared on doubt, and removed by its uid."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.errors import ForbiddenError, KtrainError, UnavailableError
from ktrain.launcher.backends.kubernetes import act, stored
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.collect import Plan, carry_out, plan_collection
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.cluster.resources import Resource
from ktrain.launcher.code.ways import MOST_CARRIED
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from tests.unit.launcher.on_cluster.clusters import client_of, job
from tests.unit.launcher.on_cluster.resumes import OWNED, Died, config_maps, dying_client, end, go_on, strays

NATIVE = Offer(
    version="1.36",
    jobset="0.12.0",
    apis=frozenset({"scheduling.k8s.io/v1alpha2"}),
    gates={"GenericWorkload": True},
    volcano=True,
)


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(NATIVE) as found:
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    return client_of(cluster, tmp_path)


def plan(client: Client, *, older_s: float = 0.0, has_record: bool | KtrainError = True) -> Plan:
    def told(run: str, submission_id: str) -> bool:
        assert run.startswith("s3://bucket/net") and submission_id
        if isinstance(has_record, KtrainError):
            raise has_record
        return has_record

    return plan_collection(client, None, older_s=older_s, has_record=told)


def planned(found: Plan) -> set[str]:
    return {f"{item.kind} {item.name}" for item in found.removals}


def abandon(cluster: FakeCluster, name: str = "net") -> None:
    """Takes a JobSet away as one does who lets its dependents be: with `--cascade=orphan`, and owners written back."""
    uid = cluster.store.get(known.JOB_SET, "default", name)["metadata"]["uid"]
    owner = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": name, "uid": uid}
    cluster.store.delete(known.JOB_SET, "default", name, propagation="Orphan")
    for kind in (*OWNED, known.WORKLOAD.at("v1alpha2"), known.POD_GROUP.at("v1alpha2")):
        for item in cluster.store.list(kind, "default").items:
            own(cluster, kind, item["metadata"]["name"], owner)


def own(cluster: FakeCluster, kind: Resource, name: str, owner: dict[str, Any]) -> None:
    def change(obj: dict[str, Any]) -> None:
        obj["metadata"]["ownerReferences"] = [owner]

    cluster.store.mutate(kind, "default", name, change)


def test_objects_whose_jobset_is_gone_are_found_in_every_kind_and_removed(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    abandon(cluster)
    found = plan(client)
    kinds = {item.kind for item in found.removals}

    assert kinds >= {"ConfigMap", "Secret", "ServiceAccount", "Role", "RoleBinding", "NetworkPolicy"}
    assert {"Workload", "PodGroup"} <= kinds and found.spared == () and found.unknown == ()
    gone, failed = carry_out(client, found.removals)
    assert len(gone) == len(found.removals) and failed == [] and list(strays(cluster)) == []


def test_job_that_lives_and_what_ktrain_did_not_make_are_never_named(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    labels = {"app.kubernetes.io/managed-by": "ktrain", contract.LABEL_RUN: "old"}
    about = {"name": "foreign", "namespace": "default", "labels": labels}
    cluster.store.create(known.CONFIG_MAP, {"metadata": about, "data": {"a": "b"}})
    annotated = {**about, "name": "unowned", "annotations": {contract.ANNOTATION_SUBMISSION: "x"}}
    cluster.store.create(known.CONFIG_MAP, {"metadata": annotated})

    assert plan(client) == Plan((), (), ())


def test_object_that_is_young_stays(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    abandon(cluster)

    assert plan(client, older_s=3600).removals == ()


def test_finished_jobs_go_and_their_objects_with_them(cluster: FakeCluster, client: Client) -> None:
    for name, kind in (("net-a", "Completed"), ("net-b", "Failed"), ("net-c", "Completed")):
        submit(client, try_job(client, job(name=name, run=f"s3://bucket/{name}")))
        end(cluster, name, kind)
    end(cluster, "net-c", "Completed", since="2999-01-01T00:00:00Z")
    found = plan(client, older_s=60)

    assert planned(found) == {"JobSet net-a", "JobSet net-b"}
    carry_out(client, found.removals)
    assert config_maps(cluster, "net") == ["net-c"]


@pytest.mark.parametrize(
    ("has_record", "reason"),
    [(False, "only this can be resumed"), (UnavailableError("bucket: away"), "cannot be told .* bucket: away")],
)
def test_failed_job_stays_while_its_run_may_lack_its_record(
    cluster: FakeCluster, client: Client, has_record: bool | KtrainError, reason: str
) -> None:
    submit(client, try_job(client, job()))
    end(cluster, "net")
    found = plan(client, has_record=has_record)

    [(what, why)] = found.spared
    assert found.removals == () and what == "JobSet default/net" and re.search(reason, why)


def test_cancelled_job_goes_once_it_is_known_since_when(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    act.cancel(client, "default", "net", deadline=Deadline.after(60, client.clock))
    assert plan(client).spared == (("JobSet default/net", "its age cannot be told"),)
    end(cluster, "net", "Suspended")

    assert planned(plan(client)) == {"JobSet net"}


def test_kind_that_may_not_be_listed_is_unknown_and_the_others_are_looked_at(
    cluster: FakeCluster, client: Client, tmp_path: Path
) -> None:
    submit(client, try_job(client, job()))
    abandon(cluster)
    rules = (Rule(("*",), ("", "jobset.x-k8s.io"), ("jobsets", "configmaps", "pods", "events")),)
    cluster.access = Access(rules={"weak": rules}, tokens={"admin": "admin", "weak": "weak"})
    found = plan(client_of(cluster, tmp_path, "weak"))

    assert planned(found) == {"ConfigMap net"}
    assert any(text.startswith("Secret of v1 were not looked at") for text in found.unknown)


def test_age_that_the_server_does_not_tell_spares(cluster: FakeCluster, client: Client, tmp_path: Path) -> None:
    submit(client, try_job(client, job()))
    abandon(cluster)
    rules = (Rule(("get", "list"), ("*",), ("*",)),)
    cluster.access = Access(rules={"weak": rules}, tokens={"admin": "admin", "weak": "weak"})
    found = plan(client_of(cluster, tmp_path, "weak"))

    assert found.removals == () and {why for _, why in found.spared} == {"its age cannot be told"}


def test_jobsets_that_may_not_be_listed_leave_everything(cluster: FakeCluster, client: Client, tmp_path: Path) -> None:
    submit(client, try_job(client, job()))
    rules = (Rule(("*",), ("",), ("*",)),)
    cluster.access = Access(rules={"weak": rules}, tokens={"admin": "admin", "weak": "weak"})

    with pytest.raises(ForbiddenError):
        plan(client_of(cluster, tmp_path, "weak"))


def test_ticket_of_a_resume_that_was_cut_off_stays_until_its_run_has_the_record(
    cluster: FakeCluster, client: Client, tmp_path: Path
) -> None:
    submit(client, try_job(client, job()))
    end(cluster, "net")
    with pytest.raises(Died):
        go_on(dying_client(cluster, tmp_path, 2))  # the ticket is written, and the old job deleted
    assert config_maps(cluster, "net") == ["net-resume"]

    assert plan(client, has_record=False).removals == ()
    assert planned(plan(client)) == {"ConfigMap net-resume"}
    go_on(client)
    assert plan(client) == Plan((), (), ())


def test_code_in_parts_beside_a_ticket_goes_where_the_ticket_is_gone(
    cluster: FakeCluster, client: Client, tmp_path: Path
) -> None:
    data = bytes(MOST_CARRIED + 1)
    digest = hashlib.sha256(data).hexdigest()
    spec = job(code={"archive": digest, "size": len(data), "parts": 2})
    submit(client, try_job(client, spec, data), data)
    end(cluster, "net")
    with pytest.raises(Died):
        go_on(dying_client(cluster, tmp_path, 4), archive=data)  # both parts, the ticket, the old job's end
    assert stored.try_read_code(client, "default", spec) == data
    cluster.store.delete(known.CONFIG_MAP, "default", "net-resume")

    parts = {f"ConfigMap net-resume-code-{digest[:10]}-{at}" for at in range(2)}
    assert planned(plan(client)) == parts
    assert carry_out(client, plan(client).removals)[1] == []
    assert config_maps(cluster, "net") == []


def test_removal_that_fails_is_told_and_the_others_go(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    abandon(cluster)
    found = plan(client)
    cluster.put_fault(Fault(status=503, method="DELETE", path="/secrets", times=100))
    gone, failed = carry_out(client, found.removals)

    assert [item.kind for item, _ in failed] == ["Secret"] and len(gone) == len(found.removals) - 1


def test_object_that_was_made_again_meanwhile_stays(cluster: FakeCluster, client: Client) -> None:
    submit(client, try_job(client, job()))
    abandon(cluster)
    found = plan(client)
    carry_out(client, found.removals)
    submit(client, try_job(client, job()))
    carry_out(client, found.removals)

    assert config_maps(cluster, "net") == ["net"]
