"""What is done with a job that is there: wait for it, stop it, take it away."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError
from ktrain.errors import ForbiddenError
from ktrain.launcher.backends.kubernetes.client import Client, path_of
from ktrain.launcher.backends.kubernetes.refusals import ExpiredError
from ktrain.launcher.backends.kubernetes.status import FINAL, Status, assess
from ktrain.launcher.backends.kubernetes.submit import object_path
from ktrain.launcher.backends.kubernetes.view import View, jobset_path, look
from ktrain.launcher.render.groups import KUEUE_QUEUE

_LOOK_S = 10.0  # at most between two looks: pods and queues change without their JobSet
_PAUSE_S = 1.0


def wait(
    client: Client,
    namespace: str,
    name: str,
    *,
    deadline: Deadline,
    observe: Callable[[Status], None] = lambda status: None,
) -> Status:
    """Waits until the job has ended; `observe` is called with every look at it.

    A server that does not answer is asked again until the deadline.

    Raises:
        DeadlineError: it has not ended; the message says what it waits for.
        NotFoundError: there is no such job, or it was deleted meanwhile.
    """
    said = "it could not be asked for"
    while True:
        try:
            view = look(client, namespace, name)
        except BusyError:
            view = None
        if view is not None:
            status = assess(view)
            observe(status)
            if status.state in FINAL:
                return status
            said = "; ".join([status.state.value, *map(str, status.reasons)])
        deadline.check(f"job {name} ({said})")
        if view is None or not _changes(client, view, deadline.sooner(_LOOK_S)):
            client.clock.sleep(min(_PAUSE_S, deadline.remaining_s()))


def cancel(client: Client, namespace: str, name: str, *, deadline: Deadline) -> Status:
    """Ends the job's pods with their grace, in which they save, and keeps the job as it is.

    A job that Kueue admitted is stopped through its Workload: Kueue would release the JobSet again.

    Raises:
        DeadlineError: pods are still there.
        NotFoundError: there is no such job.
    """
    view = look(client, namespace, name)
    if assess(view).state in FINAL:
        return assess(view)
    stamp = datetime.fromtimestamp(client.clock.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    change: dict[str, object] = {"metadata": {"annotations": {contract.ANNOTATION_CANCELLED: stamp}}}
    if KUEUE_QUEUE not in (view.jobset["metadata"].get("labels") or {}):
        change["spec"] = {"suspend": True}
    elif view.workload is None:
        raise ForbiddenError(
            f"job {name}: Kueue's Workload of it may not be read or is not there yet, so that it cannot be stopped; "
            f"`ktrain delete --namespace {namespace} {name}` ends it"
        )
    client.patch(jobset_path(namespace, name), change)
    if view.workload is not None:
        about = view.workload
        path = path_of(about["apiVersion"], "workloads", namespace, about["metadata"]["name"])
        client.patch(path, {"spec": {"active": False}})
    return wait(client, namespace, name, deadline=deadline)


def delete(client: Client, namespace: str, name: str, *, deadline: Deadline) -> None:
    """Takes the job away with all that it owns; the run, with its checkpoints, stays where it is.

    Raises:
        DeadlineError: the server has not ended it yet; it goes on by itself.
        NotFoundError: there is no such job.
    """
    view = look(client, namespace, name)
    uid = view.jobset["metadata"]["uid"]
    path = object_path(view.jobset)
    client.delete(path, uid, propagation="Foreground")
    while True:
        there = client.try_get(path)
        if there is None or there["metadata"]["uid"] != uid:
            return
        deadline.check(f"deletion of job {name}")
        client.clock.sleep(min(_PAUSE_S, deadline.remaining_s()))


def _changes(client: Client, view: View, deadline: Deadline) -> bool:
    """Whether the JobSet changed before the deadline; false too where nobody could tell."""
    fields = f"metadata.name={view.name}"
    try:
        for change in client.watch(jobset_path(view.namespace), view.version, deadline=deadline, fields=fields):
            if change.kind != "BOOKMARK":
                return True
    except (BusyError, ExpiredError):
        return False
    return False
