"""Volumes as folders, and the paths of mounts rewritten to them.

There is no mount namespace: a container's `/` is a folder with a link at each mount path. Command, arguments,
variables and probes that name a mount path are given the path below this folder instead.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.base import contract
from ktrain.launcher.cluster import environment
from ktrain.launcher.cluster.environment import NotStartedError
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store

MESSAGE_PATH = "/dev/termination-log"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the folders of one pod lie.

    `pod` is removed with the pod, as is what lies below `memory` under its name; `node` is lost with the node, `claims`
    stays.
    """

    pod: Path
    memory: Path
    node: Path
    claims: Path


@dataclass(frozen=True, slots=True)
class Mounts:
    """A container's `/` and the paths in it that are mounts."""

    root: Path
    paths: tuple[str, ...]

    def rewrite(self, text: str) -> str:
        """The text with each mount path put below `root`: where a path begins, not inside of a longer one."""
        if not self.paths:
            return text
        either = "|".join(re.escape(path) for path in sorted(self.paths, key=len, reverse=True))
        return re.sub(
            rf"(?:(?<=file://)|(?<![\w./-]))(?:{either})(?![\w.-])", lambda match: f"{self.root}{match[0]}", text
        )


def prepare(pod: Object, store: Store, places: Places, allocatable: Mapping[str, str]) -> dict[str, Path]:
    """Makes the folders of a pod's volumes; returns them by name.

    Raises:
        NotStartedError: a ConfigMap or Secret is missing.
    """
    places.pod.mkdir(parents=True, exist_ok=True)
    return {
        volume["name"]: _folder(pod, volume, store, places, allocatable) for volume in pod["spec"].get("volumes") or ()
    }


def mount(container: Mapping[str, Any], volumes: Mapping[str, Path], root: Path) -> Mounts:
    """Makes a container's `/`, with links to its volumes and the empty file of its last words.

    Raises:
        NotStartedError: it mounts a volume that the pod has not.
    """
    if root.exists():
        shutil.rmtree(root)  # links are removed, not followed
    root.mkdir(parents=True)
    message = container.get("terminationMessagePath") or MESSAGE_PATH
    paths = [message]
    _below(root, message).write_bytes(b"")
    for item in container.get("volumeMounts") or ():
        if item["name"] not in volumes:
            raise NotStartedError("CreateContainerConfigError", f'volume "{item["name"]}" is not one of the pod')
        target = volumes[item["name"]]
        if item.get("subPath"):
            target = _inside(target, item["subPath"])
            if not target.exists():
                target.mkdir(parents=True)
        path = item["mountPath"].rstrip("/")
        _below(root, path).symlink_to(target)
        paths.append(path)
    return Mounts(root, tuple(paths))


def tear_down(places: Places) -> None:
    """Removes the volumes of a pod that has ended; its logs stay until the pod itself is deleted."""
    for folder in (places.memory, places.pod / "v", places.pod / "c"):
        shutil.rmtree(folder, ignore_errors=True)


def remove(places: Places) -> None:
    """Removes what belonged to the pod alone."""
    for folder in (places.pod, places.memory):
        shutil.rmtree(folder, ignore_errors=True)


def _below(root: Path, path: str) -> Path:
    found = root / path.lstrip("/")
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


def _inside(folder: Path, path: str) -> Path:
    if path.startswith("/") or ".." in Path(path).parts:
        raise NotStartedError("CreateContainerConfigError", f"path {path} leads out of its volume")
    return folder / path


def _folder(
    pod: Object, volume: Mapping[str, Any], store: Store, places: Places, allocatable: Mapping[str, str]
) -> Path:
    name, namespace = volume["name"], pod["metadata"]["namespace"]
    if "emptyDir" in volume:
        memory = (volume["emptyDir"] or {}).get("medium") == "Memory"
        return _made((places.memory if memory else places.pod / "v") / name)
    if "persistentVolumeClaim" in volume:
        claim = volume["persistentVolumeClaim"]["claimName"]
        # Memory that nodes lend is another folder on each of them (ADR 0045); what else is claimed is one for all.
        home = places.node / "lent" if claim == contract.MEMORY_CLAIM else places.claims
        return _made(home / namespace / claim)
    if "hostPath" in volume:
        return _made(_inside(places.node / "host", volume["hostPath"]["path"].lstrip("/")))
    if "csi" in volume:
        return _made(places.node / "csi" / volume["csi"]["driver"] / namespace)
    folder = _made(places.pod / "v" / name)
    sources = volume["projected"]["sources"] if "projected" in volume else [volume]
    for source in sources:
        for path, content in _files(pod, source, store, allocatable):
            target = _inside(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_bytes(content)
            target.chmod(0o400)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _files(
    pod: Object, source: Mapping[str, Any], store: Store, allocatable: Mapping[str, str]
) -> Iterator[tuple[str, bytes]]:
    """The files of one source, by their path in the volume."""
    if "serviceAccountToken" in source:
        yield source["serviceAccountToken"]["path"], secrets.token_urlsafe(32).encode()
    elif "downwardAPI" in source:
        for item in source["downwardAPI"].get("items") or ():
            if "fieldRef" in item:
                yield item["path"], environment.field(pod, item["fieldRef"]["fieldPath"]).encode()
            else:
                yield item["path"], environment.resource_field(pod, item["resourceFieldRef"], allocatable).encode()
    else:
        kind = "configMap" if "configMap" in source else "secret"
        reference = source[kind]
        yield from _chosen(reference, _data(pod, kind, reference, store))


def _data(pod: Object, kind: str, reference: Mapping[str, Any], store: Store) -> Mapping[str, bytes]:
    name = reference.get("secretName") or reference["name"]
    found = environment.data_of(store, pod["metadata"]["namespace"], kind, name)
    if found is None and not reference.get("optional"):
        raise NotStartedError("ContainerCreating", f'{kind.lower()} "{name}" not found')
    return found or {}


def _chosen(reference: Mapping[str, Any], data: Mapping[str, bytes]) -> Iterable[tuple[str, bytes]]:
    items = reference.get("items")
    if not items:
        return data.items()
    missing = [item["key"] for item in items if item["key"] not in data]
    if missing and not reference.get("optional"):
        raise NotStartedError("ContainerCreating", f"references non-existent key: {missing[0]}")
    return [(item["path"], data[item["key"]]) for item in items if item["key"] in data]
