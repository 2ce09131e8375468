"""Whether a queue has room for a workload: flavors, quotas and who would have to give way. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ktrain.launcher import quantity
from ktrain.launcher.cluster import amounts
from ktrain.launcher.cluster.amounts import Amounts
from ktrain.launcher.cluster.shelf import Object

Usage = dict[tuple[str, str], Fraction]  # (flavor, resource) -> amount


@dataclass(frozen=True, slots=True)
class Assignment:
    """A place in a queue: for each pod set the flavor of each resource. `why_not` is set where there is none."""

    flavors: Mapping[str, Mapping[str, str]]
    why_not: str = ""
    hopeless: bool = False  # it would not fit into the empty queue either


def requests(workload: Object) -> dict[str, Amounts]:
    """What each pod set of a workload asks for, all of its pods together."""
    found = {}
    for pod_set in workload["spec"]["podSets"]:
        one = amounts.of_pod(pod_set["template"]["spec"])
        found[pod_set["name"]] = {name: amount * int(pod_set["count"]) for name, amount in one.items()}
    return found


def usage(admitted: Iterable[Object]) -> Usage:
    """What the admitted workloads have taken."""
    total: Usage = {}
    for workload in admitted:
        asked = requests(workload)
        for given in workload["status"]["admission"]["podSetAssignments"]:
            for resource, flavor in (given.get("flavors") or {}).items():
                key = flavor, resource
                total[key] = total.get(key, Fraction(0)) + asked[given["name"]].get(resource, Fraction(0))
    return total


def assign(queue: Object, workload: Object, used: Usage) -> Assignment:
    """Finds for each pod set the first flavor that has room; resources that the queue does not cover are free."""
    used = dict(used)
    chosen: dict[str, dict[str, str]] = {}
    for name, asked in requests(workload).items():
        chosen[name] = {}
        for group in queue["spec"].get("resourceGroups") or ():
            wanted = {resource: asked[resource] for resource in group["coveredResources"] if asked.get(resource)}
            flavor, problem, hopeless = _flavor(group["flavors"], wanted, used)
            if flavor is None:
                return Assignment({}, f"couldn't assign flavors to pod set {name}: {problem}", hopeless)
            for resource, amount in wanted.items():
                used[flavor, resource] = used.get((flavor, resource), Fraction(0)) + amount
                chosen[name][resource] = flavor
    return Assignment(chosen)


def _flavor(flavors: Sequence[Mapping[str, Any]], wanted: Amounts, used: Usage) -> tuple[str | None, str, bool]:
    problems, hopeless = [], True
    for flavor in flavors:
        name = flavor["name"]
        nominal = {item["name"]: quantity.parse(item["nominalQuota"]) for item in flavor["resources"]}
        short = {
            resource: amount + used.get((name, resource), Fraction(0)) - nominal.get(resource, Fraction(0))
            for resource, amount in wanted.items()
        }
        lacking = {resource: more for resource, more in short.items() if more > 0}
        if not lacking:
            return name, "", False
        hopeless = hopeless and any(wanted[resource] > nominal.get(resource, Fraction(0)) for resource in lacking)
        problems += [
            f"insufficient unused quota for {resource} in flavor {name}, {quantity.show(more)} more needed"
            for resource, more in sorted(lacking.items())
        ]
    return None, ", ".join(problems), hopeless


def victims(queue: Object, workload: Object, admitted: Sequence[Object]) -> list[Object]:
    """The workloads of lower priority that have to go for this one, the lowest and newest first; none where that would
    not help, or the queue does not allow for it.
    """
    if (queue["spec"].get("preemption") or {}).get("withinClusterQueue") != "LowerPriority":
        return []
    lower = [item for item in admitted if priority(item) < priority(workload)]
    newest_first = sorted(lower, key=lambda item: str(item["metadata"]["creationTimestamp"]), reverse=True)
    chosen: list[Object] = []
    for item in sorted(newest_first, key=priority):
        chosen.append(item)
        if not assign(queue, workload, usage(one for one in admitted if one not in chosen)).why_not:
            return chosen
    return []


def priority(workload: Object) -> int:
    """Higher goes first."""
    return int(workload["spec"].get("priority") or 0)
