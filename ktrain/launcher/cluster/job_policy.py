"""What a Job makes of its pods' ends: pure decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktrain.launcher.cluster import indexes
from ktrain.launcher.cluster.shelf import Object

FAIL_JOB, FAIL_INDEX, IGNORE, COUNT = "FailJob", "FailIndex", "Ignore", "Count"
_NO_LIMIT = 2**31 - 1
_DEFAULT_BACKOFF_LIMIT = 6


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a failed pod means: the action of the first rule that matches, Count where none does."""

    action: str = COUNT
    message: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """A condition that ends a Job: `SuccessCriteriaMet` or `FailureTarget`, and why."""

    kind: str
    reason: str
    message: str


def verdict(pod: Object, policy: Mapping[str, Any] | None) -> Verdict:
    """Judges a failed pod by a podFailurePolicy."""
    for at, rule in enumerate((policy or {}).get("rules") or ()):
        found = _matches(pod, rule)
        if found is not None:
            return Verdict(rule["action"], f"{found} matching {rule['action']} rule at index {at}")
    return Verdict()


def _matches(pod: Object, rule: Mapping[str, Any]) -> str | None:
    """The words for what matched."""
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    status = pod.get("status", {})
    for pattern in rule.get("onPodConditions") or ():
        for condition in status.get("conditions") or ():
            if (condition["type"], condition["status"]) == (pattern["type"], pattern.get("status") or "True"):
                return f"Pod {name} has condition {pattern['type']}"
    codes = rule.get("onExitCodes")
    for entry in (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ())):
        code = entry["state"].get("terminated", {}).get("exitCode", 0)
        named = codes is None or codes.get("containerName") in (None, entry["name"])
        if codes and named and code and (code in codes["values"]) == (codes["operator"] == "In"):
            return f"Container {entry['name']} for pod {name} failed with exit code {code}"
    return None


def replaces_only_failed(spec: Mapping[str, Any]) -> bool:
    """Whether a pod's place is taken only after it has ended, not while it is terminating."""
    return bool(spec.get("podFailurePolicy")) or spec.get("podReplacementPolicy") == "Failed"


def has_failed(pod: Object, spec: Mapping[str, Any]) -> bool:
    """Whether a pod counts as failed, which one that is deleted does at once where its place is taken at once."""
    phase = pod.get("status", {}).get("phase")
    if phase == "Failed" or replaces_only_failed(spec):
        return bool(phase == "Failed")
    return bool(pod["metadata"].get("deletionTimestamp")) and phase != "Succeeded"


def backoff_limit(spec: Mapping[str, Any]) -> int:
    """How many failures a Job bears."""
    limit = spec.get("backoffLimit")
    if limit is not None:
        return int(limit)
    return _NO_LIMIT if spec.get("backoffLimitPerIndex") is not None else _DEFAULT_BACKOFF_LIMIT


def num_restarts(pod: Object) -> int:
    """Of all its containers."""
    status = pod.get("status", {})
    entries = (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ()))
    return sum(int(entry["restartCount"]) for entry in entries)


def success(spec: Mapping[str, Any], completed: set[int], failed: set[int]) -> Decision | None:
    """Whether the indexes that have succeeded are enough."""
    for at, rule in enumerate((spec.get("successPolicy") or {}).get("rules") or ()):
        wanted = (
            indexes.parse(rule["succeededIndexes"]) if "succeededIndexes" in rule else set(range(completions(spec)))
        )
        need = rule.get("succeededCount", len(wanted))
        if len(wanted & completed) >= need:
            return Decision("SuccessCriteriaMet", "SuccessPolicy", f"Matched rules at index {at}")
    if len(completed) >= completions(spec) and not failed:
        words = "Reached expected number of succeeded pods"
        return Decision("SuccessCriteriaMet", "CompletionsReached", words)
    return None


def failure(
    spec: Mapping[str, Any], *, num_failed: int, has_new: bool, restarts: int, completed: set[int], failed: set[int]
) -> Decision | None:
    """Whether the failures are too many. `restarts` is of the pods that are alive, `has_new` says that one has failed
    since the last look.
    """
    limit = backoff_limit(spec)
    on_failure = spec["template"]["spec"].get("restartPolicy") == "OnFailure"
    if (has_new and num_failed > limit) or (on_failure and restarts and restarts >= limit):
        return Decision("FailureTarget", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    if spec.get("backoffLimitPerIndex") is None:
        return None
    most = spec.get("maxFailedIndexes")
    if most is not None and len(failed) > most:
        words = "Job has exceeded the specified maximal number of failed indexes"
        return Decision("FailureTarget", "MaxFailedIndexesExceeded", words)
    if failed and len(completed | failed) >= completions(spec):
        return Decision("FailureTarget", "FailedIndexes", "Job has failed indexes")
    return None


def completions(spec: Mapping[str, Any]) -> int:
    """How many indexes a Job has."""
    return _number(spec, "completions")


def parallelism(spec: Mapping[str, Any]) -> int:
    """How many pods a Job may have at a time."""
    return _number(spec, "parallelism")


def _number(spec: Mapping[str, Any], key: str) -> int:
    value = spec.get(key)
    return 1 if value is None else int(value)
