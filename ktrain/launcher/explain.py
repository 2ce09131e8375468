"""The recovery plan, told before the launch: for each kind of failure the tier it is mended from, and what that costs.

What is computed rests on the job's own numbers and on rates and times that are assumed here and said in the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from ktrain.base import contract
from ktrain.base.contract import TIER_BUCKET, TIER_MEMORY, TIER_PEER
from ktrain.base.settings import Timeouts
from ktrain.launcher import budget
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render.devices import COMPUTE_DOMAIN_GROUP
from ktrain.launcher.render.job import Rendered
from ktrain.launcher.spec import GangKind, JobSpec

MEMORY_BYTES_PER_S = 5e9  # from a slot of the own volume into the tensors
PEER_BYTES_PER_S = 0.7e9  # over Ray (ADR 0005)
WORKERS_START_S = 20.0  # import of torch, process groups
POD_START_S = 60.0  # scheduling and an image that is there
NODE_SEEN_S = 50.0  # Kubernetes' default until a silent node is tainted
TOLERATED_S = 30.0  # what the rendered pods tolerate
GANG_SCHEDULER = "a gang scheduler"  # as a feature that may be missing
JOB_BACK_OFF_S = 10.0  # of the Job controller, for every pod that failed


class Level(StrEnum):
    """What is started again; the smallest first."""

    NONE = "nothing"
    PROCESSES = "L0: worker processes"
    CONTAINER = "L1: one container"
    POD = "L2: one pod"
    ALL_PODS = "L3: all pods"
    QUEUE = "L4: all pods, after the queue"


@dataclass(frozen=True, slots=True)
class Recovery:
    """One kind of failure."""

    failure: str
    restart: Level
    tier: str | None  # None: nothing is restored
    steps_lost: int | None  # at most; None: depends on the time of a step, which is not known
    seconds: float | None  # until the job is where it was; None for the same reason
    note: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """A feature of the cluster that would make it better."""

    feature: str
    is_known: bool  # False: nobody could tell whether it is there
    cost: str
    is_extra: bool = False  # more than the job asks for


@dataclass(frozen=True, slots=True)
class Plan:
    """What `--explain` shows."""

    gang: str
    scope: str  # of the memory tier, and why
    recoveries: tuple[Recovery, ...]
    memory: budget.MemoryBudget
    replicas: int
    grace_s: int
    bucket_bytes: int
    missing: tuple[Missing, ...]
    assumed: tuple[str, ...]


def explain(spec: JobSpec, facts: ClusterFacts, rendered: Rendered) -> Plan:
    """The plan of a job that was rendered with these facts. Pure."""
    return Plan(
        gang=f"{rendered.gang.kind.value}: {rendered.gang.reason}",
        scope=f"{rendered.scope.scope.value}: {rendered.scope.reason}",
        recoveries=_recoveries(_Costs(spec), facts, keeps=rendered.scope.outlives_pods),
        memory=budget.memory_budget(spec, rendered.scope.scope),
        replicas=budget.num_replicas(spec),
        grace_s=budget.grace_s(spec),
        bucket_bytes=budget.bucket_bytes(spec),
        missing=tuple(_missing(spec, facts, rendered)),
        assumed=_assumed(spec),
    )


class _Costs:
    """The arithmetic: steps and seconds of a restore from a tier."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.timeouts = Timeouts(spec.limits.patience_s)
        self.has_peers = budget.num_replicas(spec) > 0
        self._rates = {
            TIER_MEMORY: MEMORY_BYTES_PER_S,
            TIER_PEER: PEER_BYTES_PER_S,
            TIER_BUCKET: float(spec.saving.bucket_bytes_per_s),
        }

    @property
    def farther(self) -> str:
        """The nearest tier without the node's own memory."""
        return TIER_PEER if self.has_peers else TIER_BUCKET

    def load_s(self, tier: str) -> float:
        return self.spec.memory.state / self._rates[tier]

    def steps(self, tier: str) -> int | None:
        """At most so many: a snapshot is sealed in the step after its own, and a farther tier has what moved since."""
        sealed = self.spec.saving.every + 1
        if tier == TIER_MEMORY:
            return sealed
        if self.spec.saving.step_s is None:
            return None
        transfers = 1 if tier == TIER_PEER else 2  # the bucket's drain begins when the one before has ended
        return sealed + math.ceil(transfers * self.load_s(tier) / self.spec.saving.step_s)

    def recovery(self, failure: str, restart: Level, tier: str, before_s: float, *, note: str = "") -> Recovery:
        """`before_s` is the time until workers can be started."""
        lost = self.steps(tier)
        seconds = None
        if lost is not None and self.spec.saving.step_s is not None:
            seconds = before_s + WORKERS_START_S + self.load_s(tier) + lost * self.spec.saving.step_s
        return Recovery(failure, restart, tier, lost, seconds, note)


def _recoveries(costs: _Costs, facts: ClusterFacts, *, keeps: bool) -> tuple[Recovery, ...]:
    timeouts, spec = costs.timeouts, costs.spec
    replaced_s = JOB_BACK_OFF_S + POD_START_S
    far = costs.farther
    spare = spec.spares > 0
    gone_s = timeouts.lease_s if spare else NODE_SEEN_S + TOLERATED_S + replaced_s
    found = [
        costs.recovery("a worker process dies", Level.PROCESSES, TIER_MEMORY, 1.0),
        costs.recovery("a worker hangs", Level.PROCESSES, TIER_MEMORY, timeouts.step_s),
        costs.recovery(
            "the trainer's container ends (out of memory)",
            Level.CONTAINER,
            TIER_MEMORY,
            JOB_BACK_OFF_S,
            note="the kubelet waits longer from the second time on, up to 300 s",
        ),
        Recovery("an agent or the head ends", Level.NONE, None, 0, 0.0, "training goes on; saves wait for it"),
        costs.recovery("a pod is deleted or evicted", Level.POD, TIER_MEMORY if keeps else far, replaced_s),
        costs.recovery(
            "a TPU slice is lost" if spec.tpus is not None else "a node is lost",
            Level.POD,
            far,
            gone_s,
            note="a spare takes its place" if spare else "another node takes its place as soon as the cluster has one",
        ),
        _suspected(costs, facts, 1.0 if spare else replaced_s),
        _everything(costs, "all pods are made anew", Level.ALL_PODS, keeps=keeps),
        _everything(costs, "the job is preempted", Level.QUEUE, keeps=keeps),
        costs.recovery(
            "the cluster is lost", Level.QUEUE, TIER_BUCKET, POD_START_S, note="submit the same job to another one"
        ),
    ]
    return tuple(found)


def _suspected(costs: _Costs, facts: ClusterFacts, replaced_s: float) -> Recovery:
    failure = "a node is suspected (a broken device, failures one after another)"
    if costs.spec.spares:
        return costs.recovery(failure, Level.POD, costs.farther, replaced_s, note="a spare takes its place")
    if facts.restart_rules:
        return costs.recovery(failure, Level.POD, costs.farther, replaced_s)
    note = "the kubelet starts its container again on the same node"
    return costs.recovery(failure, Level.CONTAINER, TIER_MEMORY, JOB_BACK_OFF_S, note=note)


def _everything(costs: _Costs, failure: str, level: Level, *, keeps: bool) -> Recovery:
    """Everything in pods is gone; what a node keeps is found again only by a pod that returns to it."""
    if keeps:
        return costs.recovery(
            failure,
            level,
            TIER_MEMORY,
            POD_START_S,
            note="where each pod comes to its node again; else from the bucket",
        )
    return costs.recovery(failure, level, TIER_BUCKET, POD_START_S, note="what is not in the bucket by then is lost")


def _missing(spec: JobSpec, facts: ClusterFacts, rendered: Rendered) -> list[Missing]:
    found = []
    if not facts.restart_rules:
        cost = "a suspected node is not left: its container starts again there"
        found.append(Missing("restartPolicyRules of containers", facts.restart_rules is not None, cost))
    if not facts.message_patterns:
        cost = f"a disruption of all pods counts as one of the {spec.limits.max_restarts} restarts"
        found.append(Missing("onJobFailureMessagePatterns of JobSet", facts.message_patterns is not None, cost))
    if rendered.gang.kind is GangKind.BARRIER and spec.num_nodes > 1:
        cost = rendered.gang.warning or "pods are scheduled one by one and meet at the head"
        found.append(Missing(GANG_SCHEDULER, facts.served is not None, cost))
    if not rendered.scope.outlives_pods:
        found.append(_memory_of_nodes(spec, facts))
    topology = spec.placement.topology
    levels = facts.queue_levels
    if (
        rendered.gang.kind is GangKind.KUEUE
        and topology is not None
        and levels is not None
        and topology.label not in levels
    ):
        cost = f"pods are not kept in one domain: the queue's topology has {', '.join(levels) or 'no level'}"
        found.append(Missing(f"level {topology.label} of the queue's topology", True, cost))
    wants_domain = any(devices.model.compute_domain for devices in spec.devices) and spec.num_nodes > 1
    if wants_domain and facts.serves(COMPUTE_DOMAIN_GROUP, "computedomains") is False:
        found.append(Missing("ComputeDomain", True, "links between nodes are not used: traffic goes over the network"))
    if spec.memory.replicas > budget.num_replicas(spec):
        domains = "slice" if spec.tpus is not None else "node"
        cost = f"{budget.num_replicas(spec)} of {spec.memory.replicas} copies are kept by peers"
        found.append(Missing(f"another {domains}", True, cost))
    return found


def _memory_of_nodes(spec: JobSpec, facts: ClusterFacts) -> Missing:
    """What it would be better for: the failures that are mended from a nearer tier where a node keeps the volume."""
    costs = _Costs(spec)
    either = zip(_recoveries(costs, facts, keeps=False), _recoveries(costs, facts, keeps=True), strict=True)
    better = [pod.failure for pod, node in either if pod.tier != node.tier]
    if facts.node_memory:
        feature = "use of the memory that nodes lend (--memory-scope node)"
    else:
        feature = f"memory that nodes lend (claim {contract.MEMORY_CLAIM})"
    cost = f"not mended from the node's own memory: {', '.join(better)}"
    return Missing(feature, facts.node_memory is not None, cost, is_extra=True)


def _assumed(spec: JobSpec) -> tuple[str, ...]:
    """What the figures rest on besides the job's own numbers."""
    rate = spec.saving.bucket_bytes_per_s / 1e9
    step = "not known: give saving.step_s" if spec.saving.step_s is None else f"{spec.saving.step_s:g} s"
    return (
        f"GB/s of a node: memory {MEMORY_BYTES_PER_S / 1e9:g}, peers {PEER_BYTES_PER_S / 1e9:g}, bucket {rate:.2g}",
        f"a step {step}, a snapshot every {spec.saving.every} steps",
        f"workers start in {WORKERS_START_S:g} s, a pod in {POD_START_S:g} s, a silent node is tainted after "
        f"{NODE_SEEN_S:g} s",
    )
