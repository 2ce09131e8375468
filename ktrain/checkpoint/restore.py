"""A rank's side of a restore: plan, execute, verify; then, when every rank has proven its part, apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ktrain import device
from ktrain.abc.source import copies_beside
from ktrain.abc.transport import PartialRead
from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.collector import without_collections
from ktrain.base.control import Caller
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint import lineage
from ktrain.checkpoint.agreement import RestoreState
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.packed import unpack
from ktrain.checkpoint.pulse import Pulse
from ktrain.checkpoint.source import Failure, Fetched, NearestSource, Openers, PeerCalls, Tally
from ktrain.errors import ConfigError, CorruptionError, KtrainError, UnavailableError, from_kind
from ktrain.format.manifest import Identity, Manifest
from ktrain.snapshot.arena import NodeVolume
from ktrain.state.apply import RestoreNeeds, apply, plan_restore
from ktrain.state.landing import Landing, land
from ktrain.state.plan import plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.tier.disk import NodeDisk, open_disk
from ktrain.tier.location import open_tier

_Beside: TypeAlias = dict[int, tuple[Manifest, Copy]]
"""Copies that this node has beside the shares of saved ranks, by these (ADR 0015)."""


@dataclass(slots=True)
class _Loaded:
    """A step that this rank has read and proven, waiting for the others."""

    identity: Identity
    needs: RestoreNeeds
    landing: Landing
    source: NearestSource
    seconds: float
    plan_digest: str | None  # of what this rank has saved, on the same number of ranks


class Restorer:
    """One restore of one rank. Use from the training thread."""

    def __init__(
        self,
        state: TrainState,
        topology: Topology,
        volume: NodeVolume | None,
        pulse: Pulse,
        keeper: Caller,
        run: str,
    ) -> None:
        self._state = state
        self._topology = topology
        self._volume = volume
        self._pulse = pulse
        self._keeper = keeper
        self._timeouts = settings.timeouts()
        self._clock = SYSTEM_CLOCK
        self._tier = open_tier(run, timeouts=self._timeouts)
        self._disk: NodeDisk | None = None
        if volume is not None:
            root = settings.env(contract.ENV_DISK)
            self._disk = open_disk(root, run=volume.run, node=volume.node, timeouts=self._timeouts)
        self._round = 0
        self._loaded: _Loaded | None = None
        self._has_written = False

    def restore(self, faults: FaultPoints) -> int:
        """Takes part in the agreement until every rank may apply; returns the step. Once."""
        try:
            return self._restore(faults)
        finally:
            self._close()

    def _close(self) -> None:
        self._drop()
        self._tier.close()
        if self._disk is not None:
            self._disk.close()

    def _restore(self, faults: FaultPoints) -> int:
        self._report("waiting")
        deadline = self._deadline()
        while True:
            word = self._pulse.wait_answer(deadline, f"agree on a step to restore (round {self._round})").get("restore")
            if word is None:
                continue
            state, number = RestoreState(word["state"]), int(word["round"])
            if state is RestoreState.FAILED:
                raise from_kind(word["error"]["kind"], f"{word['error']['message']}\n{self._consequence()}")
            if state is RestoreState.FRESH:
                self._round = number
                self._report("applied", tier="none", seconds=0.0, **_read_of(Tally()))
                return 0
            if state is RestoreState.WEIGHING and number != self._round and "manifests" in word:
                self._round = number
                self._say_wants(word)
                deadline = self._deadline()
            elif state is RestoreState.LOADING and number != self._round and "sources" in word:
                self._round = number
                self._load(word)
                faults.reached("restore.loaded", step=int(word["identity"]["step"]), rank=self._topology.rank)
                deadline = self._deadline()
            elif state is RestoreState.GO and number == self._round and self._loaded is not None:
                step = self._apply(self._loaded)
                faults.reached("restore.applied", step=step, rank=self._topology.rank)
                return step

    def _consequence(self) -> str:
        """What an error leaves behind in the state."""
        if not self._has_written:
            return "Nothing was changed."
        return (
            "Proven values of a checkpoint may have been written into some tensors of the state before: end the "
            "process, or give the whole state its values anew."
        )

    def _deadline(self) -> Deadline:
        return Deadline.after(self._timeouts.restore_s + self._timeouts.call_s, self._clock)

    def _report(self, status: str, **fields: Any) -> None:
        self._pulse.note_restore({"round": self._round, "status": status, **fields})

    def _drop(self) -> None:
        if self._loaded is not None:
            self._loaded.source.close()
            self._loaded = None

    def _load(self, word: Mapping[str, Any]) -> None:
        """Reads and proves this rank's part of the agreed step, and says so."""
        self._drop()
        started = self._clock.monotonic()
        manifests = _manifests_of(word)
        places = {int(rank): [Copy.from_json(value) for value in values] for rank, values in word["sources"].items()}
        identity = Identity.from_json(word["identity"])
        is_same_size = identity.world_size == self._topology.world_size
        bound = Deadline.after(self._timeouts.restore_s, self._clock)
        beside = self._find_copies(identity)
        while True:
            try:
                needs = self._plan(manifests, beside)
            except CorruptionError as error:  # it does not count, wherever it lies
                said = [Failure(copy, True, str(error)).to_json() for copies in places.values() for copy in copies]
                self._report("failed", copies=said)
                return
            source = NearestSource(
                manifests | {copies_beside(rank): manifest for rank, (manifest, _) in beside.items()},
                places | {copies_beside(rank): [copy] for rank, (_, copy) in beside.items()},
                self._openers(is_same_size),
                self._refused,
            )
            self._has_written = True
            try:
                landing = land(needs.targets)
                source.fetch(landing.views, into=landing.runs, deadline=bound)
                break
            except (CorruptionError, UnavailableError):
                source.close()
                bad = {copies_beside(failure.copy.rank) for failure in source.failures if failure.copy.rank < 0}
                if not bad:
                    self._report("failed", copies=[failure.to_json() for failure in source.failures])
                    return
                # Copies are an extra: what they had is read from the shares.
                beside = {rank: found for rank, found in beside.items() if rank not in bad}
        own = manifests.get(self._topology.rank) if is_same_size else None
        digest = None if own is None else own.plan_digest
        self._loaded = _Loaded(identity, needs, landing, source, self._clock.monotonic() - started, digest)
        self._report("ready")

    def _find_copies(self, identity: Identity) -> _Beside:
        """The copies beside shares of a snapshot that this node has, by rank: in memory, or else on its disk."""
        found: _Beside = {}
        for tier, place in ((contract.TIER_MEMORY, self._volume), (contract.TIER_DISK, self._disk)):
            if place is None or self._volume is None:
                continue
            try:
                manifests, damaged = place.copies.find(identity)
            except KtrainError as error:
                self._pulse.emit("notice", message=f"restore of rank {self._topology.rank}: {tier}: {error}")
                continue
            for rank, manifest in manifests.items():
                copy = Copy(tier, self._volume.node, copies_beside(rank), identity)
                found.setdefault(rank, (manifest, copy))
            for rank, reason in damaged.items():
                copy = Copy(tier, self._volume.node, copies_beside(rank), identity)
                self._refused(Failure(copy, True, reason))
        return found

    def _openers(self, is_same_size: bool) -> Openers:
        return Openers(
            volume=self._volume,
            disk=self._disk,
            tier=self._tier,
            peers=PeerCalls(self._fetch, self._read_parts, self._topology.rank if is_same_size else None),
            deadline_of=lambda nbytes: Deadline.after(self._timeouts.storage_s + nbytes / 1e6, self._clock),
            num_threads=self._topology.copy_threads,
        )

    def _plan(self, manifests: Mapping[int, Manifest], beside: _Beside) -> RestoreNeeds:
        copies = {rank: manifest for rank, (manifest, _) in beside.items()}
        try:
            return plan_restore(self._state, manifests, self._topology, copies)
        except ConfigError as error:
            raise ConfigError(f"{error}\n{self._consequence()}") from error

    def _say_wants(self, word: Mapping[str, Any]) -> None:
        """Tells the head how much this rank will read of each saved rank's share, and how large that is.

        Of a checkpoint with a gap it wants nothing: `_load` refuses it.
        """
        manifests = _manifests_of(word)
        try:
            ranges = self._plan(manifests, self._find_copies(Identity.from_json(word["identity"]))).ranges
        except CorruptionError:
            ranges = {}
        wants = {
            saved: [sum(end - begin for begin, end in wanted), manifests[saved].nbytes]
            for saved, wanted in ranges.items()
            if saved in manifests
        }
        self._report("wants", wants=wants)

    def _fetch(self, copy: Copy, wanted: PartialRead) -> Fetched:
        """Has the node keeper bring all of a peer's copy to this node."""
        timeout_s = self._timeouts.restore_s / 2
        said = {"copy": copy.to_json(), "wanted": wanted.to_json(), "timeout_s": timeout_s}
        return Fetched.from_json(self._keeper.call("fetch", said, timeout_s=timeout_s + self._timeouts.call_s))

    def _read_parts(self, copy: Copy, wanted: PartialRead, deadline: Deadline) -> int:
        """Has the node keeper bring parts of a peer's copy into a file; returns the bytes that crossed the wire."""
        timeout_s = deadline.remaining_s()
        said = {"copy": copy.to_json(), "wanted": wanted.to_json(), "timeout_s": timeout_s}
        return int(self._keeper.call("read", said, timeout_s=timeout_s + self._timeouts.call_s)["wire_nbytes"])

    def _refused(self, failure: Failure) -> None:
        """A copy that is bad is named in the events, and a bad slot of this node is taken out of the inventory."""
        copy = failure.copy
        if not failure.corrupt:
            self._pulse.emit("notice", message=f"restore of rank {self._topology.rank}: {failure.reason}")
            return
        is_beside = copy.rank < 0
        rank = copies_beside(copy.rank) if is_beside else copy.rank
        self._pulse.emit(
            "bad_copy",
            step=copy.identity.step,
            rank=rank,
            tier=copy.tier,
            where=copy.place,
            reason=f"copies beside its share: {failure.reason}" if is_beside else failure.reason,
            begin=failure.begin,
            end=failure.end,
        )
        near = {contract.TIER_MEMORY: self._volume, contract.TIER_DISK: self._disk}.get(copy.tier)
        if near is not None and is_beside:
            near.copies.discard(rank, copy.identity)
        elif isinstance(near, NodeVolume):
            near.discard(rank, copy.identity, failure.reason)
        elif near is not None:
            near.discard(rank, copy.identity)

    def _apply(self, loaded: _Loaded) -> int:
        started = self._clock.monotonic()
        apply(self._state, loaded.needs, loaded.source, loaded.landing)
        source = loaded.source
        self._report(
            "applied",
            tier=lineage.slowest(source.tiers.values()) if source.tiers else contract.TIER_MEMORY,
            **_read_of(source.tally),
            seconds=loaded.seconds + self._clock.monotonic() - started,
            exact=device.is_deterministic() and loaded.plan_digest == self._plan_digest(),
        )
        for notice in loaded.needs.notices:
            self._pulse.emit("notice", message=f"rank {self._topology.rank}: {notice}")
        self._drop()
        return loaded.identity.step

    def _plan_digest(self) -> str | None:
        """Of what this rank would save now; None where the first save will refuse."""
        try:
            return plan_save(self._state, self._topology).digest
        except ConfigError:
            return None


def _manifests_of(word: Mapping[str, Any]) -> dict[int, Manifest]:
    with without_collections():
        return {rank: Manifest.from_bytes(text.encode()) for rank, text in unpack(word["manifests"]).items()}


def _read_of(tally: Tally) -> dict[str, int]:
    """What a report on a restore says of its reads."""
    names = ("nbytes", "wanted_nbytes", "num_reads", "wire_nbytes", "bucket_nbytes")
    return {name: getattr(tally, name) for name in names}
