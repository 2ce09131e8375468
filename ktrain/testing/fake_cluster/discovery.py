"""What a cluster says it serves: `/version`, `/api`, `/apis`, aggregated and by group."""

from __future__ import annotations

from typing import Any

from ktrain.launcher.cluster.resources import NAMESPACE, Resource
from ktrain.testing.fake_cluster.offer import ACCESS_REVIEW, RULES_REVIEW, Offer, Served

Object = dict[str, Any]

AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
_EMULATES_FROM = 33  # the minor version whose /version first tells what it emulates
_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_CUSTOM_VERBS = ["delete", "deletecollection", "get", "list", "patch", "create", "update", "watch"]
_REVIEWS = (ACCESS_REVIEW, RULES_REVIEW)
_SUBRESOURCE_VERBS = {"status": ["get", "patch", "update"], "log": ["get"]}
_SUBRESOURCE_KINDS = {
    "binding": ("", "v1", "Binding"),
    "eviction": ("policy", "v1", "Eviction"),
    "token": ("authentication.k8s.io", "v1", "TokenRequest"),
}


def version(offer: Offer) -> Object:
    patch = offer.version.split(".")[2] if offer.version.count(".") > 1 else "0"
    emulates: Object = {}
    if offer.minor >= _EMULATES_FROM:
        emulates = {"emulationMajor": "1", "emulationMinor": str(offer.minor), "minCompatibilityMajor": "1"}
        emulates |= {"minCompatibilityMinor": str(offer.minor - 1)}
    build = {"gitCommit": "0" * 40, "gitTreeState": "clean", "buildDate": "2026-01-01T00:00:00Z"}
    build |= {"goVersion": "none", "compiler": "ktrain", "platform": "fake/fake"}
    git = {"gitVersion": f"v1.{offer.minor}.{patch}"}
    return {"major": "1", "minor": str(offer.minor), **emulates, **git, **build}


def legacy_versions(address: str) -> Object:
    clients = [{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": clients}


def groups(served: Served) -> Object:
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(served, name) for name in served.groups()]}


def group(served: Served, name: str) -> Object:
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(served, name)}


def _group(served: Served, name: str) -> Object:
    versions = [{"groupVersion": f"{name}/{version}", "version": version} for version in served.versions(name)]
    return {"name": name, "versions": versions, "preferredVersion": versions[0]}


def resources(served: Served, api_version: str) -> Object:
    found = [resource for resource in served if resource.api_version == api_version]
    entries = [entry for resource in sorted(found, key=lambda each: each.plural) for entry in _entries(resource)]
    head = {"kind": "APIResourceList", **({"apiVersion": "v1"} if "/" in api_version else {})}
    return {**head, "groupVersion": api_version, "resources": entries}


def _entries(resource: Resource) -> list[Object]:
    entry = {"name": resource.plural, "singularName": resource.kind.lower(), "namespaced": resource.namespaced}
    entry |= {"kind": resource.kind, "verbs": verbs(resource)}
    entry |= {"shortNames": list(resource.short_names)} if resource.short_names else {}
    entry |= {"categories": list(resource.categories)} if resource.categories else {}
    return [entry, *(_subresource(resource, name) for name in resource.subresources)]


def _subresource(resource: Resource, name: str) -> Object:
    entry: Object = {"name": f"{resource.plural}/{name}", "singularName": "", "namespaced": resource.namespaced}
    if name in _SUBRESOURCE_KINDS:
        group_name, version_name, kind = _SUBRESOURCE_KINDS[name]
        entry |= {"group": group_name, "version": version_name} if group_name else {}
        return {**entry, "kind": kind, "verbs": ["create"]}
    return {**entry, "kind": resource.kind, "verbs": _SUBRESOURCE_VERBS[name]}


def verbs(resource: Resource) -> list[str]:
    if resource in _REVIEWS:
        return ["create"]
    if resource.storage == NAMESPACE.storage:
        return [verb for verb in _VERBS if verb != "deletecollection"]
    return _CUSTOM_VERBS if resource.is_custom else _VERBS


def aggregated(served: Served, names: list[str]) -> Object:
    """Discovery of whole groups in one answer; the core group is named by an empty text."""
    items = []
    for name in names:
        versions = [_aggregated_version(served, name, version) for version in served.versions(name)]
        items.append({"metadata": {"name": name} if name else {}, "versions": versions})
    return {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items}


def _aggregated_version(served: Served, name: str, version_name: str) -> Object:
    found = [resource for resource in served if (resource.group, resource.version) == (name, version_name)]
    entries = [_aggregated_resource(resource) for resource in sorted(found, key=lambda each: each.plural)]
    return {"version": version_name, "resources": entries, "freshness": "Current"}


def _aggregated_resource(resource: Resource) -> Object:
    # Kubernetes' own kinds leave group and version of the answer empty: they are those of the list.
    kind = (
        {"group": resource.group, "version": resource.version} if resource.is_custom else {"group": "", "version": ""}
    )
    kind |= {"kind": resource.kind}
    scope = "Namespaced" if resource.namespaced else "Cluster"
    entry = {"resource": resource.plural, "responseKind": kind, "scope": scope}
    entry |= {"singularResource": resource.kind.lower(), "verbs": verbs(resource)}
    entry |= {"shortNames": list(resource.short_names)} if resource.short_names else {}
    entry |= {"categories": list(resource.categories)} if resource.categories else {}
    parts = [_aggregated_subresource(resource, name, kind) for name in resource.subresources]
    return entry | ({"subresources": parts} if parts else {})


def _aggregated_subresource(resource: Resource, name: str, kind: Object) -> Object:
    if name in _SUBRESOURCE_KINDS:
        group_name, version_name, kind_name = _SUBRESOURCE_KINDS[name]
        kind = {"group": group_name, "version": version_name if group_name else "", "kind": kind_name}
        return {"subresource": name, "responseKind": kind, "verbs": ["create"]}
    return {"subresource": name, "responseKind": kind, "verbs": _SUBRESOURCE_VERBS[name]}
