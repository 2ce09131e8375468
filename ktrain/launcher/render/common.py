"""What the objects of one job share: names, labels, the security of containers."""

from __future__ import annotations

from typing import Any

from ktrain.base import contract
from ktrain.launcher.spec import JobSpec

Manifest = dict[str, Any]

HEAD, WORKER = "head", "worker"  # replicated jobs, roles, and names of containers but for the worker's two
AGENT, TRAINER = "agent", "trainer"


def labels(spec: JobSpec, role: str | None = None) -> dict[str, str]:
    """Labels of every object of a job, and of its pods with their role."""
    found = {
        "app.kubernetes.io/name": "ktrain",
        "app.kubernetes.io/instance": spec.name,
        "app.kubernetes.io/managed-by": "ktrain",
        contract.LABEL_RUN: spec.name,
    }
    return found if role is None else {**found, contract.LABEL_ROLE: role}


def metadata(spec: JobSpec, name: str) -> Manifest:
    """Metadata of an object of the job."""
    return {"name": name, "namespace": spec.namespace, "labels": labels(spec)}


def token_secret_name(spec: JobSpec) -> str:
    return f"{spec.name}-token"


def user_environment(spec: JobSpec) -> list[Manifest]:
    """The user's variables go to agent and head as well: both write to the run's bucket."""
    plain = [{"name": name, "value": value} for name, value in sorted(spec.env.items())]
    secret = [
        {"name": item.env, "valueFrom": {"secretKeyRef": {"name": item.secret, "key": item.key}}}
        for item in spec.secrets
    ]
    return [*plain, *secret]


CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}


def pod_security(spec: JobSpec) -> Manifest:
    """What the pod security level `restricted` asks of a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": spec.user,
        "runAsGroup": spec.user,
        "fsGroup": spec.user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def head_address(spec: JobSpec) -> str:
    """The head pod's name in the job's headless service."""
    return f"tcp:{spec.name}-{HEAD}-0-0.{spec.name}:{contract.POD_HEAD_PORT}"
