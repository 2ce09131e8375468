"""Fault plans: what is to be broken, when, as typed by `--fault`.

    kill-worker@step=30,rank=1            SIGKILL
    stop-worker@step=30,rank=1            SIGSTOP: the process is there and silent
    kill-agent@step=30,node=1
    kill-head@step=30
    lose-node@step=60,node=1,after=peer   all its processes and its volume; an empty one takes its place
    lose-all@step=90,after=bucket

`after=TIER` waits until the newest committed step of all tiers is in that tier too, so that it is sure where the
next attempt finds it: what is nearer than TIER and survives the fault comes first, what is farther is not newer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktrain.base import contract
from ktrain.errors import ConfigError

_KEYS: dict[str, tuple[str, ...]] = {
    "kill-worker": ("step", "rank"),
    "stop-worker": ("step", "rank"),
    "kill-agent": ("step", "node"),
    "kill-head": ("step",),
    "lose-node": ("step", "node"),
    "lose-all": ("step",),
}
_AFTER = (contract.TIER_MEMORY, contract.TIER_PEER, contract.TIER_BUCKET)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, once in the life of a run."""

    spec: str  # as typed: its name in the event log
    action: str
    step: int
    rank: int | None = None
    node: int | None = None
    after: str | None = None


def parse_fault(text: str, *, nodes: int, world_size: int) -> Fault:
    """The fault that a text names.

    Raises:
        ConfigError: it names none; the message says what is allowed.
    """
    action, _, rest = text.partition("@")
    if action not in _KEYS:
        raise ConfigError(f"fault {text!r}: expected one of {', '.join(_KEYS)} before '@', found {action!r}")
    required = _KEYS[action]
    form = f"{action}@" + ",".join(f"{key}=N" for key in required) + f"[,after={'|'.join(_AFTER)}]"
    values: dict[str, str] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or key not in (*required, "after") or key in values:
            raise ConfigError(f"fault {text!r}: cannot use {part!r}; expected {form}")
        values[key] = value
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(f"fault {text!r}: {', '.join(missing)} is missing; expected {form}")
    after = values.pop("after", None)
    if after is not None and after not in _AFTER:
        raise ConfigError(f"fault {text!r}: after={after!r}; expected one of {', '.join(_AFTER)}")
    if after == contract.TIER_PEER and nodes == 1:
        raise ConfigError(f"fault {text!r}: one node has no peers; use --nodes 2 or more, or another tier")
    numbers = {key: _number(text, key, value) for key, value in values.items()}
    for key, limit, what in (("rank", world_size, "ranks"), ("node", nodes, "nodes")):
        if numbers.get(key, 0) >= limit:
            raise ConfigError(f"fault {text!r}: {key}={numbers[key]}, but the job has {what} 0 to {limit - 1}")
    return Fault(text, action, numbers["step"], numbers.get("rank"), numbers.get("node"), after)


def _number(text: str, key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"fault {text!r}: {key}={value!r}; expected a whole number, 0 or more")
    return int(value)


def due(faults: Sequence[Fault], status: Mapping[str, Any]) -> Fault | None:
    """The first fault that is to be injected now, or None. Pure.

    A fault that was typed twice fires twice; `status` counts what the run has had.
    """
    if status["state"] != "running":
        return None
    fired = dict(status["fired"])
    for fault in faults:
        if fired.get(fault.spec, 0) > 0:
            fired[fault.spec] -= 1
            continue
        if status["step"] >= fault.step and _caught_up(fault, status) and _has_target(fault, status):
            return fault
    return None


def _caught_up(fault: Fault, status: Mapping[str, Any]) -> bool:
    """Whether no tier has anything newer than the fault's tier, and that has something of this attempt."""
    if fault.after is None:
        return True
    committed = {tier: pair for tier, pair in status["committed"].items() if pair is not None}
    here = committed.get(fault.after)
    if here is None or here[1] != status["epoch"]:
        return False
    return all(here[0] >= step for step, _ in committed.values())


def _has_target(fault: Fault, status: Mapping[str, Any]) -> bool:
    return fault.rank is None or str(fault.rank) in status["pids"]
