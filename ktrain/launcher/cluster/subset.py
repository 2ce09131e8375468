"""The part of a pod that the pod runner honours; anything else is refused by name, never ignored (ADR 0036)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktrain.errors import ConfigError

Fields = Mapping[str, Any]  # name -> None for a whole value, or the fields of what lies below (of each item of a list)

_ANY: None = None
_NAMED_KEY: Fields = {"name": _ANY, "key": _ANY, "optional": _ANY}
_FIELD_REF: Fields = {"apiVersion": _ANY, "fieldPath": _ANY}
_RESOURCE_REF: Fields = {"containerName": _ANY, "resource": _ANY, "divisor": _ANY}
_ITEMS: Fields = {"key": _ANY, "path": _ANY, "mode": _ANY}
_DOWNWARD: Fields = {"path": _ANY, "fieldRef": _FIELD_REF, "resourceFieldRef": _RESOURCE_REF, "mode": _ANY}
_PROBE: Fields = {
    **dict.fromkeys(("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "successThreshold"), _ANY),
    "failureThreshold": _ANY,
    "exec": {"command": _ANY},
    "tcpSocket": {"port": _ANY},
    "httpGet": {"path": _ANY, "port": _ANY, "scheme": _ANY},
}
_NAMED: Fields = {"name": _ANY, "optional": _ANY}
_ENV: Fields = {
    "name": _ANY,
    "value": _ANY,
    "valueFrom": {
        "fieldRef": _FIELD_REF,
        "resourceFieldRef": _RESOURCE_REF,
        "configMapKeyRef": _NAMED_KEY,
        "secretKeyRef": _NAMED_KEY,
    },
}
_CONTAINER: Fields = {
    **dict.fromkeys(("name", "command", "args", "workingDir", "restartPolicy"), _ANY),
    **dict.fromkeys(("terminationMessagePath", "terminationMessagePolicy"), _ANY),
    "env": _ENV,
    "envFrom": {"prefix": _ANY, "configMapRef": _NAMED, "secretRef": _NAMED},
    "volumeMounts": {"name": _ANY, "mountPath": _ANY, "subPath": _ANY, "readOnly": _ANY},
    "restartPolicyRules": {"action": _ANY, "exitCodes": {"operator": _ANY, "values": _ANY}},
    "resources": {"requests": _ANY, "limits": _ANY},
    "startupProbe": _PROBE,
    "readinessProbe": _PROBE,
    "livenessProbe": _PROBE,
    # Only a real cluster needs these: there are no images, kernel namespaces or terminals here.
    **dict.fromkeys(("image", "imagePullPolicy", "ports", "securityContext", "stdin", "stdinOnce", "tty"), _ANY),
}
_CONFIG_MAP: Fields = {"name": _ANY, "items": _ITEMS, "optional": _ANY, "defaultMode": _ANY}
_VOLUME: Fields = {
    "name": _ANY,
    "emptyDir": {"medium": _ANY, "sizeLimit": _ANY},
    "configMap": _CONFIG_MAP,
    "secret": {"secretName": _ANY, "items": _ITEMS, "optional": _ANY, "defaultMode": _ANY},
    "downwardAPI": {"items": _DOWNWARD, "defaultMode": _ANY},
    "projected": {
        "defaultMode": _ANY,
        "sources": {
            "serviceAccountToken": {"path": _ANY, "expirationSeconds": _ANY, "audience": _ANY},
            "configMap": _CONFIG_MAP,
            "secret": _CONFIG_MAP,
            "downwardAPI": {"items": _DOWNWARD},
        },
    },
    "persistentVolumeClaim": {"claimName": _ANY, "readOnly": _ANY},
    "hostPath": {"path": _ANY, "type": _ANY},
    "csi": {"driver": _ANY, "volumeAttributes": _ANY},
}
VOLUME_SOURCES = tuple(key for key in _VOLUME if key != "name")
_SELECTOR_TERM: Fields = {
    "labelSelector": {"matchLabels": _ANY, "matchExpressions": _ANY},
    "topologyKey": _ANY,
    "namespaces": _ANY,
    "matchLabelKeys": _ANY,
}
_POD: Fields = {
    "initContainers": _CONTAINER,
    "containers": _CONTAINER,
    "volumes": _VOLUME,
    **dict.fromkeys(("restartPolicy", "terminationGracePeriodSeconds", "activeDeadlineSeconds"), _ANY),
    **dict.fromkeys(("nodeName", "nodeSelector", "tolerations", "schedulerName", "schedulingGates"), _ANY),
    **dict.fromkeys(("priority", "priorityClassName", "preemptionPolicy", "hostname", "subdomain", "resources"), _ANY),
    "schedulingGroup": {"podGroupName": _ANY},
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": _ANY,
            "preferredDuringSchedulingIgnoredDuringExecution": _ANY,  # a wish
        },
        "podAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": _SELECTOR_TERM,
            "preferredDuringSchedulingIgnoredDuringExecution": _ANY,
        },
        "podAntiAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": _SELECTOR_TERM,
            "preferredDuringSchedulingIgnoredDuringExecution": _ANY,
        },
    },
    # Only a real cluster needs these: identities, images, name service and kernel namespaces.
    **dict.fromkeys(("serviceAccountName", "serviceAccount", "automountServiceAccountToken"), _ANY),
    **dict.fromkeys(("securityContext", "imagePullSecrets", "enableServiceLinks", "dnsPolicy"), _ANY),
    **dict.fromkeys(("runtimeClassName", "shareProcessNamespace", "setHostnameAsFQDN"), _ANY),
}
_PROBE_KINDS = ("exec", "tcpSocket", "httpGet")


def check_pod(pod: Mapping[str, Any]) -> None:
    """Refuses a pod that asks for something that the pod runner does not do.

    Raises:
        ConfigError: names the first field that is not honoured, or a container without a command.
    """
    name, spec = pod["metadata"].get("name", "?"), pod["spec"]
    unknown = _unknown(spec, _POD, "spec")
    if unknown is not None:
        raise ConfigError(f"pod {name}: the pod runner does not honour {unknown}; leave it out, or use a real cluster")
    for volume in spec.get("volumes") or ():
        if sum(source in volume for source in VOLUME_SOURCES) != 1:
            raise ConfigError(f"pod {name}: volume {volume['name']}: expected one of {', '.join(VOLUME_SOURCES)}")
    for kind in ("initContainers", "containers"):
        for at, container in enumerate(spec.get(kind) or ()):
            _check_container(name, f"spec.{kind}[{at}]", container)


def _check_container(pod: str, path: str, container: Mapping[str, Any]) -> None:
    if not container.get("command"):
        raise ConfigError(
            f"pod {pod}: {path} has no command, and the pod runner knows no image's own entry point; name the command"
        )
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container and not any(kind in container[probe] for kind in _PROBE_KINDS):
            raise ConfigError(f"pod {pod}: {path}.{probe} has none of {', '.join(_PROBE_KINDS)}")
    paths = sorted(mount["mountPath"].rstrip("/") + "/" for mount in container.get("volumeMounts") or ())
    for outer, inner in zip(paths, paths[1:], strict=False):
        if inner.startswith(outer):
            raise ConfigError(
                f"pod {pod}: {path} mounts {inner[:-1]} below {outer[:-1]}, which the pod runner cannot; mount them "
                "beside one another"
            )


def _unknown(value: Any, fields: Fields | None, path: str) -> str | None:
    """The path of the first field that is asked for and not listed; what is empty, false or 0 asks for nothing."""
    if fields is None:
        return None
    if isinstance(value, list):
        below = [(item, fields, f"{path}[{at}]") for at, item in enumerate(value)]
    else:
        asked = {key: item for key, item in value.items() if item}
        strange = next((key for key in asked if key not in fields), None)
        if strange is not None:
            return f"{path}.{strange}"
        below = [(item, fields[key], f"{path}.{key}") for key, item in asked.items()]
    return next((found for item in below if (found := _unknown(*item)) is not None), None)
