"""What a cluster is asked, and what its refusals mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError
from ktrain.errors import ConfigError, ConflictError, ForbiddenError, KtrainError, NotFoundError
from ktrain.launcher.backends.kubernetes.client import Client, path_of
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.backends.kubernetes.discover import discover, try_fields
from ktrain.launcher.backends.kubernetes.refusals import ExpiredError, RejectedError, refusal
from ktrain.launcher.backends.kubernetes.submit import try_job
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.spec import GangKind
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of, job, needs_definitions


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    return client_of(cluster, tmp_path)


def add_node(cluster: FakeCluster, name: str, kubelet: str) -> None:
    info = {"nodeInfo": {"kubeletVersion": kubelet}}
    cluster.store.create(known.NODE, {"metadata": {"name": name}, "status": info})


# Facts


def test_facts_are_those_of_the_cluster(cluster: FakeCluster, client: Client) -> None:
    facts = discover(client, job())

    assert facts.version == (1, 36)
    assert facts.serves("jobset.x-k8s.io", "jobsets") is True
    assert facts.serves("kueue.x-k8s.io", "localqueues") is False and facts.queues is None


@needs_definitions
@pytest.mark.parametrize(("jobset", "rules", "patterns"), [("0.8.2", False, False), ("0.12.0", True, True)])
def test_fields_count_where_the_dry_run_kept_them(
    cluster: FakeCluster, client: Client, jobset: str, rules: bool, patterns: bool
) -> None:
    cluster.offer = replace(cluster.offer, jobset=jobset)
    add_node(cluster, "a", "v1.36.1")
    facts = try_fields(client, job(), discover(client, job()))

    assert (facts.restart_rules, facts.message_patterns) == (rules, patterns)


@pytest.mark.parametrize(("kubelets", "rules"), [(("v1.36.0", "v1.34.2"), False), ((), None), (("v1.35.0",), True)])
def test_restart_rules_count_where_every_kubelet_knows_them(
    cluster: FakeCluster, client: Client, kubelets: tuple[str, ...], rules: bool | None
) -> None:
    for at, kubelet in enumerate(kubelets):
        add_node(cluster, f"n{at}", kubelet)

    assert try_fields(client, job(), discover(client, job())).restart_rules is rules


def test_facts_that_may_not_be_read_are_not_known_and_not_absent(cluster: FakeCluster, tmp_path: Path) -> None:
    jobsets = Rule(("get", "create"), ("jobset.x-k8s.io",), ("jobsets",))
    cluster.access = Access(rules={"weak": (jobsets,)}, tokens={"admin": "admin", "weak": "weak"})
    client = client_of(cluster, tmp_path, "weak")
    facts = try_fields(client, job(), discover(client, job()))

    assert facts.csi_drivers is None and facts.restart_rules is None and facts.scheduling_group is None
    assert facts.message_patterns is True  # which JobSet's definition alone decides


@needs_definitions
@pytest.mark.parametrize("gate", [True, False])
def test_native_gang_is_chosen_where_pods_keep_their_group(cluster: FakeCluster, client: Client, gate: bool) -> None:
    cluster.offer = replace(
        cluster.offer, apis=frozenset({"scheduling.k8s.io/v1alpha2"}), gates={"GenericWorkload": gate}
    )
    tried = try_job(client, job())

    assert tried.rendered.gang.kind is (GangKind.NATIVE if gate else GangKind.BARRIER)
    assert tried.facts.scheduling_group is gate


def test_cluster_without_jobsets_is_refused_with_what_to_install(cluster: FakeCluster, client: Client) -> None:
    cluster.offer = replace(cluster.offer, jobset=None)

    with pytest.raises(ConfigError, match="have JobSet 0.8 or later installed"):
        try_job(client, job())


def test_misspelt_field_is_refused_before_anything_is_there(cluster: FakeCluster, client: Client) -> None:
    spec = job(overlay={"worker": {"hostNetwrok": True}})

    with pytest.raises(RejectedError, match="hostNetwrok"):
        try_job(client, spec)
    assert cluster.store.list(known.JOB_SET, "default").items == []


def test_given_facts_that_the_cluster_does_not_keep_are_named_with_their_cost(
    cluster: FakeCluster, client: Client
) -> None:
    cluster.offer = replace(cluster.offer, gates={"ContainerRestartRules": False})
    facts = replace(discover(client, job()), restart_rules=True)
    tried = try_job(client, job(), facts=facts)

    assert any("a suspected node is not replaced alone" in line for line in tried.warnings)


@dataclass
class Answer:
    """A reply that is there at once."""

    text: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def read(self) -> bytes:
        return self.text

    def pieces(self) -> Iterator[bytes]:
        yield self.text

    def close(self) -> None:
        pass


class OldServer:
    """A server that knows no aggregated discovery: it answers by groups whatever is accepted."""

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float) -> Answer:
        del method, headers, body, timeout_s
        version = {"groupVersion": "jobset.x-k8s.io/v1alpha2", "version": "v1alpha2"}
        answers: dict[str, Any] = {
            "/apis": {"kind": "APIGroupList", "groups": [{"name": "jobset.x-k8s.io", "versions": [version]}]},
            "/apis/jobset.x-k8s.io/v1alpha2": {"resources": [{"name": "jobsets"}, {"name": "jobsets/status"}]},
            "/version": {"major": "1", "minor": "31+"},
        }
        if path in answers:
            return Answer(json.dumps(answers[path]).encode())
        return Answer(b'{"reason": "NotFound", "message": "none"}', 404)


def test_server_without_aggregated_discovery_is_asked_group_by_group() -> None:
    facts = discover(Client(OldServer(), clock=FakeClock()), job())

    assert facts.served == {"jobset.x-k8s.io/v1alpha2/jobsets"} and facts.version == (1, 31)


# Calls


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (400, "BadRequest", RejectedError),
        (401, "Unauthorized", ForbiddenError),
        (403, "Forbidden", ForbiddenError),
        (404, "NotFound", NotFoundError),
        (409, "AlreadyExists", ConflictError),
        (409, "Conflict", ConflictError),
        (410, "Expired", ExpiredError),
        (422, "Invalid", RejectedError),
        (429, "TooManyRequests", BusyError),
        (503, "ServiceUnavailable", BusyError),
    ],
)
def test_refusal_is_the_error_of_its_status(status: int, reason: str, kind: type[KtrainError]) -> None:
    body = f'{{"kind": "Status", "reason": "{reason}", "message": "words"}}'.encode()
    error = refusal(status, {"Retry-After": "7"}, body, what="GET /x")

    assert type(error) is kind or isinstance(error, kind)
    assert str(error) == f"GET /x: {status} words"
    assert getattr(error, "retry_after_s", 7.0) == 7.0


def test_refusal_of_a_secret_does_not_quote_it() -> None:
    error = refusal(422, {}, b'{"reason": "Invalid", "message": "value hunter2 is bad"}', what="POST /x", secret=True)

    assert "hunter2" not in str(error) and "Invalid" in str(error)


def test_calls_wait_for_as_long_as_the_server_asks(cluster: FakeCluster, client: Client) -> None:
    cluster.put_fault(Fault(status=429, retry_after_s=9, times=2))
    began_s = client.clock.monotonic()
    client.get("/version")

    assert client.clock.monotonic() - began_s >= 18


def test_list_has_all_pages(cluster: FakeCluster, client: Client) -> None:
    for at in range(1200):
        cluster.store.create(known.CONFIG_MAP, {"metadata": {"name": f"c{at}", "namespace": "default"}})
    found = client.list(path_of("v1", "configmaps", "default"))

    assert len(found.items) == 1200


def test_watch_from_a_version_that_is_forgotten_says_so(cluster: FakeCluster, client: Client) -> None:
    path = path_of("v1", "configmaps", "default")
    version = client.list(path).version
    cluster.store.create(known.CONFIG_MAP, {"metadata": {"name": "a", "namespace": "default"}})
    cluster.expire()

    with pytest.raises(ExpiredError):
        next(iter(client.watch(path, version, deadline=Deadline.after(5, client.clock))))


def test_kubeconfig_that_cannot_be_read_is_a_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name one with --kubeconfig"):
        connect(tmp_path / "nope")
