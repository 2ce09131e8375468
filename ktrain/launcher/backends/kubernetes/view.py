"""Everything of one job that a cluster shows at one time. What may not be read is None, which is not "nothing"."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ktrain.base import contract
from ktrain.errors import ForbiddenError, NotFoundError
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.gang import KUEUE_GROUP, NATIVE_GROUP, VOLCANO_GROUP
from ktrain.launcher.render.groups import KUEUE_QUEUE
from ktrain.launcher.render.job import JOBSET_VERSION

_T = TypeVar("_T")
_MANAGED = "app.kubernetes.io/managed-by=ktrain"
_KUEUE_VERSIONS = ("v1beta2", "v1beta1")
_NATIVE_VERSIONS = ("v1beta1", "v1alpha3", "v1alpha2")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Objects as the server sent them."""

    jobset: Object
    jobs: tuple[Object, ...] | None = None
    pods: tuple[Object, ...] | None = None
    workload: Object | None = None  # Kueue's
    group: Object | None = None  # the PodGroup of the workers, Kubernetes' own or Volcano's
    events: tuple[Object, ...] | None = None
    spec: dict[str, Any] | None = None  # as it is stored beside the job
    version: str = ""  # from which the JobSet may be watched

    @property
    def name(self) -> str:
        return str(self.jobset["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.jobset["metadata"]["namespace"])


def jobset_path(namespace: str | None, name: str | None = None) -> str:
    """The path of a job's JobSet, or of all."""
    return path_of(JOBSET_VERSION, "jobsets", namespace, name)


def look(client: Client, namespace: str, name: str) -> View:
    """The job as it is now.

    Raises:
        NotFoundError: there is no job of this name.
        ForbiddenError: JobSets may not be read here.
    """
    try:
        jobset = client.get(jobset_path(namespace, name))
    except NotFoundError as error:
        raise NotFoundError(
            f"namespace {namespace}: there is no job {name!r}; `ktrain list --namespace {namespace}` lists them"
        ) from error
    mine = f"{contract.LABEL_RUN}={name}"
    uid = jobset["metadata"]["uid"]
    pods = _told(lambda: client.list(path_of("v1", "pods", namespace), labels=mine).items)
    jobs = _told(lambda: client.list(path_of("batch/v1", "jobs", namespace)).items)
    return View(
        jobset=jobset,
        jobs=None if jobs is None else tuple(job for job in jobs if _owner(job) == uid),
        pods=pods,
        workload=_workload(client, namespace, uid) if KUEUE_QUEUE in (jobset["metadata"].get("labels") or {}) else None,
        group=_group(client, jobset, namespace, name),
        events=_events(client, namespace, name),
        spec=_spec(client, namespace, name),
        version=str(jobset["metadata"].get("resourceVersion", "")),
    )


def list_jobsets(client: Client, namespace: str | None) -> tuple[Object, ...]:
    """The JobSets that ktrain made, in one namespace or all. Raises NotFoundError, ForbiddenError."""
    return client.list(jobset_path(namespace), labels=_MANAGED).items


def events_of(client: Client, namespace: str, name: str) -> tuple[Object, ...]:
    """What the cluster's controllers said of a job, the oldest first. Raises ForbiddenError."""
    found = client.list(path_of("v1", "events", namespace)).items
    return tuple(sorted((event for event in found if _concerns(event, name)), key=when))


def when(event: Object) -> str:
    """The time of an event: newer reporters set `eventTime` alone, older ones the other two."""
    return str(event.get("eventTime") or event.get("lastTimestamp") or event.get("firstTimestamp") or "")


def _told(ask: Callable[[], _T]) -> _T | None:
    try:
        return ask()
    except (ForbiddenError, NotFoundError):
        return None


def _owner(obj: Object) -> str | None:
    owners = obj["metadata"].get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)


def _workload(client: Client, namespace: str, uid: str) -> Object | None:
    for version in _KUEUE_VERSIONS:
        path = path_of(f"{KUEUE_GROUP}/{version}", "workloads", namespace)
        found = _told(lambda: client.list(path).items)  # noqa: B023 -- called at once
        if found is not None:
            return next((item for item in found if _owner(item) == uid), None)
    return None


def _group(client: Client, jobset: Object, namespace: str, name: str) -> Object | None:
    """The workers' group, where their pods name one."""
    text = json.dumps(jobset["spec"])
    if "schedulingGroup" in text:
        versions = [f"{NATIVE_GROUP}/{version}" for version in _NATIVE_VERSIONS]
    elif '"volcano"' in text:
        versions = [f"{VOLCANO_GROUP}/v1beta1"]
    else:
        return None
    paths = [path_of(version, "podgroups", namespace, f"{name}-worker") for version in versions]
    found = (_told(lambda: client.get(path)) for path in paths)  # noqa: B023 -- called at once
    return next((item for item in found if item is not None), None)


def _events(client: Client, namespace: str, name: str) -> tuple[Object, ...] | None:
    return _told(lambda: events_of(client, namespace, name))


def _concerns(event: Object, name: str) -> bool:
    """Whether it is about the JobSet, one of its jobs or pods, or Kueue's Workload of it."""
    about = str((event.get("involvedObject") or {}).get("name", ""))
    ours = rf"{name}|{name}-(head|worker)-\d+(-\d+-\w+)?|jobset-{name}-\w{{5}}"
    return re.fullmatch(ours, about) is not None


def _spec(client: Client, namespace: str, name: str) -> dict[str, Any] | None:
    stored = _told(lambda: client.get(path_of("v1", "configmaps", namespace, name)))
    text = None if stored is None else (stored.get("data") or {}).get(contract.POD_JOB_FILE.rpartition("/")[2])
    return None if text is None else dict(json.loads(text))
