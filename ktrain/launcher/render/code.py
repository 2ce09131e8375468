"""How code gets into a worker pod: its init container, what that is told, and the objects that carry it (ADR 0043)."""

from __future__ import annotations

import base64

from ktrain.base import contract
from ktrain.errors import ConfigError
from ktrain.launcher.code.ways import MOST_CARRIED
from ktrain.launcher.render.common import CONTAINER_SECURITY, Manifest, metadata, user_environment
from ktrain.launcher.spec import JobSpec

_FILE = "code.zip"
_STORES = ("AWS_", "AZURE_", "GOOGLE_", "GCLOUD_", "CLOUDSDK_", "STORAGE_EMULATOR_", "FSSPEC_", "OCI_")
_NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")


def config_maps(spec: JobSpec, archive: bytes | None) -> tuple[Manifest, ...]:
    """The objects that carry the code that is sent; none where it goes another way.

    Raises:
        ConfigError: it is not given, or does not fit.
    """
    if spec.code.archive is None or spec.code.is_in_bucket:
        return ()
    if archive is None:
        raise ConfigError("code.archive: its bytes are missing; give the directory that they are made of: --code DIR")
    num = spec.code.parts
    if len(archive) > num * MOST_CARRIED:
        raise ConfigError(
            f"code: the archive has {len(archive):,} bytes, and {num * MOST_CARRIED:,} fit; leave files out with "
            ".ktrainignore, or bring the code in an image: --set code.image=REF"
        )
    if spec.code.size not in (None, len(archive)):
        raise ConfigError(f"code.size: expected {len(archive)}, the bytes of the archive, found {spec.code.size}")
    return tuple(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(spec, name),
            "immutable": True,
            "binaryData": {key: base64.b64encode(archive[at * MOST_CARRIED : (at + 1) * MOST_CARRIED]).decode("ascii")},
        }
        for at, (name, key) in enumerate(parts(spec))
    )


def parts(spec: JobSpec) -> list[tuple[str, str]]:
    """Name and key of each ConfigMap; the digest in the name makes it another one for other code."""
    assert spec.code.archive is not None
    name = f"{spec.name}-code-{spec.code.archive[:10]}"
    if spec.code.parts == 1:
        return [(name, _FILE)]
    return [(f"{name}-{at}", f"{_FILE}.{at:02d}") for at in range(spec.code.parts)]


def containers(spec: JobSpec) -> list[Manifest]:
    """The init container that proves and unpacks the code; it has no token of the cluster and runs no user's code."""
    if spec.code.git is not None:
        return [_container(spec, _git_command(spec), memory="1Gi", env=_git_environment(spec))]
    if spec.code.archive is None:
        return []
    if spec.code.is_in_bucket:
        return [_container(spec, _bucket_command(spec), memory="512Mi", env=_bucket_environment(spec))]
    carried = [f"{contract.POD_CARRIED}/{key}" for _, key in parts(spec)]
    command = [*_python(spec, "ktrain.launcher.code.unpack"), *carried, spec.code.archive, contract.POD_CODE]
    return [_container(spec, command, memory="256Mi", env=[])]


def _python(spec: JobSpec, module: str) -> list[str]:
    return [spec.python, "-P", "-m", module]


def _bucket_command(spec: JobSpec) -> list[str]:
    assert spec.code.archive is not None and spec.code.size is not None
    asked = [spec.run, spec.code.archive, str(spec.code.size)]
    return [*_python(spec, "ktrain.run.code"), *asked, contract.POD_CARRIED, contract.POD_CODE]


def _git_command(spec: JobSpec) -> list[str]:
    assert spec.code.git is not None
    url, _, commit = spec.code.git.removeprefix("git+").rpartition("@")
    return [*_python(spec, "ktrain.launcher.code.git"), url, commit, contract.POD_CARRIED, contract.POD_CODE]


def _container(spec: JobSpec, command: list[str], *, memory: str, env: list[Manifest]) -> Manifest:
    is_carried = spec.code.git is None and not spec.code.is_in_bucket
    return {
        "name": "code",
        "image": spec.image,
        "command": command,
        **({"env": env} if env else {}),
        "resources": {"requests": {"cpu": "100m", "memory": memory}, "limits": {"memory": memory}},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "carried", "mountPath": contract.POD_CARRIED, **({"readOnly": True} if is_carried else {})},
            {"name": "code", "mountPath": contract.POD_CODE},
        ],
    }


_HOME: Manifest = {"name": "HOME", "value": contract.POD_CARRIED}  # the image's may not be this user's


def _bucket_environment(spec: JobSpec) -> list[Manifest]:
    """What is needed to read the run's bucket, by the references that the agent has; no other secret of the job."""
    chosen = [item for item in user_environment(spec) if _reads_a_store(item["name"]) or item["name"] in spec.code.env]
    return [_HOME, {"name": contract.ENV_PATIENCE, "value": f"{spec.limits.patience_s:g}"}, *chosen]


def _reads_a_store(name: str) -> bool:
    return name.startswith(_STORES) or _is_network(name)


def _is_network(name: str) -> bool:
    return name.upper() in _NETWORK


def _git_environment(spec: JobSpec) -> list[Manifest]:
    chosen = [item for item in user_environment(spec) if _is_network(item["name"]) or item["name"] in spec.code.env]
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": spec.code.git_secret, "key": key, "optional": optional}}}
        for name, key, optional in (
            (contract.ENV_GIT_USERNAME, "username", True),
            (contract.ENV_GIT_PASSWORD, "password", False),
        )
        if spec.code.git_secret is not None
    ]
    return [_HOME, *chosen, *secret]


def volumes(spec: JobSpec) -> list[Manifest]:
    """The volumes of the worker pod that code needs."""
    if spec.code.image is not None:
        return [{"name": "code", "image": {"reference": spec.code.image, "pullPolicy": "IfNotPresent"}}]
    if not spec.code.is_brought:
        return []
    return [{"name": "carried", **_carried(spec)}, {"name": "code", "emptyDir": {"sizeLimit": "1Gi"}}]


def _carried(spec: JobSpec) -> Manifest:
    if spec.code.git is not None:
        return {"emptyDir": {"sizeLimit": "2Gi"}}
    if spec.code.is_in_bucket:
        return {"emptyDir": {"sizeLimit": "1Gi"}}
    carriers = parts(spec)
    if len(carriers) == 1:
        return {"configMap": {"name": carriers[0][0]}}
    return {"projected": {"sources": [{"configMap": {"name": name}} for name, _ in carriers]}}


def mounts(spec: JobSpec) -> list[Manifest]:
    """Where the trainer sees the code."""
    return [{"name": "code", "mountPath": contract.POD_CODE, "readOnly": True}] if spec.code.is_brought else []
