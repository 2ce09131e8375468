"""The guide's part that shows the named set-ups, made from the golden files.

`python -m tests.unit.launcher.setups_page` writes manifests and page anew.
"""

from __future__ import annotations

import re
from typing import Any

from ktrain.launcher.render.job import Rendered
from ktrain.launcher.render.text import to_yaml
from tests.unit.launcher import setups

PAGE = setups.ROOT / "docs" / "guides" / "kubernetes.md"
MARK = "<!-- Below: written by `python -m tests.unit.launcher.setups_page`. -->\n"
_STEP = re.compile(r"([^.\[\]]+)|\[([^\]]+)\]")
_INDEX = re.compile(r"\[[^\]]*\]")
_DOCUMENT = "---\n"
_PATTERN = re.compile(r"\[/.*/\]")
_JOBSET, _HEAD, _WORKER, _POD = "JobSet", "head Job", "worker Job", "worker pod"

# Name -> title, what it shows, and the parts of the manifests that make it.
SETUPS: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "01-single-gpu": (
        "One GPU",
        "Nothing is known of the cluster, so only what every cluster keeps is used. The head's Job tells by its reason "
        "whether the job has ended; the worker's Job never fails by itself.",
        [(_JOBSET, "failurePolicy"), (_HEAD, "podFailurePolicy"), (_POD, "containers[trainer].resources")],
    ),
    "02-kueue-4x8-h100": (
        "Four nodes of eight H100, with Kueue",
        "Kueue admits the JobSet whole and ends its suspension. The topology is asked for on the pod template, because "
        "the queue's topology has that level. The key of the bucket is a reference.",
        [(_JOBSET, "metadata.labels"), (_WORKER, "template.metadata.annotations")],
    ),
    "03-native-gang": (
        "A native gang on Kubernetes 1.37",
        "Workload and PodGroup of Kubernetes itself. The cluster keeps restart rules, so a suspected node (exit 74) is "
        "replaced and every other exit restarts the container in place.",
        [
            ("Workload", "spec"),
            ("PodGroup", "spec"),
            (_POD, "schedulingGroup"),
            (_POD, "containers[trainer].restartPolicyRules"),
        ],
    ),
    "04-volcano": (
        "Volcano, and a run on a shared volume",
        "The PodGroup has the nodes that the job needs and the resources that the queue must have room for.",
        [("PodGroup", "spec"), (_WORKER, "template.metadata.annotations"), (_POD, "schedulerName")],
    ),
    "05-tpu-v6e-slice": (
        "A TPU v6e slice",
        "Four hosts of four chips, in one node pool. No gang scheduler is there: the pods meet at the head.",
        [(_WORKER, "completions"), (_POD, "nodeSelector"), (_POD, "containers[trainer].resources")],
    ),
    "06-tpu-v5p-two-slices": (
        "Two v5p slices",
        "One Job for each slice. Copies are kept in the other slice, never in the same one.",
        [("worker", "replicas"), (_WORKER, "completions"), (_POD, "containers[trainer].env[/MEGASCALE|TPU_WORKER/]")],
    ),
    "07-gb200-compute-domain": (
        "GB200 with a compute domain",
        "Fast links that reach over nodes: a ComputeDomain, whose channel the trainer claims, on nodes of one clique. "
        "Kubernetes 1.36 writes native groups in its own way.",
        [("ComputeDomain", "spec"), (_POD, "resourceClaims"), (_POD, "affinity.podAffinity"), ("PodGroup", "spec")],
    ),
    "08-dra-alternatives": (
        "Eight H200, else eight H100",
        "A claim of devices with alternatives, and the coscheduling plugin of a scheduler that was named.",
        [("ResourceClaimTemplate", "spec"), (_POD, "containers[trainer].resources"), ("PodGroup", "spec")],
    ),
    "09-spot-with-spares": (
        "Spot nodes with spares",
        "Six nodes are needed, eight are asked for. Workers are on spot nodes, the head is not; the grace period ends "
        "within the provider's notice.",
        [
            (_WORKER, "completions"),
            (_POD, "nodeSelector"),
            (_POD, "terminationGracePeriodSeconds"),
            ("head pod", "affinity"),
        ],
    ),
    "10-gke-mtc": (
        "GKE with multi-tier checkpointing",
        "The memory tier's volume is the node's, by GKE's driver: it outlives pods. The code is sent along.",
        [(_POD, "volumes[memory]"), (_POD, "initContainers[code].command")],
    ),
    "11-memory-of-nodes": (
        "Memory that nodes lend",
        "The scope is `auto`, and each node lends enough: the tier lies on the claim of the namespace, in a folder of "
        "the run, and outlives the pod. What is lent is not requested again, and stays within the limits.",
        [
            (_POD, "volumes[memory]"),
            (_POD, "containers[trainer].volumeMounts[memory]"),
            (_POD, "containers[trainer].resources"),
        ],
    ),
}


def _whole(done: Rendered, what: str) -> Any:
    jobset = done.jobset
    if what in (_JOBSET, "worker"):
        jobs = {item["name"]: item for item in jobset["spec"]["replicatedJobs"]}
        return {**jobset["spec"], "metadata": jobset["metadata"]} if what == _JOBSET else jobs[what]
    role = what.partition(" ")[0]
    if role in ("head", "worker"):
        job = setups.job_of(jobset, role)["spec"]
        return job["template"]["spec"] if what.endswith("pod") else job
    return next(item for item in done.owned if item["kind"] == what)


def _part(value: Any, path: str) -> Any:
    for key, name in _STEP.findall(path):
        if key:
            value = value[key]
        elif name.startswith("/"):
            value = [item for item in value if re.match(name.strip("/"), item["name"])]
        else:
            value = next(item for item in value if item["name"] == name)
    return value


def _excerpt(done: Rendered, what: str, path: str) -> str:
    value = _part(_whole(done, what), path)
    last = _INDEX.sub("", path).rpartition(".")[2]
    text = to_yaml([value if path.endswith("]") and isinstance(value, dict) else {last: value}])
    return f"# {what}: {_PATTERN.sub('', path)}\n{text.partition(_DOCUMENT)[2]}"


def _section(name: str) -> str:
    title, text, parts = SETUPS[name]
    done = setups.rendered(name)
    shown = [_excerpt(done, what, path) for what, path in parts]
    kinds = ", ".join(item["kind"] for item in done.objects)
    job = (setups.FOLDER / name / "job.toml").read_text()
    facts = (setups.FOLDER / name / "cluster.json").read_text()
    return (
        f"## {title}\n\n{text}\n\nThe job:\n\n```toml\n{job}```\n\n"
        f"What is known of the cluster:\n\n```json\n{facts}```\n\n"
        f"Gang: {done.gang.kind.value}, because: {done.gang.reason}. Objects: {kinds}.\n"
        f"[All manifests](../../tests/golden/kubernetes/{name}/manifests.yaml); of them:\n\n"
        f"```yaml\n{''.join(shown)}```\n"
    )


def page() -> str:
    """The whole page: what stands above the mark, and the set-ups."""
    above = PAGE.read_text().partition(MARK)[0]
    return above + MARK + "".join(f"\n{_section(name)}" for name in setups.NAMES)


if __name__ == "__main__":
    setups.write_manifests()
    PAGE.write_text(page(), encoding="ascii")
