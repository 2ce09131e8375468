"""What state a job is in, from what the cluster shows. Pure."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from ktrain.base import contract
from ktrain.launcher.backends.kubernetes.client import Object
from ktrain.launcher.backends.kubernetes.pending import Cause, Reason, condition, holds, reasons
from ktrain.launcher.backends.kubernetes.view import View
from ktrain.launcher.render.common import HEAD, WORKER
from ktrain.launcher.render.groups import KUEUE_QUEUE
from ktrain.launcher.states import FINAL as FINAL
from ktrain.launcher.states import State as State

_EXIT_CODE = re.compile(r"exit code (\d+) ")


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod in short."""

    name: str
    role: str
    index: int
    job: int  # the TPU slice, else 0
    node: str | None
    phase: str
    ready: bool
    restarts: int  # of its containers


@dataclass(frozen=True, slots=True)
class Status:
    """One job at one time."""

    name: str
    namespace: str
    run: str | None
    state: State
    reasons: tuple[Reason, ...]
    restarts: int  # times that all pods were made anew
    exit_code: int | None  # where it is final
    message: str | None  # the cluster's words at its end
    pods: tuple[Pod, ...] | None  # None: may not be read

    def to_value(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)


def assess(view: View) -> Status:
    """The status that a view shows."""
    why = reasons(view)
    state = _state(view, why)
    ended = condition(view.jobset, "Failed") if state is State.FAILED else None
    return Status(
        name=view.name,
        namespace=view.namespace,
        run=run_of(view.jobset),
        state=state,
        reasons=() if state in FINAL else why,
        restarts=int((view.jobset.get("status") or {}).get("restarts", 0)),
        exit_code=_exit_code(view, state),
        message=None if ended is None else str(ended.get("message", "")),
        pods=None if view.pods is None else tuple(sorted((_pod(pod) for pod in view.pods), key=_place)),
    )


def state_of(jobset: Object) -> State:
    """What the JobSet alone tells: `ktrain list` asks for no more."""
    return _state(View(jobset=jobset), ())


def run_of(jobset: Object) -> str | None:
    """The URL of the job's run."""
    return (jobset["metadata"].get("annotations") or {}).get(contract.ANNOTATION_RUN)


def is_ready(pod: Object) -> bool:
    """Whether it is, and is not on its way out."""
    return holds(pod, "Ready") and not pod["metadata"].get("deletionTimestamp")


def role_of(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get(contract.LABEL_ROLE, ""))


def pod_place(pod: Object) -> tuple[int, int]:
    """(Index of its Job, index in its Job)."""
    labels = pod["metadata"].get("labels") or {}
    return int(labels.get("jobset.sigs.k8s.io/job-index", 0)), int(
        labels.get("batch.kubernetes.io/job-completion-index", 0)
    )


def _state(view: View, why: tuple[Reason, ...]) -> State:
    jobset = view.jobset
    if holds(jobset, "Completed"):
        return State.DONE
    is_cancelled = contract.ANNOTATION_CANCELLED in (jobset["metadata"].get("annotations") or {})
    if holds(jobset, "Failed"):
        return State.CANCELLED if is_cancelled or _head_code(view) == contract.EXIT_STOPPED else State.FAILED
    if is_cancelled:
        return State.STOPPING if _num_active(view) or not jobset["spec"].get("suspend") else State.CANCELLED
    if jobset["spec"].get("suspend"):
        if KUEUE_QUEUE not in (jobset["metadata"].get("labels") or {}):
            return State.SUBMITTED
        return State.PREEMPTED if any(reason.cause is Cause.PREEMPTED for reason in why) else State.QUEUED
    return _alive(view)


def _alive(view: View) -> State:
    """Running where all nodes that the job needs are ready; what it had once and lacks now is recovered."""
    status = view.jobset.get("status") or {}
    ready = {item["name"]: int(item.get("ready", 0)) for item in status.get("replicatedJobsStatus") or ()}
    if holds(view.jobset, "RestartingJobSet") or any(holds(job, "FailureTarget") for job in view.jobs or ()):
        return State.RECOVERING
    workers = [pod for pod in view.pods or () if role_of(pod) == WORKER]
    is_running = (
        sum(map(is_ready, workers)) >= _num_needed(view)
        if view.pods is not None
        else all(ready.get(job["name"], 0) >= job.get("replicas", 1) for job in view.jobset["spec"]["replicatedJobs"])
    )
    if is_running:
        return State.RUNNING
    was_there = status.get("restarts", 0) > 0 or any(map(_is_second, view.pods or ()))
    return State.RECOVERING if was_there else State.STARTING


def _is_second(pod: Object) -> bool:
    """Whether it, or the pod before it, has run: a container started again, or it is leaving."""
    if pod["metadata"].get("deletionTimestamp"):
        return True
    return _num_restarts(pod) > 0 or (pod.get("status") or {}).get("phase") == "Failed"


def _num_needed(view: View) -> int:
    found = {job["name"]: job for job in view.jobset["spec"]["replicatedJobs"]}
    worker = found.get(WORKER)
    if worker is None:
        return 1
    spares = int((view.spec or {}).get("spares", 0))
    return int(worker.get("replicas", 1)) * (int(worker["template"]["spec"].get("parallelism", 1)) - spares)


def _num_active(view: View) -> int:
    return sum((pod.get("status") or {}).get("phase") in ("Pending", "Running") for pod in view.pods or ())


def _exit_code(view: View, state: State) -> int | None:
    if state is State.DONE:
        return contract.EXIT_OK
    if state is State.CANCELLED:
        return contract.EXIT_STOPPED
    if state is State.FAILED:
        code = _head_code(view)
        return code if code in contract.EXITS_FINAL else contract.EXIT_FAILED
    return None


def _head_code(view: View) -> int | None:
    """The head's verdict: the exit code of its newest pod, or what its Job says of it."""
    heads = [pod for pod in view.pods or () if role_of(pod) == HEAD]
    for pod in sorted(heads, key=lambda item: str(item["metadata"].get("creationTimestamp")), reverse=True):
        for container in (pod.get("status") or {}).get("containerStatuses") or ():
            ended = (container.get("state") or {}).get("terminated")
            if container["name"] == HEAD and ended is not None:
                return int(ended["exitCode"])
    said = (condition(job, "Failed") for job in view.jobs or ())
    found = (_EXIT_CODE.search(str(item.get("message", ""))) for item in said if item is not None)
    return next((int(match[1]) for match in found if match), None)


def _num_restarts(pod: Object) -> int:
    status = pod.get("status") or {}
    found = (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    return sum(int(item.get("restartCount", 0)) for item in found)


def _pod(pod: Object) -> Pod:
    job, index = pod_place(pod)
    return Pod(
        name=pod["metadata"]["name"],
        role=role_of(pod),
        index=index,
        job=job,
        node=pod["spec"].get("nodeName"),
        phase="Terminating" if pod["metadata"].get("deletionTimestamp") else (pod.get("status") or {}).get("phase", ""),
        ready=is_ready(pod),
        restarts=_num_restarts(pod),
    )


def _place(pod: Pod) -> tuple[str, int, int, str]:
    return pod.role, pod.job, pod.index, pod.name
