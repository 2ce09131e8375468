"""From a job to its objects on a cluster: ask, try, create, release; or leave nothing behind (ADR 0037).

Plan: facts are asked for and the job is rendered with them. Verify: every object is tried in a dry run, and what comes
back is compared. Execute: the JobSet suspended, then what it owns, then it is released. A step that fails undoes those
before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ktrain.base import ids
from ktrain.base.retry import BusyError
from ktrain.errors import ConfigError, ForbiddenError, KtrainError
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.backends.kubernetes.discover import discover, sample_pods, try_fields
from ktrain.launcher.backends.kubernetes.refusals import AlreadyExistsError, RejectedError
from ktrain.launcher.backends.kubernetes.stored import drop_ticket, stamp_of, stamps, with_submission
from ktrain.launcher.backends.kubernetes.submission import Sending, Submission, new_sending
from ktrain.launcher.dropped import Lost, lost_fields
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.render import code
from ktrain.launcher.render.access import token_secret
from ktrain.launcher.render.job import Rendered, render
from ktrain.launcher.spec import MOST_NAME, GangKind, JobSpec

PLURALS = {
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
    submission: Submission
    left: str | None = None  # a ticket that could not be removed, and why


def try_job(client: Client, spec: JobSpec, archive: bytes | None = None, facts: ClusterFacts | None = None) -> Tried:
    """Asks the cluster, renders the job for it, and has every object tried; nothing is created.

    Given facts are believed, and what the cluster drops all the same is among the warnings.

    Raises:
        ConfigError: the cluster cannot run the job, or refuses an object; the message is the server's.
        ConflictError: a job of that name is there.
        ForbiddenError: this user may not create what the job needs.
    """
    if facts is None:
        facts = _ask(client, spec)
    rendered = render(spec, facts)
    return Tried(spec, facts, rendered, _try_objects(client, spec, rendered, archive))


def try_successor(client: Client, spec: JobSpec, archive: bytes | None = None) -> Tried:
    """Like `try_job`, where a job of that name may be there and is to be replaced: tried under a name beside it."""
    mark = f"-{ids.random_id(3)}"
    trial = replace(spec, name=f"{spec.name[: MOST_NAME - len(mark)].rstrip('-')}{mark}")
    facts = _ask(client, trial)
    found = _try_objects(client, trial, render(trial, facts), archive)
    named = tuple(replace(item, name=item.name.replace(trial.name, spec.name, 1)) for item in found)
    return Tried(spec, facts, render(spec, facts), named)


def submit(client: Client, tried: Tried, archive: bytes | None = None, *, sending: Sending | None = None) -> Submitted:
    """Creates the job and releases it, unless Kueue is to do that. Without `sending` it is the first of its job.

    Raises:
        ConflictError: a job of that name is there; it was not touched.
        KtrainError: a step failed; what had been created is gone again, or the error names what is left.
    """
    spec = tried.spec
    if sending is None:
        sending = new_sending(spec, tried.facts, tried.rendered.gang, time=client.clock.wall())
    made: list[Object] = []
    try:
        jobset = _create(client, tried.rendered.jobset, sending.submission)
        made.append(jobset)
        secret = token_secret(spec, sending.token)
        for obj in (*code.config_maps(spec, archive), secret, *tried.rendered.owned):
            whole = with_submission(obj, sending.submission)
            made.append(_create(client, _owned_by(jobset, whole), sending.submission))
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
    left_ticket = _try_drop_ticket(client, spec)
    uid = jobset["metadata"]["uid"]
    return Submitted(spec.name, spec.namespace, uid, tried.rendered.released_by, sending.submission, left_ticket)


def object_path(obj: Object) -> str:
    """The path of an object that has a name."""
    return path_of(obj["apiVersion"], PLURALS[obj["kind"]], obj["metadata"]["namespace"], obj["metadata"]["name"])


def _collection(obj: Object) -> str:
    return path_of(obj["apiVersion"], PLURALS[obj["kind"]], obj["metadata"]["namespace"])


def _ask(client: Client, spec: JobSpec) -> ClusterFacts:
    """What the cluster has and keeps, as a dry run of this job tells."""
    facts = discover(client, spec)
    _expect_jobsets(facts)
    try:
        return try_fields(client, spec, facts)
    except AlreadyExistsError as error:
        raise _taken(error, spec) from error


def _try_objects(client: Client, spec: JobSpec, rendered: Rendered, archive: bytes | None) -> tuple[Found, ...]:
    objects = (rendered.jobset, *code.config_maps(spec, archive), token_secret(spec, "dry-run"), *rendered.owned)
    found = [_compared(client, obj) for obj in objects]
    found += [_pod_compared(client, pod) for pod in sample_pods(rendered, spec)]
    return tuple(item for item in found if item.lost or item.unknown is not None)


def _try_drop_ticket(client: Client, spec: JobSpec) -> str | None:
    """Of an older submission of this name, which this one takes the place of; why it is still there, if it is."""
    try:
        drop_ticket(client, spec.namespace, spec.name)
    except KtrainError as error:
        return str(error)
    return None


def _expect_jobsets(facts: ClusterFacts) -> None:
    if facts.serves("jobset.x-k8s.io", "jobsets") is False:
        raise ConfigError("the cluster does not serve jobset.x-k8s.io; have JobSet 0.8 or later installed")


def _taken(error: AlreadyExistsError, spec: JobSpec) -> AlreadyExistsError:
    """The same with what to do: a run goes on from its checkpoints when it is launched again."""
    return AlreadyExistsError(
        f"{error}; wait for it, have it go on with `ktrain resume --namespace {spec.namespace} {spec.name}`, or end it "
        f"with `ktrain delete --namespace {spec.namespace} {spec.name}`"
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


def _create(client: Client, obj: Object, submission: Submission) -> Object:
    """Creates it once: a write whose answer was lost is found again by its stamp."""
    about = obj["metadata"]
    annotations = {**about.get("annotations", {}), **stamps(submission)}
    stamped = {**obj, "metadata": {**about, "annotations": annotations}}
    try:
        return client.create(_collection(obj), stamped)
    except (AlreadyExistsError, BusyError):
        there = client.try_get(object_path(obj))
        if there is None or stamp_of(there) != submission.id:
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
