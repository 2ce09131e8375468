"""What of each transcript is compared, and what is not and why: every step of every transcript is one or the other.

Where a transcript waits for a controller, the test writes to the store what that controller would have written
(`before`), so that the API server's part of what follows can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ktrain.launcher.cluster.resources import CONFIG_MAP, JOB, JOB_SET, NODE, POD
from ktrain.testing.fake_cluster import FakeCluster, Offer
from tests.conformance.kubernetes.replay import Bindings, Client, without_owners

Object = dict[str, Any]

OFFER = Offer(
    version="1.36.2",
    jobset="0.13.0-devel",
    kueue=True,
    volcano=True,
    apis=frozenset({"scheduling.k8s.io/v1alpha2"}),
    gates={"GenericWorkload": True},
    toleration_s=5,
)
WITHOUT_ALPHA = replace(OFFER, apis=frozenset())  # some were recorded before the alpha versions were switched on
GATE_OFF = Offer(version="1.36.2", jobset="0.13.0-devel", toleration_s=5)

JOBS = "written by the Job controller"
JOB_SETS = "written by the JobSet controller"
PODS = "written by the scheduler and the kubelet"
KUEUE = "written by Kueue's controllers and webhooks"
VOLCANO = "written by Volcano's controller and scheduler"
GANGS = "written by the gang scheduler"
NODES = "written by the node controller"
EVENTS = "events of controllers"
SPOILED = "the recorder kept a reference: the body shows what the scenario changed afterwards"
HIDDEN = "the placeholder hides the digits that are wrong"
STAMPS = "time stamps of lines are the node's, in its own form"
EVENTS_V1 = "events.k8s.io is not served"
CLAIMS = "written by the resource claim controller"


@dataclass(slots=True)
class Stage:
    """A replay in progress, for those who play the controllers."""

    cluster: FakeCluster
    client: Client
    bindings: Bindings
    steps: list[Object]
    namespace: str

    def body(self, step: int) -> Object:
        """The body of a recorded request, to make another from."""
        return copy.deepcopy(self.bindings.fill(self.steps[step]["request"]["body"]))

    def create(self, resource: Any, body: Object, **changes: Any) -> None:
        metadata = {**body["metadata"], "namespace": self.namespace, **changes.pop("metadata", {})}
        path = resource.path(self.namespace)
        answer = self.client.send({"method": "POST", "path": path, "body": {**body, "metadata": metadata, **changes}})
        assert answer.status == 201, answer

    def config_map(self, name: str, data: Object | None = None, **metadata: Any) -> None:
        self.create(CONFIG_MAP, {"metadata": {"name": name, **metadata}, "data": data or {"k": "v"}})

    def run_pod(self, name: str) -> None:
        """Binds a pod and lets it run, as a scheduler and a kubelet do."""
        store = self.cluster.store
        store.mutate(POD, self.namespace, name, lambda pod: pod["spec"].update(nodeName="node-1"))
        ready = {"type": "Ready", "status": "True"}
        store.mutate(
            POD,
            self.namespace,
            name,
            lambda pod: pod["status"].update(phase="Running", conditions=[ready]),
            status=True,
        )

    def container(self, pod: str, state: Object, restarts: int = 0) -> None:
        status = {"name": "main", "state": state, "restartCount": restarts}
        update = {"containerStatuses": [status]}
        self.cluster.store.mutate(POD, self.namespace, pod, lambda obj: obj["status"].update(update), status=True)


@dataclass(frozen=True, slots=True)
class Case:
    """One transcript: what is done before a step, which steps are not compared, which parts of the others are not.

    `apart` maps a regular expression of places in an answer (`.status`, `header Warning`) to the reason.
    """

    before: Mapping[int, Callable[[Stage], None]] = field(default_factory=dict)
    without: Mapping[int, str] = field(default_factory=dict)
    apart: Mapping[str, str] = field(default_factory=dict)
    offer: Offer = OFFER


def _all(reason: str, *steps: int) -> dict[int, str]:
    return dict.fromkeys(steps, reason)


# ---------------------------------------------------------------------------- the controllers' parts


def _five_maps(stage: Stage) -> None:
    for i in range(5):
        stage.config_map(f"c{i}", labels={"i": str(i), "app": "demo"})


def _forget_page(stage: Stage) -> None:
    del stage.bindings.values["<continue>"]  # the same placeholder stands for what never was a token


def _lost_page(stage: Stage) -> None:
    for name in ("c0", "c1", "c2", "c3", "kube-root-ca.crt", "openshift-service-ca.crt"):
        stage.config_map(name)
    path = CONFIG_MAP.path(stage.namespace)
    answer = stage.client.send({"path": path, "query": {"limit": 2}})
    stage.bindings.values["<continue>"] = answer.body["metadata"]["continue"]
    stage.config_map("tick")
    stage.cluster.store.delete(CONFIG_MAP, stage.namespace, "tick")
    stage.cluster.expire()


def _same_jobset(stage: Stage) -> None:
    stage.create(JOB_SET, stage.body(0))


def _fixed_map(stage: Stage) -> None:
    stage.create(CONFIG_MAP, {"metadata": {"name": "fixed"}, "data": {"k": "v"}, "immutable": True})


def _fixed_job(stage: Stage) -> None:
    body = stage.body(5)
    body["metadata"]["name"] = "fixed"
    spec = {key: value for key, value in body["spec"].items() if key != "podFailurePolicy"}
    stage.create(JOB, body, spec={**spec, "suspend": True})


def _objects_to_patch(stage: Stage) -> None:
    stage.config_map("a", {"k": "v", "old": "1"}, labels={"a": "b"})
    recorded = stage.steps[6]["response"]["body"]
    spec = recorded["spec"]
    stage.create(
        JOB_SET, {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "a"}, "spec": spec}
    )
    pod = without_owners(stage.steps[9]["response"]["body"])["spec"]
    pod["containers"][0]["image"] = "busybox:1.36"
    stage.create(POD, {"metadata": {"name": "p"}, "spec": pod})


def _labelled_map(stage: Stage) -> None:
    stage.config_map("a", labels={"app": "demo"})


def _three_run(stage: Stage) -> None:
    for name in ("slow", "held", "forced"):
        stage.run_pod(name)


def _held_ends(stage: Stage) -> None:
    stage.cluster.store.mutate(
        POD, stage.namespace, "held", lambda pod: pod["status"].update(phase="Failed"), status=True
    )


def _one_runs(stage: Stage) -> None:
    stage.run_pod("p")


def _evicted_goes(stage: Stage) -> None:
    stage.cluster.store.delete(POD, stage.namespace, "p", grace_s=0)


def _pods_talk(stage: Stage) -> None:
    store, logs = stage.cluster.store, stage.cluster.logs
    for name in ("p", "two", "again"):
        stage.run_pod(name)
    pod = store.get(POD, stage.namespace, "p")
    logs.write(pod, "main", "".join(f"line {i}\n" for i in range(1, 7)))
    stage.container("p", {"terminated": {"exitCode": 3}})
    logs.write(store.get(POD, stage.namespace, "again"), "main", "run\n")
    stage.container("again", {"running": {}}, restarts=1)


def _kueue_admits(stage: Stage) -> None:
    stage.cluster.store.mutate(JOB_SET, stage.namespace, "first", lambda obj: obj["spec"].update(suspend=False))


def _a_node(stage: Stage) -> None:
    stage.cluster.store.create(NODE, {"metadata": {"name": "node-2"}, "spec": {}})
    stage.bindings.values["<node-2>"] = "node-2"


# ---------------------------------------------------------------------------- the cases

_POD_STATE = {r"\.status\.": PODS}
_JOB_STATUS = {r"\.status(\.|:)": JOBS}
_SET_STATUS = {r"(\.items\[\d+\])?\.status(\.|:)": JOB_SETS}
_KUEUE_PARTS = {r"\.metadata\.finalizers": KUEUE, r"\.status:": KUEUE, r"\.spec: recorded \{\}": KUEUE}
_GANG_PARTS = {
    r"\.metadata\.finalizers": "a finalizer that the controller of pod groups would have to remove",
    r"(\.items\[\d+\])?\.(status|spec\.nodeName)(\.|:)": GANGS,
}
_UNBOUND = {r"(\.items\[\d+\])?\.status\.(conditions|resourceClaimStatuses)": PODS}
_PENDING_PARTS = {
    **_UNBOUND,
    r".*\.resources\.(limits|requests)\.": "quantities are stored as they were written, not in their shortest form",
}
_VOLCANO_PARTS = {r"\.status:": VOLCANO, r"\.metadata\.generation": VOLCANO}
_HASH = {r".*storageVersionHash": "a hash of the storage, which is not emulated"}

CASES: dict[str, Case] = {
    "already-exists": Case(),
    "apply-config-map": Case(),
    "apply-jobset": Case(),
    "bad-request": Case(),
    "config-map-crud": Case(),
    "conflict": Case(),
    "discovery": Case(apart=_HASH, offer=WITHOUT_ALPHA),
    "discovery-aggregated": Case(),
    "dry-run-jobset": Case(before={2: _same_jobset}),
    "dry-run-pod-scheduling-group": Case(apart=_HASH),
    "dry-run-pod-scheduling-group-gate-off": Case(offer=GATE_OFF),
    "expired": Case(before={0: _lost_page}),
    "field-validation-job": Case(),
    "field-validation-jobset": Case(),
    "forbidden": Case(
        offer=WITHOUT_ALPHA,
        apart={r"\.status\.(nonR|r)esourceRules": "the rules that every cluster grants to everybody are not listed"},
    ),
    "garbage-collection": Case(),
    "invalid": Case(before={4: _fixed_map, 8: _fixed_job}),
    "job-disruption-ignored": Case(without=_all(JOBS, 1, 2, 3, 6, 7, 8), apart=_JOB_STATUS),
    "job-failures": Case(without=_all(JOBS, 0, 1, 4, 7, 8), apart=_JOB_STATUS),
    "job-pod-failure-policy": Case(without=_all(JOBS, 0, 1, 4, 7), apart=_JOB_STATUS),
    "job-pod-replacement": Case(without=_all(JOBS, 1, 2, 3, 6, 7, 8), apart=_JOB_STATUS),
    "job-policies": Case(without=_all(JOBS, 0, 1, 4), apart=_JOB_STATUS),
    "job-success": Case(without={**_all(JOBS, 0, 1), 4: EVENTS}, apart=_JOB_STATUS),
    "job-success-native-gang": Case(without={**_all(JOBS, 0, 1), 4: EVENTS}, apart=_JOB_STATUS),
    "jobset-depends-on": Case(without={**_all(JOB_SETS, 0, 1), 4: EVENTS}, apart=_SET_STATUS),
    "jobset-failure": Case(without={**_all(JOB_SETS, 0, 1, 2), 5: EVENTS}, apart=_SET_STATUS),
    "jobset-failure-rules": Case(without={**_all(JOB_SETS, 0, 1, 5, 6), **_all(EVENTS, 4, 9)}, apart=_SET_STATUS),
    "jobset-immutable": Case(without={11: SPOILED}, apart=_SET_STATUS),
    "jobset-objects": Case(without=_all(JOB_SETS, 2, 3, 5, 6), apart=_SET_STATUS),
    "jobset-success": Case(without={**_all(JOB_SETS, 0, 1, 2, 7), 5: EVENTS}, apart=_SET_STATUS),
    "jobset-suspend": Case(without=_all(JOB_SETS, 0, 2), apart=_SET_STATUS),
    "kueue-admission": Case({10: _kueue_admits}, {**_all(KUEUE, 4, 5, 9), 12: EVENTS}, _KUEUE_PARTS),
    "kueue-preemption": Case(without=_all(KUEUE, 4, 5, 8, 9), apart=_KUEUE_PARTS),
    "lease": Case(without={7: HIDDEN}),
    "list-options": Case(before={0: _five_maps, 9: _forget_page}),
    "native-pod-group": Case(without=_all(GANGS, 1, 2), apart=_GANG_PARTS),
    "node-death": Case({7: _a_node}, {**_all(JOB_SETS, 1, 2, 3, 5, 9), **_all(NODES, 4, 7)}, _SET_STATUS),
    "not-found": Case(),
    "patch-types": Case(before={0: _objects_to_patch}),
    "pod-delete": Case({3: _three_run, 8: _held_ends}, {3: PODS}, _POD_STATE),
    "pod-eviction": Case({2: _one_runs, 7: _evicted_goes}, {5: PODS}),
    "pod-logs": Case({4: _pods_talk}, {8: STAMPS}),
    "pod-pending": Case(without={6: EVENTS, 7: EVENTS_V1}, apart=_PENDING_PARTS),
    "resource-claim-template": Case(without={6: CLAIMS}, apart=_UNBOUND),
    "version": Case(apart={r"\.(compiler|goVersion|platform)": "how the server was built"}),
    "volcano-pod-group": Case(without={**_all(VOLCANO, 0, 1), 6: EVENTS}, apart=_VOLCANO_PARTS),
    "watch-basics": Case(before={0: _labelled_map}),
}
