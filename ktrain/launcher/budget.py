"""What the memory tier and the end of a pod need, in bytes and seconds, computed before anything starts. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ktrain.launcher import accelerators
from ktrain.launcher.quantity import GIB, MIB
from ktrain.launcher.spec import JobSpec, Memory, Scope, Spot

_DRAIN_SLOTS = 1  # read by the drain while the next save is written
_SLOTS_PER_REPLICA = 2  # the committed one, and the one that arrives
_MARGIN = 0.02  # headers, manifests, alignment
_IN_FLIGHT = 384 * MIB  # Ray's store: three times the pieces in flight (ADR 0005)
_AGENT_OWN = 1536 * MIB  # agent, its Ray child and raylet
_GRACE_LEAST_S, _GRACE_MOST_S = 30, 3600
_GRACE_FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of one node."""

    own: int  # slots of its own ranks, written by the trainer
    kept: int  # slots of other nodes' ranks, written by the agent
    in_flight: int
    trainer: int  # what the script may use
    shm: int
    is_lent: bool = False  # the volume's memory is requested by the node's agent, which lends it

    @property
    def volume(self) -> int:
        """Size limit of the memory tier's volume."""
        return self.own + self.kept

    @property
    def trainer_limit(self) -> int:
        """Pages of a memory-backed volume are charged to the container that wrote them."""
        return self.trainer + self.own + self.shm

    @property
    def trainer_request(self) -> int:
        """What is lent is not requested a second time."""
        return self.trainer_limit - (self.own if self.is_lent else 0)

    @property
    def agent_limit(self) -> int:
        return _AGENT_OWN + self.kept + self.in_flight

    @property
    def agent_request(self) -> int:
        return self.agent_limit - (self.kept if self.is_lent else 0)

    @property
    def total(self) -> int:
        return self.trainer_limit + self.agent_limit

    @property
    def total_request(self) -> int:
        """What the scheduler has to find on the node."""
        return self.trainer_request + self.agent_request


def num_replicas(spec: JobSpec) -> int:
    """Copies that other nodes keep: never more than there are other failure domains."""
    domains = spec.tpus.num_slices if spec.tpus is not None else spec.num_nodes
    return min(spec.memory.replicas, domains - 1)


def memory_budget(spec: JobSpec, scope: Scope = Scope.POD) -> MemoryBudget:
    """What one node's memory has to hold. `scope` is the one that was chosen."""
    replicas = num_replicas(spec)
    own, kept = _slots_bytes(spec.memory, replicas)
    return MemoryBudget(
        own=own,
        kept=kept,
        in_flight=_IN_FLIGHT if replicas else 0,
        trainer=spec.resources.memory or 16 * GIB * spec.num_workers,
        shm=spec.resources.shm,
        is_lent=scope is Scope.NODE,
    )


def volume_bytes(memory: Memory, num_nodes: int) -> int:
    """Bytes of the memory tier's volume of one of so many nodes."""
    return sum(_slots_bytes(memory, min(memory.replicas, num_nodes - 1)))


def _slots_bytes(memory: Memory, replicas: int) -> tuple[int, int]:
    """Slots of a node's own ranks, and those that it keeps for others."""
    slot = math.ceil(memory.state * (1 + _MARGIN))
    return _round_up((memory.slots + _DRAIN_SLOTS) * slot), _round_up(_SLOTS_PER_REPLICA * replicas * slot)


def grace_s(spec: JobSpec) -> int:
    """From SIGTERM to SIGKILL: one and a half times a flush to the bucket, no longer than the provider's notice."""
    flush_s = spec.memory.state / spec.saving.bucket_bytes_per_s
    wanted = min(max(_GRACE_LEAST_S, math.ceil(_GRACE_FACTOR * flush_s)), _GRACE_MOST_S)
    if spec.placement.spot is Spot.NONE or spec.placement.provider is None:
        return wanted
    return min(wanted, accelerators.find_provider(spec.placement.provider).notice_s)


def bucket_bytes(spec: JobSpec) -> int:
    """What the checkpoints that stay in the bucket take, with the one that is being written."""
    return (spec.saving.keep + 1) * spec.memory.state * spec.num_nodes


def _round_up(size: int) -> int:
    return -(-size // MIB) * MIB
