"""Who may do what: the job's service account, the network around its pods, its stored specification, its secrets."""

from __future__ import annotations

import json

from ktrain.base import contract
from ktrain.launcher.render.common import Manifest, metadata, token_secret_name
from ktrain.launcher.spec import JobSpec
from ktrain.launcher.spec_file import to_value

_RBAC = "rbac.authorization.k8s.io"


def access_objects(spec: JobSpec) -> tuple[Manifest, ...]:
    """What pods need to be there before they start."""
    return (*_account(spec), _network(spec), _stored(spec))


def _account(spec: JobSpec) -> tuple[Manifest, ...]:
    """The agent looks at its own pod, whose name it is told, and at nothing else: it may not even list."""
    about = metadata(spec, spec.name)
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": about,
        "automountServiceAccountToken": False,
    }
    role = {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "Role",
        "metadata": about,
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}],
    }
    binding = {
        "apiVersion": f"{_RBAC}/v1",
        "kind": "RoleBinding",
        "metadata": about,
        "roleRef": {"apiGroup": _RBAC, "kind": "Role", "name": spec.name},
        "subjects": [{"kind": "ServiceAccount", "name": spec.name, "namespace": spec.namespace}],
    }
    return account, role, binding


def _network(spec: JobSpec) -> Manifest:
    """Only pods of this job reach its pods; outward all is open, since the bucket may be anywhere."""
    mine = {"matchLabels": {contract.LABEL_RUN: spec.name}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(spec, spec.name),
        "spec": {"podSelector": mine, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": mine}]}]},
    }


def _stored(spec: JobSpec) -> Manifest:
    """The specification: pods read it, and `resume` renders it again for the cluster as it is then."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(spec, spec.name),
        "data": {contract.POD_JOB_FILE.rpartition("/")[2]: json.dumps(to_value(spec), indent=1, sort_keys=True) + "\n"},
    }


def token_secret(spec: JobSpec, token: str) -> Manifest:
    """The run's own token, by which its processes know one another; made at submission, never part of `render`."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata(spec, token_secret_name(spec)),
        "type": "Opaque",
        "immutable": True,
        "stringData": {contract.POD_TOKEN_FILE.rpartition("/")[2]: token},
    }


def shown(manifest: Manifest) -> Manifest:
    """The object as it may be printed: without the value of any secret, and without bytes that nobody reads."""
    if manifest["kind"] == "Secret":
        return {**manifest, "stringData": dict.fromkeys(manifest["stringData"], "<redacted>")}
    if "binaryData" in manifest:
        sizes = {key: f"<{len(value)} characters of base64>" for key, value in manifest["binaryData"].items()}
        return {**manifest, "binaryData": sizes}
    return manifest
