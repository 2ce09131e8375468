"""Whether a pod may run on a node: selectors, taints, room and neighbours. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ktrain.launcher.cluster import amounts
from ktrain.launcher.cluster.amounts import Amounts
from ktrain.launcher.cluster.shelf import Object

HOST_LABEL = "kubernetes.io/hostname"
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_AFFINITY = "node(s) didn't match Pod's node affinity/selector"


@dataclass(slots=True)
class Room:
    """A node, what is free on it, and the pods that are there or about to be."""

    node: Object
    free: Amounts
    pods: list[Object] = field(default_factory=list)

    @classmethod
    def of(cls, node: Object, pods: Iterable[Object]) -> Room:
        """The node with those pods on it."""
        room = cls(node, amounts.amounts(node.get("status", {}).get("allocatable")))
        for pod in pods:
            room.take(pod)
        return room

    @property
    def name(self) -> str:
        return str(self.node["metadata"]["name"])

    @property
    def labels(self) -> Mapping[str, str]:
        return {HOST_LABEL: self.name, **(self.node["metadata"].get("labels") or {})}

    def take(self, pod: Object) -> None:
        """Puts a pod here."""
        asked = request(pod)
        self.free = {name: amount - asked.get(name, Fraction(0)) for name, amount in self.free.items()}
        self.pods.append(pod)

    def copy(self) -> Room:
        """One that can be filled on trial."""
        return Room(self.node, dict(self.free), list(self.pods))


def request(pod: Object) -> Amounts:
    """What a pod takes of a node, its place among the node's pods included."""
    return {**amounts.of_pod(pod["spec"]), "pods": Fraction(1)}


def obstacles(pod: Object, room: Room, rooms: Sequence[Room]) -> list[str]:
    """Why a pod may not run on a node, in the scheduler's words; nothing where it may."""
    if not _selects(pod["spec"], room):
        return [_AFFINITY]
    taint = next((taint for taint in taints(room.node) if not is_tolerated(pod, taint)), None)
    if taint is not None:
        return [f"node(s) had untolerated taint(s) {{{taint['key']}: {taint.get('value', '')}}}"]
    short = amounts.lacking(request(pod), room.free)
    if short:
        return ["Too many pods" if name == "pods" else f"Insufficient {name}" for name in short]
    return _quarrels(pod, room, rooms)


def taints(node: Object) -> list[Mapping[str, str]]:
    """The taints of a node that keep pods away."""
    spec = node.get("spec", {})
    found = [taint for taint in spec.get("taints") or () if taint["effect"] in ("NoSchedule", "NoExecute")]
    cordoned = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}
    return [*found, *([cordoned] if spec.get("unschedulable") else [])]


def is_tolerated(pod: Object, taint: Mapping[str, str]) -> bool:
    """Whether one of a pod's tolerations allows for a taint."""
    return any(tolerates(item, taint) for item in pod["spec"].get("tolerations") or ())


def tolerates(toleration: Mapping[str, Any], taint: Mapping[str, str]) -> bool:
    """Whether a toleration allows for a taint."""
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("key") not in (None, "", taint["key"]):
        return False
    exists = toleration.get("operator") == "Exists"
    return exists or bool(toleration.get("key")) and (toleration.get("value") or "") == (taint.get("value") or "")


def affinity_terms(pod: Object, kind: str) -> list[Mapping[str, Any]]:
    """The required terms of `podAffinity` or `podAntiAffinity`."""
    return ((pod["spec"].get("affinity") or {}).get(kind) or {}).get(_REQUIRED) or []


def _selects(spec: Mapping[str, Any], room: Room) -> bool:
    labels = room.labels
    if any(labels.get(key) != value for key, value in (spec.get("nodeSelector") or {}).items()):
        return False
    required = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(_REQUIRED)
    if not required:
        return True
    fields = {"metadata.name": room.name}
    return any(
        _all(term.get("matchExpressions"), labels) and _all(term.get("matchFields"), fields)
        for term in required["nodeSelectorTerms"]
    )


def _all(expressions: Iterable[Mapping[str, Any]] | None, labels: Mapping[str, str]) -> bool:
    return all(_holds(expression, labels) for expression in expressions or ())


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(expression["key"]), list(expression.get("values") or ())
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case "Lt":
            return value is not None and int(value) < int(values[0])
    return False


def _quarrels(pod: Object, room: Room, rooms: Sequence[Room]) -> list[str]:
    for term in affinity_terms(pod, "podAffinity"):
        key = term["topologyKey"]
        mates = [other for other in rooms if any(_is_mate(term, pod, item) for item in other.pods)]
        first_of_its_kind = not mates and _is_mate(term, pod, pod)
        near = any(key in room.labels and other.labels.get(key) == room.labels[key] for other in mates)
        if not near and not (first_of_its_kind and key in room.labels):
            return ["node(s) didn't match pod affinity rules"]
    for term in affinity_terms(pod, "podAntiAffinity"):
        if any(_is_mate(term, pod, item) for item in _neighbours(room, rooms, term["topologyKey"])):
            return ["node(s) didn't match pod anti-affinity rules"]
    for item in {id(item): item for other in rooms for item in other.pods}.values():
        for term in affinity_terms(item, "podAntiAffinity"):
            near = any(item is other for other in _neighbours(room, rooms, term["topologyKey"]))
            if near and _is_mate(term, item, pod):
                return ["node(s) didn't satisfy existing pods anti-affinity rules"]
    return []


def _neighbours(room: Room, rooms: Sequence[Room], key: str) -> list[Object]:
    value = room.labels.get(key)
    return [item for other in rooms if value is not None and other.labels.get(key) == value for item in other.pods]


def _is_mate(term: Mapping[str, Any], pod: Object, other: Object) -> bool:
    """Whether a term of a pod speaks of another."""
    namespaces = term.get("namespaces") or [pod["metadata"]["namespace"]]
    selector, labels = term.get("labelSelector"), other["metadata"].get("labels") or {}
    if selector is None or other["metadata"]["namespace"] not in namespaces:
        return False
    own = pod["metadata"].get("labels") or {}
    wanted = {**(selector.get("matchLabels") or {}), **{key: own.get(key) for key in term.get("matchLabelKeys") or ()}}
    return all(labels.get(key) == value for key, value in wanted.items()) and _all(
        selector.get("matchExpressions"), labels
    )
