"""The accelerator isolation test: who asked for a device sees it, and nobody else does.

The three cases of the programme's own test of secure accelerator access: a container with a device, one beside it in
the same pod without, and a pod without one on the same node. Those without ask the runtime for every device by the
variables that runtimes have listened to, which is how isolation has been got round.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ktrain.base.clock import Deadline
from ktrain.launcher import catalogue, quantity
from ktrain.launcher.backends.kubernetes.client import Object
from ktrain.launcher.cluster import amounts
from ktrain.launcher.cluster.fitting import HOST_LABEL, Room
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.doctor.gang_trial import Terms
from ktrain.launcher.doctor.looks import Looks, condition
from ktrain.launcher.doctor.scratch import Scratch
from ktrain.launcher.render.common import CONTAINER_SECURITY

CHECK = "isolation test"  # as conformance.toml names it
_POLL_S = 0.5
_FILES = (
    "/dev/nvidia[0-9]* /dev/dri/renderD* /dev/accel[0-9]* /dev/accel/* /dev/neuron[0-9]* /dev/hl[0-9]* /dev/vfio/[0-9]*"
)
_COUNT = f"ls -d {_FILES} 2>/dev/null | wc -l"
_WISHES = ("NVIDIA_VISIBLE_DEVICES", "AMD_VISIBLE_DEVICES", "HABANA_VISIBLE_DEVICES")
_USER = 65534


def try_isolation(looks: Looks, scratch: Scratch, terms: Terms) -> Iterator[Finding]:
    """The three cases on one node that has a free accelerator."""
    found = _free_device(looks)
    if found is None:
        said = "no node has a free accelerator that is an extended resource: nothing to test"
        yield Finding(CHECK, Outcome.UNKNOWN, said)
        return
    node, resource = found
    asks = {"limits": {resource: "1"}}
    pods = {
        "with": _pod("with", node, terms, {"has": asks, "beside": {}}),
        "without": _pod("without", node, terms, {"alone": {}}),
    }
    for pod in pods.values():
        scratch.create("pods", pod)
    deadline = Deadline.after(terms.fits_s, looks.client.clock)
    late = [name for name in pods if not _ended(scratch, name, deadline)]
    if late:
        said = f"pod {', '.join(late)} on node {node} did not end within {terms.fits_s:g} s: nothing was shown"
        yield Finding(CHECK, Outcome.UNKNOWN, said, remedy=f"see whether nodes can pull {terms.image}")
        return
    seen = {
        "has": _seen(scratch, "with", "has"),
        "beside": _seen(scratch, "with", "beside"),
        "alone": _seen(scratch, "without", "alone"),
    }
    yield _judged(seen, node, resource)


def _judged(seen: dict[str, int | None], node: str, resource: str) -> Finding:
    if None in seen.values():
        lost = ", ".join(name for name, count in seen.items() if count is None)
        return Finding(CHECK, Outcome.UNKNOWN, f"container {lost} did not say what it sees")
    where = f"on node {node}, {resource}"
    leaks = [name for name in ("beside", "alone") if seen[name]]
    if leaks:
        words = {"beside": "a container beside the one that asked", "alone": "a pod that asked for none"}
        said = "; ".join(f"{words[name]} sees {seen[name]} devices" for name in leaks)
        cost = "any pod can use the devices of another, and read what is in their memory"
        remedy = "turn off accept-nvidia-visible-devices-envvar-when-unprivileged, or its like, on the nodes"
        return Finding(CHECK, Outcome.FAILED, f"{where}: {said}", cost, remedy)
    if not seen["has"]:
        said = f"{where}: the container that asked for a device sees none of the device files that are known here"
        return Finding(CHECK, Outcome.UNKNOWN, said)
    said = (
        f"{where}: who asked for one sees {seen['has']} device files, who did not sees none, in the same pod and beside"
    )
    return Finding(CHECK, Outcome.OK, said)


def _free_device(looks: Looks) -> tuple[str, str] | None:
    """A node with a free device, and the resource by which it is asked for."""
    known = {model.resource for model in catalogue.models().values()}
    known |= {model.resource for model in catalogue.tpus().values()}
    pods = looks.list("", "pods")
    for node in looks.list("", "nodes"):
        if condition(node, "Ready") not in (None, "True") or (node.get("spec") or {}).get("unschedulable"):
            continue
        here = [pod for pod in pods if (pod.get("spec") or {}).get("nodeName") == node["metadata"]["name"]]
        alive = [pod for pod in here if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")]
        room = Room.of(node, alive)
        free = sorted(name for name in known if not amounts.lacking({name: quantity.parse(1)}, room.free))
        if free:
            return room.labels[HOST_LABEL], free[0]
    return None


def _pod(name: str, host: str, terms: Terms, containers: dict[str, dict[str, Any]]) -> Object:
    wishes = [{"name": variable, "value": "all"} for variable in _WISHES]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(terms.fits_s),
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "nodeSelector": {HOST_LABEL: host},
            "tolerations": [{"operator": "Exists"}],  # nodes with devices are tainted with their resource
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": container,
                    "image": terms.image,
                    "command": ["sh", "-c", _COUNT],
                    "env": wishes if not resources else [],
                    "resources": resources,
                    "securityContext": CONTAINER_SECURITY,
                }
                for container, resources in containers.items()
            ],
        },
    }


def _ended(scratch: Scratch, name: str, deadline: Deadline) -> bool:
    while True:
        pod = scratch.client.get(scratch.path("v1", "pods", name))
        if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            return True
        if deadline.expired():
            return False
        scratch.client.clock.sleep(_POLL_S)


def _seen(scratch: Scratch, pod: str, container: str) -> int | None:
    """The number that a container printed; None where it is none."""
    deadline = Deadline.after(30.0, scratch.client.clock)
    path = f"{scratch.path('v1', 'pods', pod)}/log"
    lines = list(scratch.client.lines(path, {"container": container}, deadline=deadline))
    text = lines[0].strip() if lines else b""
    return int(text) if text.isdigit() else None
