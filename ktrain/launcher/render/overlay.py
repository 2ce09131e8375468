"""What a person lays over a rendered pod: merged, and refused where it would take the pod's protection away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ktrain.base.settings import reads_like_secret
from ktrain.errors import ConfigError
from ktrain.launcher.render.common import Manifest

_HOST_FIELDS = ("hostNetwork", "hostPID", "hostIPC")
_CONTAINER_LISTS = ("initContainers", "containers", "ephemeralContainers")


def merged(pod: Manifest, over: Mapping[str, Any], *, where: str) -> Manifest:
    """The pod with `over` merged in: tables by key, lists of named things by name, everything else replaced.

    Raises:
        ConfigError: the result is privileged, sees the node, gives user code a token of the cluster, or has a secret in
            plain.
    """
    if not over:
        return pod
    result: Manifest = _merge(pod, over)
    found = next(_dangers(result), None)
    if found is not None:
        raise ConfigError(f"{where}: {found}; an overlay takes no protection from a job's pods: leave it out")
    return result


def _merge(below: Any, over: Any) -> Any:
    if isinstance(below, Mapping) and isinstance(over, Mapping):
        return {**below, **{key: _merge(below[key], item) if key in below else item for key, item in over.items()}}
    if _is_named(below) and _is_named(over):
        names = {item["name"]: item for item in over}
        known = [_merge(item, names.pop(item["name"])) if item["name"] in names else item for item in below]
        return [*known, *names.values()]
    return over


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) and "name" in item for item in value)


def _dangers(pod: Mapping[str, Any]) -> Iterator[str]:
    for name in _HOST_FIELDS:
        if pod.get(name):
            yield f"{name} shares the node"
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken gives every container a token"
    if not pod.get("securityContext", {}).get("runAsNonRoot") or pod["securityContext"].get("runAsUser") == 0:
        yield "securityContext lets containers run as root"
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a hostPath"
    containers = [item for name in _CONTAINER_LISTS for item in pod.get(name, [])]
    for container in containers:
        yield from _dangers_of(container)


def _dangers_of(container: Mapping[str, Any]) -> Iterator[str]:
    """A container that was laid over, or one of ours that was loosened, is as tight as ours are."""
    name, security = container["name"], container.get("securityContext", {})
    if security.get("privileged") or security.get("allowPrivilegeEscalation") is not False:
        yield f"container {name} may gain privileges; say allowPrivilegeEscalation = false"
    capabilities = security.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"container {name} has capabilities; say capabilities.drop = ['ALL']"
    if security.get("runAsUser") == 0 or security.get("runAsNonRoot") is False:
        yield f"container {name} runs as root"
    for variable in container.get("env", []):
        if "value" in variable and reads_like_secret(variable["name"]):
            yield f"container {name}: variable {variable['name']} reads like a secret; refer to a key of one"
    mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
    if "cluster" in mounts and name != "agent":
        yield f"container {name} mounts the agent's token"
