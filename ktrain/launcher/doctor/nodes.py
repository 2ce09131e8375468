"""Whether the nodes have what a job asks for: ever, were they empty, and beside what runs there now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ktrain.errors import ForbiddenError, KtrainError
from ktrain.launcher import quantity
from ktrain.launcher.backends.kubernetes.client import Object
from ktrain.launcher.backends.kubernetes.discover import sample_pods
from ktrain.launcher.budget import memory_budget
from ktrain.launcher.cluster import amounts
from ktrain.launcher.cluster.fitting import Room, obstacles, request
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.doctor.looks import Looks, condition
from ktrain.launcher.quantity import show_bytes
from ktrain.launcher.render.common import WORKER
from ktrain.launcher.render.devices import DRA_GROUP
from ktrain.launcher.render.job import Rendered
from ktrain.launcher.spec import JobSpec

_ENDED = ("Succeeded", "Failed")
_WAITS = "pods stay Pending until nodes are there"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Pods of one role, all alike."""

    role: str
    pod: Object
    count: int


def wanted_pods(spec: JobSpec, rendered: Rendered) -> tuple[Wanted, ...]:
    """The pods of the job, the head first, as the scheduler would see them."""
    found = []
    for job, pod in zip(rendered.jobset["spec"]["replicatedJobs"], sample_pods(rendered, spec), strict=True):
        count = int(job["replicas"]) * int(job["template"]["spec"]["completions"])
        found.append(Wanted(job["name"], pod, count))
    return tuple(found)


def look_at_nodes(looks: Looks, spec: JobSpec, rendered: Rendered) -> Iterator[Finding]:
    """Accelerators, memory and room, for the job's pods as they were rendered."""
    nodes = [node for node in looks.list("", "nodes") if condition(node, "Ready") in (None, "True")]
    wanted = wanted_pods(spec, rendered)
    grows = growth(looks)
    worker = next(item for item in wanted if item.role == WORKER)
    found = [*_accelerators(looks, spec, rendered, nodes, grows), _memory(spec, rendered, worker, nodes, grows)]
    yield from found
    if all(item.outcome is Outcome.OK for item in found):  # else it is said already why there is no room
        yield _room(looks, wanted, nodes, grows)


def growth(looks: Looks) -> str | None:
    """What was seen of a mechanism that adds nodes; None where nothing was seen of one."""
    try:
        pools = looks.list("karpenter.sh", "nodepools")
        if pools:
            return f"Karpenter has {len(pools)} node pools"
    except KtrainError:
        pass  # not there, or not for us to see: the other one may be
    try:
        looks.get("/api/v1/namespaces/kube-system/configmaps/cluster-autoscaler-status")
    except KtrainError:
        return None
    return "the cluster autoscaler wrote its status"


def _short(check: str, evidence: str, remedy: str, grows: str | None) -> Finding:
    """A lack that an autoscaler may mend is no failure."""
    if grows is not None:
        return Finding(
            check,
            Outcome.WARNING,
            f"{evidence}; {grows}",
            "nodes have to be added first, if a pool for such nodes exists: neither its limits nor its quota were seen",
            "give the gang time (limits.gang_wait_s)",
        )
    return Finding(check, Outcome.FAILED, evidence, _WAITS, remedy)


# Accelerators


def _accelerators(
    looks: Looks, spec: JobSpec, rendered: Rendered, nodes: Sequence[Object], grows: str | None
) -> Iterator[Finding]:
    plan = rendered.devices
    if plan.claims:
        yield from _claimed(looks, rendered)
    if not plan.limits:
        return
    count = spec.num_nodes + spec.spares
    able = _with_devices(rendered, nodes)
    words = ", ".join(f"{amount} x {name}" for name, amount in plan.limits.items())
    if len(able) >= count:
        yield Finding("accelerators", Outcome.OK, f"{len(able)} nodes have {words}, {count} are needed")
        return
    model = spec.accelerator or spec.tpu or spec.fabric
    amounts = [_offers(node) for node in nodes]
    have = Counter(f"{quantity.show(has[name])} x {name}" for has in amounts for name in plan.limits if has.get(name))
    there = ", ".join(f"{n} have {text}" for text, n in have.most_common(4)) or "none has any"
    evidence = (
        f"{len(able)} of {count} needed nodes have {words} and the marks of {model}; of all {len(nodes)} nodes {there}"
    )
    yield _short("accelerators", evidence, "ask for fewer nodes or another model (--nodes, --accelerator)", grows)


def _claimed(looks: Looks, rendered: Rendered) -> Iterator[Finding]:
    """Claims of devices: their classes have to be there. Which devices a class selects is the scheduler's to say."""
    asked = [item for item in rendered.devices.objects if item["kind"] == "ResourceClaimTemplate"]
    requests = [each for item in asked for each in item["spec"]["spec"]["devices"]["requests"]]
    exact = [each for item in requests for each in item.get("firstAvailable", [item.get("exactly")])]
    wanted = sorted({str(each["deviceClassName"]) for each in exact})
    if not wanted:
        return
    there = {item["metadata"]["name"] for item in looks.list(DRA_GROUP, "deviceclasses")}
    if lacking := [name for name in wanted if name not in there]:
        known = ", ".join(sorted(there)) or "none"
        yield Finding(
            "device classes",
            Outcome.FAILED,
            f"{', '.join(lacking)}: no such class, there are: {known}",
            "the claims are never allocated, and the pods wait for ever",
            "have the vendor's DRA driver installed, or name one model and no fabric of classes",
        )
        return
    slices = looks.list(DRA_GROUP, "resourceslices")
    count = sum(len(item["spec"].get("devices") or ()) for item in slices)
    yield Finding(
        "device classes",
        Outcome.OK if count else Outcome.WARNING,
        f"{', '.join(wanted)}: there; drivers offer {count} devices of all kinds in {len(slices)} slices",
        "" if count else "no claim can be allocated now",
        "" if count else "look at the driver's pods on the nodes",
    )


def _affinity(terms: Sequence[Sequence[Any]]) -> dict[str, Any]:
    if not terms:
        return {}
    required = {"nodeSelectorTerms": [{"matchExpressions": list(term)} for term in terms]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}


def _with_devices(rendered: Rendered, nodes: Sequence[Object]) -> list[Object]:
    """The nodes with the devices of a worker and their marks, whoever uses them now; all, where none are asked for."""
    plan = rendered.devices
    pod = {"metadata": {}, "spec": {"containers": [], "nodeSelector": plan.node_selector, **_affinity(plan.terms)}}
    asked = amounts.amounts(plan.limits)
    found = []
    for node in nodes:
        open_to_all = Room({**node, "spec": {}}, {"pods": Fraction(1)})
        if not obstacles(pod, open_to_all, ()) and not amounts.lacking(asked, _offers(node)):
            found.append(node)
    return found


def _offers(node: Object) -> amounts.Amounts:
    return amounts.amounts((node.get("status") or {}).get("allocatable"))


# Memory


def _memory(spec: JobSpec, rendered: Rendered, worker: Wanted, nodes: Sequence[Object], grows: str | None) -> Finding:
    """The memory tier's volume and /dev/shm are charged to the pod's containers, whose limits hold them."""
    size = memory_budget(spec, rendered.scope.scope)
    needs = request(worker.pod)["memory"]
    amounts = [_offers(node).get("memory", Fraction(0)) for node in _with_devices(rendered, nodes)]
    able = sum(amount >= needs for amount in amounts)
    parts = (
        f"a worker pod needs {show_bytes(float(needs))} (memory tier {show_bytes(size.volume)}, /dev/shm "
        f"{show_bytes(size.shm)}, script {show_bytes(size.trainer)})"
    )
    if not amounts:
        return Finding("memory", Outcome.UNKNOWN, f"{parts}; there is no node to hold it against")
    evidence = f"{parts}; {able} of {len(amounts)} such nodes offer that, the largest {show_bytes(float(max(amounts)))}"
    if able == len(amounts) or able >= worker.count:
        return Finding("memory", Outcome.OK, evidence)
    remedy = "make --state, memory.slots, memory.replicas or resources.memory smaller, or use larger nodes"
    return _short("memory", evidence, remedy, grows)


# Room


def _room(looks: Looks, wanted: Sequence[Wanted], nodes: Sequence[Object], grows: str | None) -> Finding:
    empty = [Room.of(node, ()) for node in nodes]
    lacking, why = _place(wanted, [room.copy() for room in empty])
    total = sum(item.count for item in wanted)
    if lacking:
        evidence = f"{total - lacking} of {total} pods fit on {len(nodes)} nodes, were these empty: {why}"
        return _short("room", evidence, "ask for less, or add such nodes", grows)
    try:
        pods = looks.list("", "pods")
    except ForbiddenError as error:
        return Finding(
            "room",
            Outcome.UNKNOWN,
            f"all {total} pods fit on empty nodes; what runs there may not be read: {error}",
            remedy="have `list pods` in all namespaces added, or wait and see",
        )
    lacking, why = _place(wanted, _filled(empty, pods))
    if not lacking:
        return Finding("room", Outcome.OK, f"all {total} pods fit beside what runs now on {len(nodes)} nodes")
    return Finding(
        "room",
        Outcome.WARNING,
        f"{total - lacking} of {total} pods fit beside what runs now: {why}",
        "the job waits until others leave",
        "wait, ask for fewer nodes, or use a queue with preemption",
    )


def _filled(rooms: Sequence[Room], pods: Sequence[Object]) -> list[Room]:
    """The nodes with less room; who takes it is forgotten, since only our own pods keep one another away."""
    found = {room.name: room.copy() for room in rooms}
    for pod in pods:
        room = found.get(str((pod.get("spec") or {}).get("nodeName")))
        if room is not None and (pod.get("status") or {}).get("phase") not in _ENDED:
            room.take(pod)
            room.pods.clear()
    return list(found.values())


def _place(wanted: Sequence[Wanted], rooms: list[Room]) -> tuple[int, str]:
    """How many pods find no node, and why the nodes did not take them; one domain for all pods is not looked for."""
    lacking, why = 0, Counter[str]()
    for item in wanted:
        left = item.count
        for room in rooms:
            while left and not (reasons := obstacles(item.pod, room, [room])):
                room.take(item.pod)
                left -= 1
            if not left:
                break
            why.update(reasons)
        lacking += left
    text = "; ".join(f"{n} x {reason}" for reason, n in why.most_common(3))
    return lacking, text or "there are no nodes"
