"""What is known of a cluster, found by asking it and never by its version alone (ADR 0032).

None means everywhere: it could not be told (nobody asked, or the answer was 403). It is neither yes nor no.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ktrain.errors import ConfigError

_MINOR = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """The answers on which rendering depends."""

    version: tuple[int, int] | None = None  # that the server emulates; nothing is decided by it
    served: frozenset[str] | None = None  # "group/version/plural" of every resource
    queues: tuple[str, ...] | None = None  # Kueue's LocalQueues of the namespace
    volcano_queues: tuple[str, ...] | None = None
    queue_levels: tuple[str, ...] | None = None  # node labels of the topology of the queue's flavour
    csi_drivers: tuple[str, ...] | None = None
    node_memory: int | None = None  # bytes that each node lends to the namespace, by its claim; 0 without a bound one
    # Whether a field that was sent in a dry run of the JobSet came back, and every node's kubelet knows it.
    restart_rules: bool | None = None  # restartPolicyRules of a container
    scheduling_group: bool | None = None  # schedulingGroup of a pod
    message_patterns: bool | None = None  # onJobFailureMessagePatterns of a rule
    image_volumes: bool | None = None

    def versions_of(self, group: str, *plurals: str) -> tuple[str, ...] | None:
        """The versions of a group that serve all of these resources; None where nobody was asked."""
        if self.served is None:
            return None
        found = {name.split("/")[1] for name in self.served if name.split("/")[0] == group}
        return tuple(sorted(v for v in found if all(f"{group}/{v}/{plural}" in self.served for plural in plurals)))

    def serves(self, group: str, plural: str) -> bool | None:
        """Whether any version of the group has the resource."""
        versions = self.versions_of(group, plural)
        return None if versions is None else bool(versions)

    def to_value(self) -> dict[str, Any]:
        """As a JSON value; what is not known is left out."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            name: sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value
            for name, value in found.items()
            if value is not None
        }

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> ClusterFacts:
        """The facts of a JSON value.

        Raises:
            ConfigError: a name is unknown, or a value of another type.
        """
        known = {item.name for item in fields(cls)}
        if odd := sorted(set(value) - known):
            raise ConfigError(f"cluster facts: {odd[0]!r} is none; expected some of {', '.join(sorted(known))}")
        return cls(**{name: _checked(name, item) for name, item in value.items()})


_FLAGS = ("restart_rules", "scheduling_group", "message_patterns", "image_volumes")


def _checked(name: str, value: Any) -> Any:
    if name in _FLAGS and isinstance(value, bool):
        return value
    if name == "version" and _is_list(value, int) and len(value) == 2:
        return tuple(value)
    if name == "node_memory" and type(value) is int and value >= 0:
        return value
    if name not in (*_FLAGS, "version", "node_memory") and _is_list(value, str):
        return frozenset(value) if name == "served" else tuple(value)
    raise ConfigError(f"cluster facts: {name}: cannot use {value!r}; see the reference of the launcher for its form")


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, kind) for item in value)


def served_resources(discovery: Mapping[str, Any]) -> frozenset[str]:
    """ "group/version/plural" of every resource in an aggregated discovery document (`APIGroupDiscoveryList`).

    A stale group, which the server could not ask itself, is left out: it would be refused.
    """
    return frozenset(
        f"{group['metadata'].get('name', '')}/{version['version']}/{resource['resource']}"
        for group in discovery["items"]
        for version in group["versions"]
        if version.get("freshness") != "Stale"
        for resource in version.get("resources", ())
    )


def server_version(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor that a server of `/version` answers for: the emulated ones, where it emulates."""
    major = answer.get("emulationMajor") or answer["major"]
    minor = answer.get("emulationMinor") or answer["minor"]
    return int(major), int(_MINOR.findall(minor)[0])  # some providers append a "+"
