"""What the webhooks of JobSet and Kueue fill in and refuse, as far as the recordings show it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ktrain.launcher.cluster.resources import JOB, JOB_SET, Resource
from ktrain.testing.fake_cluster.schemas import Schema
from ktrain.testing.fake_cluster.status import INTERNAL, FieldError, Refusal, invalid, invalid_value
from ktrain.testing.fake_cluster.structural import decode_error

Object = dict[str, Any]

QUEUE = "kueue.x-k8s.io/queue-name"
_DENIED = 'admission webhook "vjobset.kb.io" denied the request: '
_REASONS = (
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
)
_MAX_LABEL = 63
_TEMPLATE_MAY_CHANGE = ("nodeSelector", "tolerations", "schedulingGates")


def complete_jobset(jobset: Object, schema: Schema | None) -> None:
    """Fills in what JobSet's mutating webhook fills in, in place.

    Raises:
        Refusal: 400 where the webhook cannot read the object.
    """
    spec = jobset.get("spec")
    if spec is None:
        spec = jobset["spec"] = {}
    wrong = decode_error(schema, {"spec": spec}) if schema is not None else None
    if wrong is not None:
        raise Refusal(400, f'admission webhook "mjobset.kb.io" denied the request: {_with_struct(wrong)}')
    spec.setdefault("network", {}).setdefault("enableDNSHostnames", True)
    spec["network"].setdefault("publishNotReadyAddresses", True)
    spec.setdefault("successPolicy", {"operator": "All"})
    spec.setdefault("startupPolicy", {"startupPolicyOrder": "AnyOrder"})
    for i, rule in enumerate((spec.get("failurePolicy") or {}).get("rules") or ()):
        rule.setdefault("name", f"failurePolicyRule{i}")
    for replicated in spec.get("replicatedJobs") or ():
        _complete_replicated(replicated)


def _complete_replicated(replicated: Object) -> None:
    replicated.setdefault("groupName", "default")
    replicated.setdefault("replicas", 1)
    job = replicated.setdefault("template", {})
    job.setdefault("metadata", {})
    job.setdefault("spec", {}).setdefault("completionMode", "Indexed")
    pod = job["spec"].setdefault("template", {})
    pod.setdefault("metadata", {})
    pod.setdefault("spec", {}).setdefault("restartPolicy", "OnFailure")
    for key in ("initContainers", "containers"):
        for container in pod["spec"].get(key) or ():
            container.setdefault("resources", {})


def _with_struct(wrong: str) -> str:
    """Go names the struct of a field; in JobSet's types it is called as the field that holds it."""
    before, _, rest = wrong.partition("Go struct field ")
    path, _, kind = rest.partition(" of type ")
    parts = path.lstrip(".").split(".")
    holder = parts[-2].removesuffix("s") if len(parts) > 1 else ""
    return f"{before}Go struct field {holder[:1].upper()}{holder[1:]}.{'.'.join(parts)} of type {kind}"


def check_jobset(old: Object | None, new: Object, *, can_restart_job: bool) -> None:
    """Checks what JobSet's validating webhook checks.

    Raises:
        Refusal: 422 in the webhook's words.
    """
    errors = list(_update_errors(old, new) if old else _create_errors(new, can_restart_job))
    if errors:
        raise invalid(JOB_SET, new["metadata"]["name"], errors, before=_DENIED)


def _create_errors(jobset: Object, can_restart_job: bool) -> Iterator[FieldError]:
    spec, name = jobset["spec"], jobset["metadata"]["name"]
    replicated = spec.get("replicatedJobs") or []
    for i, entry in enumerate(replicated):
        path, job = f"spec.replicatedJobs[{i}].name", f"{name}-{entry['name']}-{entry.get('replicas', 1) - 1}"
        last_pod = f"{job}-{(entry['template']['spec'].get('completions') or 1) - 1}-xxxxx"
        for what, longest in (("job", job), ("pod", last_pod)):
            if len(longest) > _MAX_LABEL:
                why = f"JobSet name is too long, {what} names generated for this JobSet will exceed 63 characters"
                yield invalid_value(path, job, why)
    names = {entry["name"] for entry in replicated}
    for target in _targets(spec):
        if target not in names:
            yield _internal(f"invalid replicatedJob name '{target}' does not appear in .spec.ReplicatedJobs")
    for rule in (spec.get("failurePolicy") or {}).get("rules") or ():
        if rule["action"].startswith("RestartJob") and not rule["action"].startswith("RestartJobSet"):
            if not can_restart_job:
                yield _internal(
                    "RestartJob and RestartJobAndIgnoreMaxRestarts failure policy actions are not allowed when"
                    " RestartJob feature gate is disabled"
                )
        for reason in rule.get("onJobFailureReasons") or ():
            if reason not in _REASONS:
                yield _internal(
                    f"invalid job failure reason '{reason}' in failure policy is not a recognized job failure reason"
                )


def _targets(spec: Object) -> Iterator[str]:
    yield from (spec.get("successPolicy") or {}).get("targetReplicatedJobs") or ()
    for rule in (spec.get("failurePolicy") or {}).get("rules") or ():
        yield from rule.get("targetReplicatedJobs") or ()


def _internal(why: str) -> FieldError:
    return FieldError(INTERNAL, "<nil>", "", why)


def _update_errors(old: Object, new: Object) -> Iterator[FieldError]:
    before, after = old["spec"].get("replicatedJobs"), new["spec"].get("replicatedJobs")
    may_move = old["spec"].get("suspend") or new["spec"].get("suspend")
    if (_fixed(before) != _fixed(after)) if may_move else (before != after):
        yield invalid_value("spec.replicatedJobs", after, "field is immutable")


def _fixed(replicated: list[Object] | None) -> list[Object]:
    """What of the replicated jobs may not change while a JobSet is suspended."""
    result = json.loads(json.dumps(replicated or []))
    for entry in result:
        pod = entry["template"]["spec"].get("template", {})
        for key in ("labels", "annotations"):
            pod.get("metadata", {}).pop(key, None)
        for key in _TEMPLATE_MAY_CHANGE:
            pod.get("spec", {}).pop(key, None)
    return list(result)


def queue(resource: Resource, old: Object | None, new: Object) -> None:
    """What Kueue's webhooks do with what names a queue: suspend it when it is made, hold it to its queue.

    Raises:
        Refusal: 403 where an object that runs is given another queue.
    """
    if resource.storage not in (JOB.storage, JOB_SET.storage):
        return
    name = (new["metadata"].get("labels") or {}).get(QUEUE)
    if old is None and name:
        new["spec"]["suspend"] = True
    if old is not None and not old["spec"].get("suspend") and not new["spec"].get("suspend"):
        if (old["metadata"].get("labels") or {}).get(QUEUE) != name:
            error = invalid_value(f"metadata.labels[{QUEUE}]", name, "field is immutable")
            hook = "vjobset.kb.io" if resource.storage == JOB_SET.storage else "vjob.kb.io"
            message = f'admission webhook "{hook}" denied the request: {error.path}: {error.text}'
            raise Refusal(403, message, "Forbidden")
