"""What an API server fills into the core objects that a launcher writes: the fields that the recordings show."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from ktrain.launcher.cluster.resources import (
    JOB,
    NAMESPACE,
    POD,
    POD_DISRUPTION_BUDGET,
    POD_GROUP,
    RESOURCE_CLAIM_TEMPLATE,
    SECRET,
    SERVICE,
    Resource,
)

Object = dict[str, Any]

MAX_INT32 = 2**31 - 1
_PROBES = ("startupProbe", "livenessProbe", "readinessProbe")
_PROBE = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
_GATED = "Scheduling is blocked due to non-empty scheduling gates"
_QOS_RESOURCES = ("cpu", "memory")
_LOST_NODE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def complete(resource: Resource, obj: Object, *, toleration_s: int = 300) -> None:
    """Fills what is missing in a new object of a core kind, in place; other kinds stay as they are.

    `toleration_s` is how long a pod stays on a node that is lost, unless it says so itself.
    """
    if resource.storage == POD.storage:
        _complete_pod(obj, toleration_s)
    elif resource.storage in _COMPLETE:
        _COMPLETE[resource.storage](obj)
    if resource == POD_GROUP:
        _fill(obj["spec"], disruptionMode="Pod")  # later versions of the group write it as an object


def complete_pod_spec(spec: Object) -> None:
    """Fills what is missing in the pod spec of a pod or of a core kind's pod template, in place."""
    for key in ("initContainers", "containers"):
        for container in spec.get(key) or []:
            _complete_container(container)
    for volume in spec.get("volumes") or []:
        for source in ("configMap", "secret", "downwardAPI", "projected"):
            if source in volume:
                volume[source].setdefault("defaultMode", 0o644)
    _fill(
        spec,
        restartPolicy="Always",
        terminationGracePeriodSeconds=30,
        dnsPolicy="ClusterFirst",
        securityContext={},
        schedulerName="default-scheduler",
    )


def _fill(obj: Object, **defaults: Any) -> None:
    for key, value in defaults.items():
        if obj.get(key) is None:
            obj[key] = value


def _complete_container(container: Object) -> None:
    _, _, tag = container.get("image", "").rpartition("/")[2].partition(":")
    pinned = "@" in container.get("image", "") or tag not in ("", "latest")
    _fill(
        container,
        resources={},
        terminationMessagePath="/dev/termination-log",
        terminationMessagePolicy="File",
        imagePullPolicy="IfNotPresent" if pinned else "Always",
    )
    limits = container["resources"].get("limits") or {}
    if limits:
        container["resources"]["requests"] = {**limits, **(container["resources"].get("requests") or {})}
    for port in container.get("ports") or []:
        _fill(port, protocol="TCP")
    for variable in container.get("env") or []:
        if "fieldRef" in (variable.get("valueFrom") or {}):
            _fill(variable["valueFrom"]["fieldRef"], apiVersion="v1")
    for probe in (container[name] for name in _PROBES if container.get(name)):
        _fill(probe, **_PROBE)


def _complete_pod(pod: Object, toleration_s: int) -> None:
    spec = pod.setdefault("spec", {})
    complete_pod_spec(spec)
    _fill(spec, priority=0, enableServiceLinks=True, preemptionPolicy="PreemptLowerPriority", tolerations=[])
    for key in _LOST_NODE:
        if not any(_tolerates(toleration, key) for toleration in spec["tolerations"]):
            stay = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": toleration_s}
            spec["tolerations"].append({"key": key, **stay})
    _fill(pod, status={})
    _fill(pod["status"], phase="Pending", qosClass=_qos_class(spec))
    if spec.get("schedulingGates"):
        gated = {"type": "PodScheduled", "status": "False", "lastProbeTime": None}
        gated |= {"lastTransitionTime": pod["metadata"]["creationTimestamp"], "reason": "SchedulingGated"}
        _fill(pod["status"], conditions=[{**gated, "message": _GATED}])


def _tolerates(toleration: Object, key: str) -> bool:
    return bool(toleration.get("key", key) == key and toleration.get("effect", "NoExecute") == "NoExecute")


def _qos_class(spec: Object) -> str:
    containers = [*spec.get("initContainers", []), *spec.get("containers", [])]
    bounds = [(_of_qos(each, "limits"), _of_qos(each, "requests")) for each in containers]
    if not any(limits or requests for limits, requests in bounds):
        return "BestEffort"
    fixed = all(len(limits) == len(_QOS_RESOURCES) and limits == requests for limits, requests in bounds)
    return "Guaranteed" if fixed else "Burstable"


def _of_qos(container: Object, bound: str) -> Object:
    """The bounds of the resources that count for the class of a pod."""
    found = (container.get("resources") or {}).get(bound) or {}
    return {name: value for name, value in found.items() if name in _QOS_RESOURCES}


def _complete_job(job: Object) -> None:
    spec = job.setdefault("spec", {})
    if spec.get("completions") is None and spec.get("parallelism") is None:
        spec["completions"] = 1
    per_index = spec.get("backoffLimitPerIndex") is not None
    _fill(
        spec,
        parallelism=1,
        backoffLimit=MAX_INT32 if per_index else 6,
        completionMode="NonIndexed",
        suspend=False,
        manualSelector=False,
        podReplacementPolicy="Failed" if spec.get("podFailurePolicy") else "TerminatingOrFailed",
    )
    for rule in (spec.get("podFailurePolicy") or {}).get("rules") or []:
        for condition in rule.get("onPodConditions") or []:
            _fill(condition, status="True")
    template = spec.setdefault("template", {})
    complete_pod_spec(template.setdefault("spec", {}))
    if not spec["manualSelector"]:
        _select_own_pods(job, template)
    _fill(job, status={})


def _select_own_pods(job: Object, template: Object) -> None:
    uid, name = job["metadata"]["uid"], job["metadata"]["name"]
    labels = {"batch.kubernetes.io/controller-uid": uid, "batch.kubernetes.io/job-name": name}
    labels |= {"controller-uid": uid, "job-name": name}
    metadata = template.setdefault("metadata", {})
    metadata["labels"] = {**(metadata.get("labels") or {}), **labels}
    if not job["metadata"].get("labels"):
        job["metadata"]["labels"] = dict(labels)
    job["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}


def _complete_secret(secret: Object) -> None:
    texts = secret.pop("stringData", None) or {}
    if texts:
        data = {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()}
        secret["data"] = {**(secret.get("data") or {}), **data}
    _fill(secret, type="Opaque")


def _complete_service(service: Object) -> None:
    spec = service.setdefault("spec", {})
    for port in spec.get("ports") or []:
        _fill(port, protocol="TCP", targetPort=port.get("port"))
    _fill(spec, type="ClusterIP", sessionAffinity="None", internalTrafficPolicy="Cluster")
    _fill(service, status={"loadBalancer": {}})


def _complete_namespace(namespace: Object) -> None:
    metadata = namespace["metadata"]
    metadata["labels"] = {**(metadata.get("labels") or {}), "kubernetes.io/metadata.name": metadata["name"]}
    _fill(namespace, spec={"finalizers": ["kubernetes"]}, status={"phase": "Active"})


def _complete_budget(budget: Object) -> None:
    none = {"disruptionsAllowed": 0, "currentHealthy": 0, "desiredHealthy": 0, "expectedPods": 0}
    _fill(budget, status=none)


def _complete_pod_group(group: Object) -> None:
    _fill(group, status={})


def _complete_claim_template(template: Object) -> None:
    _fill(template.setdefault("spec", {}), metadata={})


_COMPLETE: dict[tuple[str, str], Callable[[Object], None]] = {
    JOB.storage: _complete_job,
    SECRET.storage: _complete_secret,
    SERVICE.storage: _complete_service,
    NAMESPACE.storage: _complete_namespace,
    POD_DISRUPTION_BUDGET.storage: _complete_budget,
    POD_GROUP.storage: _complete_pod_group,
    RESOURCE_CLAIM_TEMPLATE.storage: _complete_claim_template,
}
