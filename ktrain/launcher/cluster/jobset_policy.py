"""What a JobSet makes of its Jobs' ends: pure decisions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktrain.launcher.cluster.conditions import find_condition
from ktrain.launcher.cluster.shelf import Object

REPLICATED_JOB = "jobset.sigs.k8s.io/replicatedjob-name"
FAIL, RESTART, RESTART_FREELY = "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"
ACTIONS = (FAIL, RESTART, RESTART_FREELY)


@dataclass(frozen=True, slots=True)
class Consequence:
    """What follows from failed Jobs: `action`, and the reason and message of the condition that says so."""

    action: str
    reason: str
    message: str


def consequence(spec: Mapping[str, Any], status: Mapping[str, Any], failed: Sequence[Object]) -> Consequence:
    """Chooses by the first rule that matches a failed Job.

    Without a match a JobSet restarts, without a policy it fails.
    """
    policy = spec.get("failurePolicy")
    if not policy:
        words = "jobset failed due to one or more job failures"
        return Consequence(FAIL, "FailedJobs", f"{words} (first failed job: {_name(_first(failed))})")
    rule, job = _match(policy.get("rules") or (), failed)
    action = rule["action"] if rule else RESTART
    which = f"(first failed job: {_name(job)})"
    if action == RESTART and status.get("restartsCountTowardsMax", 0) >= policy.get("maxRestarts", 0):
        words = "jobset failed due to reaching max number of restarts"
        return Consequence(FAIL, "ReachedMaxRestarts", f"{words} {which}")
    reason = f"FailurePolicy_{rule['name']}" if rule else "DefaultFailurePolicy"
    if action == FAIL:
        reason = "FailJobSetFailurePolicyAction"
    return Consequence(action, reason, f"applying {action} failure policy action {which}")


def has_succeeded(spec: Mapping[str, Any], replicated: Mapping[str, int], succeeded: Iterable[Object]) -> bool:
    """Whether the Jobs that have succeeded are enough. `replicated` is the number of Jobs by replicated job."""
    policy = spec.get("successPolicy") or {}
    targets = policy.get("targetReplicatedJobs") or list(replicated)
    num_done = sum(job["metadata"]["labels"][REPLICATED_JOB] in targets for job in succeeded)
    need = 1 if policy.get("operator") == "Any" else sum(replicated[name] for name in targets)
    return num_done >= need


def _match(rules: Iterable[Mapping[str, Any]], failed: Sequence[Object]) -> tuple[Mapping[str, Any] | None, Object]:
    for rule in rules:
        matching = [job for job in failed if _matches(rule, job)]
        if matching:
            return rule, _first(matching)
    return None, _first(failed)


def _matches(rule: Mapping[str, Any], job: Object) -> bool:
    condition = find_condition(job, "Failed")
    targets, reasons = rule.get("targetReplicatedJobs"), rule.get("onJobFailureReasons")
    if targets and job["metadata"]["labels"][REPLICATED_JOB] not in targets:
        return False
    if reasons and condition.get("reason") not in reasons:
        return False
    patterns = rule.get("onJobFailureMessagePatterns")
    return not patterns or any(_found(pattern, condition.get("message", "")) for pattern in patterns)


def _found(pattern: str, message: str) -> bool:
    """Whether an expression is found in a message; one that does not compile, which JobSet accepts, matches nothing."""
    try:
        return re.search(pattern, message) is not None
    except re.error:
        return False


def _first(jobs: Sequence[Object]) -> Object:
    """The Job that failed first."""
    return min(jobs, key=lambda job: str(find_condition(job, "Failed").get("lastTransitionTime", "")))


def _name(job: Object) -> str:
    return str(job["metadata"]["name"])
