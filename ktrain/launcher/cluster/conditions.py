"""Conditions of objects: what holds of them, since when and why."""

from __future__ import annotations

from typing import Any

from ktrain.launcher.cluster.shelf import Object

Conditions = list[Object]


def set_condition(
    conditions: Conditions, now: str, kind: str, status: str, reason: str = "", message: str = ""
) -> bool:
    """Sets a condition of a pod, node or Job in place; true when that changed it.

    The transition time moves with the status alone.
    """
    said = {**({"reason": reason} if reason else {}), **({"message": message} if message else {})}
    return _put(conditions, {"type": kind, "status": status, "lastProbeTime": None, "lastTransitionTime": now, **said})


def set_meta_condition(
    conditions: Conditions, now: str, kind: str, status: str, reason: str, message: str = ""
) -> bool:
    """Sets a condition of a JobSet, a queue's Workload or a group, which always have a reason and a message."""
    return _put(
        conditions, {"type": kind, "status": status, "lastTransitionTime": now, "reason": reason, "message": message}
    )


def has_condition(obj: Object, kind: str, status: str = "True") -> bool:
    """Whether an object has a condition with this status."""
    return bool(find_condition(obj, kind).get("status") == status)


def find_condition(obj: Object, kind: str) -> dict[str, Any]:
    """A condition of an object, or nothing."""
    return next((item for item in obj.get("status", {}).get("conditions") or () if item["type"] == kind), {})


def _put(conditions: Conditions, new: Object) -> bool:
    for at, old in enumerate(conditions):
        if old["type"] == new["type"]:
            if old["status"] == new["status"]:
                new = {**new, "lastTransitionTime": old["lastTransitionTime"]}
            conditions[at] = new
            return new != old
    conditions.append(new)
    return True
