"""Twenty thousand small tensors: through DCP, and from a replica of a peer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ktrain.checkpoint.dcp import RunStorageReader, RunStorageWriter
from ktrain.checkpoint.dcp_attempt import attempt_of
from ktrain.checkpoint.lineage import Copy
from ktrain.errors import CapacityError
from ktrain.state.train_state import TrainState
from tests.unit.checkpoint.shelves import restore_from
from tests.unit.checkpoint.test_source_peers import made_peers
from tests.unit.state.worlds import ALONE, snapshot

NUM = 20_000


class Many(torch.nn.Module):
    """Parameters of some hundred bytes each, no two alike."""

    def __init__(self, first: float, num: int = NUM) -> None:
        super().__init__()
        for index in range(num):
            value = torch.full((index % 7 + 100,), first + index)
            self.register_parameter(f"layers_{index}_weight", torch.nn.Parameter(value))


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_save_and_load_of_twenty_thousand_tensors_gives_every_value(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    saved, fresh = Many(1.0), Many(-1.0)
    try:
        dcp.save({"model": saved.state_dict()}, storage_writer=RunStorageWriter(run), checkpoint_id="step-10")
        dcp.load({"model": fresh.state_dict()}, storage_reader=RunStorageReader(run))
    finally:
        attempt_of(run).close()
    assert same(fresh, saved)


def no_slot(copy: Copy) -> int:
    raise CapacityError(f"{copy}: all slots are in use")


@pytest.mark.parametrize("is_pulled", [True, False])
def test_restore_of_twenty_thousand_tensors_from_a_peer_gives_every_value(tmp_path: Path, is_pulled: bool) -> None:
    saved, fresh = Many(1.0), Many(-1.0)
    snapshots = {0: snapshot(TrainState({"model": saved}))}
    for peers in made_peers(tmp_path, snapshots):
        peers.shelf.own = 0
        if not is_pulled:
            peers.shelf.pull = no_slot
        restore_from(peers.source(), TrainState({"model": fresh}), ALONE)
        assert same(fresh, saved)
        assert bool(peers.reads) is not is_pulled
