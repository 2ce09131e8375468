"""Parts of objects that are more than a field: evictions, logs, reviews of access."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ktrain.errors import NotFoundError
from ktrain.launcher.cluster import selectors
from ktrain.launcher.cluster.resources import POD, POD_DISRUPTION_BUDGET
from ktrain.launcher.cluster.store import Store
from ktrain.testing.fake_cluster import bodies
from ktrain.testing.fake_cluster.access import Access, Ask
from ktrain.testing.fake_cluster.logs import LogQuery, LogReader
from ktrain.testing.fake_cluster.offer import ACCESS_REVIEW
from ktrain.testing.fake_cluster.requests import Request, Response, Target, write_options
from ktrain.testing.fake_cluster.status import Refusal, not_found, success

Object = dict[str, Any]

_ENDED = ("Succeeded", "Failed")
_EVICTED = {"reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"}


def evict(store: Store, target: Target, request: Request) -> Response:
    """Evicts a pod: its end is marked as a disruption, then it is deleted with its grace.

    Raises:
        Refusal: 404 without the pod, 429 where a disruption budget forbids it.
    """
    pod = _pod(store, target)
    options = write_options(request, "CreateOptions")
    if pod.get("status", {}).get("phase") not in _ENDED:
        for budget in store.list(POD_DISRUPTION_BUDGET, target.namespace).items:
            _check_budget(store, budget, pod)
    if not options.dry_run:
        name = str(target.name)
        store.mutate(POD, target.namespace, name, lambda obj: _disrupt(obj, store.now()), status=True)
        store.delete(POD, target.namespace, name)
    return Response(201, success(code=201))


def _pod(store: Store, target: Target) -> Object:
    assert target.name is not None
    try:
        return store.get(POD, target.namespace, target.name)
    except NotFoundError as error:
        raise not_found(POD, target.name) from error


def _check_budget(store: Store, budget: Object, pod: Object) -> None:
    selector = selector_of(budget["spec"].get("selector") or {})
    if not selector(pod):
        return
    covered = [obj for obj in store.list(POD, pod["metadata"]["namespace"]).items if selector(obj)]
    healthy = sum(_is_healthy(obj) for obj in covered)
    needed = _needed(budget["spec"], len(covered))
    if _is_healthy(pod) and healthy - 1 < needed:
        name = budget["metadata"]["name"]
        what = f"The disruption budget {name} needs {needed} healthy pods and has {healthy} currently"
        details = {"causes": [{"reason": "DisruptionBudget", "message": what}]}
        message = "Cannot evict pod as it would violate the pod's disruption budget."
        raise Refusal(429, message, "TooManyRequests", details)


def selector_of(selector: Mapping[str, Any]) -> selectors.Matches:
    """Returns whether an object matches a label selector in its structured form."""
    texts = [f"{key}={value}" for key, value in (selector.get("matchLabels") or {}).items()]
    for term in selector.get("matchExpressions") or ():
        key, values = term["key"], ",".join(term.get("values") or ())
        forms = {"In": f"{key} in ({values})", "NotIn": f"{key} notin ({values})", "Exists": key}
        texts.append({**forms, "DoesNotExist": f"!{key}"}[term["operator"]])
    return selectors.labels_match(",".join(texts))


def _is_healthy(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    is_ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    return is_ready and not pod["metadata"].get("deletionTimestamp")


def _needed(spec: Object, count: int) -> int:
    """The number of healthy pods that a budget wants of so many; shares are rounded up."""
    if spec.get("minAvailable") is not None:
        return _share(spec["minAvailable"], count)
    return count - _share(spec.get("maxUnavailable", 0), count)


def _share(value: int | str, count: int) -> int:
    return -(-count * int(value.rstrip("%")) // 100) if isinstance(value, str) else value


def _disrupt(pod: Object, now: str) -> None:
    condition = {"type": "DisruptionTarget", "status": "True", "lastProbeTime": None, "lastTransitionTime": now}
    conditions = pod.setdefault("status", {}).setdefault("conditions", [])
    conditions[:] = [each for each in conditions if each["type"] != "DisruptionTarget"]
    conditions.append({**condition, **_EVICTED})


def log(store: Store, reader: LogReader, target: Target, request: Request) -> Response:
    """Answers with the log of one container of a pod, as text."""
    pod = _pod(store, target)
    pieces = reader.read(pod, LogQuery.of(dict(request.query), str(target.name)))
    if pieces is None:
        return Response(204)
    return Response(200, headers={"Content-Type": "text/plain"}, stream=pieces)


def review(access: Access, user: str, target: Target, request: Request) -> Response:
    """Answers what the sender may do: a SelfSubjectAccessReview or a SelfSubjectRulesReview."""
    body, _ = bodies.decode(request, target.resource)
    spec = body.get("spec") or {}
    kind = {"kind": target.resource.kind, "apiVersion": target.resource.api_version, "metadata": {}}
    if target.resource != ACCESS_REVIEW:
        rules = access.rules_of(user, spec.get("namespace", ""))
        status = {"resourceRules": rules, "nonResourceRules": [], "incomplete": False}
        return Response(201, {**kind, "spec": {}, "status": status})
    asked = spec.get("resourceAttributes") or {}
    part = f"/{asked['subresource']}" if asked.get("subresource") else ""
    ask = Ask(
        asked.get("verb", ""),
        asked.get("group", ""),
        asked.get("resource", "") + part,
        asked.get("namespace") or None,
        asked.get("name"),
    )
    return Response(201, {**kind, "spec": spec, "status": {"allowed": access.allows(user, ask)}})
