"""How the pods of a job are admitted whole or not at all, chosen from what the cluster has (ADR 0032). Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ktrain.errors import ConfigError
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.spec import GangKind, JobSpec

KUEUE_GROUP = "kueue.x-k8s.io"
NATIVE_GROUP = "scheduling.k8s.io"
VOLCANO_GROUP = "scheduling.volcano.sh"
KAI_GROUP = "scheduling.run.ai"
COSCHEDULING_GROUP = "scheduling.x-k8s.io"
_NATIVE_VERSIONS = ("v1beta1", "v1alpha3", "v1alpha2")  # the wanted one first; 1.35's v1alpha1 is another thing


@dataclass(frozen=True, slots=True)
class Gang:
    """The mechanism of one job, and why it was chosen."""

    kind: GangKind  # never AUTO
    reason: str
    queue: str | None = None
    native_version: str | None = None  # of Workload and PodGroup, also where they stand beside Kueue
    warning: str | None = None


def choose(spec: JobSpec, facts: ClusterFacts) -> Gang:
    """The mechanism that was asked for, else the first that the cluster shows.

    Raises:
        ConfigError: the one that was asked for cannot work here; the message names what is missing.
    """
    wanted = spec.placement.gang
    if wanted is GangKind.BARRIER:
        return Gang(GangKind.BARRIER, "asked for")
    if wanted is not GangKind.AUTO:
        found = _CHOICES[wanted](spec, facts, True)
        if isinstance(found, str):
            raise ConfigError(f"--gang {wanted.value}: {found}")
        return found
    for try_it in _CHOICES.values():
        found = try_it(spec, facts, False)
        if isinstance(found, Gang):
            return found
    return _barrier(spec, facts)


# Each gives its gang, or what it lacks. One that was asked for is tried also where nobody knows what the cluster has.


def _kueue(spec: JobSpec, facts: ClusterFacts, asked: bool) -> Gang | str:
    if not _has(facts, KUEUE_GROUP, "localqueues", asked):
        return f"the cluster does not serve {KUEUE_GROUP}; install Kueue or choose another"
    queue = spec.placement.queue or _only(facts.queues)
    if queue is None:
        return f"no LocalQueue is named, and {_known(facts.queues)}; name one with --queue"
    if facts.queues is not None and queue not in facts.queues:
        return f"the namespace has no LocalQueue {queue!r}; {_known(facts.queues)}"
    native = _native(spec, facts, False)
    version = native.native_version if isinstance(native, Gang) else None
    beside = "" if version is None else f", and {NATIVE_GROUP}/{version} places the pods"
    return Gang(GangKind.KUEUE, f"Kueue's LocalQueue {queue!r}{beside}", queue=queue, native_version=version)


def _native(spec: JobSpec, facts: ClusterFacts, asked: bool) -> Gang | str:
    del spec, asked  # what to write depends on the version that is served: it has to be known
    versions = facts.versions_of(NATIVE_GROUP, "workloads", "podgroups")
    if versions is None:
        return f"it is not known which version of {NATIVE_GROUP} is served; ask the cluster, and give --facts"
    version = next((name for name in _NATIVE_VERSIONS if name in versions), None)
    if version is None:
        return f"no version of {NATIVE_GROUP} serves workloads and podgroups; Kubernetes 1.36 has them where enabled"
    if not facts.scheduling_group:
        said = "drops" if facts.scheduling_group is False else "was not seen to keep"
        return (
            f"the cluster {said} schedulingGroup of a JobSet's pods; it takes JobSet 0.12 and the gate GenericWorkload"
        )
    reason = f"{NATIVE_GROUP}/{version} serves workloads and podgroups, and a dry run kept schedulingGroup"
    return Gang(GangKind.NATIVE, reason, native_version=version)


def _volcano(spec: JobSpec, facts: ClusterFacts, asked: bool) -> Gang | str:
    if not _has(facts, VOLCANO_GROUP, "podgroups", asked):
        return f"the cluster does not serve {VOLCANO_GROUP}; install Volcano or choose another"
    queue = spec.placement.queue or _only(facts.volcano_queues) or ("default" if asked else None)
    if queue is None:
        return f"no queue is named, and {_known(facts.volcano_queues)}; name one with --queue"
    if facts.volcano_queues is not None and queue not in facts.volcano_queues:
        return f"there is no queue {queue!r}; {_known(facts.volcano_queues)}"
    return Gang(GangKind.VOLCANO, f"Volcano's queue {queue!r}", queue=queue)


def _kai(spec: JobSpec, facts: ClusterFacts, asked: bool) -> Gang | str:
    if not _has(facts, KAI_GROUP, "podgroups", asked):
        return f"the cluster does not serve {KAI_GROUP}; install KAI or choose another"
    queue = spec.placement.queue
    if queue is None:
        return "it takes a queue; name one with --queue"
    return Gang(GangKind.KAI, f"KAI's queue {queue!r}", queue=queue)


def _coscheduling(spec: JobSpec, facts: ClusterFacts, asked: bool) -> Gang | str:
    if not _has(facts, COSCHEDULING_GROUP, "podgroups", asked):
        return f"the cluster does not serve {COSCHEDULING_GROUP}; choose another"
    scheduler = spec.placement.scheduler
    if scheduler is None:
        return "no served API tells which scheduler runs the plugin; name it: --set placement.scheduler=NAME"
    return Gang(GangKind.COSCHEDULING, f"the scheduler {scheduler!r} was named")


def _barrier(spec: JobSpec, facts: ClusterFacts) -> Gang:
    if spec.num_nodes == 1:
        return Gang(GangKind.BARRIER, "one node needs no gang")
    reason = "no gang scheduler was found" if facts.served is not None else "it is not known what the cluster has"
    return Gang(
        GangKind.BARRIER,
        reason,
        warning=f"{reason}: pods are scheduled one by one, meet at the head, and give their nodes back after "
        f"{spec.limits.gang_wait_s} s; two jobs can hold each other's nodes until then",
    )


def _has(facts: ClusterFacts, group: str, plural: str, asked: bool) -> bool:
    serves = facts.serves(group, plural)
    return asked if serves is None else serves


def _only(queues: tuple[str, ...] | None) -> str | None:
    """The queue that is meant where none is named: the only one, or the one called `default`."""
    if queues is None:
        return None
    return queues[0] if len(queues) == 1 else "default" if "default" in queues else None


def _known(queues: tuple[str, ...] | None) -> str:
    return "its queues could not be listed" if queues is None else f"it has {', '.join(queues) or 'none'}"


_CHOICES: dict[GangKind, Callable[[JobSpec, ClusterFacts, bool], Gang | str]] = {
    GangKind.KUEUE: _kueue,
    GangKind.NATIVE: _native,
    GangKind.VOLCANO: _volcano,
    GangKind.KAI: _kai,
    GangKind.COSCHEDULING: _coscheduling,
}  # the wanted one first
