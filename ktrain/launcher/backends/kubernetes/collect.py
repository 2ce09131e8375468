"""What ktrain left on a cluster and nobody needs: finished jobs, and objects whose job is gone (ADR 0040).

Plan, then carry out. Nothing is taken that ktrain did not make, that is younger than was asked for, or of which
something cannot be told: 403 is not "absent", and a job that may yet be resumed stays until its run has its record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ktrain.base import contract, ids
from ktrain.errors import ForbiddenError, KtrainError, NotFoundError
from ktrain.launcher.backends.kubernetes import stored
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.backends.kubernetes.pending import condition
from ktrain.launcher.backends.kubernetes.status import FINAL, State, assess, run_of, state_of
from ktrain.launcher.backends.kubernetes.stored import TICKET_SUFFIX, stamp_of
from ktrain.launcher.backends.kubernetes.submit import PLURALS
from ktrain.launcher.backends.kubernetes.view import list_jobsets, look
from ktrain.launcher.gang import COSCHEDULING_GROUP, NATIVE_GROUP, VOLCANO_GROUP

_MANAGED = "app.kubernetes.io/managed-by=ktrain"
_RBAC = "rbac.authorization.k8s.io/v1"
_NATIVE = tuple(f"{NATIVE_GROUP}/{version}" for version in ("v1beta1", "v1alpha3", "v1alpha2"))
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (  # and the versions in which it may be served
    ("ConfigMap", ("v1",)),
    ("Secret", ("v1",)),
    ("ServiceAccount", ("v1",)),
    ("Role", (_RBAC,)),
    ("RoleBinding", (_RBAC,)),
    ("NetworkPolicy", ("networking.k8s.io/v1",)),
    ("ResourceClaimTemplate", ("resource.k8s.io/v1",)),
    ("ComputeDomain", ("resource.nvidia.com/v1beta1",)),
    ("Workload", _NATIVE),
    ("PodGroup", _NATIVE),
    ("PodGroup", (f"{VOLCANO_GROUP}/v1beta1",)),
    ("PodGroup", (f"{COSCHEDULING_GROUP}/v1alpha1",)),
)
_CODE_TICKET = re.compile(rf"(.+){TICKET_SUFFIX}-code-[0-9a-f]{{10}}(-\d+)?")

HasRecord = Callable[[str, str], bool]  # (URL of a run, id of a submission); raises KtrainError where it cannot tell


@dataclass(frozen=True, slots=True)
class Removal:
    """One object that is to go."""

    kind: str
    namespace: str
    name: str
    uid: str
    path: str
    why: str
    age_s: float

    def to_value(self) -> dict[str, Any]:
        """As a JSON value."""
        return {"kind": self.kind, "namespace": self.namespace, "name": self.name, "why": self.why, "age_s": self.age_s}

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}: {self.why}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What would go, what stays and why, and what could not be looked at."""

    removals: tuple[Removal, ...]
    spared: tuple[tuple[str, str], ...]  # (what, why)
    unknown: tuple[str, ...]


@dataclass(slots=True)
class _Search:
    """One look at a cluster, while it is made."""

    client: Client
    older_s: float
    has_record: HasRecord
    removals: list[Removal] = field(default_factory=list)
    spared: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    nows: dict[str, float | None] = field(default_factory=dict)

    def now(self, namespace: str) -> float | None:
        """The server's own time, by which all ages are told; None where it does not say."""
        if namespace not in self.nows:
            self.nows[namespace] = _server_time(self.client, namespace)
        return self.nows[namespace]

    def spare(self, obj: Object, why: str) -> None:
        about = obj["metadata"]
        self.spared.append((f"{obj['kind']} {about['namespace']}/{about['name']}", why))

    def take(self, obj: Object, path: str, since: str | None, why: str) -> None:
        """Plans the removal, if the object is known to be old enough."""
        about = obj["metadata"]
        now, then = self.now(about["namespace"]), _seconds(since)
        if now is None or then is None:
            self.spare(obj, "its age cannot be told")
        elif now - then >= self.older_s:
            names = about["namespace"], about["name"], about["uid"]
            self.removals.append(Removal(obj["kind"], *names, path, why, now - then))

    def is_in_run(self, obj: Object, run: str | None, stamp: str | None) -> bool:
        """Whether the run has the record of the submission, so that it can be resumed from there."""
        if run is None or stamp is None:
            self.spare(obj, "it is not known of which run it is")
            return False
        try:
            found = self.has_record(run, stamp)
        except KtrainError as error:
            self.spare(obj, f"it cannot be told whether the run can do without it: {error}")
            return False
        if not found:
            self.spare(obj, f"the run {run} has no record of it, so that only this can be resumed")
        return found


def plan_collection(client: Client, namespace: str | None, *, older_s: float, has_record: HasRecord) -> Plan:
    """What would go, in one namespace or in all. Changes nothing.

    Raises:
        ForbiddenError: JobSets may not be listed, so that nothing can be told.
    """
    search = _Search(client, older_s, has_record)
    things = list(_made_by_ktrain(client, namespace, search))
    jobsets = {_key(jobset): jobset for jobset in list_jobsets(client, namespace)}  # after what they own
    for jobset in jobsets.values():
        _consider_job(search, jobset)
    tickets = {_key(obj) for obj, _ in things if _is_ticket(obj)}
    for obj, path in things:
        _consider(search, obj, path, jobsets, tickets)
    return Plan(tuple(search.removals), tuple(search.spared), tuple(search.unknown))


def carry_out(client: Client, removals: Iterable[Removal]) -> tuple[list[Removal], list[tuple[Removal, KtrainError]]]:
    """Deletes what was planned, each by its uid; returns what went, and what could not."""
    gone: list[Removal] = []
    failed: list[tuple[Removal, KtrainError]] = []
    for removal in removals:
        try:
            client.delete(removal.path, removal.uid)
        except KtrainError as error:
            failed.append((removal, error))
        else:
            gone.append(removal)
    return gone, failed


def _key(obj: Object) -> tuple[str, str]:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]


def _path(obj: Object) -> str:
    namespace, name = _key(obj)
    return path_of(obj["apiVersion"], PLURALS[obj["kind"]], namespace, name)


def _made_by_ktrain(client: Client, namespace: str | None, search: _Search) -> Iterator[tuple[Object, str]]:
    """Objects that bear our labels and a submission's stamp, with their paths."""
    for kind, versions in _KINDS:
        for version in versions:
            try:
                found = client.list(path_of(version, PLURALS[kind], namespace), labels=_MANAGED).items
            except NotFoundError:
                continue  # not served in that version
            except ForbiddenError as error:
                search.unknown.append(f"{kind} of {version} were not looked at: {error}")
                break
            for item in found:
                obj = {**item, "apiVersion": version, "kind": kind}  # a list's items may lack both
                if stamp_of(obj) is not None and contract.LABEL_RUN in (obj["metadata"].get("labels") or {}):
                    yield obj, _path(obj)
            break


# Jobs


def _consider_job(search: _Search, jobset: Object) -> None:
    is_leaving = jobset["metadata"].get("deletionTimestamp") is not None
    if is_leaving or stamp_of(jobset) is None or state_of(jobset) not in FINAL:
        return
    obj = {**jobset, "kind": "JobSet", "apiVersion": jobset.get("apiVersion", "jobset.x-k8s.io/v1alpha2")}
    try:
        view = look(search.client, *_key(jobset))
    except NotFoundError:
        return  # it has gone meanwhile
    state = assess(view).state
    if view.pods is None and state is State.CANCELLED:
        search.spare(obj, "it is cancelled, and whether its pods have ended may not be read")
        return
    ends = {State.DONE: "Completed", State.FAILED: "Failed", State.CANCELLED: "Suspended"}
    if state not in ends or view.jobset["metadata"]["uid"] != jobset["metadata"]["uid"]:
        return
    since = (condition(view.jobset, ends[state]) or condition(view.jobset, "Failed") or {}).get("lastTransitionTime")
    if state is State.DONE or search.is_in_run(obj, run_of(jobset), stamp_of(jobset)):
        search.take(obj, _path(obj), since, f"the job is {state.value}")


# What jobs own


def _is_ticket(obj: Object) -> bool:
    about = obj["metadata"]
    return bool(obj["kind"] == "ConfigMap" and about["name"] == about["labels"][contract.LABEL_RUN] + TICKET_SUFFIX)


def _consider(
    search: _Search,
    obj: Object,
    path: str,
    jobsets: dict[tuple[str, str], Object],
    tickets: set[tuple[str, str]],
) -> None:
    about = obj["metadata"]
    job = about["namespace"], about["labels"][contract.LABEL_RUN]
    since, jobset = about.get("creationTimestamp"), jobsets.get(job)
    code = _CODE_TICKET.fullmatch(about["name"])
    if _is_ticket(obj):
        _consider_ticket(search, obj, path, jobset)
    elif code is not None and code[1] == job[1] and not about.get("ownerReferences"):
        if (job[0], job[1] + TICKET_SUFFIX) not in tickets:
            search.take(obj, path, since, "code of a resume that is over")
    elif _owner_is_gone(obj, job[1], jobset):
        search.take(obj, path, since, f"its JobSet {job[1]} is gone")


def _owner_is_gone(obj: Object, job: str, jobset: Object | None) -> bool:
    """Whether all of its owners are JobSets of its job that are no more; a uid does not come again."""
    owners = obj["metadata"].get("ownerReferences") or []
    there = None if jobset is None else jobset["metadata"]["uid"]
    return bool(owners) and all(
        owner["kind"] == "JobSet" and owner["name"] == job and owner["uid"] != there for owner in owners
    )


def _consider_ticket(search: _Search, obj: Object, path: str, jobset: Object | None) -> None:
    """It is the only record on the cluster, unless a job of its name has one."""
    why, since = "a resume was cut off, and its record lies elsewhere", obj["metadata"].get("creationTimestamp")
    if jobset is not None:
        try:
            beside = stored.try_read_submission(search.client, jobset)
        except KtrainError as error:
            search.spare(obj, f"the record of its job cannot be read: {error}")
            return
        if beside is not None:
            search.take(obj, path, since, why)
            return
    if search.is_in_run(obj, run_of(obj), stamp_of(obj)):
        search.take(obj, path, since, why)


# Time


def _server_time(client: Client, namespace: str) -> float | None:
    """What the server writes as the time of a creation that is only tried: clocks of two hosts are never compared."""
    about = {"name": f"ktrain-time-{ids.random_id()}", "namespace": namespace}
    tried: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about}
    try:
        made = client.create(path_of("v1", "configmaps", namespace), tried, dry_run=True)
    except ForbiddenError:
        return None
    return _seconds(made["metadata"].get("creationTimestamp"))


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
