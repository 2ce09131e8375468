"""Taking snapshots into this node's volume: plan, stage, seal. What fails is said once and never stops training."""

from __future__ import annotations

import torch

import ktrain
from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.line import Line
from ktrain.checkpoint.policy import Keep
from ktrain.checkpoint.pulse import Pulse
from ktrain.errors import CapacityError, ConflictError, CorruptionError, KtrainError, NotFoundError, UnavailableError
from ktrain.format import document
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.snapshot.arena import NodeVolume, required_nbytes
from ktrain.snapshot.staging import stage
from ktrain.state.plan import SavePlan, plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState

# What is wrong with the volume and not with the caller or with us.
_TIER_FAILURES = (CapacityError, ConflictError, CorruptionError, NotFoundError, UnavailableError, OSError)
_DRAIN_SLOTS = 1  # read by the drain while the next snapshots are taken


class Saver:
    """One rank's writer of the memory tier. Use from the training thread."""

    def __init__(
        self, state: TrainState, topology: Topology, keep: Keep, *, line: Line, pulse: Pulse, faults: FaultPoints
    ) -> None:
        self._state = state
        self._topology = topology
        self._num_slots = keep.memory + _DRAIN_SLOTS
        self._line = line
        self._pulse = pulse
        self._faults = faults
        self._clock = SYSTEM_CLOCK
        self._run_id = ""
        self._format = document.FORMAT
        self._prepared = False
        self._failure: str | None = None
        self._refused = False  # the volume is too small for all slots: said once, though single saves find room
        self.volume: NodeVolume | None = None
        self.saved_step: int | None = None

    def open_volume(self, run: str, run_id: str, format: int) -> None:
        """Opens this node's folder; without one there is no memory tier, which is said.

        `format`: the version in which the run is written.
        """
        self._run_id, self._format = run_id, format
        try:
            self.volume = NodeVolume(self._line.volume_root, node=self._line.node, run=run_id, uri=run)
        except (OSError, KtrainError) as error:
            self._fail(error)

    def close(self) -> None:
        """Lets go of the volume; what is sealed stays."""
        if self.volume is not None:
            self.volume.close()

    def check_volume(self) -> None:
        """Raises CapacityError when there is no volume at all, so that waiting for a slot is in vain."""
        if self.volume is None:
            raise CapacityError(
                f"rank {self._topology.rank}: no snapshot can be taken, the memory tier failed ({self._failure}); "
                "name another folder by KTRAIN_VOLUME"
            )

    def prepare(self) -> None:
        """Makes and pre-faults the slots, once the optimizer has its state, so that the first save is as fast as all.

        What does not fit is refused here, with the numbers, before anything was written.
        """
        if not self._prepared and self.volume is not None:
            self._prepare(self.volume, plan_save(self._state, self._topology))

    def _prepare(self, volume: NodeVolume, plan: SavePlan) -> None:
        self._prepared = True
        local = self._topology.local_world_size
        kept = local if self._topology.world_size > local and self._line.has_launcher else 0
        try:
            required_nbytes(
                plan.layout.nbytes,
                ranks_per_node=local,
                slots=self._num_slots,
                kept_ranks=kept,
                free_nbytes=volume.free_nbytes(),
                held_nbytes=volume.held_nbytes(),
            )
            volume.prepare(self._topology.rank, plan.layout.nbytes, self._num_slots)
        except _TIER_FAILURES as error:
            self._fail(error)
            self._refused = True

    def save(self, step: int) -> bool:
        """Takes a snapshot of `step`; false where it had to be skipped, which is counted in the events."""
        started = self._clock.monotonic()
        if self.volume is None:
            return False
        rank = self._topology.rank
        self._faults.reached("save.begin", step=step, rank=rank)
        plan = plan_save(self._state, self._topology)
        if not self._prepared:
            self._prepare(self.volume, plan)
        try:
            sealed = self._write(self.volume, step, plan)
        except _TIER_FAILURES as error:
            self._fail(error)
            return False
        if not sealed:
            reason = "no slot is free: all are newest, committed, or being read"
            self._pulse.emit("save_skipped", rank=rank, step=step, tier=contract.TIER_MEMORY, reason=reason)
            return False
        self._faults.reached("save.sealed", step=step, rank=rank)
        self.saved_step = step
        self._recovered()
        self._pulse.note_sealed()
        fields = {"rank": rank, "step": step, "tier": contract.TIER_MEMORY, "nbytes": plan.layout.nbytes}
        self._pulse.emit("snapshot", stall_s=self._clock.monotonic() - started, **fields)
        return True

    def _write(self, volume: NodeVolume, step: int, plan: SavePlan) -> bool:
        rank = self._topology.rank
        protect = [(int(at), int(epoch)) for at, epoch in self._pulse.answer.get("protect", [])]
        writer = volume.acquire(rank, plan.layout.nbytes, protect=protect, limit=self._num_slots)
        if writer is None:
            return False
        with writer:
            chunks = stage(plan, writer.memory, num_threads=self._topology.copy_threads)
            self._faults.reached("save.staged", step=step, rank=rank)
            writer.seal(self._manifest(step, plan, chunks))
        return True

    def _manifest(self, step: int, plan: SavePlan, chunks: tuple[int, ...]) -> Manifest:
        world_size = self._topology.world_size
        return Manifest(
            identity=Identity(run=self._run_id, step=step, epoch=self._line.epoch, world_size=world_size),
            rank=self._topology.rank,
            plan_digest=plan.digest,
            nbytes=plan.layout.nbytes,
            chunk_nbytes=CHUNK_NBYTES,
            chunks=chunks,
            entries=plan.layout.entries,
            objects=plan.objects,
            origin={
                "ktrain": ktrain.__version__,
                "torch": torch.__version__,
                "node": self._line.node,
                "local_world_size": self._topology.local_world_size,
            },
            format=self._format,
        )

    def _fail(self, error: Exception) -> None:
        """Says once that the memory tier fails; training goes on."""
        said, self._failure = self._failure, f"{type(error).__name__}: {error}"
        if said is None:
            self._pulse.emit("tier_failed", tier=contract.TIER_MEMORY, rank=self._topology.rank, reason=self._failure)

    def _recovered(self) -> None:
        if self._refused:
            return
        if self._failure is not None:
            self._pulse.emit("tier_recovered", tier=contract.TIER_MEMORY, rank=self._topology.rank)
        self._failure = None
