"""The pods of a Job: names, labels, owner and the index in each container's environment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ktrain.launcher.cluster.resources import copied
from ktrain.launcher.cluster.shelf import Object

PREFIX = "batch.kubernetes.io/"
TRACKING = f"{PREFIX}job-tracking"  # the finalizer of a pod that its Job has not counted yet
INDEX = f"{PREFIX}job-completion-index"
FAILURES = f"{PREFIX}job-index-failure-count"
CONTROLLER_UID = f"{PREFIX}controller-uid"
_ENV_INDEX = "JOB_COMPLETION_INDEX"


def owner(of: Object) -> dict[str, Any]:
    """The reference to the controller of an object."""
    metadata = of["metadata"]
    return {
        "apiVersion": of["apiVersion"],
        "kind": of["kind"],
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def owned(objects: Iterable[Object], by: Object) -> list[Object]:
    """The objects that an object controls."""
    uid = by["metadata"]["uid"]
    return [
        item
        for item in objects
        if any(ref["uid"] == uid and ref.get("controller") for ref in item["metadata"].get("ownerReferences") or ())
    ]


def index_of(pod: Object) -> int | None:
    """The completion index of a Job's pod."""
    text = (pod["metadata"].get("annotations") or {}).get(INDEX)
    return None if text is None else int(text)


def is_terminal(pod: Object) -> bool:
    """Whether it has ended."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def is_deleting(pod: Object) -> bool:
    """Whether somebody has deleted it, and it is not gone yet."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def is_tracked(pod: Object) -> bool:
    """Whether its Job has yet to count it."""
    return TRACKING in (pod["metadata"].get("finalizers") or ())


def make(job: Object, index: int, *, failures: int) -> Object:
    """A new pod for an index of a Job that had so many failures of it."""
    metadata, template = job["metadata"], copied(job["spec"]["template"])
    name, uid = metadata["name"], metadata["uid"]
    given = template.get("metadata") or {}
    spec = template["spec"]
    spec.setdefault("hostname", f"{name}-{index}")
    reference = {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{INDEX}']"}}
    for container in (*spec["containers"], *(spec.get("initContainers") or ())):
        env = container.setdefault("env", [])
        if all(entry["name"] != _ENV_INDEX for entry in env):
            env.append({"name": _ENV_INDEX, "valueFrom": reference})
    counted = {FAILURES: str(failures)} if job["spec"].get("backoffLimitPerIndex") is not None else {}
    return {
        "metadata": {
            "generateName": f"{name}-{index}-",
            "namespace": metadata["namespace"],
            "labels": {
                **(given.get("labels") or {}),
                CONTROLLER_UID: uid,
                "controller-uid": uid,
                f"{PREFIX}job-name": name,
                "job-name": name,
                INDEX: str(index),
            },
            "annotations": {**(given.get("annotations") or {}), INDEX: str(index), **counted},
            "ownerReferences": [owner(job)],
            "finalizers": [TRACKING],
        },
        "spec": spec,
        "status": {"phase": "Pending", "qosClass": "BestEffort"},
    }
