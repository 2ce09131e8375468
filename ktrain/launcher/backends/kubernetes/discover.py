"""What a cluster has, found by asking it: the facts on which rendering depends. 403 leaves one unknown (ADR 0032)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from ktrain.base import contract
from ktrain.errors import ForbiddenError, NotFoundError
from ktrain.launcher import probe
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.dropped import lost_fields
from ktrain.launcher.facts import ClusterFacts, served_resources, server_version
from ktrain.launcher.gang import KUEUE_GROUP, VOLCANO_GROUP
from ktrain.launcher.quantity import parse_bytes
from ktrain.launcher.render.job import JOBSET_VERSION, Rendered, render
from ktrain.launcher.spec import JobSpec

_T = TypeVar("_T")
_AGGREGATED = "application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
_ACCEPT = ",".join([*(_AGGREGATED.format(version=version) for version in ("v2", "v2beta1")), "application/json"])
_KUBELET = re.compile(r"v?(\d+)\.(\d+)")
_IMAGE_VOLUME = re.compile(r"volumes\[[^]]*\]\.image$")


def discover(client: Client, spec: JobSpec) -> ClusterFacts:
    """What is served and what stands in the namespace of the job; nothing is sent to be tried yet."""
    kinds = served(client)
    facts = ClusterFacts(version=_told(lambda: server_version(client.get("/version"))), served=kinds)
    if kinds is None:
        return facts
    if facts.serves(KUEUE_GROUP, "localqueues"):
        version = _newest(facts, KUEUE_GROUP, "localqueues")
        queues = _told(lambda: client.list(path_of(version, "localqueues", spec.namespace)).items)
        facts = replace(facts, queues=_names(queues))
        levels = _told(lambda: _levels(client, version, queues or (), spec.placement.queue))
        facts = replace(facts, queue_levels=levels)
    if facts.serves(VOLCANO_GROUP, "queues"):
        found = _told(lambda: client.list(path_of(_newest(facts, VOLCANO_GROUP, "queues"), "queues")).items)
        facts = replace(facts, volcano_queues=_names(found))
    drivers = _told(lambda: client.list(path_of("storage.k8s.io/v1", "csidrivers")).items)
    memory = _told(lambda: _node_memory(client, spec.namespace))
    return replace(facts, csi_drivers=_names(drivers), node_memory=memory)


def try_fields(client: Client, spec: JobSpec, facts: ClusterFacts) -> ClusterFacts:
    """The facts with what a dry run tells of fields that not every cluster keeps.

    JobSet's definition says what its controller will see, and a pod what the server itself keeps of that: a field
    counts where both kept it. Unknown fields are no error here, since they are the question.
    """
    rendered = render(spec, probe.asking(facts))
    sent: Object = {"jobset": rendered.jobset}
    back: Object = {"jobset": _tried(client, path_of(JOBSET_VERSION, "jobsets", spec.namespace), rendered.jobset)}
    for pod in sample_pods(rendered, spec):
        role = pod["metadata"]["generateName"]
        sent[role] = pod
        back[role] = _told(lambda: _tried(client, path_of("v1", "pods", spec.namespace), pod))  # noqa: B023 -- called at once
    kubelet = _told(lambda: _oldest_kubelet(client))
    if any(answer is None for answer in back.values()):
        told = probe.answered(facts, sent["jobset"], back["jobset"], oldest_kubelet=kubelet)
        return replace(
            told, restart_rules=_at_most(told.restart_rules), scheduling_group=_at_most(told.scheduling_group)
        )
    facts = probe.answered(facts, sent, back, oldest_kubelet=kubelet)
    if spec.code.image is None:
        return facts
    lost = any(_IMAGE_VOLUME.search(item.path) for item in lost_fields(sent, back))
    return replace(facts, image_volumes=not lost)


def sample_pods(rendered: Rendered, spec: JobSpec) -> tuple[Object, ...]:
    """A pod of each role as the controllers would make it, but for the account that is not there yet."""
    found = []
    for job in rendered.jobset["spec"]["replicatedJobs"]:
        template = job["template"]["spec"]["template"]
        pod = {key: value for key, value in template["spec"].items() if key != "serviceAccountName"}
        name = f"{spec.name}-{job['name']}-dry-run-"
        about = {**template["metadata"], "generateName": name, "namespace": spec.namespace}
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": pod})
    return tuple(found)


def _at_most(kept: bool | None) -> bool | None:
    """What JobSet's definition alone tells of a field of pods: lost is lost, kept may still be lost by the server."""
    return False if kept is False else None


def _tried(client: Client, path: str, obj: Object) -> Object:
    return client.create(path, obj, dry_run=True, validation="Ignore")


def _told(ask: Callable[[], _T]) -> _T | None:
    """The answer, None where the server would not or could not tell; a refused object is not one of these."""
    try:
        return ask()
    except (ForbiddenError, NotFoundError):
        return None


def served(client: Client) -> frozenset[str] | None:
    """ "group/version/plural" of every resource outside the core group; None where it may not be read.

    From aggregated discovery; a server that lacks it is asked group by group."""
    answer = _told(lambda: client.get("/apis", accept=_ACCEPT))
    if answer is None:
        return None
    if answer["kind"] == "APIGroupDiscoveryList":
        return served_resources(answer)
    found: set[str] = set()
    for group in answer["groups"]:
        for item in group["versions"]:
            listed = _told(lambda: client.get(f"/apis/{item['groupVersion']}"))  # noqa: B023 -- called at once
            if listed is None:
                return None
            found |= {f"{item['groupVersion']}/{resource['name']}" for resource in listed["resources"]}
    return frozenset(name for name in found if name.count("/") == 2)


def _newest(facts: ClusterFacts, group: str, plural: str) -> str:
    return f"{group}/{(facts.versions_of(group, plural) or ('',))[-1]}"


def _names(objects: Iterable[Object] | None) -> tuple[str, ...] | None:
    return None if objects is None else tuple(sorted(item["metadata"]["name"] for item in objects))


def _levels(client: Client, version: str, queues: Iterable[Object], wanted: str | None) -> tuple[str, ...] | None:
    """Node labels of the topologies of the queue's flavours; None where no one queue is meant."""
    named = {item["metadata"]["name"]: item for item in queues}
    name = wanted if wanted is not None else next(iter(named)) if len(named) == 1 else "default"
    if name not in named:
        return None
    cluster_queue = client.get(path_of(version, "clusterqueues", None, named[name]["spec"]["clusterQueue"]))
    found: list[str] = []
    for group in cluster_queue["spec"].get("resourceGroups") or ():
        for flavor in group["flavors"]:
            about = client.get(path_of(version, "resourceflavors", None, flavor["name"]))["spec"]
            if about.get("topologyName"):
                topology = client.get(path_of(version, "topologies", None, about["topologyName"]))
                found += [level["nodeLabel"] for level in topology["spec"]["levels"]]
    return tuple(dict.fromkeys(found))


def _node_memory(client: Client, namespace: str) -> int:
    """Bytes that each node lends to the namespace: the size of the claim, once it is bound."""
    claim = client.try_get(path_of("v1", "persistentvolumeclaims", namespace, contract.MEMORY_CLAIM))
    status = {} if claim is None else claim.get("status") or {}
    size = (status.get("capacity") or {}).get("storage")
    return parse_bytes(str(size), name="size of the claim") if size and status.get("phase") == "Bound" else 0


def _oldest_kubelet(client: Client) -> tuple[int, int] | None:
    nodes = client.list(path_of("v1", "nodes")).items
    texts: list[Any] = [item.get("status", {}).get("nodeInfo", {}).get("kubeletVersion", "") for item in nodes]
    matches = [_KUBELET.match(text) for text in texts]
    versions = [(int(match[1]), int(match[2])) for match in matches if match]
    return min(versions) if versions and len(versions) == len(nodes) else None
