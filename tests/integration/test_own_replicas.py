"""Nodes that hold one state build each other's replicas from their own memory, and a lost node comes back from them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract
from tests.integration import once_worker
from tests.integration.launching import Place, place
from tests.integration.test_once_a_job import assert_restored_exactly

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

WIDTH = 1024  # a state of 13 MB, so that a share is many chunks


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        shutil.copy(Path(once_worker.__file__), made.script)
        yield made


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_replica_crosses_the_wire_in_small_part_and_brings_a_lost_node_back(num_nodes: int, here: Place) -> None:
    options = ["--nodes", str(num_nodes), "--fault", "lose-node@step=12,node=1,after=peer"]

    launch = here.launch(*options, args=("ddp", "100", "0.15", str(WIDTH)))
    assert here.end(launch) == contract.EXIT_OK, here.output()

    (restored,) = here.events("restored")
    assert (restored["tier"], restored["bucket_bytes"]) == ("peer", 0)
    replicas = [event for event in here.events("replicated") if event["nbytes"]]
    built = [event for event in replicas if event["attempt"] == 1 or event["step"] > restored["step"]]
    assert {(event["attempt"], event["rank"]) for event in built} == {
        (attempt, rank) for attempt in (1, 2) for rank in range(num_nodes)
    }
    for event in built:
        assert event["nbytes"] <= 0.15 * (event["nbytes"] + event["own_bytes"]), event
    assert_restored_exactly(here, 1)
    assert here.events("bad_copy") == []
