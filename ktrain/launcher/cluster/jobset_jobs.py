"""The Jobs of a JobSet: names, labels and the headless service."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from ktrain.launcher.cluster.job_pods import owner
from ktrain.launcher.cluster.jobset_policy import REPLICATED_JOB
from ktrain.launcher.cluster.resources import copied
from ktrain.launcher.cluster.shelf import Object

PREFIX = "jobset.sigs.k8s.io/"
NAME = f"{PREFIX}jobset-name"
ATTEMPT = f"{PREFIX}restart-attempt"


def attempt_of(job: Object) -> int:
    """The restart that a Job belongs to."""
    return int((job["metadata"].get("labels") or {}).get(ATTEMPT, "0"))


def num_replicas(replicated: Mapping[str, Any]) -> int:
    """How many Jobs a replicated job stands for."""
    return int(replicated.get("replicas", 1))


def subdomain(jobset: Object) -> str:
    """The name of the headless service."""
    return str((jobset["spec"].get("network") or {}).get("subdomain") or jobset["metadata"]["name"])


def has_service(jobset: Object) -> bool:
    """Whether its pods have names."""
    return bool((jobset["spec"].get("network") or {}).get("enableDNSHostnames", True))


def service(jobset: Object) -> Object:
    """The headless service; as recorded it does not bear the JobSet's label."""
    metadata, network = jobset["metadata"], jobset["spec"].get("network") or {}
    return {
        "metadata": {
            "name": subdomain(jobset),
            "namespace": metadata["namespace"],
            "ownerReferences": [owner(jobset)],
        },
        "spec": {
            "clusterIP": "None",
            "selector": {NAME: metadata["name"]},
            "publishNotReadyAddresses": network.get("publishNotReadyAddresses", True),
        },
    }


def jobs(jobset: Object, restarts: int) -> Iterator[tuple[Mapping[str, Any], Object]]:
    """All Jobs that a JobSet should have in its present attempt, each with its replicated job."""
    spec = jobset["spec"]
    total = sum(num_replicas(replicated) for replicated in spec["replicatedJobs"])
    groups: dict[str, int] = {}
    for replicated in spec["replicatedJobs"]:
        group = replicated.get("groupName") or "default"
        groups[group] = groups.get(group, 0) + num_replicas(replicated)
    global_index, group_index = 0, dict.fromkeys(groups, 0)
    for replicated in spec["replicatedJobs"]:
        group = replicated.get("groupName") or "default"
        for index in range(num_replicas(replicated)):
            places = {
                "global-replicas": total,
                "group-name": group,
                "group-replicas": groups[group],
                "job-global-index": global_index,
                "job-group-index": group_index[group],
                "job-index": index,
                "replicatedjob-replicas": num_replicas(replicated),
                "restart-attempt": restarts,
            }
            yield replicated, _job(jobset, replicated, index, places)
            global_index += 1
            group_index[group] += 1


def _job(jobset: Object, replicated: Mapping[str, Any], index: int, places: Mapping[str, Any]) -> Object:
    metadata, spec = jobset["metadata"], jobset["spec"]
    name = f"{metadata['name']}-{replicated['name']}-{index}"
    key = hashlib.sha1(f"{metadata['namespace']}/{name}".encode(), usedforsecurity=False).hexdigest()
    labels = {
        **{f"{PREFIX}{place}": str(value) for place, value in places.items()},
        f"{PREFIX}job-key": key,
        NAME: metadata["name"],
        f"{PREFIX}jobset-uid": metadata["uid"],
        REPLICATED_JOB: replicated["name"],
        **_coordinator(jobset),
    }
    template = copied(replicated["template"])
    pod = template["spec"]["template"]
    for part in (template, pod):
        given = part.get("metadata") or {}
        part["metadata"] = {
            **given,
            "labels": {**(given.get("labels") or {}), **labels},
            "annotations": {**(given.get("annotations") or {}), **labels},
        }
    if has_service(jobset):
        pod["spec"].setdefault("subdomain", subdomain(jobset))
    template["spec"]["suspend"] = bool(spec.get("suspend"))
    named = {"name": name, "namespace": metadata["namespace"], "ownerReferences": [owner(jobset)]}
    return {"metadata": {**template["metadata"], **named}, "spec": template["spec"]}


def _coordinator(jobset: Object) -> dict[str, str]:
    found = jobset["spec"].get("coordinator")
    if not found:
        return {}
    place = f"{found['replicatedJob']}-{found.get('jobIndex', 0)}-{found.get('podIndex', 0)}"
    return {f"{PREFIX}coordinator": f"{jobset['metadata']['name']}-{place}.{subdomain(jobset)}"}
