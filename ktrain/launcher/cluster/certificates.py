"""What a cluster puts into every namespace by itself: the certificate of its API server, which pods mount."""

from __future__ import annotations

from ktrain.errors import ConflictError
from ktrain.launcher.cluster.resources import CONFIG_MAP, NAMESPACE
from ktrain.launcher.cluster.store import Store

ROOT_CERTIFICATE = "kube-root-ca.crt"
_NONE = ""  # the API server of a local cluster speaks plain HTTP


class RootCertificates:
    """Publishes the certificate. Call from one thread; `reconcile` never waits."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def reconcile(self) -> float | None:
        """Makes what is missing; nothing comes due by itself."""
        names = {item["metadata"]["name"] for item in self._store.list(NAMESPACE).items}
        there = self._store.list(CONFIG_MAP, fields=f"metadata.name={ROOT_CERTIFICATE}").items
        for namespace in sorted(names - {item["metadata"]["namespace"] for item in there}):
            about = {"name": ROOT_CERTIFICATE, "namespace": namespace}
            try:
                self._store.create(CONFIG_MAP, {"metadata": about, "data": {"ca.crt": _NONE}})
            except ConflictError:
                continue  # somebody else made it meanwhile
        return None
