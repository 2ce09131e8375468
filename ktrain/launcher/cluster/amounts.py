"""Amounts of resources as numbers: what a pod asks for, what a node has, what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from ktrain.launcher import quantity

Amounts = dict[str, Fraction]


def amounts(quantities: Mapping[str, Any] | None) -> Amounts:
    """A resource list as numbers."""
    return {name: quantity.parse(value) for name, value in (quantities or {}).items()}


def add(*parts: Mapping[str, Fraction]) -> Amounts:
    """The sum by resource."""
    total: Amounts = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, Fraction(0)) + amount
    return total


def most(*parts: Mapping[str, Fraction]) -> Amounts:
    """The largest by resource."""
    total: Amounts = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = max(total.get(name, Fraction(0)), amount)
    return total


def lacking(wanted: Mapping[str, Fraction], free: Mapping[str, Fraction]) -> list[str]:
    """The resources of which less is free than wanted, by name."""
    return sorted(name for name, amount in wanted.items() if amount > free.get(name, Fraction(0)))


def of_pod(spec: Mapping[str, Any]) -> Amounts:
    """What a pod asks a node for: containers and sidecars together, or one init container beside the sidecars
    before it, whichever is more; a pod-level request stands for all of its containers.
    """
    sidecars: Amounts = {}
    starting: Amounts = {}
    for container in spec.get("initContainers") or ():
        if container.get("restartPolicy") == "Always":
            sidecars = add(sidecars, _of_container(container))
            starting = most(starting, sidecars)
        else:
            starting = most(starting, add(sidecars, _of_container(container)))
    running = add(sidecars, *map(_of_container, spec["containers"]))
    return {**most(running, starting), **_requests(spec.get("resources"))}


def _of_container(container: Mapping[str, Any]) -> Amounts:
    return _requests(container.get("resources"))


def _requests(resources: Mapping[str, Any] | None) -> Amounts:
    """Requests; a limit without a request counts as one."""
    found = resources or {}
    return amounts({**(found.get("limits") or {}), **(found.get("requests") or {})})


def total(pods: Iterable[Mapping[str, Any]]) -> Amounts:
    """What these pod specs ask for together."""
    return add(*map(of_pod, pods))
