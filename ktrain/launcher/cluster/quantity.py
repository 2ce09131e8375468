"""Kubernetes quantities as numbers: `500m` -> 0.5, `4Gi` -> 4294967296."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from ktrain.errors import ConfigError

_SUFFIXES = {
    "": Fraction(1),
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    **{suffix: Fraction(1000 ** (power + 1)) for power, suffix in enumerate("kMGTPE")},
    **{f"{suffix}i": Fraction(1024 ** (power + 1)) for power, suffix in enumerate("KMGTPE")},
}
_FORM = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d+)|([a-zA-Z]*))")

Amounts = dict[str, Fraction]


def parse(text: str | float) -> Fraction:
    """The exact number that a quantity names.

    Raises:
        ConfigError: it is none.
    """
    match = _FORM.fullmatch(str(text).strip())
    if match is None or (match[3] or "") not in _SUFFIXES:
        raise ConfigError(f"expected a quantity such as 500m, 2 or 4Gi, found {text!r}")
    return Fraction(match[1]) * _SUFFIXES[match[3] or ""] * Fraction(10) ** int(match[2] or 0)


def show(amount: Fraction) -> str:
    """`2`, or `500m` where it is not whole."""
    return str(amount.numerator) if amount.denominator == 1 else f"{-(-amount * 1000 // 1)}m"


def amounts(quantities: Mapping[str, Any] | None) -> Amounts:
    """A resource list as numbers."""
    return {name: parse(value) for name, value in (quantities or {}).items()}


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
