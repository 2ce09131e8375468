"""Taking snapshots into this node's volume: plan, stage, seal. What fails is said once and never stops training.

`save` copies what may change at any moment, and leaves to a thread what changes only in an optimizer step that is
announced (ADR 0010), the digests and the seal.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from dataclasses import dataclass, field

import torch

import ktrain
from ktrain import device
from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.faults import FaultPoints
from ktrain.base.process import let_training_first
from ktrain.checkpoint.line import Line
from ktrain.checkpoint.policy import Capture, Keep
from ktrain.checkpoint.pulse import Pulse
from ktrain.errors import CapacityError, ConflictError, CorruptionError, KtrainError, NotFoundError, UnavailableError
from ktrain.format import columns, document
from ktrain.format.document import Written
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, Layout
from ktrain.snapshot import numa
from ktrain.snapshot.arena import KEPT_SLOTS, NodeVolume, Slots, SlotWriter, required_nbytes
from ktrain.snapshot.next_slot import NextSlot
from ktrain.snapshot.payloads import SlotStager, SlotStaging, slot_nbytes
from ktrain.snapshot.pinned import PinnedSlots
from ktrain.snapshot.slots import SlotCalls
from ktrain.snapshot.staging import Later
from ktrain.snapshot.window import Window
from ktrain.state.guard import UpdateGuard
from ktrain.state.plan import SavePlan, plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState

_LOG = logging.getLogger(__name__)

# What is wrong with the volume and not with the caller or with us.
_TIER_FAILURES = (CapacityError, ConflictError, CorruptionError, NotFoundError, UnavailableError, OSError)
_DRAIN_SLOTS = 1  # read by the drain while the next snapshots are taken
_LOG_BEATS = 4  # a seal waits for the run's log at most
_COPY_SHARE = 0.5  # of the silence after which a rank counts as hung


@dataclass(slots=True)
class _Snapshot:
    """One on its way into a slot."""

    step: int
    plan: SavePlan
    writer: SlotWriter
    staging: SlotStaging
    window: Window
    num_events: int  # of this rank, up to the step, that are to be in the log before the seal
    stall_s: float = 0.0  # in `save`; what `window` adds comes later
    is_sealed: bool = False
    proves: bool = False  # whether it is watched up to the next optimizer step, with all its bytes
    is_awaited: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


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
        self.wait_s = settings.timeouts().step_s * _COPY_SHARE
        """How long training, or the next save, waits for a snapshot at most."""
        self._manifests = _Manifests(topology, line)
        self._prepared = False
        self._failure: str | None = None
        self._refused = False  # the volume is too small for all slots: said once, though single saves find room
        self._pinned = PinnedSlots()
        self._stager = SlotStager(topology.copy_threads)
        self._guard = UpdateGuard(state, self.wait_copied)
        self._turn = 0  # number of saves
        self._log_stands_at: int | None = None  # events in the log when it was last waited for in vain
        self._is_proven = False  # one window was watched as a whole, and nothing changed in it
        self._newest: _Snapshot | None = None  # from `save` until it has ended
        self._next = NextSlot(topology.rank, self._num_slots)  # the thread's until a snapshot has ended
        self._window_of: _Snapshot | None = None  # whose window training has not seen closed
        self._work: queue.SimpleQueue[_Snapshot | None] = queue.SimpleQueue()  # at most one, and the word to end
        # One for all snapshots: to start a thread is to wait until it runs.
        self._thread = threading.Thread(target=self._run, name="ktrain-capture", daemon=True)
        self.capture = Capture.HIDDEN
        """AT_ONCE from the moment that something was changed while it was copied."""
        self.volume: NodeVolume | None = None
        self.saved_step: int | None = None  # written by the thread that seals

    def open_volume(self, run: str, run_id: str, format: int) -> None:
        """Opens this node's folder; without one there is no memory tier, which is said.

        `format`: the version in which the run is written.
        """
        self._manifests.run_id, self._manifests.format = run_id, format
        self._thread.start()
        atexit.register(self.finish)  # a process that ends without close() still seals what it has copied
        try:
            place, calls = self._line, _NearDevice()
            self.volume = NodeVolume(place.volume_root, node=place.node, run=run_id, uri=run, calls=calls)
        except (OSError, KtrainError) as error:
            self._fail(error)

    def close(self) -> None:
        """Ends the snapshot that is being made, and lets go of the volume; what is sealed stays."""
        self._guard.close()
        atexit.unregister(self.finish)
        if self._has_ended():  # else a device may still write
            self._pinned.close()
            if self._thread.is_alive():
                self._work.put(None)
                self._thread.join()  # it has nothing left to do
            self._next.give_back()
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
            self._prepare(self.volume, plan_save(self._state, self._topology, version=self._manifests.format))

    def _prepare(self, volume: NodeVolume, plan: SavePlan) -> None:
        self._prepared = True
        local, nbytes = self._topology.local_world_size, slot_nbytes(plan)
        kept = local if self._topology.world_size > local and self._line.has_launcher else 0
        try:
            required_nbytes(
                Slots(local, self._num_slots, nbytes),
                Slots(kept, KEPT_SLOTS, plan.layout.nbytes),
                free_nbytes=volume.free_nbytes(),
                held_nbytes=volume.held_nbytes(),
            )
            volume.prepare(self._topology.rank, nbytes, self._num_slots, self._pinned.pin)
        except _TIER_FAILURES as error:
            self._fail(error)
            self._refused = True

    def save(self, step: int) -> bool:
        """Begins a snapshot of `step`; false where it had to be skipped, which is counted in the events.

        When it returns the state may be used and stepped on: see `wait_copied`. `finish` waits for the seal.
        """
        started = self._clock.monotonic()
        if self.volume is None:
            return False
        rank = self._topology.rank
        if not self._has_ended():
            return self._skip(step, "the snapshot before it is not sealed yet")
        self._faults.reached("save.begin", step=step, rank=rank)
        self._look_at_nodes()
        plan = plan_save(self._state, self._topology, version=self._manifests.format)
        if not self._prepared:
            self._prepare(self.volume, plan)
        try:
            made = self._begin(self.volume, step, plan)
        except _TIER_FAILURES as error:
            self._fail(error)
            return False
        if made is None:
            return self._skip(step, "no slot is free: all are newest, committed, or being read")
        self._newest = self._window_of = made
        made.stall_s = self._clock.monotonic() - started
        self._work.put(made)
        return True

    def _look_at_nodes(self) -> None:
        """Takes the head's word on what the nodes divide: it is taken back where their shares did not make a whole."""
        said = self._pulse.answer.get("node_sizes")  # None from a keeper that has not heard of this attempt yet
        if said is not None and not said and self._topology.node_sizes:
            self._topology = self._topology.with_nodes(())

    def wait_copied(self) -> None:
        """Returns when the state may change: all of it is copied, or the snapshot was given up for being late.

        Bounded, and raises nothing.
        """
        made = self._window_of
        if made is None:
            return
        is_good = made.window.wait(Deadline.after(self.wait_s, self._clock))
        self._window_of = None
        if made.proves and is_good:
            problem = made.staging.problem_of_tensors()
            made.staging.release()
            if problem is None:
                self._is_proven = True
            else:
                self._copy_at_once(f"{problem} between step {made.step} and the next optimizer step")

    def finish(self) -> bool:
        """Waits, bounded, until the snapshot that is being made has ended; whether the last one was sealed."""
        made = self._newest
        return made is not None and self._has_ended() and made.is_sealed

    def _has_ended(self) -> bool:
        made = self._newest
        if made is None:
            return True
        self.wait_copied()
        if not made.ended.is_set():
            made.is_awaited.set()
            if not self._clock.wait(made.ended, self.wait_s):
                return False
        self._newest = None
        return True

    def _skip(self, step: int, reason: str) -> bool:
        rank = self._topology.rank
        self._pulse.emit("save_skipped", rank=rank, step=step, tier=contract.TIER_MEMORY, reason=reason)
        return False

    def _begin(self, volume: NodeVolume, step: int, plan: SavePlan) -> _Snapshot | None:
        """Takes a slot and copies what may not wait; None where no slot is free."""
        writer = self._next.take(volume, slot_nbytes(plan), protect=self._protected())
        if writer is None:
            return None
        self._turn += 1
        sure = self._guard.take_sure() if self.capture is Capture.HIDDEN else frozenset()
        try:
            self._pinned.pin(writer.slot, writer.memory)
            later = Later(sure, self._turn, all_bytes=not self._is_proven)
            staging = self._stager.begin(plan, writer.memory, later)
        except BaseException:
            writer.abandon()
            raise
        # Without the tensors: those that wait are held by `staging` until they are copied.
        num_events = self._pulse.log.num_said if self._topology.rank == 0 else 0  # the losses are rank 0's to say
        made = _Snapshot(step, plan.without_tensors(), writer, staging, Window(self._clock), num_events)
        made.proves = staging.waits and not self._is_proven
        if not staging.waits:
            made.window.close(None)
        return made

    def _protected(self) -> list[tuple[int, int]]:
        return [(int(step), int(epoch)) for step, epoch in self._pulse.answer.get("protect", [])]

    # The thread

    def _run(self) -> None:
        let_training_first()
        while (made := self._work.get()) is not None:
            self._make(made)
            del made  # else what it holds would be held until the next

    def _make(self, made: _Snapshot) -> None:
        try:
            with made.writer:
                self._copy_and_seal(made)
            self._lease_ahead(slot_nbytes(made.plan))
        except (*_TIER_FAILURES, KtrainError) as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 -- top of the thread: recorded, training goes on
            _LOG.exception("rank %d: the capture of step %d failed", self._topology.rank, made.step)
            self._fail(error)
        finally:
            made.window.close("the copy failed")
            made.ended.set()

    def _copy_and_seal(self, made: _Snapshot) -> None:
        step, rank, staging = made.step, self._topology.rank, made.staging
        self._faults.reached("save.copying", step=step, rank=rank)
        staging.copy()
        changed = staging.problem_of_copies()
        problem = made.window.close(changed)
        if problem is not None or not made.proves:
            staging.release()
        if problem is not None:
            self._skip(step, problem)
            if problem is changed:  # and not by a step that could wait no longer
                self._copy_at_once(f"{problem} while step {step} was copied")
            return
        chunks = staging.digest()
        self._faults.reached("save.staged", step=step, rank=rank)
        plans = [made.plan] if made.plan.copies is None else [made.plan, made.plan.copies]
        self._await_log(made)
        made.writer.seal(*(self._manifests.make(step, *each) for each in zip(plans, chunks, strict=True)))
        self._faults.reached("save.sealed", step=step, rank=rank)
        self.saved_step = step
        made.is_sealed = True
        self._recovered()
        self._pulse.note_sealed()
        fields = {"rank": rank, "step": step, "tier": contract.TIER_MEMORY, "nbytes": slot_nbytes(made.plan)}
        self._pulse.emit("snapshot", stall_s=made.stall_s + made.window.waited_s, **fields)

    def _lease_ahead(self, nbytes: int) -> None:
        assert self.volume is not None
        try:
            self._next.lease_ahead(self.volume, nbytes, protect=self._protected())
        except (*_TIER_FAILURES, KtrainError) as error:
            _LOG.debug("no slot is leased ahead: %s", error)  # the save itself says what is wrong

    def _await_log(self, made: _Snapshot) -> None:
        """Bounded: what was said up to this step is in the run's log before the snapshot can be restored.

        Where somebody waits for the seal, or the log stands still since the last try, it is sealed at once.
        """
        log = self._pulse.log
        if log.num_heard >= made.num_events or log.num_heard == self._log_stands_at:
            return
        deadline = Deadline.after(_LOG_BEATS * settings.timeouts().beat_s, self._clock)
        if log.wait(made.num_events, deadline, made.is_awaited):
            self._log_stands_at = None
        elif not made.is_awaited.is_set():
            self._log_stands_at = log.num_heard
            self._pulse.emit(
                "notice",
                message=f"rank {self._topology.rank}: step {made.step} is sealed before the run's log has all that was "
                f"said up to it; the head did not confirm it within {deadline.total_s:g} s",
            )

    def _copy_at_once(self, why: str) -> None:
        """From now on nothing is left to the background: this loop changes its state at other moments too."""
        if self.capture is Capture.HIDDEN:
            self.capture = Capture.AT_ONCE
            self._pulse.emit(
                "notice",
                message=f"rank {self._topology.rank}: {why}; from now on snapshots are copied before step() returns "
                '(capture="at_once")',
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


class _Manifests:
    """Writes the manifests of one rank's payloads. `format`: the version in which the run is written."""

    def __init__(self, topology: Topology, line: Line) -> None:
        self._topology = topology
        self._line = line
        self._tables: dict[bool, tuple[Layout, Written]] = {}  # of the copies, and of the share
        self.run_id = ""
        self.format = document.FORMAT

    def make(self, step: int, plan: SavePlan, chunks: tuple[int, ...]) -> Manifest:
        topology, line = self._topology, self._line
        return Manifest(
            identity=Identity(run=self.run_id, step=step, epoch=line.epoch, world_size=topology.world_size),
            rank=topology.rank,
            plan_digest=plan.digest,
            nbytes=plan.layout.nbytes,
            chunk_nbytes=CHUNK_NBYTES,
            chunks=chunks,
            entries=plan.layout.entries,
            table=self._table_of(plan),
            objects=plan.objects,
            origin={
                "ktrain": ktrain.__version__,
                "torch": torch.__version__,
                "node": line.node,
                "local_world_size": topology.local_world_size,
            },
            format=self.format,
        )

    def _table_of(self, plan: SavePlan) -> Written:
        """The manifest's table, made once as long as the layout stays: it takes a microsecond for each tensor."""
        known = self._tables.get(plan.is_copies)
        if known is None or known[0] is not plan.layout:
            known = self._tables[plan.is_copies] = plan.layout, columns.write(plan.layout.entries)
        return known[1]


class _NearDevice(SlotCalls):
    """Slots whose pages lie next to this rank's device, where the machine has several nodes (ADR 0021)."""

    def near(self) -> frozenset[int]:
        nodes = numa.read_nodes()
        if len(nodes) < 2:
            return frozenset()
        return numa.choose_processors(nodes, os.sched_getaffinity(0), device.numa_node())
