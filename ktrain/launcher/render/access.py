"""Who may do what: the job's service account, the network around its pods, its stored specification, its secrets."""

from __future__ import annotations

import base64
import json

from ktrain.base import contract
from ktrain.errors import ConfigError
from ktrain.launcher.render.common import Manifest, code_name, metadata, token_secret_name
from ktrain.launcher.spec import JobSpec
from ktrain.launcher.spec_file import to_value

MOST_CARRIED = 700 * 1024  # bytes of code in a ConfigMap, which ends at 1 MiB with its base64
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


def code_config_map(spec: JobSpec, archive: bytes) -> Manifest:
    """The code that is sent.

    Raises:
        ConfigError: it does not fit.
    """
    if len(archive) > MOST_CARRIED:
        raise ConfigError(
            f"code: the archive has {len(archive):,} bytes, and {MOST_CARRIED:,} fit; leave files out with "
            ".ktrainignore, or bring the code in an image: --set code.image=REF"
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(spec, code_name(spec)),
        "immutable": True,
        "binaryData": {"code.zip": base64.b64encode(archive).decode("ascii")},
    }


def shown(manifest: Manifest) -> Manifest:
    """The object as it may be printed: without the value of any secret, and without bytes that nobody reads."""
    if manifest["kind"] == "Secret":
        return {**manifest, "stringData": dict.fromkeys(manifest["stringData"], "<redacted>")}
    if "binaryData" in manifest:
        sizes = {key: f"<{len(value)} characters of base64>" for key, value in manifest["binaryData"].items()}
        return {**manifest, "binaryData": sizes}
    return manifest
