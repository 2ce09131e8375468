"""What `kubectl kustomize` makes of the folders in launch/cluster, as far as they use it; anything else is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from tests.unit.launcher import setups

CLUSTER = setups.ROOT / "launch" / "cluster"
FOLDERS = sorted(path.parent.name for path in CLUSTER.glob("*/kustomization.yaml"))
_KNOWN = {"apiVersion", "kind", "namespace", "resources", "labels"}
_WIDE = {  # kinds that lie in no namespace
    "Namespace", "ClusterRole", "ClusterRoleBinding", "PersistentVolume", "StorageClass", "PriorityClass", "Topology",
    "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass",
}  # fmt: skip


def resolve(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization.

    Raises:
        ValueError: it uses something that is not known here.
    """
    about = yaml.safe_load((folder / "kustomization.yaml").read_text())
    odd = set(about) - _KNOWN
    if odd or (about["apiVersion"], about["kind"]) != ("kustomize.config.k8s.io/v1beta1", "Kustomization"):
        raise ValueError(f"{folder}: not known here: {sorted(odd) or about['kind']}")
    found = [item for name in about["resources"] for item in _resource(folder / name)]
    for item in found:
        _put_namespace(item, about.get("namespace"))
        for labels in about.get("labels", ()):
            if set(labels) != {"pairs"}:
                raise ValueError(f"{folder}: labels: not known here: {sorted(labels)}")
            item["metadata"].setdefault("labels", {}).update(labels["pairs"])
    return found


def is_wide(item: dict[str, Any]) -> bool:
    """Whether an object lies in no namespace."""
    return item["kind"] in _WIDE


def _resource(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        return resolve(path)
    return [copy.deepcopy(item) for item in yaml.safe_load_all(path.read_text()) if item is not None]


def _put_namespace(item: dict[str, Any], namespace: str | None) -> None:
    if namespace is None:
        return
    if item["kind"] == "Namespace":
        item["metadata"]["name"] = namespace
    elif not is_wide(item):
        item["metadata"]["namespace"] = namespace
