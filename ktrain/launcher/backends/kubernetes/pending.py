"""Why a job does not run yet, in words: from conditions of Kueue, of groups and pods, and from events. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ktrain.base import contract
from ktrain.launcher.backends.kubernetes.client import Object
from ktrain.launcher.backends.kubernetes.view import View
from ktrain.launcher.render.common import WORKER
from ktrain.launcher.render.groups import KUEUE_QUEUE

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CONFIGURATION = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_QUOTA = re.compile(r"exceeded quota|insufficient (unused )?quota")
_LOST_NODE = "DeletionByTaintManager"


class Cause(StrEnum):
    """What has to change before the job goes on."""

    QUEUE = "queue"
    QUOTA = "quota"
    PREEMPTED = "preempted"
    TOPOLOGY = "topology"
    GANG = "gang"
    UNSCHEDULABLE = "unschedulable"
    GATED = "gated"
    IMAGE = "image"
    CONFIGURATION = "configuration"
    CRASH = "crash"
    NOT_CREATED = "not-created"
    NODE = "node"


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that the job waits for."""

    cause: Cause
    text: str

    def __str__(self) -> str:
        return f"{self.cause.value}: {self.text}"


def reasons(view: View) -> tuple[Reason, ...]:
    """All that is known, the queue first; the same words about several pods are said once, with their number."""
    return (*_queue(view), *_group(view), *_pods(view), *_not_created(view))


def condition(obj: Object | None, kind: str) -> Object | None:
    """The condition of that type."""
    found = ((obj or {}).get("status") or {}).get("conditions") or ()
    return next((item for item in found if item["type"] == kind), None)


def holds(obj: Object | None, kind: str) -> bool:
    """Whether the condition is there and True."""
    found = condition(obj, kind)
    return found is not None and found["status"] == "True"


def _queue(view: View) -> Iterator[Reason]:
    queue = (view.jobset["metadata"].get("labels") or {}).get(KUEUE_QUEUE)
    if queue is None or not view.jobset["spec"].get("suspend"):
        return
    evicted, reserved = condition(view.workload, "Evicted"), condition(view.workload, "QuotaReserved")
    if evicted is not None and evicted["status"] == "True":
        cause = Cause.PREEMPTED if evicted["reason"] == "Preempted" else Cause.QUEUE
        yield Reason(cause, evicted["message"])
    if view.workload is None:
        yield Reason(
            Cause.QUEUE, f"Kueue shows no Workload for queue {queue!r}: is its controller running, may it be read?"
        )
    elif reserved is None:
        yield Reason(Cause.QUEUE, f"Kueue has not looked at queue {queue!r} yet")
    elif reserved["status"] != "True" and reserved["reason"] != "Deactivated":
        yield Reason(_queue_cause(reserved), reserved["message"])
    elif reserved["status"] == "True" and not holds(view.workload, "Admitted"):
        yield Reason(Cause.QUEUE, f"quota is reserved in {queue!r}; an admission check is not passed yet")


def _queue_cause(reserved: Object) -> Cause:
    if reserved["reason"] == "Misconfigured":
        return Cause.QUEUE
    return Cause.TOPOLOGY if "topology" in reserved["message"] else Cause.QUOTA


def _group(view: View) -> Iterator[Reason]:
    """Kubernetes' own group is silent until its pods are all there; Volcano's says it in its phase alone."""
    if view.group is None or view.jobset["spec"].get("suspend"):
        return
    scheduled, phase = condition(view.group, "PodGroupScheduled"), (view.group.get("status") or {}).get("phase")
    if phase in ("Pending", "Inqueue"):
        said = condition(view.group, "Unschedulable")
        yield Reason(Cause.GANG, f"Volcano's group is {phase}" + (f": {said['message']}" if said else ""))
    elif scheduled is not None and scheduled["status"] == "False":
        yield Reason(Cause.GANG, f"{scheduled.get('message') or scheduled['reason']}: its pods do not fit together")
    elif scheduled is None and phase is None and view.pods is not None:
        least = (view.group["spec"].get("schedulingPolicy") or {}).get("gang", {}).get("minCount")
        there = sum(pod["metadata"].get("labels", {}).get(contract.LABEL_ROLE) == WORKER for pod in view.pods)
        if least is not None and there < least:
            yield Reason(Cause.GANG, f"{there} of the {least} pods that start together are there")


def _pods(view: View) -> Iterator[Reason]:
    counts: dict[Reason, int] = {}
    for pod in view.pods or ():
        for reason in _pod(pod):
            counts[reason] = counts.get(reason, 0) + 1
    for reason, count in counts.items():
        yield reason if count == 1 else Reason(reason.cause, f"{reason.text} ({count} pods)")


def _pod(pod: Object) -> Iterator[Reason]:
    status, about = pod.get("status") or {}, pod["metadata"]
    disrupted = condition(pod, "DisruptionTarget")
    if about.get("deletionTimestamp") and disrupted is not None and disrupted.get("reason") == _LOST_NODE:
        node = pod["spec"].get("nodeName", "")
        yield Reason(
            Cause.NODE,
            f"node {node} does not answer, and {about['name']} stays until it does or is marked: kubectl taint nodes "
            f"{node} node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
        )
        return
    if status.get("phase") != "Pending" and status.get("phase") != "Running":
        return
    scheduled = condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        cause = Cause.GATED if scheduled.get("reason") == "SchedulingGated" else Cause.UNSCHEDULABLE
        yield Reason(cause, scheduled.get("message") or "")
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        yield from _container(container)


def _container(status: Object) -> Iterator[Reason]:
    waiting = (status.get("state") or {}).get("waiting")
    if waiting is None:
        return
    reason, message = waiting.get("reason"), waiting.get("message") or ""
    if reason in _IMAGE:
        yield Reason(Cause.IMAGE, f"{status.get('image', '')}: {message or reason}")
    elif reason in _CONFIGURATION:
        yield Reason(Cause.CONFIGURATION, f"container {status['name']}: {message or reason}")
    elif reason == "CrashLoopBackOff":
        ended = (status.get("lastState") or {}).get("terminated") or {}
        yield Reason(Cause.CRASH, f"container {status['name']} ended {_ending(ended)} and is started again later")


def _ending(terminated: Object) -> str:
    code = f"with exit code {terminated.get('exitCode', '?')}"
    return f"{code} ({terminated['reason']})" if terminated.get("reason") not in (None, "Error") else code


def _not_created(view: View) -> Iterator[Reason]:
    """What only events say: that pods or jobs may not be made at all."""
    if view.jobset["spec"].get("suspend") or view.pods:
        return
    failed = [event for event in view.events or () if str(event.get("reason", "")).startswith("FailedCreate")]
    if failed:
        text = str(failed[-1].get("message", ""))
        yield Reason(Cause.QUOTA if _QUOTA.search(text) else Cause.NOT_CREATED, text)
