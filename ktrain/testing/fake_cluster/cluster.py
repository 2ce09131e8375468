"""A Kubernetes API server in this process, for tests."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.launcher.cluster.resources import CUSTOM_RESOURCE_DEFINITION, NAMESPACE
from ktrain.launcher.cluster.store import Store
from ktrain.testing.fake_cluster.access import ADMIN, Access
from ktrain.testing.fake_cluster.admission import Admission
from ktrain.testing.fake_cluster.api import Api
from ktrain.testing.fake_cluster.faults import Fault, Faults
from ktrain.testing.fake_cluster.logs import LogReader, LogSource, PodLogs
from ktrain.testing.fake_cluster.offer import Offer, Served
from ktrain.testing.fake_cluster.reads import Reads
from ktrain.testing.fake_cluster.requests import Request, Response
from ktrain.testing.fake_cluster.server import Server

_NAMESPACES = ("default", "kube-system")
_MAX_SEEN = 100_000


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of a cluster and the length of its memory; tests make them short."""

    bookmark_s: float = 60.0  # between two bookmarks of a watch
    history: int = 10_000  # changes that a watch can start behind
    clock: Clock = SYSTEM_CLOCK


class FakeCluster:
    """An API server on 127.0.0.1 over a store that controllers may share. Use it in a `with`.

        with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=folder) as cluster:
            config = cluster.kubeconfig()

    Nothing runs in it by itself: pods stay Pending until controllers, given `cluster.store`, or the test move them.
    `crds` is the folder of the CRDs' files; without it custom resources have no schema. `logs` is who has the
    containers' output; without it the test writes it to `cluster.logs`.

    Raises:
        ConfigError: the offer names a version or CRD whose schema is not there.
    """

    def __init__(
        self,
        offer: Offer | None = None,
        *,
        crds: Path | None = None,
        access: Access | None = None,
        logs: LogSource | None = None,
        pace: Pace | None = None,
    ) -> None:
        pace = pace or Pace()
        self._crds = crds
        self._served = Served(offer or Offer(), crds)
        self.store = Store(clock=pace.clock, history=pace.history, admit=Admission(lambda: self._served))
        self.logs = PodLogs(pace.clock)
        self._faults = Faults()
        self._seen: deque[Request] = deque(maxlen=_MAX_SEEN)
        self._server = Server(self._faults)
        self._api = Api(
            self.store,
            lambda: self._served,
            access or Access(),
            Reads(self.store, pace.clock, bookmark_s=pace.bookmark_s),
            LogReader(self.store, logs or self.logs, pace.clock),
            self._server.address,
        )
        for name in _NAMESPACES:
            self.store.create(NAMESPACE, {"metadata": {"name": name}})
        self._define()

    def __enter__(self) -> FakeCluster:
        self._server.start(self._answer)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.close()

    @property
    def url(self) -> str:
        return f"http://{self._server.address}"

    @property
    def offer(self) -> Offer:
        """What the cluster serves. Set it to upgrade or roll back: objects stay, their versions come and go."""
        return self._served.offer

    @offer.setter
    def offer(self, offer: Offer) -> None:
        self._served = Served(offer, self._crds)
        self._define()

    @property
    def access(self) -> Access:
        """Who may do what; may be set while the cluster runs."""
        return self._api.access

    @access.setter
    def access(self, access: Access) -> None:
        self._api.access = access

    def kubeconfig(self, user: str = ADMIN, namespace: str = "default") -> dict[str, Any]:
        """A kubeconfig for the user, as its file says it: one context, a bearer token, plain HTTP."""
        name = "fake"
        context = {"cluster": name, "user": user, "namespace": namespace}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": {"server": self.url}}],
            "users": [{"name": user, "user": {"token": self.access.token(user)}}],
            "contexts": [{"name": name, "context": context}],
            "current-context": name,
        }

    def write_kubeconfig(self, path: Path, user: str = ADMIN, namespace: str = "default") -> Path:
        """Writes a kubeconfig for the user (JSON, which is YAML) and returns its path."""
        path.write_text(json.dumps(self.kubeconfig(user, namespace), indent=1), "utf-8")
        return path

    def put_fault(self, fault: Fault) -> None:
        """Lets a fault befall the next requests that it matches."""
        self._faults.put(fault)

    def clear_faults(self) -> None:
        self._faults.clear()

    def expire(self) -> None:
        """Forgets all history: watches, pages and exact lists from older versions get their 410."""
        self.store.compact()

    def requests(self, matches: Callable[[Request], bool] = lambda request: True) -> list[Request]:
        """The requests that were answered so far, oldest first."""
        return [request for request in list(self._seen) if matches(request)]

    def _answer(self, request: Request, is_gone: Callable[[], bool]) -> Response:
        self._seen.append(request)
        return self._api.answer(request, is_gone)

    def _define(self) -> None:
        """Shows the definitions of what is served, as objects."""
        for obj in self.store.list(CUSTOM_RESOURCE_DEFINITION).items:
            self.store.delete(CUSTOM_RESOURCE_DEFINITION, None, obj["metadata"]["name"])
        for definition in self._served.definitions:
            self.store.create(CUSTOM_RESOURCE_DEFINITION, definition.obj)
