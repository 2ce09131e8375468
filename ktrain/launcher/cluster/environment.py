"""What a container finds in its environment: values, downward fields, ConfigMaps and Secrets."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from ktrain.errors import KtrainError, NotFoundError
from ktrain.launcher import quantity
from ktrain.launcher.cluster.resources import CONFIG_MAP, SECRET
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store

_REFERENCE = re.compile(r"\$(?:\$\(|\(([A-Za-z_][A-Za-z0-9_.-]*)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


class NotStartedError(KtrainError):
    """A container cannot be started yet; `reason` is the kubelet's word for it."""

    kind = "unavailable"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` by its value, `$$(NAME)` as `$(NAME)`; an unknown name stays as it is written."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return "$("
        return variables.get(match[1], match[0])

    return _REFERENCE.sub(value, text)


def of_container(
    pod: Object, container: Mapping[str, Any], store: Store, allocatable: Mapping[str, str]
) -> dict[str, str]:
    """The variables of a container, later ones expanded by earlier ones.

    Raises:
        NotStartedError: a ConfigMap, a Secret or a key of one is missing.
    """
    variables: dict[str, str] = {}
    for source in container.get("envFrom") or ():
        kind = "configMap" if "configMapRef" in source else "secret"
        reference = source.get(f"{kind}Ref")
        found = _data(store, pod, kind, reference["name"], optional=reference.get("optional", False))
        prefix = source.get("prefix", "")
        variables.update({f"{prefix}{key}": value.decode() for key, value in (found or {}).items()})
    for entry in container.get("env") or ():
        if "valueFrom" not in entry:
            variables[entry["name"]] = expand(entry.get("value") or "", variables)
            continue
        value = _from(pod, container, entry["valueFrom"], store, allocatable)
        if value is not None:
            variables[entry["name"]] = value
    return variables


def _from(
    pod: Object, container: Mapping[str, Any], source: Mapping[str, Any], store: Store, allocatable: Mapping[str, str]
) -> str | None:
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return resource_field(pod, source["resourceFieldRef"], allocatable, of=container["name"])
    kind = "configMap" if "configMapKeyRef" in source else "secret"
    reference = source[f"{kind}KeyRef"]
    optional = reference.get("optional", False)
    found = _data(store, pod, kind, reference["name"], optional=optional)
    if found is None or (optional and reference["key"] not in found):
        return None
    if reference["key"] not in found:
        where = f"{_WORDS[kind]} {pod['metadata']['namespace']}/{reference['name']}"
        raise NotStartedError("CreateContainerConfigError", f"couldn't find key {reference['key']} in {where}")
    return found[reference["key"]].decode()


_KINDS = {"configMap": CONFIG_MAP, "secret": SECRET}
_WORDS = {"configMap": "ConfigMap", "secret": "Secret"}


def _data(store: Store, pod: Object, kind: str, name: str, *, optional: bool) -> dict[str, bytes] | None:
    found = data_of(store, pod["metadata"]["namespace"], kind, name)
    if found is None and not optional:
        raise NotStartedError("CreateContainerConfigError", f'{kind.lower()} "{name}" not found')
    return found


def data_of(store: Store, namespace: str, kind: str, name: str) -> dict[str, bytes] | None:
    """The keys of a ConfigMap (`configMap`) or a Secret (`secret`); None where there is none of this name."""
    try:
        found = store.get(_KINDS[kind], namespace, name)
    except NotFoundError:
        return None
    encoded = found.get("binaryData" if kind == "configMap" else "data") or {}
    plain = found.get("data" if kind == "configMap" else "stringData") or {}
    return {
        **{key: base64.b64decode(value) for key, value in encoded.items()},
        **{key: value.encode() for key, value in plain.items()},
    }


def field(pod: Object, path: str) -> str:
    """A downward field as text; a whole map of labels or annotations is `key="value"` lines."""
    match = _SUBSCRIPT.fullmatch(path)
    if match:
        return str((pod["metadata"].get(match[1]) or {}).get(match[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        entries = pod["metadata"].get(path.partition(".")[2]) or {}
        return "\n".join(f'{key}="{_escaped(value)}"' for key, value in sorted(entries.items()))
    if path in ("status.podIPs", "status.hostIPs"):
        return ",".join(item["ip"] for item in pod.get("status", {}).get(path.partition(".")[2]) or ())
    read = _FIELDS.get(path)
    if read is None:
        raise NotStartedError("CreateContainerConfigError", f"field {path} is no downward field of a pod")
    return read(pod)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


_FIELDS: dict[str, Callable[[Object], str]] = {
    "metadata.name": lambda pod: pod["metadata"]["name"],
    "metadata.namespace": lambda pod: pod["metadata"]["namespace"],
    "metadata.uid": lambda pod: pod["metadata"]["uid"],
    "spec.nodeName": lambda pod: pod["spec"].get("nodeName", ""),
    "spec.serviceAccountName": lambda pod: pod["spec"].get("serviceAccountName", "default"),
    "status.hostIP": lambda pod: pod.get("status", {}).get("hostIP", ""),
    "status.podIP": lambda pod: pod.get("status", {}).get("podIP", ""),
}


def resource_field(pod: Object, reference: Mapping[str, Any], allocatable: Mapping[str, str], *, of: str = "") -> str:
    """A container's request or limit, in the divisor's units and rounded up; without a limit, what the node has."""
    name = reference.get("containerName") or of
    containers = [*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or ())]
    container: Mapping[str, Any] = next((item for item in containers if item["name"] == name), {})
    which, _, resource = reference["resource"].partition(".")
    amounts = (container.get("resources") or {}).get(which) or {}
    fallback = allocatable.get(resource, "0") if which == "limits" else "0"
    divisor = quantity.parse(reference.get("divisor") or "1") or Fraction(1)
    return str(-(-quantity.parse(amounts.get(resource, fallback)) // divisor))
