"""The gang test: a group that fits runs whole, one that does not fit does not run at all.

The pods are placed by the marks that a real job's would bear: a JobSet is rendered and its containers are exchanged for
one that sleeps. What does not fit is never more than one node, or the queue's quota, has: nothing else is taken away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from ktrain.base.clock import Deadline
from ktrain.errors import ForbiddenError, KtrainError
from ktrain.launcher import quantity
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.backends.kubernetes.discover import discover, try_fields
from ktrain.launcher.backends.kubernetes.pending import reasons
from ktrain.launcher.backends.kubernetes.view import look
from ktrain.launcher.cluster.fitting import HOST_LABEL, Room, taints
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.doctor.looks import Looks, condition
from ktrain.launcher.doctor.scratch import Scratch
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.gang import KUEUE_GROUP, Gang, choose
from ktrain.launcher.quantity import MIB
from ktrain.launcher.render.common import CONTAINER_SECURITY, WORKER
from ktrain.launcher.render.job import Rendered, render
from ktrain.launcher.spec import Bytes, GangKind, JobSpec, Memory, Placement, Resources

CHECK = "gang test"  # as conformance.toml names it
_PODS = 2
_POLL_S = 0.5
_MOST_OF_IT = Fraction(6, 10)  # of what is free: one such pod fits, two do not
_LIVES_S = 600  # of a test pod, should nobody remove it
_PLURALS = {"PodGroup": "podgroups", "Workload": "workloads"}
_REMEDY = "look at the scheduler's pods and logs; choose another mechanism with --gang"


@dataclass(frozen=True, slots=True)
class Terms:
    """How long the tests take and what their pods run."""

    image: str = "busybox:1.37"  # needs `sh` and `sleep`
    fits_s: float = 180.0  # until all pods of a group that fits run
    settle_s: float = 20.0  # that pods of a group that does not fit are watched
    clear_s: float = 120.0  # until everything is gone


@dataclass(frozen=True, slots=True)
class _Limit:
    """What a group must not fit into: CPUs of one node, or of a queue."""

    cpu: Fraction
    host: str | None
    said: str


def probe_spec(namespace: str, job: JobSpec | None) -> JobSpec:
    """A small job with the placement of the real one, as far as it chooses who admits its pods."""
    placement = Placement()
    if job is not None:
        wanted = job.placement
        placement = Placement(queue=wanted.queue, gang=wanted.gang, scheduler=wanted.scheduler)
    return JobSpec(
        name="ktrain-doctor",
        namespace=namespace,
        run="s3://ktrain-doctor/none",  # never opened: no container of ktrain's runs
        image="none",
        command=("none",),
        nodes=_PODS,
        memory=Memory(state=Bytes(MIB)),
        resources=Resources(memory=Bytes(64 * MIB), shm=Bytes(MIB)),
        placement=replace(placement, share_nodes=True),
    )


def try_gang(looks: Looks, scratch: Scratch, job: JobSpec | None, terms: Terms) -> Iterator[Finding]:
    """Both halves of the test, of the mechanism that the job would get."""
    spec = probe_spec(looks.namespace, job)
    facts = try_fields(looks.client, spec, discover(looks.client, spec))
    gang = choose(spec, facts)
    if gang.kind is GangKind.BARRIER:
        said = "there is no gang scheduler to be tested: pods are scheduled one by one"
        yield Finding(CHECK, Outcome.WARNING, said, "the job's own barrier holds them together", _REMEDY)
        return
    if gang.kind is GangKind.KUEUE and gang.queue is not None:
        if not _takes_any_namespace(looks, gang.queue):
            said = (
                f"the ClusterQueue of {gang.queue} takes jobs of chosen namespaces alone: none can be tested in another"
            )
            yield Finding(CHECK, Outcome.UNKNOWN, said)
            return
        _make_queue(looks, scratch, gang.queue)
    inside = replace(spec, namespace=scratch.name)
    fits = _try_fit(scratch, replace(inside, name="fits"), facts, terms)
    if fits.outcome is not Outcome.OK:
        yield fits
        return
    yield _try_not_fit(looks, scratch, replace(inside, name="too-much"), facts, gang, terms, fits.evidence)


def _takes_any_namespace(looks: Looks, name: str) -> bool:
    """Whether our namespace can use the queue; where its ClusterQueue may not be read, it is tried."""
    try:
        return bool(_cluster_queue(looks, name)["spec"].get("namespaceSelector") == {})
    except ForbiddenError:
        return True


def _cluster_queue(looks: Looks, name: str) -> Object:
    """The ClusterQueue of a LocalQueue of the job's namespace."""
    version = looks.version_of(KUEUE_GROUP, "localqueues")
    local = looks.get(path_of(version, "localqueues", looks.namespace, name))
    return looks.get(path_of(version, "clusterqueues", None, local["spec"]["clusterQueue"]))


def _make_queue(looks: Looks, scratch: Scratch, name: str) -> None:
    """The queue of the job's namespace, in ours: on the same ClusterQueue."""
    version = looks.version_of(KUEUE_GROUP, "localqueues")
    local = looks.get(path_of(version, "localqueues", looks.namespace, name))
    above = {"clusterQueue": local["spec"]["clusterQueue"]}
    queue = {"apiVersion": version, "kind": "LocalQueue", "metadata": {"name": name}, "spec": above}
    scratch.create("localqueues", queue)


# A group that fits


def _try_fit(scratch: Scratch, spec: JobSpec, facts: ClusterFacts, terms: Terms) -> Finding:
    client = scratch.client
    rendered = _sleeping(spec, facts, terms, cpu=Fraction(1, 100), host=None)
    deadline = Deadline.after(terms.fits_s, client.clock)
    began_s = client.clock.monotonic()
    jobset = _submit(scratch, rendered)
    try:
        while True:
            pods = _pods(scratch, spec.name)
            running = [pod for pod in pods if _phase(pod) in ("Running", "Succeeded")]
            if len(running) == _PODS:
                took_s = client.clock.monotonic() - began_s
                said = f"{rendered.gang.kind.value}: a group of {_PODS} pods ran whole after {took_s:.0f} s"
                return Finding(CHECK, Outcome.OK, said)
            if deadline.expired():
                return _never_ran(client, spec, rendered.gang, len(running), terms)
            client.clock.sleep(_POLL_S)
    finally:
        scratch.remove("jobsets", jobset, Deadline.after(terms.clear_s, client.clock))


def _never_ran(client: Client, spec: JobSpec, gang: Gang, running: int, terms: Terms) -> Finding:
    try:
        why = "; ".join(str(reason) for reason in reasons(look(client, spec.namespace, spec.name)))
    except KtrainError as error:
        why = str(error)
    said = (
        f"{gang.kind.value}: {running} of {_PODS} small pods run after {terms.fits_s:g} s: {why or 'no reason is told'}"
    )
    return Finding(CHECK, Outcome.FAILED, said, "no job under this mechanism starts here", _REMEDY)


# A group that does not fit


def _try_not_fit(  # noqa: PLR0913 -- one test with all that it needs
    looks: Looks, scratch: Scratch, spec: JobSpec, facts: ClusterFacts, gang: Gang, terms: Terms, so_far: str
) -> Finding:
    client = scratch.client
    limit = _limit(looks, gang)
    if isinstance(limit, str):
        return Finding(CHECK, Outcome.UNKNOWN, f"{so_far}; a group that does not fit was not tried: {limit}")
    cpu = limit.cpu * _MOST_OF_IT
    rendered = _sleeping(spec, facts, terms, cpu=cpu, host=limit.host)
    deadline = Deadline.after(terms.settle_s, client.clock)
    jobset = _submit(scratch, rendered)
    try:
        while not deadline.expired():
            started = [pod for pod in _pods(scratch, spec.name) if pod["spec"].get("nodeName")]
            if started:
                said = f"{len(started)} of {_PODS} pods of a group that does not fit ({limit.said}) got a node"
                cost = "jobs hold nodes and do nothing, and two of them can keep each other from starting"
                return Finding(CHECK, Outcome.FAILED, f"{so_far}; {said}", cost, _REMEDY)
            client.clock.sleep(_POLL_S)
    finally:
        scratch.remove("jobsets", jobset, Deadline.after(terms.clear_s, client.clock))
    none = f"of a group of {_PODS} that does not fit ({limit.said}) none got a node in {terms.settle_s:g} s"
    return Finding(CHECK, Outcome.OK, f"{so_far}; {none}")


def _limit(looks: Looks, gang: Gang) -> _Limit | str:
    """What two test pods will not fit into although one does; a text says why nothing was found."""
    return _quota(looks, str(gang.queue)) if gang.kind is GangKind.KUEUE else _node(looks)


def _quota(looks: Looks, name: str) -> _Limit | str:
    try:
        queue = _cluster_queue(looks, name)
    except KtrainError as error:
        return f"the quota may not be read: {error}"
    if queue["spec"].get("cohortName") or queue["spec"].get("cohort"):
        return "the queue may borrow from its cohort, so that its quota is no limit"
    found = [
        quantity.parse(item["nominalQuota"])
        for group in queue["spec"].get("resourceGroups") or ()
        for flavor in group["flavors"]
        for item in flavor["resources"]
        if item["name"] == "cpu"
    ]
    if not found or max(found) <= 0:
        return "the queue has no quota of CPUs"
    # Kueue takes one flavour for a pod set, so the largest is what a group must not fit into.
    return _Limit(max(found), None, f"{quantity.show(max(found))} CPUs of quota")


def _node(looks: Looks) -> _Limit | str:
    """The node with the most free CPUs: pods are pinned to it, so that no autoscaler adds another."""
    pods = looks.list("", "pods")
    rooms = []
    for node in looks.list("", "nodes"):
        here = [pod for pod in pods if (pod.get("spec") or {}).get("nodeName") == node["metadata"]["name"]]
        alive = [pod for pod in here if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
        if not taints(node) and condition(node, "Ready") in (None, "True"):
            rooms.append(Room.of(node, alive))
    free = [(room.free.get("cpu", Fraction(0)), room) for room in rooms]
    cpu, room = max(free, key=lambda item: item[0], default=(Fraction(0), None))
    if room is None or cpu <= Fraction(1, 10):
        return "no node that is open to all pods has free CPUs"
    return _Limit(cpu, room.labels[HOST_LABEL], f"{quantity.show(cpu)} free CPUs of node {room.name}")


# The pods


def _sleeping(spec: JobSpec, facts: ClusterFacts, terms: Terms, *, cpu: Fraction, host: str | None) -> Rendered:
    """The job as it is rendered, without its head, and with pods that only sleep."""
    rendered = render(spec, facts)
    jobset = rendered.jobset
    worker = next(job for job in jobset["spec"]["replicatedJobs"] if job["name"] == WORKER)
    template = worker["template"]["spec"]
    pod = {key: value for key, value in template["template"]["spec"].items() if key in _KEPT}
    limits = {"cpu": quantity.show(cpu), "memory": "16Mi"}
    container = {
        "name": "sleeper",
        "image": terms.image,
        "command": ["sleep", str(_LIVES_S)],
        "resources": {"requests": limits},
        "securityContext": CONTAINER_SECURITY,
    }
    pod |= {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]}
    pod |= {"nodeSelector": {HOST_LABEL: host}} if host is not None else {}
    about = template["template"]["metadata"]
    job = {**template, "backoffLimit": 0, "activeDeadlineSeconds": _LIVES_S}
    job["template"] = {"metadata": about, "spec": pod}
    body: dict[str, Any] = {
        "suspend": True,
        "failurePolicy": {"maxRestarts": 0},
        "ttlSecondsAfterFinished": 0,
        "replicatedJobs": [{**worker, "template": {"spec": job}}],
    }
    owned = tuple(_resized(obj, cpu) for obj in rendered.owned if obj["kind"] in _PLURALS)
    return replace(rendered, jobset={**jobset, "spec": body}, owned=owned)


def _resized(obj: Object, cpu: Fraction) -> Object:
    """A group that says what it needs in all says what its pods here need."""
    if "minResources" not in obj["spec"]:
        return obj
    return {**obj, "spec": {**obj["spec"], "minResources": {"cpu": quantity.show(_PODS * cpu)}}}


_KEPT = ("schedulerName", "schedulingGroup", "securityContext", "priorityClassName", "automountServiceAccountToken")


def _submit(scratch: Scratch, rendered: Rendered) -> Object:
    for obj in rendered.owned:
        scratch.create(_PLURALS[obj["kind"]], obj)
    jobset = scratch.create("jobsets", rendered.jobset)
    if rendered.released_by == "ktrain":
        path = scratch.path(jobset["apiVersion"], "jobsets", jobset["metadata"]["name"])
        scratch.client.patch(path, {"spec": {"suspend": False}})
    return rendered.jobset


def _pods(scratch: Scratch, name: str) -> tuple[Object, ...]:
    return scratch.client.list(scratch.path("v1", "pods"), labels=f"jobset.sigs.k8s.io/jobset-name={name}").items


def _phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase", ""))
