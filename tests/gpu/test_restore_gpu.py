"""Device tensors filled from the memory of another node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from ktrain import device
from ktrain.abc.transport import PartialRead
from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.checkpoint.lineage import Copy
from ktrain.errors import CapacityError
from ktrain.snapshot.arena import NodeVolume
from ktrain.state.train_state import TrainState
from ktrain.testing.local_transport import LocalTransport, LocalWire
from ktrain.testing.tier_conformance import soon
from tests.gpu.loops import MixedLoop, rig_of, taken
from tests.unit.checkpoint.saving import same
from tests.unit.checkpoint.shelves import Shelves, restore_from, shelves
from tests.unit.state.worlds import ALONE, Taken

PEER = "node-peer"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.is_available(), reason="this process sees no accelerator"),
]


class Peers:
    """The node of a rank that restores, whose peer holds the snapshot, and the wire between them."""

    def __init__(self, folder: Path, snapshot: Taken, undo: ExitStack, *, has_slots: bool) -> None:
        self._has_slots = has_slots
        self.snapshots = {0: snapshot}
        manifest, payload = snapshot
        wire = LocalWire()
        self.shelf: Shelves = undo.enter_context(shelves(folder, self.snapshots))
        far = undo.enter_context(NodeVolume(folder / "far", node=PEER, run=manifest.identity.run))
        writer = far.acquire(0, len(payload), protect=(), limit=2)
        assert writer is not None
        with writer:
            writer.memory[:] = payload
            writer.seal(manifest)
        undo.callback(LocalTransport(wire, far).close)
        self._receiver = LocalTransport(wire, self.shelf.volume)
        undo.callback(self._receiver.close)
        self.shelf.pull, self.shelf.read = self._pull, self._read
        self.num_parts = 0

    def _pull(self, copy: Copy) -> int:
        if not self._has_slots:
            raise CapacityError("all slots are protected")
        address = f"local:{copy.place}"
        return self._receiver.pull(address, copy.rank, copy.identity, protect=(), deadline=soon()).wire_nbytes

    def _read(self, copy: Copy, wanted: PartialRead, deadline: Deadline) -> int:
        self.num_parts += len(wanted.parts)
        return self._receiver.read(f"local:{copy.place}", wanted, deadline=deadline)

    def restore(self, state: TrainState) -> None:
        copy = Copy(contract.TIER_PEER, PEER, 0, self.snapshots[0][0].identity)
        source = self.shelf.source(self.snapshots, {0: [copy]})
        restore_from(source, state, ALONE)
        assert source.tiers == {0: contract.TIER_PEER} and source.failures == []


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("has_slots", [True, False], ids=["pulled-whole", "read-in-parts"])
@pytest.mark.parametrize("is_fresh", [True, False], ids=["without-optimizer-state", "with-optimizer-state"])
def test_restore_of_device_tensors_from_a_peers_replica_continues_bit_for_bit(
    has_slots: bool, is_fresh: bool, undo: ExitStack, tmp_path: Path
) -> None:
    loop = MixedLoop()
    with rig_of(loop, tmp_path / "rig") as rig:
        loop.step()
        assert rig.saver.save(2) and rig.saver.finish()
        peers = Peers(tmp_path, taken(rig, 2), undo, has_slots=has_slots)
        before = loop.values()
        expected = [loop.step() for _ in range(4)]

    other = MixedLoop(seed=9)
    if not is_fresh:
        other.step()
    places = [value.data_ptr() for value in other.model.parameters()]
    peers.restore(TrainState(other.parts))
    assert same(other.values(), before)
    assert [value.data_ptr() for value in other.model.parameters()] == places
    assert (peers.num_parts == 0) == has_slots
    assert all(value.device == other.device for value in other.model.state_dict().values())
    assert [other.step() for _ in range(4)] == expected
    assert same(other.values(), loop.values())
    torch.accelerator.synchronize()
