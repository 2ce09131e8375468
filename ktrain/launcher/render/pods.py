"""The two pods of a job: the head, and a worker with its agent and trainer."""

from __future__ import annotations

import math

from ktrain.base import contract, ids
from ktrain.base.settings import Timeouts
from ktrain.launcher import budget
from ktrain.launcher.gang import Gang
from ktrain.launcher.quantity import MIB, format_bytes
from ktrain.launcher.render import code, placing
from ktrain.launcher.render.common import (
    AGENT,
    CONTAINER_SECURITY,
    HEAD,
    TRAINER,
    WORKER,
    Manifest,
    head_address,
    pod_security,
    token_secret_name,
    user_environment,
)
from ktrain.launcher.render.devices import DevicePlan
from ktrain.launcher.scope import MTC_DRIVER
from ktrain.launcher.spec import JobSpec, Scope

_PROBE_S = 2
_TOKEN_S = 3600
_CLUSTER_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"
_FIELDS = (
    (contract.ENV_POD_NAME, "metadata.name"),
    (contract.ENV_POD_NAMESPACE, "metadata.namespace"),
    (contract.ENV_POD_IP, "status.podIP"),
    (contract.ENV_HOST, "spec.nodeName"),
    (contract.ENV_JOB_INDEX, "metadata.labels['jobset.sigs.k8s.io/job-index']"),
    (contract.ENV_POD_INDEX, "metadata.annotations['batch.kubernetes.io/job-completion-index']"),
)


def head_pod(spec: JobSpec, gang: Gang) -> Manifest:
    """The pod whose exit code is the job's verdict: no device, no token of the cluster."""
    container = {
        "name": HEAD,
        "image": spec.image,
        "command": _entry(spec, HEAD),
        "env": [*_environment(spec, HEAD), *user_environment(spec)],
        "ports": [{"name": "control", "containerPort": contract.POD_HEAD_PORT, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            *_common_mounts(),
            {"name": "wire", "mountPath": "/dev/shm"},  # noqa: S108 -- Ray's head looks here
            *_claim_mounts(spec),
        ],
    }
    return {
        **_pod(spec),
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [*_common_volumes(spec), _memory_volume("wire", 256 * MIB), *_claim_volumes(spec)],
        **placing.of_head(spec, gang),
    }


def worker_pod(spec: JobSpec, gang: Gang, devices: DevicePlan, *, scope: Scope, restart_rules: bool) -> Manifest:
    """The pod of one node: the agent holds what must survive, the trainer runs the ranks.

    `scope` is the one that was chosen.
    With `restart_rules` the kubelet restarts the trainer in place, except where it asks for another node; without, it
    restarts it always, which every version does.
    """
    claims = [{"name": name, "resourceClaimTemplateName": template} for name, template in devices.claims.items()]
    return {
        **_pod(spec),
        "restartPolicy": "Never" if restart_rules else "OnFailure",
        "initContainers": [*code.containers(spec), _agent(spec, scope)],
        "containers": [{**_trainer(spec, devices, scope), **(_RULES if restart_rules else {})}],
        "volumes": _worker_volumes(spec, scope),
        **({"resourceClaims": claims} if claims else {}),
        **placing.of_worker(spec, gang, devices),
    }


_RULES: Manifest = {
    "restartPolicy": "Never",
    "restartPolicyRules": [
        {
            "action": "Restart",
            "exitCodes": {"operator": "NotIn", "values": [contract.EXIT_OK, contract.EXIT_BAD_NODE]},
        }
    ],
}


def _pod(spec: JobSpec) -> Manifest:
    pull = {"imagePullSecrets": [{"name": name} for name in spec.pull_secrets]} if spec.pull_secrets else {}
    return {
        "serviceAccountName": spec.name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": budget.grace_s(spec),
        "securityContext": pod_security(spec),
        **pull,
    }


def _entry(spec: JobSpec, role: str) -> list[str]:
    return [spec.python, "-P", "-m", "ktrain.run.pod", role]


# Containers


def _trainer(spec: JobSpec, devices: DevicePlan, scope: Scope) -> Manifest:
    size = budget.memory_budget(spec, scope)
    claims = {"claims": [{"name": name} for name in devices.claims]} if devices.claims else {}
    return {
        "name": TRAINER,
        "image": spec.image,
        "command": _entry(spec, TRAINER),
        **({"workingDir": contract.POD_CODE} if spec.code.is_brought else {}),  # else the image's own
        "env": [*_environment(spec, WORKER), *devices.env, *user_environment(spec)],
        "resources": {
            "requests": {
                "cpu": spec.resources.cpu or str(4 * spec.num_workers),
                "memory": format_bytes(size.trainer_request),
            },
            "limits": {"memory": format_bytes(size.trainer_limit), **devices.limits},
            **claims,
        },
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            *_common_mounts(),
            _memory_mount(spec, scope),
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 -- data loaders look here
            *code.mounts(spec),
            *_claim_mounts(spec),
        ],
    }


def _agent(spec: JobSpec, scope: Scope) -> Manifest:
    """A native sidecar: ready when it has adopted the volume and joined the head, so the trainer starts only then."""
    size = budget.memory_budget(spec, scope)
    waits_s = max(spec.limits.gang_wait_s, math.ceil(Timeouts(spec.limits.patience_s).start_s))
    return {
        "name": AGENT,
        "image": spec.image,
        "command": _entry(spec, AGENT),
        "restartPolicy": "Always",
        "env": [*_environment(spec, WORKER), *user_environment(spec)],
        "resources": {
            "requests": {"cpu": "1", "memory": format_bytes(size.agent_request)},
            "limits": {"memory": format_bytes(size.agent_limit)},
        },
        "securityContext": CONTAINER_SECURITY,
        "startupProbe": {
            "exec": {"command": ["test", "-e", contract.POD_READY_FILE]},
            "periodSeconds": _PROBE_S,
            "failureThreshold": math.ceil(waits_s / _PROBE_S),
        },
        "volumeMounts": [
            *_common_mounts(),
            _memory_mount(spec, scope),
            {"name": "wire", "mountPath": "/dev/shm"},  # noqa: S108 -- Ray's store lies here
            {"name": "cluster", "mountPath": _CLUSTER_DIR, "readOnly": True},
            *_claim_mounts(spec),
        ],
    }


# Environment


def _environment(spec: JobSpec, role: str) -> list[Manifest]:
    fixed = {
        contract.ENV_ROLE: role,
        contract.ENV_RUN: spec.run,
        contract.ENV_HEAD: head_address(spec),
        contract.ENV_JOB: contract.POD_JOB_FILE,
        contract.ENV_TOKEN_FILE: contract.POD_TOKEN_FILE,
        contract.ENV_VOLUME: contract.POD_VOLUME,
        contract.ENV_PATIENCE: f"{spec.limits.patience_s:g}",
        "HOME": contract.POD_WORK,
    }
    downward = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in _FIELDS]
    return [*downward, *({"name": name, "value": value} for name, value in fixed.items())]


# Volumes


def _common_mounts() -> list[Manifest]:
    return [
        {"name": "work", "mountPath": contract.POD_WORK},
        {"name": "job", "mountPath": contract.POD_JOB_FILE.rpartition("/")[0], "readOnly": True},
        {"name": "token", "mountPath": contract.POD_TOKEN_FILE.rpartition("/")[0], "readOnly": True},
    ]


def _common_volumes(spec: JobSpec) -> list[Manifest]:
    return [
        {"name": "work", "emptyDir": {"sizeLimit": "8Gi"}},
        {"name": "job", "configMap": {"name": spec.name}},
        {"name": "token", "secret": {"secretName": token_secret_name(spec), "defaultMode": 0o440}},
    ]


def _memory_volume(name: str, size: int) -> Manifest:
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": format_bytes(size)}}


def _memory_mount(spec: JobSpec, scope: Scope) -> Manifest:
    """Of memory that is lent to all jobs of the namespace: the folder of this run alone, whatever the job is called."""
    part = {"subPath": ids.text_digest(spec.run, 16)} if scope is Scope.NODE else {}
    return {"name": "memory", "mountPath": contract.POD_VOLUME, **part}


def _memory_tier(size: int, scope: Scope) -> Manifest:
    """The pod's own memory, or the node's, which outlives the pod."""
    if scope is Scope.NODE:
        return {"name": "memory", "persistentVolumeClaim": {"claimName": contract.MEMORY_CLAIM}}
    if scope is Scope.MTC:
        return {"name": "memory", "csi": {"driver": MTC_DRIVER}}
    return _memory_volume("memory", size)


def _worker_volumes(spec: JobSpec, scope: Scope) -> list[Manifest]:
    size = budget.memory_budget(spec)
    return [
        *_common_volumes(spec),
        _memory_tier(size.volume, scope),
        _memory_volume("shm", size.shm),
        _memory_volume("wire", max(size.in_flight, 64 * MIB)),
        {"name": "cluster", "projected": {"sources": _cluster_sources(), "defaultMode": 0o440}},
        *code.volumes(spec),
        *_claim_volumes(spec),
    ]


def _cluster_sources() -> list[Manifest]:
    """What a client in a pod expects to find: the only token of the cluster in the job, for the agent alone."""
    namespace = {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": _TOKEN_S}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [namespace]}},
    ]


def _claim_name(at: int) -> str:
    return f"data-{at}"


def _claim_mounts(spec: JobSpec) -> list[Manifest]:
    return [
        {"name": _claim_name(at), "mountPath": volume.path, **({"readOnly": True} if volume.read_only else {})}
        for at, volume in enumerate(spec.volumes)
    ]


def _claim_volumes(spec: JobSpec) -> list[Manifest]:
    return [
        {"name": _claim_name(at), "persistentVolumeClaim": {"claimName": volume.claim}}
        for at, volume in enumerate(spec.volumes)
    ]
