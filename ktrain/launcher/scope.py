"""What the memory tier's volume belongs to, chosen from what the cluster has (ADR 0045). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ktrain.base import contract
from ktrain.errors import ConfigError
from ktrain.launcher import budget
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.quantity import show_bytes
from ktrain.launcher.spec import JobSpec, Scope

MTC_DRIVER = "multitier-checkpoint.csi.storage.gke.io"


@dataclass(frozen=True, slots=True)
class ChosenScope:
    """The scope of one job, and why."""

    scope: Scope  # never AUTO
    reason: str

    @property
    def outlives_pods(self) -> bool:
        """Whether a new pod on the same node finds what the one before it left."""
        return self.scope is not Scope.POD


def choose_scope(spec: JobSpec, facts: ClusterFacts) -> ChosenScope:
    """The scope that was asked for; `auto` takes the node's memory where it is surely there.

    Raises:
        ConfigError: the cluster surely lacks what was asked for; the message says what.
    """
    wanted = spec.memory.scope
    lacks = {Scope.NODE: _node_lacks(spec, facts), Scope.MTC: _driver_lacks(facts)}
    if wanted is Scope.AUTO:
        return _best(facts, lacks)
    lack = lacks.get(wanted)
    if lack is not None:
        raise ConfigError(f"memory.scope {wanted.value!r}: {lack}; use 'pod'")
    return ChosenScope(wanted, "asked for")


def _best(facts: ClusterFacts, lacks: dict[Scope, str | None]) -> ChosenScope:
    """Only what is known to be there: what is not known is no reason to rely on it."""
    if facts.node_memory is not None and lacks[Scope.NODE] is None:
        return ChosenScope(Scope.NODE, f"nodes lend {show_bytes(facts.node_memory)} to the namespace")
    if facts.csi_drivers is not None and lacks[Scope.MTC] is None:
        return ChosenScope(Scope.MTC, f"the cluster has the driver {MTC_DRIVER}")
    told = "it is not known whether nodes lend memory" if facts.node_memory is None else lacks[Scope.NODE]
    return ChosenScope(Scope.POD, str(told))


def _node_lacks(spec: JobSpec, facts: ClusterFacts) -> str | None:
    if facts.node_memory is None:
        return None
    if facts.node_memory == 0:
        return (
            f"namespace {spec.namespace} has no bound claim {contract.MEMORY_CLAIM!r}; an administrator installs the "
            "node agent and the claim (launch/cluster)"
        )
    needed = budget.memory_budget(spec).volume
    if needed > facts.node_memory:
        return f"a node's part needs {show_bytes(needed)}, and each node lends {show_bytes(facts.node_memory)}"
    return None


def _driver_lacks(facts: ClusterFacts) -> str | None:
    if facts.csi_drivers is None or MTC_DRIVER in facts.csi_drivers:
        return None
    return f"the cluster has no driver {MTC_DRIVER}"
