"""Where pods may run: selectors, affinities, tolerations, the scheduler and its groups."""

from __future__ import annotations

from ktrain.base import contract
from ktrain.launcher import accelerators
from ktrain.launcher.catalogue import Provider
from ktrain.launcher.gang import Gang
from ktrain.launcher.render.common import WORKER, Manifest
from ktrain.launcher.render.devices import DevicePlan
from ktrain.launcher.spec import GangKind, JobSpec, Spot, TopologyMode

HOST_LABEL = "kubernetes.io/hostname"
_GONE_S = 30  # that a pod stays on a node which is not ready; the default is 300
_SCHEDULERS = {GangKind.VOLCANO: "volcano", GangKind.KAI: "kai-scheduler"}


def pod_group_name(spec: JobSpec) -> str:
    """Of the group of the worker pods, whatever the scheduler calls it."""
    return f"{spec.name}-{WORKER}"


def of_head(spec: JobSpec, gang: Gang) -> Manifest:
    """The head's part: on demand unless all may be on spot nodes, away from suspected nodes."""
    provider, where = _provider(spec), list(_avoided(spec))
    if spec.placement.spot is Spot.WORKERS and provider is not None:
        where.append({"key": provider.label, "operator": "NotIn", "values": [provider.value]})
    found: Manifest = {"tolerations": _tolerations(spec, spot=spec.placement.spot is Spot.ALL)}
    if where:
        found["affinity"] = {"nodeAffinity": _required([where])}
    if gang.kind is GangKind.KAI:
        found["schedulerName"] = _SCHEDULERS[gang.kind]
    return {**found, **_priority(spec, gang)}


def of_worker(spec: JobSpec, gang: Gang, devices: DevicePlan) -> Manifest:
    """The worker's part."""
    placement = spec.placement
    selector = {**devices.node_selector, **placement.node_selector}
    provider = _provider(spec)
    if placement.spot is not Spot.NONE and provider is not None:
        selector[provider.label] = provider.value
    found: Manifest = {"tolerations": _worker_tolerations(spec, devices)}
    if selector:
        found["nodeSelector"] = selector
    affinity = {**_node_affinity(spec, devices), **_pod_affinity(spec, gang), **_apart(spec)}
    if affinity:
        found["affinity"] = affinity
    scheduler = placement.scheduler if gang.kind is GangKind.COSCHEDULING else _SCHEDULERS.get(gang.kind)
    if scheduler is not None:
        found["schedulerName"] = scheduler
    if gang.native_version is not None:
        found["schedulingGroup"] = {"podGroupName": pod_group_name(spec)}
    return {**found, **_priority(spec, gang)}


def _provider(spec: JobSpec) -> Provider | None:
    return accelerators.find_provider(spec.placement.provider) if spec.placement.provider is not None else None


def _priority(spec: JobSpec, gang: Gang) -> Manifest:
    """Kueue has priorities of its own, which stand on the JobSet."""
    if spec.placement.priority is None or gang.kind is GangKind.KUEUE:
        return {}
    return {"priorityClassName": spec.placement.priority}


def _tolerations(spec: JobSpec, *, spot: bool) -> list[Manifest]:
    """Of both pods: a node that does not answer, for a while, and spot nodes where they may run there."""
    found = [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": _GONE_S,
        }
        for state in ("not-ready", "unreachable")
    ]
    provider = _provider(spec)
    if spot and provider is not None and provider.taint is not None:
        found.append({"key": provider.taint, "operator": "Equal", "value": provider.value, "effect": "NoSchedule"})
    return found


def _worker_tolerations(spec: JobSpec, devices: DevicePlan) -> list[Manifest]:
    tainted = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in devices.tainted]
    own = [
        {
            "key": item.key,
            **({"operator": "Exists"} if item.value is None else {"operator": "Equal", "value": item.value}),
            **({} if item.effect is None else {"effect": item.effect}),
        }
        for item in spec.placement.tolerations
    ]
    return [*_tolerations(spec, spot=spec.placement.spot is not Spot.NONE), *tainted, *own]


def _avoided(spec: JobSpec) -> list[Manifest]:
    nodes = list(spec.placement.avoid_nodes)
    return [{"key": HOST_LABEL, "operator": "NotIn", "values": nodes}] if nodes else []


def _required(terms: list[list[Manifest]]) -> Manifest:
    selector = {"nodeSelectorTerms": [{"matchExpressions": term} for term in terms]}
    return {"requiredDuringSchedulingIgnoredDuringExecution": selector}


def _node_affinity(spec: JobSpec, devices: DevicePlan) -> Manifest:
    """Any of the labels that tell the model, and on each of these ways no suspected node."""
    avoided = _avoided(spec)
    terms = [[*term, *avoided] for term in devices.terms] or ([avoided] if avoided else [])
    return {"nodeAffinity": _required(terms)} if terms else {}


def _mates(spec: JobSpec) -> Manifest:
    return {"matchLabels": {contract.LABEL_RUN: spec.name, contract.LABEL_ROLE: WORKER}}


def _pod_affinity(spec: JobSpec, gang: Gang) -> Manifest:
    """All workers in one domain, by the scheduler's own means; Kueue is told by an annotation."""
    topology = spec.placement.topology
    if topology is None or gang.kind is GangKind.KUEUE:
        return {}
    term = {"labelSelector": _mates(spec), "topologyKey": topology.label}
    if topology.mode is TopologyMode.REQUIRED:
        return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    weighted = {"weight": 100, "podAffinityTerm": term}
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [weighted]}}


def _apart(spec: JobSpec) -> Manifest:
    """No two workers on one machine: what one keeps for the other would be lost with it."""
    if spec.num_nodes + spec.spares == 1 or spec.placement.share_nodes:
        return {}
    term = {"labelSelector": _mates(spec), "topologyKey": HOST_LABEL}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
