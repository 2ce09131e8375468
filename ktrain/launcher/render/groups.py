"""The objects and marks by which each gang mechanism knows the pods of a job."""

from __future__ import annotations

from ktrain.launcher import budget
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.gang import COSCHEDULING_GROUP, NATIVE_GROUP, VOLCANO_GROUP, Gang
from ktrain.launcher.quantity import format_bytes
from ktrain.launcher.render.common import WORKER, Manifest, metadata
from ktrain.launcher.render.devices import DevicePlan
from ktrain.launcher.render.placing import pod_group_name
from ktrain.launcher.spec import GangKind, JobSpec, Scope, TopologyMode

KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
_KUEUE_TOPOLOGY = "kueue.x-k8s.io/podset-{mode}-topology"
_VOLCANO_GROUP_NAME = "scheduling.k8s.io/group-name"
_COSCHEDULING_GROUP_NAME = "scheduling.x-k8s.io/pod-group"
_KAI_QUEUE = "kai.scheduler/queue"


def job_labels(spec: JobSpec, gang: Gang) -> dict[str, str]:
    """Of the JobSet."""
    if gang.kind is not GangKind.KUEUE or gang.queue is None:
        return {}
    priority = {} if spec.placement.priority is None else {KUEUE_PRIORITY: spec.placement.priority}
    return {KUEUE_QUEUE: gang.queue, **priority}


def pod_marks(spec: JobSpec, gang: Gang, role: str, facts: ClusterFacts) -> tuple[dict[str, str], dict[str, str]]:
    """Labels and annotations of the pods of a role."""
    if gang.kind is GangKind.KAI and gang.queue is not None:
        return {_KAI_QUEUE: gang.queue}, {}  # its grouper makes one group of the JobSet's pods, the head's too
    if role != WORKER:
        return {}, {}
    if gang.kind is GangKind.VOLCANO:
        return {}, {_VOLCANO_GROUP_NAME: pod_group_name(spec)}
    if gang.kind is GangKind.COSCHEDULING:
        return {_COSCHEDULING_GROUP_NAME: pod_group_name(spec)}, {}
    if gang.kind is GangKind.KUEUE:
        return {}, _kueue_topology(spec, facts)
    return {}, {}


def _kueue_topology(spec: JobSpec, facts: ClusterFacts) -> dict[str, str]:
    """On the pod template, where Kueue looks; a level that the queue's topology lacks would never be admitted."""
    topology = spec.placement.topology
    if topology is None or (facts.queue_levels is not None and topology.label not in facts.queue_levels):
        return {}
    return {_KUEUE_TOPOLOGY.format(mode=topology.mode.value): topology.label}


def group_objects(spec: JobSpec, gang: Gang, devices: DevicePlan, scope: Scope) -> tuple[Manifest, ...]:
    """The groups that have to exist before the pods: workers alone, and spares not counted."""
    if gang.kind is GangKind.VOLCANO:
        return (_volcano(spec, gang, devices, scope),)
    if gang.kind is GangKind.COSCHEDULING:
        return (_coscheduling(spec),)
    return _native(spec, gang.native_version) if gang.native_version is not None else ()


def _volcano(spec: JobSpec, gang: Gang, devices: DevicePlan, scope: Scope) -> Manifest:
    priority = {} if spec.placement.priority is None else {"priorityClassName": spec.placement.priority}
    return {
        "apiVersion": f"{VOLCANO_GROUP}/v1beta1",
        "kind": "PodGroup",
        "metadata": metadata(spec, pod_group_name(spec)),
        "spec": {
            "minMember": spec.num_nodes,
            "queue": gang.queue,
            "minResources": _resources_of_all(spec, devices, scope),
            **priority,
        },
    }


def _resources_of_all(spec: JobSpec, devices: DevicePlan, scope: Scope) -> dict[str, str]:
    """What the queue must have room for before any pod is made."""
    nodes = spec.num_nodes
    return {
        "memory": format_bytes(nodes * budget.memory_budget(spec, scope).total_request),
        **{resource: str(nodes * int(count)) for resource, count in devices.limits.items()},
    }


def _coscheduling(spec: JobSpec) -> Manifest:
    return {
        "apiVersion": f"{COSCHEDULING_GROUP}/v1alpha1",
        "kind": "PodGroup",
        "metadata": metadata(spec, pod_group_name(spec)),
        "spec": {"minMember": spec.num_nodes, "scheduleTimeoutSeconds": spec.limits.gang_wait_s},
    }


def _native(spec: JobSpec, version: str) -> tuple[Manifest, Manifest]:
    """Workload and PodGroup of Kubernetes itself; 1.36 writes two of the fields in another way."""
    is_old = version == "v1alpha2"
    together = spec.spares == 0  # half a synchronous job only holds devices
    policy: Manifest = {
        "schedulingPolicy": {"gang": {"minCount": spec.num_nodes}},
        "disruptionMode": ("PodGroup" if together else "Pod") if is_old else {"all" if together else "single": {}},
        **({} if spec.placement.priority is None else {"priorityClassName": spec.placement.priority}),
    }
    topology = spec.placement.topology
    if topology is not None and topology.mode is TopologyMode.REQUIRED:
        policy["schedulingConstraints"] = {"topology": [{"key": topology.label}]}
    to_job = {"apiGroup": "jobset.x-k8s.io", "kind": "JobSet", "name": spec.name}
    workload = {
        "apiVersion": f"{NATIVE_GROUP}/{version}",
        "kind": "Workload",
        "metadata": metadata(spec, spec.name),
        "spec": {"controllerRef": to_job, "podGroupTemplates": [{"name": WORKER, **policy}]},
    }
    template = (
        {"podGroupTemplateRef": {"workload": {"workloadName": spec.name, "podGroupTemplateName": WORKER}}}
        if is_old
        else {"workloadRef": {"workloadName": spec.name, "templateName": WORKER}}
    )
    group = {
        "apiVersion": f"{NATIVE_GROUP}/{version}",
        "kind": "PodGroup",
        "metadata": metadata(spec, pod_group_name(spec)),
        "spec": {**template, **policy},
    }
    return workload, group
