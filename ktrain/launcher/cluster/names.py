"""The names of pods, for processes without a name service: one file for each namespace, as /etc/hosts is written."""

from __future__ import annotations

from ktrain.base import atomic
from ktrain.launcher.cluster.job_pods import is_deleting, is_terminal
from ktrain.launcher.cluster.pod_starter import Folders
from ktrain.launcher.cluster.resources import POD, SERVICE
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store


class Names:
    """Keeps the files current. Call from one thread."""

    def __init__(self, store: Store, folders: Folders) -> None:
        self._store = store
        self._folders = folders
        self._written: dict[str, str] = {}

    def reconcile(self) -> float | None:
        """Writes the files that are out of date; nothing comes due by itself."""
        services = {
            (item["metadata"]["namespace"], item["metadata"]["name"]): item for item in self._store.list(SERVICE).items
        }
        lines: dict[str, list[str]] = {namespace: [] for namespace in self._written}
        for pod in sorted(self._store.list(POD).items, key=is_deleting):  # a name is its first line's
            namespace = pod["metadata"]["namespace"]
            service = services.get((namespace, pod["spec"].get("subdomain", "")))
            if service is not None and _is_served(pod, service):
                lines.setdefault(namespace, []).append(_line(pod))
        for namespace, found in lines.items():
            text = "".join(found)
            if self._written.get(namespace) != text:
                path = self._folders.hosts(namespace)
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_bytes(path, text.encode())
                self._written[namespace] = text
        return None


def _is_served(pod: Object, service: Object) -> bool:
    selector, labels = service["spec"].get("selector") or {}, pod["metadata"].get("labels") or {}
    chosen = all(labels.get(key) == value for key, value in selector.items())
    return chosen and bool(pod["status"].get("podIP") and pod["spec"].get("hostname")) and not is_terminal(pod)


def _line(pod: Object) -> str:
    spec, namespace = pod["spec"], pod["metadata"]["namespace"]
    short = f"{spec['hostname']}.{spec['subdomain']}"
    whole = f"{short}.{namespace}.svc"
    return f"{pod['status']['podIP']} {short} {whole} {whole}.cluster.local\n"
