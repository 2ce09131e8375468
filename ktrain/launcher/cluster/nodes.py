"""The nodes of a local cluster: their objects, their kubelets, their loss, and what becomes of their pods."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ktrain.base.clock import Clock
from ktrain.errors import ConfigError, ConflictError, NotFoundError
from ktrain.launcher.cluster import fitting, times
from ktrain.launcher.cluster.conditions import find_condition, set_condition
from ktrain.launcher.cluster.job_pods import is_deleting, is_terminal
from ktrain.launcher.cluster.kubelet import Kubelet, NodeSpec
from ktrain.launcher.cluster.pod_starter import HOST_IP, Machine
from ktrain.launcher.cluster.resources import NODE, POD
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Preconditions, Store

_LOG = logging.getLogger(__name__)
UNREACHABLE = "node.kubernetes.io/unreachable"
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
KUBELET_VERSION = "v1.37.0"


@dataclass(frozen=True, slots=True)
class Silence:
    """How long a node may be silent before it counts as unreachable (a cluster's default is 40 to 50 s)."""

    grace_s: float = 50.0


class Nodes:
    """Runs the kubelets and watches over them. Call from one thread; `reconcile` never waits."""

    def __init__(
        self,
        specs: Iterable[NodeSpec],
        store: Store,
        machine: Machine,
        silence: Silence = Silence(),  # noqa: B008 - frozen
    ) -> None:
        self._store = store
        self._machine = machine
        self._clock = machine.clock
        self._silence = silence
        self._specs = {spec.name: spec for spec in specs}
        self._kubelets: dict[str, Kubelet] = {}
        self._lost_s: dict[str, float] = {}  # by name of a silent node, monotonic
        for spec in self._specs.values():
            store.create(NODE, _node(spec, store.now()))
            self._kubelets[spec.name] = Kubelet(spec, store, machine)

    def reconcile(self) -> float | None:
        """Lets the kubelets work, and does what is due for silent nodes; returns when something comes due by itself."""
        dues = [self._run_kubelets()]
        for name, lost_s in self._lost_s.items():
            dues.append(self._watch_silent(name, lost_s))
        nodes = {node["metadata"]["name"]: node for node in self._store.list(NODE).items}
        for pod in self._store.list(POD).items:
            node_name = pod["spec"].get("nodeName")
            if node_name is not None:
                dues.append(self._judge(pod, nodes.get(node_name)))
        return min((due for due in dues if due is not None), default=None)

    def kubelet_of(self, pod: Object) -> Kubelet | None:
        """Who runs a pod; None while it is not bound, or its node is lost."""
        return self._kubelets.get(pod["spec"].get("nodeName", ""))

    def lose(self, name: str) -> None:
        """Ends a machine: its processes are killed and its memory is gone, and nobody says so.

        Raises:
            ConfigError: there is no such node, or it is lost already.
        """
        kubelet = self._kubelets.pop(name, None)
        if kubelet is None:
            raise ConfigError(f"node {name}: expected one of {', '.join(sorted(self._kubelets)) or 'none'}")
        kubelet.lose()
        self._lost_s[name] = self._clock.monotonic()

    def restore(self, name: str) -> None:
        """Starts a lost machine again, empty.

        Raises:
            ConfigError: it is not lost.
        """
        if name not in self._lost_s:
            raise ConfigError(
                f"node {name}: expected one of the lost nodes, {', '.join(sorted(self._lost_s)) or 'none'}"
            )
        del self._lost_s[name]
        self._kubelets[name] = Kubelet(self._specs[name], self._store, self._machine)
        words = "kubelet is posting ready status"
        self._set_ready(name, "True", "KubeletReady", words)
        self._store.mutate(NODE, None, name, lambda node: _untaint(node, (UNREACHABLE, OUT_OF_SERVICE)))

    def close(self) -> None:
        """Ends the kubelets' threads; the containers are the runtime's to kill."""
        for kubelet in self._kubelets.values():
            kubelet.close()

    def _run_kubelets(self) -> float | None:
        by_node: dict[str, dict[str, Object]] = {name: {} for name in self._kubelets}
        for pod in self._store.list(POD).items:
            name = pod["spec"].get("nodeName")
            if name in by_node:
                by_node[name][pod["metadata"]["uid"]] = pod
        dues = [kubelet.reconcile(by_node[name]) for name, kubelet in self._kubelets.items()]
        return min((due for due in dues if due is not None), default=None)

    def _watch_silent(self, name: str, lost_s: float) -> float | None:
        due = lost_s + self._silence.grace_s
        if self._clock.monotonic() < due:
            return due
        node = self._store.get(NODE, None, name)
        if find_condition(node, "Ready").get("status") == "Unknown":
            return None
        self._set_ready(name, "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
        for pod in self._store.list(POD, fields=f"spec.nodeName={name}").items:
            self._change_status(pod, lambda obj: _set(obj, self._store.now(), "Ready", "False"))
        self._store.mutate(NODE, None, name, lambda obj: _taint(obj, self._store.now()))
        return None

    def _set_ready(self, name: str, status: str, reason: str, message: str) -> None:
        def change(node: Object) -> None:
            _set(node, self._store.now(), "Ready", status, reason, message)

        self._store.mutate(NODE, None, name, change, status=True)

    # Pods on nodes that are not well

    def _judge(self, pod: Object, node: Object | None) -> float | None:
        """Deletes a pod that its node does not want or that has no node any more; returns when that is due."""
        if node is None:
            self._collect(pod, "DeletionByPodGC", "PodGC: node no longer exists")
            return None
        taints = node["spec"].get("taints") or ()
        silent = find_condition(node, "Ready").get("status") != "True"
        if silent and is_deleting(pod) and any(taint["key"] == OUT_OF_SERVICE for taint in taints):
            self._collect(pod)
            return None
        if is_deleting(pod) or is_terminal(pod):
            return None
        dues = [_tolerated_until(pod, taint, self._clock) for taint in taints if taint["effect"] == "NoExecute"]
        due = min((at for at in dues if at is not None), default=None)
        if due is None or self._clock.monotonic() < due:
            return due
        words = "Taint manager: deleting due to NoExecute taint"
        evict(self._store, pod, "DeletionByTaintManager", words)
        return None

    def _collect(self, pod: Object, reason: str = "", message: str = "") -> None:
        """Removes a pod that nobody runs any more."""

        def change(obj: Object) -> None:
            if reason and not is_terminal(obj):
                _set(obj, self._store.now(), "DisruptionTarget", "True", reason, message)
            obj["status"]["phase"] = obj["status"]["phase"] if is_terminal(obj) else "Failed"

        self._change_status(pod, change)
        _delete(self._store, pod, grace_s=0)

    def _change_status(self, pod: Object, change: Any) -> None:
        try:
            self._store.mutate(POD, pod["metadata"]["namespace"], pod["metadata"]["name"], change, status=True)
        except NotFoundError:
            _LOG.debug("pod %s is gone already", pod["metadata"]["name"])


def evict(
    store: Store, pod: Object, reason: str = "EvictionByEvictionAPI", message: str = "Eviction API: evicting"
) -> None:
    """Says that a pod is disrupted, then deletes it with its own grace."""

    def change(obj: Object) -> None:
        _set(obj, store.now(), "DisruptionTarget", "True", reason, message)

    try:
        store.mutate(POD, pod["metadata"]["namespace"], pod["metadata"]["name"], change, status=True)
    except NotFoundError:
        return
    _delete(store, pod)


def _delete(store: Store, pod: Object, *, grace_s: int | None = None) -> None:
    metadata = pod["metadata"]
    try:
        store.delete(
            POD,
            metadata["namespace"],
            metadata["name"],
            grace_s=grace_s,
            preconditions=Preconditions(uid=metadata["uid"]),
        )
    except (NotFoundError, ConflictError):
        _LOG.debug("pod %s is gone already", metadata["name"])


def _tolerated_until(pod: Object, taint: Mapping[str, Any], clock: Clock) -> float | None:
    """When a taint drives a pod away, monotonic; None for never."""
    matching = [item for item in pod["spec"].get("tolerations") or () if fitting.tolerates(item, taint)]
    limits = [item["tolerationSeconds"] for item in matching if item.get("tolerationSeconds") is not None]
    if matching and not limits:
        return None
    since_s = times.monotonic(taint["timeAdded"], clock) if "timeAdded" in taint else clock.monotonic()
    return since_s + float(min(limits, default=0))


def _set(obj: Object, now: str, kind: str, status: str, reason: str = "", message: str = "") -> None:
    conditions = obj.setdefault("status", {}).setdefault("conditions", [])
    set_condition(conditions, now, kind, status, reason, message)


def _taint(node: Object, now: str) -> None:
    old = [taint for taint in node["spec"].get("taints") or () if taint["key"] != UNREACHABLE]
    new = [{"key": UNREACHABLE, "effect": effect, "timeAdded": now} for effect in ("NoSchedule", "NoExecute")]
    node["spec"]["taints"] = [*old, *new]


def _untaint(node: Object, keys: tuple[str, ...]) -> None:
    node["spec"]["taints"] = [taint for taint in node["spec"].get("taints") or () if taint["key"] not in keys]


def _node(spec: NodeSpec, now: str) -> Object:
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "KubeletReady",
        "message": "kubelet is posting ready status",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
    return {
        "metadata": {"name": spec.name, "labels": {fitting.HOST_LABEL: spec.name, **spec.labels}},
        "spec": {"taints": [dict(taint) for taint in spec.taints]} if spec.taints else {},
        "status": {
            "capacity": dict(spec.resources),
            "allocatable": dict(spec.resources),
            "conditions": [ready],
            "addresses": [{"type": "InternalIP", "address": HOST_IP}, {"type": "Hostname", "address": spec.name}],
            "nodeInfo": {"kubeletVersion": KUBELET_VERSION, "operatingSystem": "linux"},
        },
    }
