"""What is refused on create and on update: the rules of core kinds that the recordings show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ktrain.launcher.cluster.resources import (
    CONFIG_MAP,
    JOB,
    LEASE,
    POD,
    RESOURCE_CLAIM_TEMPLATE,
    Resource,
)
from ktrain.testing.fake_cluster.status import FORBIDDEN, INVALID, REQUIRED, FieldError, invalid, invalid_value

Object = dict[str, Any]
Errors = Iterator[FieldError]

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_NAME_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and"
    f" end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{_SUBDOMAIN.pattern}')"
)
_LABEL_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and"
    " end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is"
    f" '{_LABEL_VALUE.pattern}')"
)
_POD_RULE = (
    "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)
_MAX_LABEL = 63


def check(resource: Resource, old: Object | None, new: Object) -> None:
    """Checks an object that is about to be created (`old` is None) or to replace another.

    Raises:
        Refusal: 422 with a cause for each thing that is wrong.
    """
    generated = (new.get("spec", {}).get("template") or {}).get("metadata", {}).get("labels") or {}
    errors = list(_metadata(new["metadata"], generated if resource.storage == JOB.storage else {}))
    if resource.storage in _RULES and (old is None or old.get("spec") != new.get("spec") or "spec" not in new):
        errors = [*_RULES[resource.storage](old, new), *errors]
    if errors:
        raise invalid(resource, new["metadata"]["name"], errors)


def _metadata(metadata: Object, generated: Object) -> Errors:
    """What is wrong with an object's name and labels; a Job's `generated` labels are looked at in its template."""
    name = metadata["name"]
    if not _SUBDOMAIN.fullmatch(name):
        yield invalid_value("metadata.name", name, _NAME_RULE)
    labels = metadata.get("labels") or {}
    yield from _labels("metadata.labels", {key: value for key, value in labels.items() if key not in generated})


def _labels(path: str, labels: Object | None) -> Errors:
    for value in (labels or {}).values():
        if len(value) > _MAX_LABEL:
            yield invalid_value(path, value, f"must be no more than {_MAX_LABEL} bytes")
        elif not _LABEL_VALUE.fullmatch(value):
            yield invalid_value(path, value, _LABEL_RULE)


def _config_map(old: Object | None, new: Object) -> Errors:
    if old is not None and old.get("immutable") and old.get("data") != new.get("data"):
        yield FieldError(FORBIDDEN, "data", "", "field is immutable when `immutable` is set")


def _pod(old: Object | None, new: Object) -> Errors:
    if not new["spec"].get("containers"):
        yield FieldError(REQUIRED, "spec.containers")
    elif old is not None and _fixed(old["spec"]) != _fixed(new["spec"]):
        yield FieldError(FORBIDDEN, "spec", "", _POD_RULE)


def _fixed(spec: Object) -> Object:
    """What of a pod's spec may not change. Gates may be lifted, and a scheduler binds it to a node."""
    mutable = ("activeDeadlineSeconds", "tolerations", "schedulingGates", "nodeName", "terminationGracePeriodSeconds")
    fixed = {key: value for key, value in spec.items() if key not in mutable}
    for key in ("initContainers", "containers"):
        if key in fixed:
            fixed[key] = [{k: v for k, v in entry.items() if k != "image"} for entry in fixed[key]]
    return fixed


def _job(old: Object | None, new: Object) -> Errors:
    spec = new["spec"]
    if old is not None:
        yield from _job_update(old["spec"], spec)
        return
    rules = (spec.get("podFailurePolicy") or {}).get("rules") or []
    for i, rule in enumerate(rules):
        codes = rule.get("onExitCodes") or {}
        for j, value in enumerate(codes.get("values") or []):
            if value == 0 and codes.get("operator") == "In":
                path = f"spec.podFailurePolicy.rules[{i}].onExitCodes.values[{j}]"
                yield invalid_value(path, 0, "must not be 0 for the In operator")
    if spec["template"]["spec"].get("restartPolicy") not in ("OnFailure", "Never"):
        yield FieldError(REQUIRED, "spec.template.spec.restartPolicy", "", 'valid values: "OnFailure", "Never"')
    yield from _labels("spec.template.labels", spec["template"].get("metadata", {}).get("labels"))
    name = new["metadata"]["name"]
    if spec["completionMode"] == "Indexed":
        last = f"{name}-{(spec.get('completions') or 1) - 1}"
        if len(last) > _MAX_LABEL:
            why = f"will not able to create pod with invalid DNS label: {last}"
            yield invalid_value("metadata.name", name, why)


def _job_update(old: Object, new: Object) -> Errors:
    completions = new.get("completions")
    if completions != old.get("completions") and completions != new.get("parallelism"):
        yield invalid_value("spec.completions", completions, "can only be modified in tandem with spec.parallelism")
    for key in ("selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy"):
        if old.get(key) != new.get(key):
            yield invalid_value(f"spec.{key}", new.get(key), "field is immutable")
    if not old.get("suspend") and old.get("template") != new.get("template"):
        yield FieldError(INVALID, "spec.template", "", "field is immutable")


def _lease(old: Object | None, new: Object) -> Errors:
    duration_s = new.get("spec", {}).get("leaseDurationSeconds")
    if duration_s is not None and duration_s <= 0:
        yield invalid_value("spec.leaseDurationSeconds", duration_s, "must be greater than 0")


def _claim_template(old: Object | None, new: Object) -> Errors:
    if old is not None:
        yield invalid_value("spec", new["spec"], "field is immutable")
        return
    requests = new["spec"].get("spec", {}).get("devices", {}).get("requests") or []
    for i, request in enumerate(requests):
        if ("exactly" in request) == ("firstAvailable" in request):
            why = "exactly one of `exactly` or `firstAvailable` is required"
            yield FieldError(REQUIRED, f"spec.spec.devices.requests[{i}]", "", why)


_RULES: dict[tuple[str, str], Callable[[Object | None, Object], Errors]] = {
    CONFIG_MAP.storage: _config_map,
    POD.storage: _pod,
    JOB.storage: _job,
    LEASE.storage: _lease,
    RESOURCE_CLAIM_TEMPLATE.storage: _claim_template,
}
