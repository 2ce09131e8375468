"""The JobSet controller: makes Jobs, restarts or ends all of them together, suspends and resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktrain.base.clock import Clock
from ktrain.errors import ConflictError, NotFoundError
from ktrain.launcher.cluster import job_policy, jobset_jobs, jobset_policy, times
from ktrain.launcher.cluster.conditions import find_condition, has_condition, set_meta_condition
from ktrain.launcher.cluster.events import NORMAL, WARNING, Recorder
from ktrain.launcher.cluster.job_pods import is_deleting, owned
from ktrain.launcher.cluster.jobset_policy import FAIL, REPLICATED_JOB, RESTART
from ktrain.launcher.cluster.resources import JOB, JOB_SET, SERVICE, copied
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import AlreadyExistsError, Store

_HONOURED = ("suspend", "network", "successPolicy", "failurePolicy", "replicatedJobs", "ttlSecondsAfterFinished")
_LET_THROUGH = ("startupPolicy", "coordinator")
_MOVABLE = ("nodeSelector", "tolerations", "schedulingGates")
_STRATEGIES = (None, "Recreate", "BlockingRecreate")


@dataclass(slots=True)
class _Jobs:
    """The Jobs of a JobSet: those of its present attempt by how they stand, and those of older ones."""

    active: list[Object]
    succeeded: list[Object]
    failed: list[Object]
    old: list[Object]

    @classmethod
    def of(cls, jobs: list[Object], restarts: int) -> _Jobs:
        present = [job for job in jobs if jobset_jobs.attempt_of(job) >= restarts]
        failed = [job for job in present if has_condition(job, "Failed")]
        succeeded = [job for job in present if has_condition(job, "Complete")]
        active = [job for job in present if job not in failed and job not in succeeded]
        return cls(active, succeeded, failed, [job for job in jobs if job not in present])


class JobSetController:
    """Brings all JobSets on. Call from one thread; `reconcile` never waits."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._recorder = Recorder(store, "jobset")

    def reconcile(self) -> float | None:
        """Does for every JobSet what is due; returns the monotonic time at which something comes due by itself."""
        dues = []
        jobs = self._store.list(JOB).items
        for jobset in self._store.list(JOB_SET).items:
            try:
                dues.append(self._sync(jobset, owned(jobs, jobset)))
            except (ConflictError, NotFoundError):
                dues.append(self._clock.monotonic())  # changed or gone meanwhile: looked at again at once
        return min((due for due in dues if due is not None), default=None)

    def _sync(self, jobset: Object, owned_jobs: list[Object]) -> float | None:
        if is_deleting(jobset):
            return None
        status: Object = copied(jobset.get("status") or {})
        status.setdefault("restarts", 0)
        jobs = _Jobs.of(owned_jobs, status["restarts"])
        status["replicatedJobsStatus"] = [_tally(item, jobs) for item in jobset["spec"]["replicatedJobs"]]
        if has_condition(jobset, "Completed") or has_condition(jobset, "Failed"):
            self._delete([*jobs.active, *jobs.old])
            self._write(jobset, status)
            return self._expire(jobset)
        refused = _refusal(jobset["spec"])
        if refused is not None:
            self._end(jobset, status, "Failed", "NotHonoured", refused)
        elif jobs.failed:
            self._fail(jobset, status, jobs)
        elif jobs.succeeded and jobset_policy.has_succeeded(jobset["spec"], _replicas(jobset), jobs.succeeded):
            self._end(jobset, status, "Completed", "AllJobsCompleted", "jobset completed successfully")
        else:
            self._make(jobset, status, jobs)
        self._write(jobset, status)
        return None

    # Making and suspending

    def _make(self, jobset: Object, status: Object, jobs: _Jobs) -> None:
        self._delete(jobs.old)
        if jobset_jobs.has_service(jobset):
            self._create(SERVICE, jobset_jobs.service(jobset))
        suspended = bool(jobset["spec"].get("suspend"))
        here = {job["metadata"]["name"] for job in (*jobs.active, *jobs.succeeded, *jobs.old)}
        blocked = (
            bool(jobs.old) and (jobset["spec"].get("failurePolicy") or {}).get("restartStrategy") == "BlockingRecreate"
        )
        wanted: dict[str, Object] = {}
        for replicated, job in jobset_jobs.jobs(jobset, status["restarts"]):
            wanted[job["metadata"]["name"]] = job
            reached = suspended or _is_reached(replicated, status["replicatedJobsStatus"], _replicas(jobset))
            if job["metadata"]["name"] not in here and reached and not blocked:
                self._create(JOB, job)
        for job in jobs.active:
            if bool(job["spec"].get("suspend")) != suspended:
                self._suspend(job, wanted[job["metadata"]["name"]])
        self._say_suspended(jobset, status, suspended)
        every = sum(_replicas(jobset).values())
        ready = sum(item["ready"] + item["succeeded"] for item in status["replicatedJobsStatus"])
        if has_condition({"status": status}, "RestartingJobSet") and ready >= every:
            self._say(jobset, status, "RestartingJobSet", "False", "JobsReady", "all jobs are ready")

    def _create(self, resource: Any, obj: Object) -> None:
        try:
            self._store.create(resource, obj)
        except AlreadyExistsError:
            return  # made before, or an older one of this name is still ending

    def _suspend(self, job: Object, wanted: Object) -> None:
        """Suspends or resumes a Job; one that resumes takes over where its pods may run, which may have changed."""
        new = wanted["spec"]["template"]

        def change(obj: Object) -> None:
            obj["spec"]["suspend"] = wanted["spec"]["suspend"]
            if not wanted["spec"]["suspend"]:
                pod = obj["spec"]["template"]
                pod["metadata"] = new["metadata"]
                pod["spec"].update({key: new["spec"][key] for key in _MOVABLE if key in new["spec"]})

        self._store.mutate(JOB, job["metadata"]["namespace"], job["metadata"]["name"], change)

    def _say_suspended(self, jobset: Object, status: Object, suspended: bool) -> None:
        known = has_condition(jobset, "Suspended")
        if suspended and not known:
            self._say(jobset, status, "Suspended", "True", "SuspendedJobs", "jobset is suspended")
        elif known and not suspended:
            self._say(jobset, status, "Suspended", "False", "ResumeJobs", "jobset is resumed")

    # Ends and restarts

    def _fail(self, jobset: Object, status: Object, jobs: _Jobs) -> None:
        found = jobset_policy.consequence(jobset["spec"], status, jobs.failed)
        if found.action == FAIL:
            self._end(jobset, status, "Failed", found.reason, found.message)
            return
        status["restarts"] += 1
        if found.action == RESTART:
            status["restartsCountTowardsMax"] = status.get("restartsCountTowardsMax", 0) + 1
        now = self._store.now()
        set_meta_condition(
            status.setdefault("conditions", []), now, "RestartingJobSet", "True", found.reason, found.message
        )
        for reason in (found.reason, f"{found.action}FailurePolicyAction"):
            self._recorder.say(jobset, WARNING, reason, found.message)

    def _end(self, jobset: Object, status: Object, kind: str, reason: str, message: str) -> None:
        status["terminalState"] = kind
        conditions = status.setdefault("conditions", [])
        if find_condition({"status": status}, "RestartingJobSet"):
            over = ("JobSetFailed", "jobset failed") if kind == "Failed" else ("JobSetCompleted", message)
            self._say(jobset, status, "RestartingJobSet", "False", *over)
        set_meta_condition(conditions, self._store.now(), kind, "True", reason, message)
        self._recorder.say(jobset, WARNING if kind == "Failed" else NORMAL, reason, message)

    def _say(self, jobset: Object, status: Object, kind: str, holds: str, reason: str, message: str) -> None:
        set_meta_condition(status.setdefault("conditions", []), self._store.now(), kind, holds, reason, message)
        self._recorder.say(jobset, NORMAL, reason, message)

    def _delete(self, jobs: list[Object]) -> None:
        for job in jobs:
            if not is_deleting(job):
                metadata = job["metadata"]
                self._store.delete(JOB, metadata["namespace"], metadata["name"], propagation="Foreground")

    def _write(self, jobset: Object, status: Object) -> None:
        if status != jobset.get("status"):
            self._store.update(JOB_SET, {**jobset, "status": status}, status=True)

    def _expire(self, jobset: Object) -> float | None:
        ttl_s = jobset["spec"].get("ttlSecondsAfterFinished")
        if ttl_s is None:
            return None
        ended = next(found for kind in ("Completed", "Failed") if (found := find_condition(jobset, kind)))
        due = times.monotonic(ended["lastTransitionTime"], self._clock) + float(ttl_s)
        if self._clock.monotonic() < due:
            return due
        metadata = jobset["metadata"]
        self._store.delete(JOB_SET, metadata["namespace"], metadata["name"], propagation="Foreground")
        return None


def _replicas(jobset: Object) -> dict[str, int]:
    return {item["name"]: jobset_jobs.num_replicas(item) for item in jobset["spec"]["replicatedJobs"]}


def _tally(replicated: Mapping[str, Any], jobs: _Jobs) -> Object:
    """The entry of `replicatedJobsStatus`: how many Jobs stand how."""
    name = replicated["name"]

    def own(found: list[Object]) -> list[Object]:
        return [job for job in found if job["metadata"]["labels"][REPLICATED_JOB] == name]

    active = own(jobs.active)
    return {
        "name": name,
        "ready": sum(map(_is_ready, active)),
        "succeeded": len(own(jobs.succeeded)),
        "failed": len(own(jobs.failed)),
        "active": sum(job.get("status", {}).get("active", 0) > 0 for job in active),
        "suspended": sum(bool(job["spec"].get("suspend")) for job in active),
    }


def _is_ready(job: Object) -> bool:
    """Whether all its pods are ready or have succeeded."""
    spec, status = job["spec"], job.get("status", {})
    need = min(job_policy.parallelism(spec), job_policy.completions(spec))
    return int(status.get("ready", 0)) + int(status.get("succeeded", 0)) >= need


def _is_reached(replicated: Mapping[str, Any], tallies: list[Object], replicas: Mapping[str, int]) -> bool:
    """Whether what a replicated job depends on has come so far."""
    by_name = {item["name"]: item for item in tallies}
    for dependency in replicated.get("dependsOn") or ():
        tally = by_name[dependency["name"]]
        there = tally["succeeded"] + (tally["ready"] if dependency["status"] == "Ready" else 0)
        if there < replicas[dependency["name"]]:
            return False
    return True


def _refusal(spec: Mapping[str, Any]) -> str | None:
    """Why a JobSet is not run here."""
    strange = sorted(key for key, value in spec.items() if value and key not in (*_HONOURED, *_LET_THROUGH))
    policy = spec.get("failurePolicy") or {}
    actions = [rule["action"] for rule in policy.get("rules") or () if rule["action"] not in jobset_policy.ACTIONS]
    if strange:
        return f"the pod runner does not honour spec.{strange[0]}; leave it out, or use a real cluster"
    if (spec.get("startupPolicy") or {}).get("startupPolicyOrder") == "InOrder":
        return "the pod runner does not honour spec.startupPolicy; use dependsOn"
    if actions:
        return f"the pod runner does not honour the action {actions[0]}; expected {', '.join(jobset_policy.ACTIONS)}"
    if policy.get("restartStrategy") not in _STRATEGIES:
        return f"the pod runner does not honour the restart strategy {policy['restartStrategy']}"
    return None
