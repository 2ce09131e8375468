"""A job goes on as another submission: rendered again for what its cluster is now (ADR 0040).

Plan: the last submission is found, on the cluster or in the run. Verify: it is rendered and tried anew, as for any
submission. Execute: ticket, record in the run, the old job deleted with its pods, what it left swept, the new one
sent. Each step can be the last one of a process that dies: the next resume finds where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.urls import without_slash
from ktrain.errors import ConfigError, ConflictError, DeadlineError, ForbiddenError, KtrainError, NotFoundError
from ktrain.launcher.backends.kubernetes import stored
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.backends.kubernetes.find import is_of_run
from ktrain.launcher.backends.kubernetes.status import FINAL, State, Status, assess, run_of, state_of
from ktrain.launcher.backends.kubernetes.submission import Submission, new_sending
from ktrain.launcher.backends.kubernetes.submit import Submitted, Tried, object_path, submit
from ktrain.launcher.backends.kubernetes.view import View, jobset_path, list_jobsets, look
from ktrain.launcher.render import code
from ktrain.launcher.render.access import token_secret

_PAUSE_S = 1.0
_WAITING = (State.QUEUED, State.PREEMPTED)  # in Kueue's hands: it may start at any moment
_LIVE = (State.STARTING, State.RUNNING, State.RECOVERING)
_AT_REST = (State.FAILED, State.CANCELLED, State.SUBMITTED)


@dataclass(frozen=True, slots=True)
class Last:
    """What a job goes on from."""

    namespace: str
    name: str
    submission: Submission
    status: Status | None  # of the job as it is on the cluster; None: it is not there
    jobset: Object | None
    is_cut_off: bool  # a resume began it and did not get to its end
    is_sent: bool = False  # a resume sent it, and was cut off then: there is nothing left to do

    @property
    def ended(self) -> dict[str, Any] | None:
        """How it ended, for the record of the next submission; None: it never came to be."""
        if self.is_cut_off:
            return None
        if self.status is None:
            return {}
        found = self.status
        return {
            "state": found.state.value,
            "exit_code": found.exit_code,
            "message": found.message,
            "restarts": found.restarts,
        }


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was done."""

    sent: Submitted
    unkept: str | None  # why the run has no record of it yet; its head makes up for that


def find_last(
    client: Client,
    namespace: str,
    name: str,
    *,
    run: str | None = None,
    from_run: Callable[[], Submission | None] = lambda: None,
) -> Last:
    """The submission that a job goes on from: of any run, or of the given one alone, since names are used again.

    `from_run` asks the run, where the cluster has none.

    Raises:
        ConflictError: the job, or another one of its run, is live, or may start at any moment; or the job of that name
            is of another run.
        ConfigError: it is done, or its submission cannot be read.
        NotFoundError: nobody knows such a job.
        ForbiddenError: it may not be told.
    """
    view = _try_look(client, namespace, name)
    ticket = stored.try_read_ticket(client, namespace, name)
    if run is not None and view is not None and not is_of_run(view.jobset, run):
        raise ConflictError(_of_another(view, run))
    ticket = ticket if _is_current(ticket, view) and (run is None or is_ticket_of(ticket, run)) else None
    last = _from_ticket(namespace, name, ticket) if view is None else _from_cluster(client, view, ticket)
    if last is None:
        found = from_run()
        if found is None:
            raise NotFoundError(_unknown(namespace, name, view))
        status = None if view is None else assess(view)
        last = Last(namespace, name, found, status, None if view is None else view.jobset, is_cut_off=False)
    if not last.is_sent:
        _expect_alone(client, namespace, name, str(last.submission.spec.get("run")))
    return last


def _from_ticket(namespace: str, name: str, ticket: Submission | None) -> Last | None:
    """Where a resume was cut off between the old job and the new one."""
    return None if ticket is None else Last(namespace, name, ticket, None, None, is_cut_off=True)


def _from_cluster(client: Client, view: View, ticket: Submission | None) -> Last | None:
    """Of a job that is there; None where neither it nor a ticket has its submission."""
    status, there = assess(view), stored.try_read_submission(client, view.jobset)
    is_ours = ticket is not None and stored.stamp_of(view.jobset) == ticket.id
    if is_ours and there is not None and status.state in _LIVE:
        return Last(view.namespace, view.name, there, status, view.jobset, is_cut_off=False, is_sent=True)
    is_leaving = view.jobset["metadata"].get("deletionTimestamp") is not None and status.state is not State.DONE
    if not is_leaving:  # what is being deleted does not live on
        _expect_at_rest(status, cut_off=is_ours)
    has_ended = is_ours and there is not None and status.state in FINAL  # its ticket was not removed, that is all
    if ticket is not None and not has_ended:
        return Last(view.namespace, view.name, ticket, status, view.jobset, is_cut_off=True)
    return None if there is None else Last(view.namespace, view.name, there, status, view.jobset, is_cut_off=False)


def resume(
    client: Client,
    last: Last,
    tried: Tried,
    archive: bytes | None,
    *,
    keep: Callable[[Submission], str | None],
    deadline: Deadline,
) -> Resumed:
    """Replaces the job. `keep` writes the record into the run and returns why it could not.

    Raises:
        DeadlineError: pods of the old job are still there; they are named. Nothing new was made.
        ConflictError: a name is taken by what ktrain did not make, and nothing was changed; or somebody else sends
            this job.
        KtrainError: a step failed; another resume goes on where this one was.
    """
    spec = tried.spec
    needed = (*tried.rendered.owned, *code.config_maps(spec, archive), token_secret(spec, ""))
    _expect_ours(client, needed)
    sending = new_sending(
        spec,
        tried.facts,
        tried.rendered.gang,
        time=client.clock.wall(),
        after=last.submission,
        ended=last.ended,
    )
    try:
        if last.jobset is not None:
            stored.write_ticket(client, spec, sending.submission, archive)
        unkept = keep(sending.submission)
        if last.jobset is not None:
            _end(client, last.jobset, deadline)
        _expect_no_pods(client, spec.namespace, spec.name, deadline)
        _sweep(client, needed, spec.namespace, spec.name, deadline)
        return Resumed(submit(client, tried, archive, sending=sending), unkept)
    except KtrainError as error:
        error.add_note(f"`ktrain resume --namespace {spec.namespace} {spec.name}` goes on from here")
        raise


# Which one is the last


def _try_look(client: Client, namespace: str, name: str) -> View | None:
    try:
        return look(client, namespace, name)
    except NotFoundError:
        return None


def _is_current(ticket: Submission | None, view: View | None) -> bool:
    """Whether a ticket is about the job that is there, or none is; else a later submission made it worthless."""
    if ticket is None or view is None:
        return ticket is not None
    stamp = stored.stamp_of(view.jobset)
    return stamp in (ticket.id, (ticket.before or {}).get("id"))


def _expect_at_rest(status: Status, *, cut_off: bool) -> None:
    """`cut_off`: a resume made it and did not get to its end, so that it is nobody's yet."""
    where = f"--namespace {status.namespace} {status.name}"
    if status.state in _AT_REST or (cut_off and status.state in _WAITING):
        return
    if status.state is State.DONE:
        raise ConfigError(
            f"job {status.name}: it is done, there is nothing to resume; to have it do more, "
            f"`ktrain delete {where}` and launch it again"
        )
    if status.state is State.STOPPING:
        raise ConflictError(f"job {status.name}: its pods still save; `ktrain wait {where}`, then resume it")
    if status.state in _WAITING:
        raise ConflictError(
            f"job {status.name}: it is {status.state.value} and starts by itself; to have it rendered anew, "
            f"`ktrain cancel --backend kubernetes {where}` first"
        )
    raise ConflictError(
        f"job {status.name}: it is {status.state.value}; a job that lives is not replaced: "
        f"`ktrain cancel --backend kubernetes {where}` first, then resume it"
    )


def _expect_alone(client: Client, namespace: str, name: str, run: str) -> None:
    """A run has one job at a time: another one of its name would only wait for the hold of this one, and fail."""
    for jobset in list_jobsets(client, namespace):
        other, state = jobset["metadata"]["name"], state_of(jobset)
        if other != name and is_of_run(jobset, run) and state not in FINAL:
            raise ConflictError(
                f"run {run}: it is live as job {other} ({state.value}); `ktrain cancel --backend kubernetes "
                f"--namespace {namespace} {other}` first"
            )


def is_ticket_of(ticket: Submission | None, run: str) -> bool:
    """Whether it is there, and a resume of that run left it."""
    return ticket is not None and without_slash(str(ticket.spec.get("run"))) == without_slash(run)


def _of_another(view: View, run: str) -> str:
    return (
        f"job {view.name}: the last job of run {run} had this name, which a job of run {run_of(view.jobset)} has now; "
        f"`ktrain delete --namespace {view.namespace} {view.name}` first, or launch the run again under another --name"
    )


def _unknown(namespace: str, name: str, view: View | None) -> str:
    if view is not None:
        return (
            f"job {name}: its specification is not there, since the submission was cut off; `ktrain delete --namespace "
            f"{namespace} {name}` and launch it again"
        )
    return (
        f"namespace {namespace}: there is no job {name!r}; `ktrain list --namespace {namespace}` lists them, and a job "
        "that was deleted is resumed by the URL of its run"
    )


# What is left of the old one


def _end(client: Client, jobset: Object, deadline: Deadline) -> None:
    """Deletes that very JobSet, and returns once it and the pods below it are gone."""
    path, uid = object_path(jobset), jobset["metadata"]["uid"]
    while True:
        there = client.try_get(path)
        if there is None or there["metadata"]["uid"] != uid:
            return
        if not there["metadata"].get("deletionTimestamp") and _try_delete(client, path, there):
            continue
        if deadline.expired():
            raise DeadlineError(_still_there(client, jobset, deadline.total_s))
        client.clock.sleep(min(_PAUSE_S, deadline.remaining_s()))


def _try_delete(client: Client, path: str, jobset: Object) -> bool:
    """Deletes a JobSet as it was just seen: somebody may have let it go on since it was found at rest.

    False where it changed between the two calls, so that it has to be looked at again.

    Raises:
        ConflictError: it is live.
    """
    about = jobset["metadata"]
    if state_of(jobset) in (*_LIVE, State.STOPPING):
        raise ConflictError(f"job {about['name']}: somebody let it go on meanwhile; it was not touched")
    try:
        client.delete(path, about["uid"], propagation="Foreground", version=about["resourceVersion"])
    except ConflictError:
        return False
    return True


def _still_there(client: Client, jobset: Object, total_s: float) -> str:
    about = jobset["metadata"]
    pods = _pods(client, about["namespace"], about["name"])
    named = "its pods may not be read" if pods is None else ", ".join(_place(pod) for pod in pods) or "no pod of it"
    return (
        f"job {about['name']}: it was not gone within {total_s:g} s; still there: {named}. A pod on a node that does "
        "not answer stays until that node is back or is marked: kubectl taint nodes NODE "
        "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
    )


def _expect_no_pods(client: Client, namespace: str, name: str, deadline: Deadline) -> None:
    """Pods of a job whose JobSet somebody deleted before; where they may not be read, the deletion's word is all."""
    while True:
        pods = _pods(client, namespace, name)
        if not pods:
            return
        if deadline.expired():
            raise DeadlineError(
                f"job {name}: pods of it are there still: {', '.join(map(_place, pods))}; wait for them, or delete them"
            )
        client.clock.sleep(min(_PAUSE_S, deadline.remaining_s()))


def _pods(client: Client, namespace: str, name: str) -> tuple[Object, ...] | None:
    try:
        found = client.list(path_of("v1", "pods", namespace), labels=f"{contract.LABEL_RUN}={name}").items
    except ForbiddenError:
        return None
    ended = ("Succeeded", "Failed")
    return tuple(pod for pod in found if (pod.get("status") or {}).get("phase") not in ended)


def _place(pod: Object) -> str:
    node = pod["spec"].get("nodeName")
    return f"{pod['metadata']['name']}{f' on node {node}' if node else ''}"


def _expect_ours(client: Client, needed: Iterable[Object]) -> None:
    for obj in needed:
        found = client.try_get(object_path(obj))
        if found is not None and stored.stamp_of(found) is None:
            raise ConflictError(
                f"{obj['kind']} {obj['metadata']['name']}: there is one that ktrain did not make; rename or remove it"
            )


def _sweep(client: Client, needed: Iterable[Object], namespace: str, name: str, deadline: Deadline) -> None:
    """Removes objects of the old job whose names the new one needs, and which the collector has not got to yet."""
    for obj in needed:
        path = object_path(obj)
        found = client.try_get(path)
        if found is not None and _is_left_over(client, found, namespace, name):
            client.delete(path, found["metadata"]["uid"])
            _expect_gone(client, path, found["metadata"]["uid"], deadline)


def _expect_gone(client: Client, path: str, uid: str, deadline: Deadline) -> None:
    while (there := client.try_get(path)) is not None and there["metadata"]["uid"] == uid:
        deadline.check(f"removal of {path}, which was of the old job")
        client.clock.sleep(min(_PAUSE_S, deadline.remaining_s()))


def _is_left_over(client: Client, obj: Object, namespace: str, name: str) -> bool:
    """Whether ktrain made it for a JobSet that is gone. The JobSet is asked for after its object was seen: it was
    there before that, so that one that is not there now does not come again."""
    owners: list[Mapping[str, Any]] = obj["metadata"].get("ownerReferences") or []
    if stored.stamp_of(obj) is None or not owners or any(o["kind"] != "JobSet" or o["name"] != name for o in owners):
        return False
    jobset = client.try_get(jobset_path(namespace, name))
    return jobset is None or all(owner["uid"] != jobset["metadata"]["uid"] for owner in owners)
