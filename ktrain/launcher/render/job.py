"""The whole job: one JobSet, and the objects that it owns."""

from __future__ import annotations

from dataclasses import dataclass

from ktrain.base import contract
from ktrain.errors import ConfigError
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.gang import Gang, choose
from ktrain.launcher.render import groups, overlay
from ktrain.launcher.render.access import access_objects
from ktrain.launcher.render.common import HEAD, WORKER, Manifest, labels, metadata
from ktrain.launcher.render.devices import DevicePlan, plan_devices
from ktrain.launcher.render.pods import head_pod, worker_pod
from ktrain.launcher.scope import ChosenScope, choose_scope
from ktrain.launcher.spec import GangKind, JobSpec

JOBSET_VERSION = "jobset.x-k8s.io/v1alpha2"
_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
_MOST_RETRIES = 2**31 - 1
_HEAD_RETRIES = 10  # of a head that ended without a verdict


@dataclass(frozen=True, slots=True)
class Rendered:
    """What is sent to a cluster, in this order: the JobSet suspended, then what it owns, then it is released."""

    jobset: Manifest
    owned: tuple[Manifest, ...]
    gang: Gang
    devices: DevicePlan
    scope: ChosenScope  # of the memory tier

    @property
    def objects(self) -> tuple[Manifest, ...]:
        return (self.jobset, *self.owned)

    @property
    def released_by(self) -> str:
        """Who ends the JobSet's suspension."""
        return "Kueue" if self.gang.kind is GangKind.KUEUE else "ktrain"


def render(spec: JobSpec, facts: ClusterFacts) -> Rendered:
    """The objects of a job for a cluster of which these facts are known.

    Raises:
        ConfigError: the cluster cannot run what was asked for.
    """
    _expect_possible(spec, facts)
    gang = choose(spec, facts)
    devices = plan_devices(spec, facts)
    scope = choose_scope(spec, facts)
    groups_of_pods = groups.group_objects(spec, gang, devices, scope.scope)
    owned = (*access_objects(spec), *devices.objects, *groups_of_pods)
    jobs = [_head(spec, facts, gang), _worker(spec, facts, gang, devices, scope)]
    return Rendered(_jobset(spec, facts, gang, jobs), owned, gang, devices, scope)


def _expect_possible(spec: JobSpec, facts: ClusterFacts) -> None:
    """Refuses what the cluster surely lacks, and no job falls back to something else from by itself."""
    if spec.code.image is not None and facts.image_volumes is False:
        raise ConfigError(f"code.image {spec.code.image!r}: the cluster drops image volumes; send the code (--code)")


def _jobset(spec: JobSpec, facts: ClusterFacts, gang: Gang, jobs: list[Manifest]) -> Manifest:
    about = metadata(spec, spec.name)
    about["labels"] = {**about["labels"], **groups.job_labels(spec, gang)}
    return {
        "apiVersion": JOBSET_VERSION,
        "kind": "JobSet",
        "metadata": about,
        "spec": {
            "suspend": True,
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All", "targetReplicatedJobs": [HEAD]},
            "failurePolicy": _failure_policy(spec, facts),
            "ttlSecondsAfterFinished": spec.limits.keep_s,
            "replicatedJobs": jobs,
        },
    }


def _failure_policy(spec: JobSpec, facts: ClusterFacts) -> Manifest:
    """The head's word is the job's: a verdict ends it, the two codes for "again" make all pods anew.

    They are told apart by the reasons of the head's Job, which every JobSet knows. Only a JobSet that keeps message
    patterns can leave a disruption uncounted: where they are pruned, that rule would take every restart for one.
    """
    rules: list[Manifest] = []
    if facts.message_patterns:
        rules.append(
            {
                "name": "disrupted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [f"exit code {contract.EXIT_AGAIN_FREE} "],
                "targetReplicatedJobs": [HEAD],
            }
        )
    rules += [
        {
            "name": "again",
            "action": "RestartJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
            "targetReplicatedJobs": [HEAD],
        },
        {
            "name": "verdict",
            "action": "FailJobSet",
            "onJobFailureReasons": [
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "BackoffLimitExceeded",
                "DeadlineExceeded",
            ],
            "targetReplicatedJobs": [HEAD],
        },
    ]
    return {"maxRestarts": spec.limits.max_restarts, "restartStrategy": "BlockingRecreate", "rules": rules}


def _head(spec: JobSpec, facts: ClusterFacts, gang: Gang) -> Manifest:
    exits = {"containerName": HEAD, "operator": "In"}
    job: Manifest = {
        "completionMode": "Indexed",
        "completions": 1,
        "parallelism": 1,
        "backoffLimitPerIndex": _HEAD_RETRIES,
        "maxFailedIndexes": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {**exits, "values": [contract.EXIT_AGAIN, contract.EXIT_AGAIN_FREE]},
                },
                {"action": "FailIndex", "onExitCodes": {**exits, "values": list(contract.EXITS_FINAL)}},
            ]
        },
    }
    if spec.limits.deadline_s is not None:
        job["activeDeadlineSeconds"] = spec.limits.deadline_s
    pod = overlay.merged(head_pod(spec, gang), spec.overlay.head, where="overlay.head")
    return {"name": HEAD, "replicas": 1, "template": {"spec": {**job, "template": _pod(spec, facts, gang, HEAD, pod)}}}


def _worker(spec: JobSpec, facts: ClusterFacts, gang: Gang, devices: DevicePlan, scope: ChosenScope) -> Manifest:
    """One Job, or one for each TPU slice; it never fails by itself, and never waits for a pod that cannot answer."""
    num_jobs = spec.tpus.num_slices if spec.tpus is not None else 1
    num_pods = spec.num_nodes // num_jobs + spec.spares
    pod = worker_pod(spec, gang, devices, scope=scope.scope, restart_rules=facts.restart_rules is True)
    pod = overlay.merged(pod, spec.overlay.worker, where="overlay.worker")
    job = {
        "completionMode": "Indexed",
        "completions": num_pods,
        "parallelism": num_pods,
        "backoffLimit": _MOST_RETRIES,
        "podReplacementPolicy": "TerminatingOrFailed",
        "template": _pod(spec, facts, gang, WORKER, pod),
    }
    about = {} if devices.exclusive is None else {"metadata": {"annotations": {_EXCLUSIVE: devices.exclusive}}}
    return {"name": WORKER, "replicas": num_jobs, "template": {**about, "spec": job}}


def _pod(spec: JobSpec, facts: ClusterFacts, gang: Gang, role: str, pod: Manifest) -> Manifest:
    more, annotations = groups.pod_marks(spec, gang, role, facts)
    about: Manifest = {"labels": {**labels(spec, role), **more}}
    return {"metadata": {**about, **({"annotations": annotations} if annotations else {})}, "spec": pod}
