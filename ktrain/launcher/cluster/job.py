"""The Job controller: one pod for each index, replaced or given up as the Job's policies say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ktrain.base.clock import Clock
from ktrain.errors import ConflictError, NotFoundError
from ktrain.launcher.cluster import indexes, job_policy, times
from ktrain.launcher.cluster.conditions import find_condition, has_condition, set_condition
from ktrain.launcher.cluster.events import NORMAL, WARNING, Recorder
from ktrain.launcher.cluster.job_pods import (
    CONTROLLER_UID,
    FAILURES,
    TRACKING,
    index_of,
    is_deleting,
    is_terminal,
    is_tracked,
    make,
)
from ktrain.launcher.cluster.job_policy import Decision
from ktrain.launcher.cluster.resources import JOB, POD, copied
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store

_FIRST_BACK_OFF_S = 10.0
_LONGEST_BACK_OFF_S = 600.0
_HONOURED = frozenset(
    "completionMode completions parallelism backoffLimit backoffLimitPerIndex maxFailedIndexes podFailurePolicy"
    " podReplacementPolicy successPolicy suspend activeDeadlineSeconds ttlSecondsAfterFinished template selector"
    " manualSelector".split()
)
_FINAL = {"FailureTarget": "Failed", "SuccessCriteriaMet": "Complete"}


@dataclass(slots=True)
class _Memory:
    """What the controller knows of a Job beyond the store: the delays before its next pods."""

    num_failures: int = 0  # in a row, without a success between them
    failed_s: float = 0.0  # monotonic
    by_index: dict[int, int] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)  # uids: a turn that came to nothing is done again


@dataclass(slots=True)
class _Count:
    """The pods of a Job, sorted by what they mean to it."""

    completed: set[int]
    failed_indexes: set[int]
    succeeded: list[Object] = field(default_factory=list)  # to be counted now, like the two below
    failed: list[Object] = field(default_factory=list)
    ignored: list[Object] = field(default_factory=list)
    decision: Decision | None = None


class JobController:
    """Brings all Jobs on. Call from one thread; `reconcile` never waits."""

    def __init__(self, store: Store, clock: Clock, *, back_off_s: float = _FIRST_BACK_OFF_S) -> None:
        """`back_off_s` is the delay before a failed pod is replaced, doubled by each further failure."""
        self._store = store
        self._clock = clock
        self._back_off_s = back_off_s
        self._recorder = Recorder(store, "job-controller")
        self._memory: dict[str, _Memory] = {}

    def reconcile(self) -> float | None:
        """Does for every Job what is due; returns the monotonic time at which something comes due by itself."""
        jobs = self._store.list(JOB).items
        alive = {job["metadata"]["uid"] for job in jobs}
        self._memory = {uid: memory for uid, memory in self._memory.items() if uid in alive}
        self._release_orphans(alive)
        dues = []
        for job in jobs:
            try:
                dues.append(self._sync(job))
            except (ConflictError, NotFoundError):
                dues.append(self._clock.monotonic())  # changed or gone meanwhile: looked at again at once
        return min((due for due in dues if due is not None), default=None)

    def _sync(self, job: Object) -> float | None:
        spec, metadata = job["spec"], job["metadata"]
        pods = self._store.list(POD, metadata["namespace"], labels=f"{CONTROLLER_UID}={metadata['uid']}").items
        if has_condition(job, "Complete") or has_condition(job, "Failed"):
            self._release(pods)
            return self._expire(job)
        if metadata.get("deletionTimestamp"):
            self._release(pods)
            return None
        refused = _refusal(spec)
        if refused is not None:
            self._finish(job, Decision("FailureTarget", "NotHonoured", refused))
            return None
        return self._drive(job, pods)

    def _drive(self, job: Object, pods: list[Object]) -> float | None:
        spec = job["spec"]
        memory = self._memory.setdefault(job["metadata"]["uid"], _Memory())
        status: Object = copied(job.get("status") or {})
        suspended = bool(spec.get("suspend"))
        if "startTime" not in status and not suspended:
            status["startTime"] = self._store.now()
        _settle_uncounted(status, pods)
        count = self._count(job, pods, memory)
        count.decision = _standing(job) or count.decision or self._decide(spec, status, pods, count)
        due = None
        if count.decision is not None:
            pods = self._delete_active(pods, count)
        elif suspended:
            pods = self._suspend(pods)
        else:
            due = self._fill(job, pods, count, memory)
            pods = self._store.list(POD, job["metadata"]["namespace"], labels=_label(job)).items
        self._say_suspended(job, status, suspended)
        self._write(job, status, pods, count)
        return min((at for at in (due, self._deadline(spec, status)) if at is not None), default=None)

    # Counting

    def _count(self, job: Object, pods: list[Object], memory: _Memory) -> _Count:
        spec, status = job["spec"], job.get("status") or {}
        count = _Count(indexes.parse(status.get("completedIndexes")), indexes.parse(status.get("failedIndexes")))
        for pod in pods:
            index = index_of(pod)
            if index is None or not is_tracked(pod):
                continue
            if pod.get("status", {}).get("phase") == "Succeeded":
                count.succeeded.append(pod)
                count.completed.add(index)
                memory.num_failures = 0
            elif job_policy.has_failed(pod, spec):
                self._count_failure(job, pod, index, count, memory)
        return count

    def _count_failure(self, job: Object, pod: Object, index: int, count: _Count, memory: _Memory) -> None:
        spec = job["spec"]
        found = job_policy.verdict(pod, spec.get("podFailurePolicy"))
        if found.action == job_policy.IGNORE:
            count.ignored.append(pod)
            return
        count.failed.append(pod)
        if pod["metadata"]["uid"] not in memory.counted:
            memory.counted.add(pod["metadata"]["uid"])
            memory.num_failures += 1
            memory.failed_s = self._clock.monotonic()
        failures = int((pod["metadata"].get("annotations") or {}).get(FAILURES, "0")) + 1
        memory.by_index[index] = max(failures, memory.by_index.get(index, 0))
        per_index = spec.get("backoffLimitPerIndex")
        if found.action == job_policy.FAIL_JOB and count.decision is None:
            count.decision = Decision("FailureTarget", "PodFailurePolicy", found.message)
        elif per_index is not None and (found.action == job_policy.FAIL_INDEX or failures > per_index):
            count.failed_indexes.add(index)

    def _decide(
        self, spec: Mapping[str, Any], status: Mapping[str, Any], pods: list[Object], count: _Count
    ) -> Decision | None:
        found = job_policy.success(spec, count.completed, count.failed_indexes)
        if found is not None:
            return found
        deadline_s = self._deadline(spec, status)
        if deadline_s is not None and self._clock.monotonic() >= deadline_s:
            words = "Job was active longer than specified deadline"
            return Decision("FailureTarget", "DeadlineExceeded", words)
        return job_policy.failure(
            spec,
            num_failed=status.get("failed", 0) + len(count.failed),
            has_new=bool(count.failed),
            restarts=sum(job_policy.num_restarts(pod) for pod in pods if _is_active(pod)),
            completed=count.completed,
            failed=count.failed_indexes,
        )

    def _deadline(self, spec: Mapping[str, Any], status: Mapping[str, Any]) -> float | None:
        limit_s = spec.get("activeDeadlineSeconds")
        if limit_s is None or "startTime" not in status or spec.get("suspend"):
            return None
        return times.monotonic(status["startTime"], self._clock) + float(limit_s)

    # Pods

    def _delete_active(self, pods: list[Object], count: _Count) -> list[Object]:
        """Ends what still runs when the Job's end is decided. What a failure ends has failed with it."""
        ended = []
        for pod in pods:
            if _is_active(pod):
                pod = self._store.delete(POD, pod["metadata"]["namespace"], pod["metadata"]["name"])
                assert count.decision is not None
                if count.decision.kind == "FailureTarget":
                    count.failed.append(pod)
            ended.append(pod)
        return ended

    def _suspend(self, pods: list[Object]) -> list[Object]:
        """Deletes what runs."""
        self._withdraw(pod for pod in pods if _is_active(pod))
        return [self._fresh(pod) for pod in pods]

    def _withdraw(self, pods: Iterable[Object]) -> None:
        """Deletes pods that are counted for nothing."""
        for pod in pods:
            self._release([pod])
            self._store.delete(POD, pod["metadata"]["namespace"], pod["metadata"]["name"])

    def _fresh(self, pod: Object) -> Object:
        try:
            return self._store.get(POD, pod["metadata"]["namespace"], pod["metadata"]["name"])
        except NotFoundError:
            return {**pod, "status": {**pod.get("status", {}), "phase": "Failed"}}

    def _fill(self, job: Object, pods: list[Object], count: _Count, memory: _Memory) -> float | None:
        """Makes the pods that are lacking, lowest index first, or takes back those that are too many, highest first.

        Returns when a delayed one is due.
        """
        spec = job["spec"]
        active = sorted(filter(_is_active, pods), key=lambda pod: index_of(pod) or 0)
        self._withdraw(active[job_policy.parallelism(spec) :])
        counted_now = {pod["metadata"]["uid"] for pod in (*count.failed, *count.ignored, *count.succeeded)}
        taken = {
            index_of(pod)
            for pod in pods
            if _is_active(pod) or (is_deleting(pod) and not is_terminal(pod) and job_policy.replaces_only_failed(spec))
        }
        settled = count.completed | count.failed_indexes
        wanted = [index for index in range(job_policy.completions(spec)) if index not in settled]
        room = job_policy.parallelism(spec) - len(taken)
        lacking = [index for index in wanted if index not in taken][: max(room, 0)]
        if not lacking:
            return None
        if counted_now and not count.ignored:  # the next turn, when the failure has been counted
            return self._clock.monotonic()
        per_index = spec.get("backoffLimitPerIndex") is not None
        due = None
        for index in lacking:
            failures = memory.by_index.get(index, 0)
            ready_s = self._ready_s(failures if per_index else memory.num_failures, memory.failed_s)
            if self._clock.monotonic() < ready_s:
                due = ready_s if due is None else min(due, ready_s)
                continue
            made = self._store.create(POD, make(job, index, failures=failures))
            self._recorder.say(job, NORMAL, "SuccessfulCreate", f"Created pod: {made['metadata']['name']}")
        return due

    def _ready_s(self, num_failures: int, failed_s: float) -> float:
        if num_failures == 0:
            return 0.0
        return failed_s + min(self._back_off_s * 2.0 ** (num_failures - 1), _LONGEST_BACK_OFF_S)

    def _release(self, pods: Iterable[Object]) -> None:
        """Takes the Job's finalizer off pods that it has counted, or will not count."""
        for pod in pods:
            if is_tracked(pod):
                try:
                    self._store.mutate(POD, pod["metadata"]["namespace"], pod["metadata"]["name"], _untrack)
                except NotFoundError:
                    continue

    def _release_orphans(self, jobs: set[str]) -> None:
        """A pod whose Job is gone is held by nobody."""
        for pod in self._store.list(POD).items:
            uid = (pod["metadata"].get("labels") or {}).get(CONTROLLER_UID)
            if uid is not None and uid not in jobs:
                self._release([pod])

    # Status

    def _say_suspended(self, job: Object, status: Object, suspended: bool) -> None:
        known = find_condition({"status": status}, "Suspended").get("status")
        conditions = status.setdefault("conditions", []) if suspended or known else []
        now = self._store.now()
        if suspended and known != "True":
            set_condition(conditions, now, "Suspended", "True", "JobSuspended", "Job suspended")
            self._recorder.say(job, NORMAL, "Suspended", "Job suspended")
            status.pop("startTime", None)
        elif not suspended and known == "True":
            set_condition(conditions, now, "Suspended", "False", "JobResumed", "Job resumed")
            self._recorder.say(job, NORMAL, "Resumed", "Job resumed")

    def _write(self, job: Object, status: Object, pods: list[Object], count: _Count) -> None:
        """First the ends that are being counted, then the finalizers off, then the counts and the verdict."""
        new = {
            **status,
            "active": sum(map(_is_active, pods)),
            "ready": sum(has_condition(pod, "Ready") for pod in pods if _is_active(pod)),
            "terminating": sum(is_deleting(pod) and not is_terminal(pod) for pod in pods),
            "succeeded": len(count.completed),
            "completedIndexes": indexes.show(count.completed),
            "uncountedTerminatedPods": {"failed": uids} if (uids := _uids(count.failed)) else {},
        }
        if job["spec"].get("backoffLimitPerIndex") is not None:
            new["failedIndexes"] = indexes.show(count.failed_indexes)
        if count.decision is not None and not has_condition(job, count.decision.kind):
            made = count.decision
            set_condition(
                new.setdefault("conditions", []), self._store.now(), made.kind, "True", made.reason, made.message
            )
        job = self._store.update(JOB, {**job, "status": _terse(new)}, status=True)
        self._release((*count.succeeded, *count.failed, *count.ignored))
        if count.decision is not None:
            self._release(pods)
        counted: Object = {**job["status"], "uncountedTerminatedPods": {}}
        counted["failed"] = counted.get("failed", 0) + len(count.failed)
        if count.decision is not None and not counted.get("terminating"):
            counted = self._final(job, counted, count.decision)
        self._store.update(JOB, {**job, "status": _terse(counted)}, status=True)

    def _final(self, job: Object, status: Object, decision: Decision) -> Object:
        kind = _FINAL[decision.kind]
        conditions = copied(status.get("conditions") or [])
        set_condition(conditions, self._store.now(), kind, "True", decision.reason, decision.message)
        if kind == "Complete":
            self._recorder.say(job, NORMAL, "Completed", "Job completed")
            return {**status, "conditions": conditions, "completionTime": self._store.now()}
        self._recorder.say(job, WARNING, decision.reason, decision.message)
        return {**status, "conditions": conditions}

    def _finish(self, job: Object, decision: Decision) -> None:
        status = self._final(job, job.get("status") or {}, decision)
        self._store.update(JOB, {**job, "status": status}, status=True)

    def _expire(self, job: Object) -> float | None:
        ttl_s = job["spec"].get("ttlSecondsAfterFinished")
        if ttl_s is None or job["metadata"].get("deletionTimestamp"):
            return None
        ended = find_condition(job, "Complete") or find_condition(job, "Failed")
        due = times.monotonic(ended["lastTransitionTime"], self._clock) + float(ttl_s)
        if self._clock.monotonic() < due:
            return due
        self._store.delete(JOB, job["metadata"]["namespace"], job["metadata"]["name"], propagation="Foreground")
        return None


def _refusal(spec: Mapping[str, Any]) -> str | None:
    """Why a Job is not run here."""
    strange = sorted(key for key, value in spec.items() if value and key not in _HONOURED)
    if strange:
        return f"the pod runner does not honour spec.{strange[0]}; leave it out, or use a real cluster"
    if spec.get("completionMode") != "Indexed":
        return "the pod runner runs Jobs of completionMode Indexed alone"
    return None


def _settle_uncounted(status: Object, pods: Iterable[Object]) -> None:
    """Counts what a turn that was cut off had begun to count: failed pods whose finalizer is off already."""
    begun = set((status.get("uncountedTerminatedPods") or {}).get("failed") or ())
    begun -= {pod["metadata"]["uid"] for pod in pods if is_tracked(pod)}
    if begun:
        status["failed"] = status.get("failed", 0) + len(begun)


def _standing(job: Object) -> Decision | None:
    """The end that was decided before."""
    for kind in _FINAL:
        found = find_condition(job, kind)
        if found.get("status") == "True":
            return Decision(kind, found["reason"], found.get("message", ""))
    return None


def _is_active(pod: Object) -> bool:
    return not is_terminal(pod) and not is_deleting(pod)


def _label(job: Object) -> str:
    return f"{CONTROLLER_UID}={job['metadata']['uid']}"


def _uids(pods: Iterable[Object]) -> list[str]:
    return [pod["metadata"]["uid"] for pod in pods]


def _untrack(pod: Object) -> None:
    pod["metadata"]["finalizers"] = [item for item in pod["metadata"].get("finalizers") or () if item != TRACKING]


def _terse(status: Object) -> Object:
    """Counts of nothing are left out, as the recorded controllers leave them out."""
    optional = ("active", "succeeded", "failed", "completedIndexes")
    return {key: value for key, value in status.items() if value or key not in optional}
