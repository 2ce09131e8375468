"""Events: what controllers say happened, for people."""

from __future__ import annotations

from ktrain.launcher.cluster.resources import EVENT
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store

NORMAL, WARNING = "Normal", "Warning"


class Recorder:
    """Records events of one controller, each once for an object."""

    def __init__(self, store: Store, component: str) -> None:
        self._store = store
        self._component = component
        self._said: set[tuple[str, str, str]] = set()  # uid, reason, message

    def say(self, about: Object, kind: str, reason: str, message: str) -> None:
        """Records that something happened to an object."""
        metadata, now = about["metadata"], self._store.now()
        namespace = metadata.get("namespace") or "default"
        key = metadata["uid"], reason, message
        if key in self._said:
            return
        self._said.add(key)
        self._store.create(
            EVENT,
            {
                "metadata": {"generateName": f"{metadata['name']}.", "namespace": namespace},
                "type": kind,
                "reason": reason,
                "message": message,
                "involvedObject": {
                    "apiVersion": about["apiVersion"],
                    "kind": about["kind"],
                    "name": metadata["name"],
                    "namespace": namespace,
                    "uid": metadata["uid"],
                    "resourceVersion": metadata["resourceVersion"],
                },
                "reportingComponent": self._component,
                "reportingInstance": "",
                "source": {"component": self._component},
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
            },
        )
