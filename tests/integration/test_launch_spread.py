"""A restore from the bucket under a real launch with two nodes: each byte is read once and passed on over Ray."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from tests.integration import launch_worker
from tests.integration.launching import Place, place
from tests.integration.test_launch_faults import assert_same_losses

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def here() -> Iterator[Place]:
    """A run that ended after 10 steps on one node: two ranks stored a half of the state each, and memory is free."""
    with place() as made:
        shutil.copy(Path(launch_worker.__file__), made.script)
        first = made.launch("--workers-per-node", "2", args=("10", "0"))
        assert made.end(first) == contract.EXIT_OK, made.output()
        yield made


def stored_nbytes(here: Place) -> int:
    """Of the payloads of step 10."""
    return sum(path.stat().st_size for path in here.run.rglob("step-00000010/**/*.safetensors"))


def last_restored(here: Place) -> dict[str, Any]:
    return here.events("restored")[-1]


@pytest.mark.slow
def test_launch_on_two_nodes_reads_each_byte_of_the_bucket_once(here: Place) -> None:
    second = here.launch("--nodes", "2", args=("20", "0"), KTRAIN_RESTORE_SPREAD="always")

    assert here.end(second) == contract.EXIT_OK, here.output(1)
    said = last_restored(here)
    assert (said["step"], said["tier"]) == (10, "bucket")
    assert said["bucket_bytes"] == stored_nbytes(here)
    assert 0 < said["wire_bytes"] <= 1.2 * stored_nbytes(here)  # manifests cross, too
    assert said["spread"].startswith("each byte is read from the bucket once: it is set so")
    assert_same_losses(here, 20)
    here.await_nothing_left()
    assert here.leftovers() == []


@pytest.mark.slow
def test_launch_whose_agent_dies_while_it_fills_reads_the_rest_from_the_bucket(here: Place) -> None:
    dying = {"KTRAIN_RESTORE_SPREAD": "always", "KTRAIN_FAULTS": "kill@restore.fill,rank=0,epoch=2"}
    second = here.launch("--nodes", "2", "--patience", "6", args=("20", "0"), **dying)

    assert here.end(second) == contract.EXIT_OK, here.output(1)
    assert last_restored(here)["step"] == 10
    assert last_restored(here)["bucket_bytes"] > 0
    assert here.events("agent_lost")
    assert_same_losses(here, 20)
    here.await_nothing_left()
