"""From a job to its objects on a cluster: ask, try, create, release; or leave nothing behind (ADR 0037).

Plan: facts are asked for and the job is rendered with them. Verify: every object is tried in a dry run, and what comes
back is compared. Execute: the JobSet suspended, then what it owns, then it is released. A step that fails undoes those
before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ktrain.base import contract, ids
from ktrain.base.retry import BusyError
from ktrain.errors import ConfigError, ForbiddenError, KtrainError
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.backends.kubernetes.discover import discover, sample_pods, try_fields
from ktrain.launcher.backends.kubernetes.refusals import AlreadyExistsError, RejectedError
from ktrain.launcher.dropped import Lost, lost_fields
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render import code
from ktrain.launcher.render.access import token_secret
from ktrain.launcher.render.job import Rendered, render
from ktrain.launcher.spec import GangKind, JobSpec

_PLURALS = {
    "ComputeDomain": "computedomains",
    "ConfigMap": "configmaps",
    "JobSet": "jobsets",
    "NetworkPolicy": "networkpolicies",
    "Pod": "pods",
    "PodGroup": "podgroups",
    "ResourceClaimTemplate": "resourceclaimtemplates",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "Secret": "secrets",
    "ServiceAccount": "serviceaccounts",
    "Workload": "workloads",
}
_TOKEN_NBYTES = 32


@dataclass(frozen=True, slots=True)
class Found:
    """What a dry run told of one object."""

    kind: str
    name: str
    lost: tuple[Lost, ...]
    unknown: str | None = None  # why nothing was told

    def lines(self) -> list[str]:
        """For people."""
        what = f"{self.kind} {self.name}"
        if self.unknown is not None:
            return [f"{what}: not tried: {self.unknown}"]
        return [f"{what}: {item.describe()}" for item in self.lost]


@dataclass(frozen=True, slots=True)
class Tried:
    """A job that this cluster would take."""

    spec: JobSpec
    facts: ClusterFacts
    rendered: Rendered
    found: tuple[Found, ...]

    @property
    def warnings(self) -> list[str]:
        """Everything that the cluster lost or would not tell."""
        return [line for item in self.found for line in item.lines()]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was sent."""

    name: str
    namespace: str
    uid: str  # of the JobSet
    released_by: str


def try_job(client: Client, spec: JobSpec, archive: bytes | None = None, facts: ClusterFacts | None = None) -> Tried:
    """Asks the cluster, renders the job for it, and has every object tried; nothing is created.

    Given facts are believed, and what the cluster drops all the same is among the warnings.

    Raises:
        ConfigError: the cluster cannot run the job, or refuses an object; the message is the server's.
        ConflictError: a job of that name is there.
        ForbiddenError: this user may not create what the job needs.
    """
    if facts is None:
        facts = discover(client, spec)
        _expect_jobsets(facts)
        try:
            facts = try_fields(client, spec, facts)
        except AlreadyExistsError as error:
            raise _taken(error, spec) from error
    rendered = render(spec, facts)
    objects = (rendered.jobset, *code.config_maps(spec, archive), token_secret(spec, "dry-run"), *rendered.owned)
    found = [_compared(client, obj) for obj in objects]
    found += [_pod_compared(client, pod) for pod in sample_pods(rendered, spec)]
    return Tried(spec, facts, rendered, tuple(item for item in found if item.lost or item.unknown is not None))


def submit(client: Client, tried: Tried, archive: bytes | None = None) -> Submitted:
    """Creates the job and releases it, unless Kueue is to do that.

    Raises:
        ConflictError: a job of that name is there; it was not touched.
        KtrainError: a step failed; what had been created is gone again, or the error names what is left.
    """
    spec, submission = tried.spec, ids.random_id()
    made: list[Object] = []
    try:
        jobset = _create(client, tried.rendered.jobset, submission, spec)
        made.append(jobset)
        secret = token_secret(spec, ids.random_id(_TOKEN_NBYTES))
        for obj in (*code.config_maps(spec, archive), secret, *tried.rendered.owned):
            made.append(_create(client, _owned_by(jobset, obj), submission, spec))
        if tried.rendered.gang.kind is not GangKind.KUEUE:
            client.patch(object_path(jobset), {"spec": {"suspend": False}})
    except BaseException as error:
        left = _undo(client, made)
        if isinstance(error, BusyError) and not made:
            left = [f"JobSet {spec.name}, if the server made it before it fell silent"]
        if left:
            error.add_note(f"left behind in namespace {spec.namespace}: {', '.join(left)}")
        if isinstance(error, AlreadyExistsError) and not made:
            raise _taken(error, spec) from error
        raise
    return Submitted(spec.name, spec.namespace, jobset["metadata"]["uid"], tried.rendered.released_by)


def object_path(obj: Object) -> str:
    """The path of an object that has a name."""
    return path_of(obj["apiVersion"], _PLURALS[obj["kind"]], obj["metadata"]["namespace"], obj["metadata"]["name"])


def _collection(obj: Object) -> str:
    return path_of(obj["apiVersion"], _PLURALS[obj["kind"]], obj["metadata"]["namespace"])


def _expect_jobsets(facts: ClusterFacts) -> None:
    if facts.serves("jobset.x-k8s.io", "jobsets") is False:
        raise ConfigError("the cluster does not serve jobset.x-k8s.io; have JobSet 0.8 or later installed")


def _taken(error: AlreadyExistsError, spec: JobSpec) -> AlreadyExistsError:
    """The same with what to do: a run goes on from its checkpoints when it is launched again."""
    return AlreadyExistsError(
        f"{error}; wait for it, or end it with `ktrain delete --namespace {spec.namespace} {spec.name}`"
    )


def _compared(client: Client, obj: Object) -> Found:
    """Strictly, so that a misspelt field is refused; an unknown one is named with what it costs."""
    kind, name = obj["kind"], obj["metadata"]["name"]
    try:
        back = client.create(_collection(obj), obj, dry_run=True)
    except AlreadyExistsError:
        return Found(kind, name, (), "an object of that name is there")
    except RejectedError as error:
        raise RejectedError(f"{error}{_costs(client, obj)}") from error
    return Found(kind, name, tuple(lost_fields(obj, back)))


def _pod_compared(client: Client, pod: Object) -> Found:
    """A server drops what its gates are off for in pods alone, however strict it is asked to be."""
    name = pod["metadata"]["generateName"].removesuffix("-dry-run-")
    try:
        back = client.create(_collection(pod), pod, dry_run=True)
    except ForbiddenError as error:
        return Found("Pod", name, (), str(error))
    return Found("Pod", name, tuple(lost_fields(pod, back)))


def _costs(client: Client, obj: Object) -> str:
    """What a refused object would lose where unknown fields are let pass; nothing where it is refused all the same."""
    try:
        back = client.create(_collection(obj), obj, dry_run=True, validation="Ignore")
    except KtrainError:
        return ""
    return "".join(f"\n  {item.describe()}" for item in lost_fields(obj, back))


def _create(client: Client, obj: Object, submission: str, spec: JobSpec) -> Object:
    """Creates it once: a write whose answer was lost is found again by its stamp."""
    about = obj["metadata"]
    stamps = {contract.ANNOTATION_SUBMISSION: submission, contract.ANNOTATION_RUN: spec.run}
    stamped = {**obj, "metadata": {**about, "annotations": {**about.get("annotations", {}), **stamps}}}
    try:
        return client.create(_collection(obj), stamped)
    except (AlreadyExistsError, BusyError):
        there = client.try_get(object_path(obj))
        annotations = {} if there is None else there["metadata"].get("annotations") or {}
        if there is None or annotations.get(contract.ANNOTATION_SUBMISSION) != submission:
            raise
        return there


def _owned_by(jobset: Object, obj: Object) -> Object:
    """With the JobSet as its owner, so that it goes with it."""
    owner = {
        "apiVersion": jobset["apiVersion"],
        "kind": jobset["kind"],
        "name": jobset["metadata"]["name"],
        "uid": jobset["metadata"]["uid"],
        "controller": False,
        "blockOwnerDeletion": False,  # true would need a right on the JobSet's finalizers
    }
    return {**obj, "metadata": {**obj["metadata"], "ownerReferences": [owner]}}


def _undo(client: Client, made: Iterable[Object]) -> list[str]:
    """Deletes what was made, the last first; returns what could not be."""
    left = []
    for obj in reversed(list(made)):
        try:
            client.delete(object_path(obj), obj["metadata"]["uid"])
        except KtrainError as error:
            left.append(f"{obj['kind']} {obj['metadata']['name']} ({error})")
    return left
