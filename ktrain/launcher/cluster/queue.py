"""A queue as Kueue keeps it: a JobSet that names one is suspended until its whole fits, and may be evicted again."""

from __future__ import annotations

import secrets
from typing import Any

from ktrain.base.clock import Clock
from ktrain.errors import ConflictError, NotFoundError
from ktrain.launcher import quantity
from ktrain.launcher.cluster import job_policy, jobset_jobs, quota
from ktrain.launcher.cluster.conditions import find_condition, has_condition, set_meta_condition
from ktrain.launcher.cluster.events import NORMAL, WARNING, Recorder
from ktrain.launcher.cluster.job_pods import owned, owner
from ktrain.launcher.cluster.resources import (
    CLUSTER_QUEUE,
    JOB,
    JOB_SET,
    KUEUE_WORKLOAD,
    LOCAL_QUEUE,
    PRIORITY_CLASS,
    RESOURCE_FLAVOR,
    WORKLOAD_PRIORITY_CLASS,
    copied,
)
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store

QUEUE = "kueue.x-k8s.io/queue-name"
PRIORITY = "kueue.x-k8s.io/priority-class"
_JOB_UID = "kueue.x-k8s.io/job-uid"
_NO_RESERVATION = "The workload has no reservation"


class QueueController:
    """Admits and evicts JobSets. Call from one thread; `reconcile` never waits."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._recorder = Recorder(store, "kueue-admission")

    def reconcile(self) -> float | None:
        """Does what is due; nothing comes due by itself."""
        queued = [item for item in self._store.list(JOB_SET).items if QUEUE in (item["metadata"].get("labels") or {})]
        if not queued:
            return None
        try:
            for jobset in queued:
                self._follow(jobset)
            self._admit_waiting()
        except (ConflictError, NotFoundError):
            return self._clock.monotonic()  # changed or gone meanwhile: looked at again at once
        return None

    # One JobSet

    def _follow(self, jobset: Object) -> None:
        workload = self._workload_of(jobset)
        finished = find_condition(jobset, "Completed") or find_condition(jobset, "Failed")
        if workload is None:
            if not finished and not jobset["metadata"].get("deletionTimestamp"):
                self._store.create(KUEUE_WORKLOAD, self._new_workload(jobset))
                self._suspend(jobset, True)
            return
        if has_condition(workload, "Finished"):
            return
        if finished:
            reason = "Succeeded" if finished["type"] == "Completed" else "Failed"
            self._say(workload, ("Finished", "True", reason, finished["message"]))
            return
        if has_condition(workload, "Evicted"):
            self._give_back(jobset, workload)
        elif not workload["spec"].get("active", True) and has_condition(workload, "Admitted"):
            self._evict(workload, "Deactivated", "The workload is deactivated")
        else:
            self._suspend(jobset, not has_condition(workload, "Admitted"))
        self._say_ready(jobset, workload)

    def _workload_of(self, jobset: Object) -> Object | None:
        found = owned(self._store.list(KUEUE_WORKLOAD, jobset["metadata"]["namespace"]).items, jobset)
        return found[0] if found else None

    def _new_workload(self, jobset: Object) -> Object:
        metadata, labels = jobset["metadata"], jobset["metadata"]["labels"]
        pod_sets = [
            {
                "name": item["name"],
                "count": jobset_jobs.num_replicas(item) * job_policy.parallelism(item["template"]["spec"]),
                "template": copied(item["template"]["spec"]["template"]),
            }
            for item in jobset["spec"]["replicatedJobs"]
        ]
        return {
            "metadata": {
                "name": f"jobset-{metadata['name']}-{secrets.token_hex(3)[:5]}",
                "namespace": metadata["namespace"],
                "labels": {_JOB_UID: metadata["uid"]},
                "ownerReferences": [owner(jobset)],
            },
            "spec": {
                "active": True,
                "podSets": pod_sets,
                "queueName": labels[QUEUE],
                "priority": self._priority(jobset, pod_sets),
            },
        }

    def _priority(self, jobset: Object, pod_sets: list[Object]) -> int:
        name = jobset["metadata"]["labels"].get(PRIORITY)
        resource = WORKLOAD_PRIORITY_CLASS
        if name is None:
            names = [item["template"]["spec"].get("priorityClassName") for item in pod_sets]
            name, resource = next((item for item in names if item), None), PRIORITY_CLASS
        if name is None:
            return 0
        try:
            return int(self._store.get(resource, None, name).get("value") or 0)
        except NotFoundError:
            return 0

    def _suspend(self, jobset: Object, suspended: bool) -> None:
        if bool(jobset["spec"].get("suspend")) == suspended:
            return
        selectors = {} if suspended else self._selectors(jobset)

        def change(obj: Object) -> None:
            obj["spec"]["suspend"] = suspended
            for item in obj["spec"]["replicatedJobs"]:
                chosen = selectors.get(item["name"])
                if chosen:
                    spec = item["template"]["spec"]["template"]["spec"]
                    spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), **chosen}

        self._store.mutate(JOB_SET, jobset["metadata"]["namespace"], jobset["metadata"]["name"], change)

    def _selectors(self, jobset: Object) -> dict[str, dict[str, str]]:
        """The labels of the nodes of the assigned flavors, by pod set."""
        workload = self._workload_of(jobset)
        assert workload is not None
        found: dict[str, dict[str, str]] = {}
        for given in workload["status"]["admission"]["podSetAssignments"]:
            for flavor in set((given.get("flavors") or {}).values()):
                labels = self._store.get(RESOURCE_FLAVOR, None, flavor).get("spec", {}).get("nodeLabels") or {}
                found.setdefault(given["name"], {}).update(labels)
        return found

    def _say_ready(self, jobset: Object, workload: Object) -> None:
        tallies = jobset.get("status", {}).get("replicatedJobsStatus") or ()
        there = sum(item["ready"] + item["succeeded"] for item in tallies)
        need = sum(map(jobset_jobs.num_replicas, jobset["spec"]["replicatedJobs"]))
        if there >= need and has_condition(workload, "Admitted"):
            words = "All pods reached readiness and the workload is running"
            self._say(workload, ("PodsReady", "True", "Started", words))
        elif not has_condition(workload, "PodsReady"):
            self._say(workload, ("PodsReady", "False", "WaitForStart", "Not all pods are ready or succeeded"))

    # Eviction

    def _evict(self, workload: Object, reason: str, message: str) -> None:
        said = [("Evicted", "True", reason, message)]
        if reason == "Preempted":
            said.append(("Preempted", "True", "InClusterQueue", message))
        self._say(workload, *said)
        self._recorder.say(workload, NORMAL, f"EvictedDueTo{reason}", message)

    def _give_back(self, jobset: Object, workload: Object) -> None:
        """Suspends an evicted JobSet, and frees its quota when its pods are gone."""
        self._suspend(jobset, True)
        jobs = owned(self._store.list(JOB, jobset["metadata"]["namespace"]).items, jobset)
        status = [job.get("status", {}) for job in jobs]
        if any(item.get("active") or item.get("terminating") for item in status):
            return
        if not has_condition(workload, "QuotaReserved"):
            return
        evicted = find_condition(workload, "Evicted")
        active = workload["spec"].get("active", True)
        self._say(
            workload,
            ("QuotaReserved", "False", "PendingEvaluation" if active else evicted["reason"], evicted["message"]),
            ("Admitted", "False", "NoReservation", _NO_RESERVATION),
            ("Requeued", str(active), evicted["reason"], evicted["message"]),
            ("PodsReady", "False", "WaitForStart", "Not all pods are ready or succeeded"),
            admission=None,
        )

    # Admission

    def _admit_waiting(self) -> None:
        workloads = self._store.list(KUEUE_WORKLOAD).items
        waiting = [item for item in workloads if _waits(item)]
        for workload in sorted(
            waiting, key=lambda item: (-quota.priority(item), item["metadata"]["creationTimestamp"])
        ):
            queue, problem = self._queue_of(workload)
            if queue is None:
                self._refuse(workload, "Misconfigured", problem)
                continue
            name = queue["metadata"]["name"]
            admitted = [
                item
                for item in self._store.list(KUEUE_WORKLOAD).items
                if has_condition(item, "QuotaReserved")
                and item["status"].get("admission", {}).get("clusterQueue") == name
                and not has_condition(item, "Finished")
            ]
            found = quota.assign(queue, workload, quota.usage(admitted))
            if not found.why_not:
                self._admit(workload, name, found)
            else:
                self._wait(queue, workload, found, admitted)

    def _queue_of(self, workload: Object) -> tuple[Object | None, str]:
        """The cluster queue of a workload, or why it has none."""
        name = workload["spec"]["queueName"]
        try:
            local = self._store.get(LOCAL_QUEUE, workload["metadata"]["namespace"], name)
        except NotFoundError:
            return None, f"LocalQueue {name} doesn't exist"
        try:
            return self._store.get(CLUSTER_QUEUE, None, local["spec"]["clusterQueue"]), ""
        except NotFoundError:
            return None, f"ClusterQueue {local['spec']['clusterQueue']} doesn't exist"

    def _wait(self, queue: Object, workload: Object, found: quota.Assignment, admitted: list[Object]) -> None:
        leaving = [item for item in admitted if has_condition(item, "Evicted")]
        going = leaving or quota.victims(queue, workload, admitted)
        if not going:
            self._refuse(workload, "ExceedsMaxQuota" if found.hopeless else "WaitingForQuota", found.why_not)
            return
        path = f"/{queue['metadata']['name']}"
        uid, job_uid = workload["metadata"]["uid"], workload["metadata"]["labels"][_JOB_UID]
        words = f"Preempted to accommodate a workload (UID: {uid}, JobUID: {job_uid}) due to prioritization in the"
        for item in going:
            if item not in leaving:
                where = f"ClusterQueue; preemptor path: {path}; preemptee path: {path}"
                self._evict(item, "Preempted", f"{words} {where}")
        pending = f"{found.why_not}. Pending the preemption of {len(going)} workload(s)"
        self._refuse(workload, "WaitingForPreemptedWorkloads", pending)

    def _refuse(self, workload: Object, reason: str, message: str) -> None:
        self._say(
            workload,
            ("QuotaReserved", "False", reason, message),
            ("Admitted", "False", "NoReservation", _NO_RESERVATION),
        )
        self._recorder.say(workload, WARNING, reason, message)

    def _admit(self, workload: Object, queue: str, found: quota.Assignment) -> None:
        asked = quota.requests(workload)
        given = [
            {
                "name": item["name"],
                "count": item["count"],
                "flavors": dict(found.flavors[item["name"]]),
                "resourceUsage": {
                    name: quantity.show(asked[item["name"]][name]) for name in found.flavors[item["name"]]
                },
            }
            for item in workload["spec"]["podSets"]
        ]
        said = [
            ("QuotaReserved", "True", "QuotaReserved", f"Quota reserved in ClusterQueue {queue}"),
            ("Admitted", "True", "Admitted", "The workload is admitted"),
        ]
        for kind in ("Evicted", "Preempted"):
            old = find_condition(workload, kind)
            if old.get("status") == "True":
                said.append((kind, "False", "QuotaReserved", f"Previously: {old['message']}"))
        self._say(workload, *said, admission={"clusterQueue": queue, "podSetAssignments": given})
        self._recorder.say(workload, NORMAL, "QuotaReserved", f"Quota reserved in ClusterQueue {queue}")
        self._recorder.say(workload, NORMAL, "Admitted", f"Admitted by ClusterQueue {queue}")

    def _say(self, workload: Object, *said: tuple[str, str, str, str], **admission: Any) -> None:
        """Sets conditions, and with `admission` what was assigned (None takes it away)."""

        def change(obj: Object) -> None:
            status = obj.setdefault("status", {})
            for condition in said:
                set_meta_condition(status.setdefault("conditions", []), self._store.now(), *condition)
            for value in admission.values():
                status["admission"] = value
                if value is None:
                    del status["admission"]

        metadata = workload["metadata"]
        self._store.mutate(KUEUE_WORKLOAD, metadata["namespace"], metadata["name"], change, status=True)


def _waits(workload: Object) -> bool:
    reserved = has_condition(workload, "QuotaReserved")
    return not reserved and workload["spec"].get("active", True) and not has_condition(workload, "Finished")
