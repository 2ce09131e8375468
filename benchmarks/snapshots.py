"""States of a chosen size, and their snapshots taken as a rank takes them: plan, acquire, stage, seal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import ktrain
from benchmarks.bench import Bench
from benchmarks.harness import Bytes, Proofs, as_bytes
from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.source import Fetched, NearestSource, Openers, PeerCalls
from ktrain.format import columns
from ktrain.format.document import Written
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, Layout
from ktrain.snapshot.arena import Held, NodeVolume
from ktrain.snapshot.staging import Stager
from ktrain.state.apply import apply, plan_restore
from ktrain.state.landing import land
from ktrain.state.plan import SavePlan, plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.tier.location import open_tier

RUN = "bench"
ALONE = Topology(rank=0, world_size=1)
_SLOTS = 3
_PATIENCE_S = 300.0


class Tensors(torch.nn.Module):
    """Parameters without a use, named as a deep model names its own."""

    def __init__(self, num_tensors: int, nbytes_each: int, seed: int, first: int = 0) -> None:
        super().__init__()
        self.first = first  # number of the first layer: the stages of a pipeline hold different ones
        generator = torch.Generator().manual_seed(seed)
        width = max(1, nbytes_each // 4)
        for index in range(first, first + num_tensors):
            value = torch.empty(width).uniform_(-1.0, 1.0, generator=generator)
            self.register_parameter(f"layers_{index}_weight", torch.nn.Parameter(value))


@dataclass(slots=True)
class Parts:
    """Seconds of the parts of each capture."""

    plan_s: list[float] = field(default_factory=list)
    acquire_s: list[float] = field(default_factory=list)
    stage_s: list[float] = field(default_factory=list)
    seal_s: list[float] = field(default_factory=list)

    def clear(self) -> None:
        for seconds in (self.plan_s, self.acquire_s, self.stage_s, self.seal_s):
            seconds.clear()


class Snapshotter:
    """One rank's state and the volume that its snapshots go to; without the head and the threads around them."""

    def __init__(self, module: Tensors, volume: NodeVolume, *, num_threads: int = 1, num_slots: int = _SLOTS) -> None:
        self.module = module
        self.state = TrainState({"model": module})
        self.volume = volume
        self.num_threads = num_threads
        self._num_slots = num_slots
        self.parts = Parts()
        self.step = 0
        self.held: Held | None = None
        self._stager: tuple[int, Stager] | None = None  # kept between snapshots, as a rank keeps it
        self._table: tuple[Layout, Written] | None = None  # as well
        self._said: tuple[int, bytes] = 0, b""  # the newest manifest as a head sends it, by its step

    @property
    def nbytes(self) -> int:
        """Of the payload."""
        return self.plan().layout.nbytes

    @property
    def identity(self) -> Identity:
        return Identity(run=self.volume.run, step=self.step, epoch=1, world_size=1)

    def plan(self) -> SavePlan:
        return plan_save(self.state, ALONE)

    def prepare(self, pin: Callable[[str, memoryview], None] = lambda slot, memory: None) -> None:
        """Has all slots warm, and given to `pin`."""
        self.volume.prepare(0, self.nbytes, self._num_slots, pin)

    def capture(self) -> None:
        """The next snapshot, into a slot."""
        self.step += 1
        begin = time.perf_counter()
        plan = self.plan()
        planned = time.perf_counter()
        writer = self.volume.acquire(0, plan.layout.nbytes, protect=(), limit=self._num_slots)
        assert writer is not None, "all slots are in use"
        acquired = time.perf_counter()
        with writer:
            chunks = self._stage(plan, writer.memory)
            staged = time.perf_counter()
            self.held = writer.seal(self._manifest(plan, chunks))
        sealed = time.perf_counter()
        self.parts.plan_s.append(planned - begin)
        self.parts.acquire_s.append(acquired - planned)
        self.parts.stage_s.append(staged - acquired)
        self.parts.seal_s.append(sealed - staged)

    def _stage(self, plan: SavePlan, memory: memoryview) -> tuple[int, ...]:
        if self._stager is None or self._stager[0] != self.num_threads:
            self._stager = self.num_threads, Stager(self.num_threads)
        staging = self._stager[1].begin(plan, memory, None)
        staging.copy()
        return staging.digest()

    def manifest(self) -> Manifest:
        """Of the newest snapshot."""
        with self.volume.open(0, self.identity) as slot:
            return slot.manifest

    def manifest_bytes(self) -> bytes:
        """Of the newest snapshot, as a rank that restores hears them from the head."""
        if self._said[0] != self.step:
            self._said = self.step, self.manifest().to_bytes()
        return self._said[1]

    def prove(self, proofs: Proofs) -> None:
        """Proves that an independent reader finds the module's bytes in the slot."""
        from safetensors.torch import load

        with self.volume.open(0, self.identity) as slot:
            found = load(bytes(slot.memory))
        live = {f"model/{name}": value for name, value in self.module.state_dict().items()}
        same = found.keys() == live.keys() and all(torch.equal(found[name], live[name]) for name in live)
        proofs.true("safetensors' own reader finds every tensor of the module in the slot", same)

    def _manifest(self, plan: SavePlan, chunks: tuple[int, ...]) -> Manifest:
        if self._table is None or self._table[0] is not plan.layout:
            self._table = plan.layout, columns.write(plan.layout.entries)
        return Manifest(
            identity=self.identity,
            rank=0,
            plan_digest=plan.digest,
            nbytes=plan.layout.nbytes,
            chunk_nbytes=CHUNK_NBYTES,
            chunks=chunks,
            entries=plan.layout.entries,
            table=self._table[1],
            objects=plan.objects,
            origin={"ktrain": ktrain.__version__, "torch": torch.__version__},
        )


class Restored:
    """A second state of the same shapes, and restores into it as a rank does them."""

    def __init__(
        self, saved: Snapshotter, *, run_url: str, volume: NodeVolume | None = None, num_threads: int = 1
    ) -> None:
        self._saved = saved
        self._num_threads = num_threads
        shapes = [value.numel() for value in saved.module.parameters()]
        self.module = Tensors(len(shapes), shapes[0] * 4, seed=99, first=saved.module.first)
        self._state = TrainState({"model": self.module})
        live, of = self.module.parameters(), saved.module.parameters()
        self._pairs = [(as_bytes(into), as_bytes(value)) for into, value in zip(live, of, strict=True)]
        self._volume = volume or saved.volume
        self._tier = open_tier(run_url, timeouts=Timeouts())
        self.phases: dict[str, list[float]] = {"parse": [], "plan": [], "read and prove": [], "apply": []}

    def load(self, copy: Copy) -> None:
        """Parses the manifest, plans, reads, proves and applies one copy, into the live tensors."""
        said = self._saved.manifest_bytes()
        begin = time.perf_counter()
        manifests = {0: Manifest.from_bytes(said)}
        parsed = time.perf_counter()
        needs = plan_restore(self._state, manifests, ALONE)
        landing = land(needs.targets)
        planned = time.perf_counter()
        openers = Openers(
            disk=None,
            volume=self._volume,
            tier=self._tier,
            peers=PeerCalls(lambda copy, wanted: Fetched(0), lambda copy, wanted, deadline: 0, 0),
            deadline_of=lambda nbytes: Deadline.after(_PATIENCE_S),
            num_threads=self._num_threads,
        )
        source = NearestSource(manifests, {0: [copy]}, openers, lambda failure: None)
        try:
            source.fetch(landing.views, into=landing.runs, deadline=Deadline.after(_PATIENCE_S))
            read = time.perf_counter()
            apply(self._state, needs, source, landing)
        finally:
            source.close()
        seconds = (parsed - begin, planned - parsed, read - planned, time.perf_counter() - read)
        for phase, taken in zip(self.phases.values(), seconds, strict=True):
            phase.append(taken)

    def copy_plainly(self, num_threads: int) -> None:
        """Copies the saved tensors into the live ones, one after the other, each thread its share of them."""
        shares = [self._pairs[at::num_threads] for at in range(num_threads)]
        others = [threading.Thread(target=_copy_all, args=(share,)) for share in shares[1:]]
        for thread in others:
            thread.start()
        _copy_all(shares[0])
        for thread in others:
            thread.join()

    def prove(self, copy: Copy, proofs: Proofs) -> None:
        """Proves that a restore gives the saved values, starting from others."""
        with torch.no_grad():
            for value in self.module.parameters():
                value.zero_()
        self.load(copy)
        pairs = zip(self.module.parameters(), self._saved.module.parameters(), strict=True)
        same = all(torch.equal(found, expected) for found, expected in pairs)
        proofs.true(f"a restore from {copy.tier} gives every saved value", same)


def _copy_all(pairs: Sequence[tuple[Bytes, Bytes]]) -> None:
    for target, source in pairs:
        np.copyto(target, source)


def large(bench: Bench) -> Snapshotter:
    """The state of `sizes.nbytes`, in the volume of node-0, with one snapshot."""
    return bench.once("large", lambda: _make(bench, RUN, bench.sizes.num_tensors, bench.sizes.nbytes))


def small_tensors(bench: Bench) -> Snapshotter:
    """The state of many small tensors."""
    sizes = bench.sizes
    return bench.once("small", lambda: _make(bench, "small", sizes.num_small, sizes.num_small * sizes.small_nbytes))


def for_s3(bench: Bench) -> Snapshotter:
    """A state small enough for the test S3 server."""
    return bench.once("for_s3", lambda: _make(bench, "s3", 16, bench.sizes.s3_nbytes))


def _make(bench: Bench, run: str, num_tensors: int, nbytes: int) -> Snapshotter:
    volume = bench.stack.enter_context(NodeVolume(bench.volume_root, node="node-0", run=run))
    made = Snapshotter(Tensors(num_tensors, nbytes // num_tensors, seed=1), volume, num_threads=bench.threads)
    made.prepare()
    made.capture()
    return made
