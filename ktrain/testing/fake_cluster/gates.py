"""Feature gates: fields that a server knows and drops without a word while their gate is off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ktrain.launcher.cluster.resources import JOB, POD, Resource

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate with the fields that it guards; `on_from` is the minor version in which it is on by default."""

    pod_fields: tuple[str, ...] = ()
    container_fields: tuple[str, ...] = ()
    job_fields: tuple[str, ...] = ()
    on_from: int | None = None


GATES: Mapping[str, Gate] = {
    "GenericWorkload": Gate(pod_fields=("schedulingGroup", "workloadRef")),
    "ContainerRestartRules": Gate(container_fields=("restartPolicyRules",), on_from=35),
    "DynamicResourceAllocation": Gate(pod_fields=("resourceClaims",), on_from=34),
    "WorkloadWithJob": Gate(job_fields=("scheduling",)),
}


def are_on(minor: int, set_by_hand: Mapping[str, bool]) -> frozenset[str]:
    """The gates that are on at a version of Kubernetes, with those that its administrator set."""
    defaults = {name: gate.on_from is not None and minor >= gate.on_from for name, gate in GATES.items()}
    return frozenset(name for name, is_on in {**defaults, **set_by_hand}.items() if is_on)


def drop(resource: Resource, obj: Object, on: frozenset[str]) -> None:
    """Removes from a pod or a Job, in place, the fields whose gates are off."""
    off = [gate for name, gate in GATES.items() if name not in on]
    if resource.storage == JOB.storage:
        for gate in off:
            _pop(obj.get("spec"), gate.job_fields)
    for spec in _pod_specs(resource, obj):
        for gate in off:
            _pop(spec, gate.pod_fields)
            for key in ("initContainers", "containers"):
                for container in spec.get(key) or ():
                    _pop(container, gate.container_fields)


def _pod_specs(resource: Resource, obj: Object) -> Iterator[Object]:
    spec = obj.get("spec") or {}
    if resource.storage == POD.storage:
        yield spec
    elif resource.storage == JOB.storage:
        yield (spec.get("template") or {}).get("spec") or {}


def _pop(obj: Object | None, keys: tuple[str, ...]) -> None:
    for key in keys:
        if obj is not None:
            obj.pop(key, None)
