"""An API server whose pods run: FakeCluster over the local cluster's pod runner."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ktrain.base import settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.errors import NotFoundError
from ktrain.launcher.cluster.driving import Driver
from ktrain.launcher.cluster.kubelet import NodeSpec, base_environment
from ktrain.launcher.cluster.local import LocalCluster, Pace
from ktrain.launcher.cluster.nodes import Silence
from ktrain.launcher.cluster.pod_run import Delays
from ktrain.launcher.cluster.pod_starter import Addresses, Folders, Machine, Network
from ktrain.launcher.cluster.processes import ProcessRuntime
from ktrain.testing.fake_cluster.cluster import FakeCluster
from ktrain.testing.fake_cluster.logs import FileLogs
from ktrain.testing.fake_cluster.offer import Offer

_T = TypeVar("_T")
_DELAYS = Delays(first_s=0.05, longest_s=1.0, probe_s=0.2)
QUICK = Pace(job_back_off_s=0.05, silence=Silence(0.2))


class RunningCluster:
    """FakeCluster with nodes on this machine, in a `with`. Its pods are processes, which end with it.

    `api` is the API server. `lose` and `restore` end a node and bring it back; anything else that only the cluster's
    own thread may do goes through `call`. `crds` is the folder of the CRDs' files, as for FakeCluster.
    """

    def __init__(
        self, nodes: Sequence[NodeSpec], offer: Offer | None = None, *, crds: Path | None = None, pace: Pace = QUICK
    ) -> None:
        self.api = FakeCluster(offer, crds=crds, logs=FileLogs(lambda *run: _log(self.cluster, *run)))
        self._root = Path(tempfile.mkdtemp(prefix="ktp-"))  # short: sockets lie below it
        self._memory = Path(tempfile.mkdtemp(prefix="ktp-", dir=settings.volume_root().parent))
        environment = base_environment(settings.child_environment({}))
        self._folders = Folders(self._root, self._memory)
        self._network = Network()
        addresses = Addresses(self._network.number)
        machine = Machine(
            ProcessRuntime(), SYSTEM_CLOCK, self._folders, environment, addresses=addresses, delays=_DELAYS
        )
        self.cluster = LocalCluster(nodes, machine, pace=pace, store=self.api.store)
        self._driver = Driver(self.cluster)

    def __enter__(self) -> RunningCluster:
        self.api.__enter__()
        self._driver.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._driver.close()
        finally:
            self.api.__exit__(*error)
            self._network.close()
            for folder in (self._root, self._memory):
                shutil.rmtree(folder, ignore_errors=True)

    def call(self, do: Callable[[LocalCluster], _T]) -> _T:
        """Does something with the cluster in its own thread."""
        return self._driver.call(lambda: do(self.cluster))

    def claim(self, name: str, namespace: str = "default") -> Path:
        """The folder of a persistent volume claim; it need not be there yet."""
        return self._folders.claim(namespace, name)

    def logs(self) -> list[Path]:
        """The log of each run of each container of the pods that are there: POD/logs/CONTAINER/RUN.log."""
        return sorted(self._root.glob("p*/logs/*/*.log"))

    def lose(self, node: str) -> None:
        """Ends a node: its processes, its memory and its word."""
        self.call(lambda cluster: cluster.nodes.lose(node))

    def restore(self, node: str) -> None:
        """Brings a lost node back, empty."""
        self.call(lambda cluster: cluster.nodes.restore(node))


def _log(cluster: LocalCluster, pod: dict[str, Any], container: str, run: int) -> Path | None:
    """Where the pod runner has the log of a container's run."""
    try:
        found = cluster.run_of(pod["metadata"]["namespace"], pod["metadata"]["name"])
    except NotFoundError:
        return None
    return found.places.pod / "logs" / container / f"{run}.log"
