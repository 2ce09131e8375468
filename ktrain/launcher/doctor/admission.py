"""Whether the job's pods would be let in: queue, gang, pod security, and the objects that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from ktrain.errors import ForbiddenError, KtrainError, NotFoundError
from ktrain.launcher import accelerators, quantity
from ktrain.launcher.backends.kubernetes.client import Object, path_of
from ktrain.launcher.cluster import amounts
from ktrain.launcher.cluster.fitting import request
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.doctor.looks import Looks, condition
from ktrain.launcher.doctor.nodes import Wanted
from ktrain.launcher.gang import KUEUE_GROUP, NATIVE_GROUP, VOLCANO_GROUP, Gang
from ktrain.launcher.spec import GangKind, JobSpec

_LEVELS = ("privileged", "baseline", "restricted")  # the loosest first
_ENFORCE = "pod-security.kubernetes.io/enforce"
_CONTROLLER = "app.kubernetes.io/name=jobset"  # its own manifests mark its pods so
_NOBODY = "the job stays suspended or its pods Pending, and nothing says why"


def look_at_gang(looks: Looks, gang: Gang) -> Iterator[Finding]:
    """The mechanism that the job would get, and whether somebody acts on its objects."""
    if gang.warning is not None:
        cost = "two jobs can hold each other's nodes until the deadline of the barrier"
        remedy = "have Kueue, Volcano or the gate GenericWorkload set up"
        yield Finding("gang", Outcome.WARNING, gang.reason, cost, remedy)
        return
    yield Finding("gang", Outcome.OK, f"{gang.kind.value}: {gang.reason}")
    kind = _RECONCILED.get(gang.kind)
    if kind is not None:
        yield _reconciled(looks, f"gang {gang.kind.value}", kind)


_RECONCILED = {
    GangKind.NATIVE: (NATIVE_GROUP, "podgroups"),
    GangKind.VOLCANO: (VOLCANO_GROUP, "podgroups"),
}


def look_at_jobset_controller(looks: Looks) -> Iterator[Finding]:
    """A definition without its controller takes every job and starts none."""
    found = _reconciled(looks, "JobSet controller", ("jobset.x-k8s.io", "jobsets"))
    if found.outcome is Outcome.UNKNOWN:
        pods = looks.list("", "pods", labels=_CONTROLLER)
        ready = sorted(str(pod["metadata"]["name"]) for pod in pods if condition(pod, "Ready") == "True")
        if ready:
            found = Finding(found.check, Outcome.OK, f"its pod {ready[0]} is ready; there are no jobsets yet")
    yield found


def _reconciled(looks: Looks, check: str, kind: tuple[str, str]) -> Finding:
    """Whether any object of the kind bears a status, which only its controller writes."""
    found = looks.list(*kind)
    alive = [item for item in found if item.get("status")]
    what = f"{kind[1]}.{kind[0]}"
    if alive:
        return Finding(check, Outcome.OK, f"its controller wrote the status of {len(alive)} of {len(found)} {what}")
    if found:
        cost = _NOBODY
        remedy = "look at the controller's pods; `ktrain doctor --active` tries it"
        return Finding(check, Outcome.WARNING, f"none of {len(found)} {what} bears a status", cost, remedy)
    said = f"there are no {what} yet from which to see whether a controller acts on them"
    return Finding(check, Outcome.UNKNOWN, said, remedy="`ktrain doctor --active` tries it")


# Queues


def look_at_queue(looks: Looks, gang: Gang, wanted: Sequence[Wanted]) -> Iterator[Finding]:
    """The queue that the job would go to: there, open, and with a quota that such a job can fit."""
    if gang.kind is GangKind.KUEUE and gang.queue is not None:
        yield from _kueue(looks, gang.queue, wanted)
    if gang.kind is GangKind.VOLCANO and gang.queue is not None:
        yield from _volcano(looks, gang.queue)


def _volcano(looks: Looks, name: str) -> Iterator[Finding]:
    queue = looks.get(path_of(looks.version_of(VOLCANO_GROUP, "queues"), "queues", None, name))
    state = str((queue.get("status") or {}).get("state") or "Unknown")
    if state in ("Closed", "Closing"):
        yield Finding("queue", Outcome.FAILED, f"Volcano's queue {name} is {state}", _NOBODY, "name an open queue")
    else:
        outcome = Outcome.OK if state == "Open" else Outcome.UNKNOWN
        yield Finding("queue", outcome, f"Volcano's queue {name}: {state}")


def _kueue(looks: Looks, name: str, wanted: Sequence[Wanted]) -> Iterator[Finding]:
    version = looks.version_of(KUEUE_GROUP, "localqueues")
    try:
        local = looks.get(path_of(version, "localqueues", looks.namespace, name))
    except NotFoundError:
        remedy = f"name one of the queues of namespace {looks.namespace} (--queue)"
        yield Finding("queue", Outcome.FAILED, f"there is no LocalQueue {name}", "the job is never admitted", remedy)
        return
    above = str(local["spec"]["clusterQueue"])
    try:
        queue = looks.get(path_of(version, "clusterqueues", None, above))
    except NotFoundError:
        remedy = "have the ClusterQueue made, or name another queue (--queue)"
        evidence = f"LocalQueue {name} stands on ClusterQueue {above}, which is not there"
        yield Finding("queue", Outcome.FAILED, evidence, "the job is never admitted", remedy)
        return
    except ForbiddenError:
        yield _open(f"LocalQueue {name}", local, "its ClusterQueue and quota may not be read")
        return
    held = (queue["spec"].get("stopPolicy") or "None", local["spec"].get("stopPolicy") or "None")
    if held != ("None", "None"):
        evidence = f"LocalQueue {name} or ClusterQueue {above} is held (stopPolicy {', '.join(held)})"
        yield Finding("queue", Outcome.FAILED, evidence, "nothing is admitted until it is opened", "ask its owner")
        return
    yield _open(f"LocalQueue {name}", local, f"ClusterQueue {above}")
    yield from _quota(above, queue, wanted)


def _open(what: str, queue: Object, more: str) -> Finding:
    active = condition(queue, "Active")
    if active == "False":
        found = (queue.get("status") or {}).get("conditions") or ()
        said = next((item.get("message", "") for item in found if item.get("type") == "Active"), "")
        return Finding(
            "queue", Outcome.FAILED, f"{what} is not active: {said}", "nothing is admitted", "ask the queue's owner"
        )
    if active is None:
        return Finding("queue", Outcome.UNKNOWN, f"{what} ({more}) bears no status: Kueue may not run", remedy=_TRY)
    return Finding("queue", Outcome.OK, f"{what} is active; {more}")


_TRY = "`ktrain doctor --active` tries it"


def _quota(name: str, queue: Object, wanted: Sequence[Wanted]) -> Iterator[Finding]:
    """A job that asks for what the queue does not cover, or more than it could ever have, is never admitted."""
    needs = amounts.add(*({key: value * item.count for key, value in request(item.pod).items()} for item in wanted))
    covered: dict[str, Fraction] = {}
    for group in queue["spec"].get("resourceGroups") or ():
        for flavor in group["flavors"]:
            for item in flavor["resources"]:
                most = quantity.parse(item["nominalQuota"]) + quantity.parse(item.get("borrowingLimit") or 0)
                covered[item["name"]] = covered.get(item["name"], Fraction(0)) + most
    outside = sorted(key for key in needs if key != "pods" and key not in covered)
    never = "the job is never admitted"
    if outside:
        remedy = f"have them added to the resource groups of ClusterQueue {name}"
        yield Finding("quota", Outcome.FAILED, f"ClusterQueue {name} covers no {', '.join(outside)}", never, remedy)
        return
    over = [key for key in sorted(covered) if needs.get(key, Fraction(0)) > covered[key]]
    said = ", ".join(f"{_amount(key, needs[key])} of {_amount(key, covered[key])} {key}" for key in over)
    cohort = queue["spec"].get("cohortName") or queue["spec"].get("cohort")
    if over and not cohort:
        yield Finding(
            "quota", Outcome.FAILED, f"the job asks ClusterQueue {name} for {said}", never, "ask for less, or for quota"
        )
    elif over:
        cost = "it is admitted only while others of the cohort lend that much"
        yield Finding("quota", Outcome.WARNING, f"{said}; cohort {cohort} may lend", cost, "ask for less, or wait")
    else:
        yield Finding("quota", Outcome.OK, f"ClusterQueue {name} has the quota, all its flavours together")


def _amount(name: str, amount: Fraction) -> str:
    return f"{float(amount) / 2**30:.4g} GiB" if name == "memory" else quantity.show(amount)


# Pod security


def look_at_security(looks: Looks, spec: JobSpec) -> Iterator[Finding]:
    """The level that the namespace enforces, against what the pods and their fabric need."""
    about = looks.get(path_of("v1", "namespaces", None, looks.namespace))["metadata"]
    found = (about.get("labels") or {}).get(_ENFORCE)
    level = found if found in _LEVELS else "privileged"
    said = (
        f"namespace {looks.namespace} enforces {found}" if found else f"namespace {looks.namespace} enforces no level"
    )
    if spec.code.image is not None and level == "restricted":
        yield Finding(
            "pod security",
            Outcome.FAILED,
            f"{said}, whose list of volumes lacks images, and the code is an image volume",
            "the pods are refused",
            "send the code along (--code DIR), or use a namespace with the level baseline",
        )
    else:
        yield Finding("pod security", Outcome.OK, f"{said}; the job's pods pass restricted")
    if spec.fabric is not None:
        fabric, _ = accelerators.parse_fabric(spec.fabric)
        if fabric.pod_security is not None:
            allows = _LEVELS.index(level) <= _LEVELS.index(fabric.pod_security)
            may = "the namespace would allow it" if allows else f"{said}, which forbids it"
            yield Finding(
                "fabric",
                Outcome.WARNING,
                f"{fabric.name} {fabric.needs}; the job's pods have no such right, and {may}",
                "the pods are let in, and NCCL ends with an error or falls back to TCP",
                fabric.remedy,
            )


# What the pods name


def look_at_references(looks: Looks, spec: JobSpec, gang: Gang) -> Iterator[Finding]:
    """Secrets, claims and priority classes; of a Secret only whether it is there."""
    of_code = () if spec.code.git_secret is None else (spec.code.git_secret,)
    secrets = dict.fromkeys((*spec.pull_secrets, *of_code, *(item.secret for item in spec.secrets)))
    space = looks.namespace
    wanted = [("Secret", name, path_of("v1", "secrets", space, name)) for name in secrets]
    claims = [volume.claim for volume in spec.volumes]
    wanted += [("PersistentVolumeClaim", name, path_of("v1", "persistentvolumeclaims", space, name)) for name in claims]
    priority = spec.placement.priority
    if priority is not None and gang.kind is not GangKind.KUEUE:  # Kueue has priority classes of its own
        wanted.append(("PriorityClass", priority, path_of("scheduling.k8s.io/v1", "priorityclasses", None, priority)))
    lacking, unknown = [], []
    for kind, name, path in wanted:
        try:
            looks.name_of(path)
        except NotFoundError:
            lacking.append(f"{kind} {name}")
        except KtrainError as error:
            unknown.append(f"{kind} {name} ({error})")
    if lacking:
        yield Finding(
            "references",
            Outcome.FAILED,
            f"not there: {', '.join(lacking)}",
            "pods are not made, or wait for ever in CreateContainerConfigError or ImagePullBackOff",
            f"make them in namespace {space}, or name others",
        )
    if unknown:
        yield Finding("references", Outcome.UNKNOWN, f"may not be looked for: {', '.join(unknown)}")
    if wanted and not lacking and not unknown:
        yield Finding("references", Outcome.OK, f"there: {', '.join(f'{kind} {name}' for kind, name, _ in wanted)}")


def refused(text: str) -> Finding | None:
    """What a 403 of a dry run says beside "you may not": only its words tell admission from a missing right."""
    never = "the pods are refused, and the job never starts"
    if "violates PodSecurity" in text:
        remedy = "use a namespace with a level that allows it, or leave out what needs more (overlay)"
        return Finding("pod security", Outcome.FAILED, text, never, remedy)
    if "exceeded quota" in text:
        return Finding("quota", Outcome.FAILED, text, never, "ask for less, or have the ResourceQuota raised")
    return None
