"""A node's driver: joins one generation of the run's Ray cluster and lives as long as that does.

Started by `RayTransport` as `python -m ktrain.replicate.ray_wire CONFIG`. It tells its state on standard
output, one JSON object a line, and answers `pull` and `read` on a Unix socket. It ends when its stdin closes, when
its raylet ends or when the head is gone; a new generation gets a new process, because Ray may end a driver that lost
its raylet.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ktrain import native
from ktrain.abc.transport import PartialRead
from ktrain.base import control, ids
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.process import let_training_first
from ktrain.errors import DeadlineError, KtrainError, UnavailableError, from_kind
from ktrain.format.manifest import Identity
from ktrain.replicate import landing, ray_settings
from ktrain.replicate.ray_cluster import Cluster
from ktrain.replicate.ray_keeper import KeptRay
from ktrain.snapshot.arena import NodeVolume

_START_S = 120.0  # seconds on a node with idle cores; everybody starts at once
_CONNECT_S = 5.0
_STALL_S = 20.0  # one piece; a source that is silent for longer is not worth to wait for
_WATCH_S = 0.5
_STRIKES = 4  # looks in a row that found no head
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class WireConfig:
    """What the child is told on its command line; the token itself is only in the file."""

    node: str
    host: str  # this node's own address
    run: str
    volume_root: str
    work_dir: str
    token_file: str
    slots: int  # per rank that is kept here
    cluster_address: str
    generation: int

    def to_argument(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_argument(cls, text: str) -> WireConfig:
        return cls(**json.loads(text))

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.cluster_address, self.generation)


def namespace(run: str) -> str:
    return f"ktrain-{run}"


def parse_address(source: str, generation: int) -> str:
    """The actor's name in an address of this generation.

    Raises:
        UnavailableError: the address is of another generation, or of another kind of wire.
    """
    scheme, _, rest = source.partition(":")
    number, _, actor = rest.partition(":")
    if scheme != "ray" or not number.isdecimal() or not actor:
        raise UnavailableError(f"pull: expected an address like ray:GENERATION:NAME, found {source!r}")
    if int(number) != generation:
        raise UnavailableError(
            f"pull: the source is in generation {number} of the Ray cluster, this node in {generation}; ask again"
        )
    return actor


class RayWire:
    """One node's membership in one generation of the cluster."""

    def __init__(self, config: WireConfig, announce: Any) -> None:
        self._config = config
        self._announce = announce
        self._volume = NodeVolume(Path(config.volume_root), run=config.run, node=config.node)
        self._actors: dict[str, Any] = {}  # by name; guarded by _finding
        self._stopping = threading.Lock()
        self._finding = threading.Lock()
        self._pulling = threading.Lock()  # one at a time takes all places
        self._reading = threading.BoundedSemaphore(landing.IN_FLIGHT)  # pieces bound both ends' memory
        name = f"ray-{config.generation}-{ids.random_id(3)}"
        environment = ray_settings.environment(Path(config.token_file))
        self._kept = KeptRay(Path(config.work_dir), name, environment=environment)
        self._actor: Any = None
        self._server: control.Server | None = None

    def join(self) -> None:
        """Starts the raylet, attaches to it, starts the actor, and says where it serves."""
        config = self._config
        deadline = Deadline.after(_START_S)
        if not config.cluster.answers(deadline.sooner(_CONNECT_S).remaining_s()):
            raise UnavailableError(f"the Ray head at {config.cluster_address} does not answer")
        self._kept.start(
            ray_settings.node_arguments(
                head=config.cluster_address, host=config.host, name=config.node, folder=self._kept.folder
            )
        )
        started = {"event": "started", "session": self._kept.session, "link": str(self._kept.folder)}
        self._announce(started)
        import ray  # while the raylet starts

        while not self._kept.socket_ready():
            if not self._kept.alive():
                raise UnavailableError(f"Ray node {config.node}: did not start; it said: {self._kept.reason()}")
            deadline.check(f"Ray node {config.node}: start of the raylet")
            SYSTEM_CLOCK.sleep(_POLL_S)
        ray.init(
            address=config.cluster_address,
            namespace=namespace(config.run),
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address=config.host,
            _temp_dir=str(self._kept.folder),
        )
        actor_name = f"{config.node}-{ids.random_id(3)}"
        self._actor = self._start_actor(actor_name)
        _get(self._actor.ready.remote(), "start of the source actor", deadline)
        token = Path(config.token_file).read_text()
        self._server = control.Server(
            {"pull": self._pull, "read": self._read, "release": self._release},
            address=f"unix:{self._kept.folder}/wire.sock",
            token=token,
        )
        address = f"ray:{config.generation}:{actor_name}"
        self._announce({"event": "serving", "address": address, "control": self._server.address})

    def watch(self) -> str:
        """Returns, when the cluster is lost, why."""
        strikes = 0
        while strikes < _STRIKES:
            SYSTEM_CLOCK.sleep(_WATCH_S)
            if not self._kept.alive():
                return f"the raylet of node {self._config.node} ended; it said: {self._kept.reason()}"
            strikes = 0 if self._config.cluster.answers() else strikes + 1
        return f"the Ray head at {self._config.cluster_address} does not answer"

    def stop(self) -> None:
        """Ends the raylet and all of this node's Ray processes but this one."""
        with self._stopping:  # two threads may end this process; the second waits until all is done
            self._kept.stop()

    def _start_actor(self, name: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from ktrain.replicate.ray_source import RaySource

        config = self._config
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(RaySource).options(
            name=name,
            num_cpus=0,
            max_restarts=0,
            # One thread more than pieces in flight, so that opening does not queue behind reading.
            max_concurrency=landing.IN_FLIGHT + 1,
            scheduling_strategy=here,
        )
        return actor.remote(config.volume_root, config.run, config.node)

    def _pull(self, params: dict[str, Any]) -> dict[str, Any]:
        let_training_first()  # the call has a thread of its own; most pulls bring a replica
        deadline = Deadline.after(float(params["timeout_s"]))
        wanted = landing.Wanted(
            rank=int(params["rank"]),
            identity=Identity.from_json(params["identity"]),
            protect=[(int(step), int(epoch)) for step, epoch in params["protect"]],
            slots=self._config.slots,
        )
        with self._places(landing.IN_FLIGHT, f"pull of {wanted}", deadline):
            actor = self._find(parse_address(params["source"], self._config.generation))
            chunks = _ActorChunks(actor, f"pull of {wanted}")
            receipt = landing.land(self._volume, chunks, wanted, deadline=deadline)
        return receipt.to_json()

    def _read(self, params: dict[str, Any]) -> dict[str, Any]:
        deadline = Deadline.after(float(params["timeout_s"]))
        wanted = PartialRead.from_json(params["wanted"])
        num_ahead = landing.IN_FLIGHT if wanted.nbytes > landing.PULL_NBYTES else 1
        with self._places(num_ahead, f"read of {wanted}", deadline):
            actor = self._find(parse_address(params["source"], self._config.generation))
            chunks = _ActorChunks(actor, f"read of {wanted}")
            return {"wire_nbytes": landing.land_parts(chunks, wanted, num_ahead=num_ahead, deadline=deadline)}

    def _release(self, params: dict[str, Any]) -> dict[str, Any]:
        self._volume.release(int(params["rank"]))
        return {}

    @contextlib.contextmanager
    def _places(self, count: int, what: str, deadline: Deadline) -> Iterator[None]:
        """Room for so many pieces in flight. Of those who want more than one, one at a time gathers and has it."""
        taken = 0
        is_alone = count > 1
        if is_alone and not self._pulling.acquire(timeout=deadline.remaining_s()):
            raise DeadlineError(f"{what}: other pulls of this node took {deadline.total_s:g} s")
        try:
            while taken < count:
                if not self._reading.acquire(timeout=deadline.remaining_s()):
                    raise DeadlineError(f"{what}: what else this node takes in took {deadline.total_s:g} s")
                taken += 1
            yield
        finally:
            for _ in range(taken):
                self._reading.release()
            if is_alone:
                self._pulling.release()

    def _find(self, name: str) -> Any:
        import ray

        with self._finding:
            known = self._actors.get(name)
        if known is not None:
            return known
        try:
            found = ray.get_actor(name, namespace=namespace(self._config.run))
        except ValueError as error:
            raise UnavailableError(f"pull: there is no source {name!r} in the Ray cluster; ask again") from error
        with self._finding:
            return self._actors.setdefault(name, found)


class _ActorChunks:
    """Another node's actor as a source of chunks. This process owns every object that it asks for."""

    def __init__(self, actor: Any, what: str) -> None:
        self._actor = actor
        self._what = what

    def open(self, rank: int, identity: Identity, *, deadline: Deadline) -> tuple[str, bytes]:
        handle, manifest = _get(self._actor.open.remote(rank, identity.to_json()), self._what, deadline)
        return str(handle), bytes(manifest)

    def lease(self, rank: int, identity: Identity, *, deadline: Deadline) -> str:
        return str(_get(self._actor.lease.remote(rank, identity.to_json()), self._what, deadline))

    def request(self, handle: str, ranges: landing.Ranges) -> landing.Piece:
        return _ActorPiece(self._actor.read.remote(handle, list(ranges)), f"{self._what}, byte {ranges[0][0]}")

    def release(self, handle: str) -> None:
        self._actor.release.remote(handle)


@dataclass(slots=True)
class _ActorPiece:
    ref: Any
    what: str

    def take(self, deadline: Deadline) -> Any:
        ref, self.ref = self.ref, None
        return _get(ref, self.what, deadline)


def _get(ref: Any, what: str, deadline: Deadline) -> Any:
    """`ray.get` with a bound, and with our errors."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    bound = deadline.sooner(_STALL_S)
    try:
        return ray.get(ref, timeout=bound.remaining_s())
    except GetTimeoutError as error:
        raise DeadlineError(f"{what}: the source sent nothing within {bound.total_s:g} s") from error
    except RayTaskError as error:
        if isinstance(error.cause, KtrainError):
            raise from_kind(error.cause.kind, str(error.cause)) from error
        raise UnavailableError(f"{what}: the source failed: {error.cause!r}") from error
    except RayError as error:
        raise UnavailableError(f"{what}: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def main(argument: str) -> int:
    parent = os.getppid()
    native.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent
    # Ray and what it starts may print; the lines to the agent keep a descriptor of their own.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def announce(event: dict[str, Any]) -> None:
        lines.write(json.dumps(event) + "\n")

    wire = RayWire(WireConfig.from_argument(argument), announce)

    def end_with_agent() -> None:
        os.read(0, 1)
        wire.stop()
        os._exit(0)  # the main thread may stand in a call of Ray that does not return

    threading.Thread(target=end_with_agent, name="ktrain-stdin", daemon=True).start()
    try:
        wire.join()
        reason = wire.watch()
    except Exception as error:  # noqa: BLE001 -- top of the process: the agent gets the cause
        reason = str(error) if isinstance(error, KtrainError) else f"{type(error).__name__}: {error}"
    announce({"event": "lost", "reason": reason})
    wire.stop()
    # Not a normal exit: Ray's own exit handlers wait for a cluster that is gone.
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
