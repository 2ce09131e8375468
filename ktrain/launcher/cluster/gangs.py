"""Gangs: pods that are placed all at once or not at all, by the group that the pods name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ktrain.errors import NotFoundError
from ktrain.launcher.cluster import job_policy
from ktrain.launcher.cluster.job_pods import PREFIX
from ktrain.launcher.cluster.resources import COSCHEDULING_POD_GROUP, JOB, POD_GROUP, VOLCANO_POD_GROUP, Resource
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store

VOLCANO_GROUP = "scheduling.k8s.io/group-name"
COSCHEDULING_GROUP = "scheduling.x-k8s.io/pod-group"
VOLCANO_SCHEDULER, KAI_SCHEDULER = "volcano", "kai-scheduler"


class Mechanism(Enum):
    """Whose gang it is."""

    NATIVE = "native"
    VOLCANO = "volcano"
    COSCHEDULING = "coscheduling"
    KAI = "kai"


_RESOURCES: Mapping[Mechanism, Resource] = {
    Mechanism.NATIVE: POD_GROUP,
    Mechanism.VOLCANO: VOLCANO_POD_GROUP,
    Mechanism.COSCHEDULING: COSCHEDULING_POD_GROUP,
}


@dataclass(frozen=True, slots=True)
class GangName:
    """The group that a pod belongs to."""

    mechanism: Mechanism
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Gang:
    """A group and the fewest pods that it is placed with. `group` is its object, which KAI's gangs do not need."""

    name: GangName
    least: int
    group: Object | None = None

    @property
    def resource(self) -> Resource | None:
        return _RESOURCES.get(self.name.mechanism)


def name_of(pod: Object) -> GangName | None:
    """The gang of a pod; None for one that is placed alone."""
    metadata, spec = pod["metadata"], pod["spec"]
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    namespace = metadata["namespace"]
    native = (spec.get("schedulingGroup") or {}).get("podGroupName")
    if native:
        return GangName(Mechanism.NATIVE, namespace, native)
    if spec.get("schedulerName") == VOLCANO_SCHEDULER and VOLCANO_GROUP in annotations:
        return GangName(Mechanism.VOLCANO, namespace, annotations[VOLCANO_GROUP])
    if COSCHEDULING_GROUP in labels:
        return GangName(Mechanism.COSCHEDULING, namespace, labels[COSCHEDULING_GROUP])
    if spec.get("schedulerName") == KAI_SCHEDULER and f"{PREFIX}job-name" in labels:
        return GangName(Mechanism.KAI, namespace, labels[f"{PREFIX}job-name"])
    return None


def find(store: Store, name: GangName) -> Gang | None:
    """The gang of that name; None where its group is not there, whose pods then wait."""
    try:
        if name.mechanism is Mechanism.KAI:
            job = store.get(JOB, name.namespace, name.name)
            return Gang(name, job_policy.parallelism(job["spec"]))
        group = store.get(_RESOURCES[name.mechanism], name.namespace, name.name)
    except NotFoundError:
        return None
    if name.mechanism is Mechanism.NATIVE:
        policy = group["spec"].get("schedulingPolicy") or {}
        return Gang(name, int((policy.get("gang") or {}).get("minCount") or 1), group)
    return Gang(name, int(group["spec"].get("minMember") or 1), group)
