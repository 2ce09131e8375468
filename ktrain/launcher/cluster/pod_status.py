"""What a kubelet says of a pod: phase, conditions and container statuses, in its words."""

from __future__ import annotations

from ktrain.launcher.cluster.conditions import Conditions, set_condition
from ktrain.launcher.cluster.containers import Kind
from ktrain.launcher.cluster.pod_run import PodRun, Stage
from ktrain.launcher.cluster.shelf import Object


def render(run: PodRun, old: Object, *, now: str, pod_ip: str, host_ip: str) -> Object:
    """The status of a pod that runs here, from the one that was written last."""
    phase = run.phase()
    found: Object = {**old, "phase": phase, "startTime": old.get("startTime") or now}
    found["conditions"] = _conditions(run, phase, list(old.get("conditions") or ()), now)
    if run.reason:
        found["reason"] = run.reason
        found["message"] = run.message
    found.update(hostIP=host_ip, hostIPs=[{"ip": host_ip}], podIP=pod_ip, podIPs=[{"ip": pod_ip}])
    inits = run.of(Kind.INIT, Kind.SIDECAR)
    if inits:
        found["initContainerStatuses"] = [container.status() for container in inits]
    found["containerStatuses"] = [container.status() for container in run.of(Kind.MAIN)]
    found.setdefault("qosClass", _quality(run.pod["spec"]))
    return found


def _conditions(run: PodRun, phase: str, conditions: Conditions, now: str) -> Conditions:
    over = run.stage is Stage.ENDED
    completed = "PodCompleted" if phase == "Succeeded" else ""
    counted = [*run.of(Kind.MAIN), *run.of(Kind.SIDECAR)]
    unready = [container.name for container in counted if not container.ready]
    new: Conditions = []
    old = {item["type"]: item for item in conditions}

    def put(kind: str, holds: bool, reason: str = "", message: str = "") -> None:
        kept = [old[kind]] if kind in old else []
        set_condition(kept, now, kind, "True" if holds else "False", reason, message)
        new.extend(kept)

    put("PodReadyToStartContainers", not over)
    incomplete = [init.name for init in run.of(Kind.INIT, Kind.SIDECAR) if not init.ready]
    if run.initialised or over:
        put("Initialized", True, completed)
    else:
        put(
            "Initialized",
            False,
            "ContainersNotInitialized",
            f"containers with incomplete status: [{' '.join(incomplete)}]",
        )
    for kind in ("Ready", "ContainersReady"):
        if over:
            put(kind, False, completed or "PodFailed")
        elif unready:
            put(kind, False, "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]")
        else:
            put(kind, True)
    known = {item["type"] for item in new}
    return [*new, *(item for item in conditions if item["type"] not in known)]


def _quality(spec: Object) -> str:
    """The quality-of-service class that follows from requests and limits."""
    containers = [*spec["containers"], *(spec.get("initContainers") or ())]
    resources = [container.get("resources") or {} for container in containers]
    if not any(item.get("requests") or item.get("limits") for item in resources):
        return "BestEffort"
    for item in resources:
        limits, requests = item.get("limits") or {}, item.get("requests") or {}
        if any(
            limits.get(name) is None or requests.get(name, limits[name]) != limits[name] for name in ("cpu", "memory")
        ):
            return "Burstable"
    return "Guaranteed"
