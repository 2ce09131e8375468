"""What several nodes hold is in the bucket once; a node restores from itself, and what copies lack from shares."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ktrain.base import contract
from ktrain.format.manifest import Manifest
from ktrain.format.payload import copies_begin
from tests.integration import once_worker
from tests.integration.launching import Place, place

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

WIDTH = once_worker.WIDTH
STATE_NBYTES = 3 * 4 * (16 * WIDTH + WIDTH + WIDTH * WIDTH + WIDTH + 16 * WIDTH + 16)  # with two moments
BESIDE_NBYTES = 4 * 32768  # headers, generators and step counters of four ranks


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        shutil.copy(Path(once_worker.__file__), made.script)
        yield made


def assert_restored_exactly(here: Place, num: int) -> None:
    """Every restore gave the parameters that were saved, to the last bit."""
    saved = {event["saved"]: event["total"] for event in here.events("log") if event.get("saved")}
    started = [event for event in here.events("log") if event.get("started")]
    assert len(started) == num
    assert [event["total"] for event in started] == [saved[event["started"]] for event in started]


def in_bucket(here: Place) -> list[int]:
    """Bytes of each rank's payload in the newest checkpoint."""
    newest = max(here.run.glob("checkpoints/step-*"))
    return [path.stat().st_size for path in sorted(newest.glob("data-*/rank-*.safetensors"))]


@pytest.mark.parametrize("layout", ["ddp", "hsdp"])
def test_job_is_stored_once_and_restores_from_every_tier(layout: str, here: Place) -> None:
    plan = ("kill-worker@step=12,rank=1", "lose-node@step=22,node=1,after=peer")
    options = ["--nodes", "2", "--workers-per-node", "2", *[part for spec in plan for part in ("--fault", spec)]]

    assert here.end(here.launch(*options, args=(layout, "30", "0.1"))) == contract.EXIT_OK, here.output()

    same_nodes, lost_node = here.events("restored")
    assert (same_nodes["tier"], same_nodes["wire_bytes"]) == ("memory", 0)
    assert lost_node["tier"] == "peer"
    assert lost_node["tiers"]["0"] == lost_node["tiers"]["1"] == "memory", "the node that was left needed nobody"
    for event in here.events("committed"):
        assert event["tier"] != "bucket" or STATE_NBYTES <= event["nbytes"] <= STATE_NBYTES + BESIDE_NBYTES
    sizes = in_bucket(here)
    assert len(sizes) == 4
    assert max(sizes) <= 1.05 * sum(sizes) / 4
    for event in here.events("replicated"):
        assert event["nbytes"] <= 1.05 * max(sizes), "a peer keeps a share, no copies"

    # Another number of ranks, and nothing left but the bucket.
    assert here.end(here.launch("--nodes", "1", args=(layout, "35", "0"))) == contract.EXIT_OK, here.output(1)
    assert here.events("restored")[-1]["tier"] == "bucket"
    assert_restored_exactly(here, 3)


def stop_at(here: Place, step: int, *options: str, args: tuple[str, ...]) -> None:
    """Launches and stops once the peers hold `step`; what is in memory stays."""
    launch = here.launch(*options, args=args)
    here.await_that(
        f"step {step} at peers",
        lambda: any(e["tier"] == "peer" and e["step"] >= step for e in here.events("committed")),
    )
    launch.terminate()
    assert here.end(launch) == contract.EXIT_STOPPED, here.output()


def test_copies_that_are_damaged_or_gone_are_read_from_shares(here: Place) -> None:
    stop_at(here, 5, "--nodes", "2", args=("ddp", "100000", "0.05"))
    (at,) = {event["step"] for event in here.events("run_ended")}
    for path in here.volume.rglob("*.copies.json"):
        copies = Manifest.from_bytes(path.read_bytes())
        if copies.identity.step != at:
            continue
        if copies.rank == 1:
            path.unlink()
            continue
        share = Manifest.from_bytes(path.with_name(path.name.replace("copies", "manifest")).read_bytes())
        with open(path.with_name(path.name.replace("copies.json", "safetensors")), "r+b") as payload:
            payload.seek(copies_begin(share.nbytes) + copies.nbytes // 2)
            payload.write(b"flipped")

    assert here.end(here.launch("--nodes", "2", args=("ddp", str(at + 5), "0"))) == contract.EXIT_OK, here.output(1)

    (restored,) = here.events("restored")
    assert restored["step"] == at
    assert restored["tier"] in ("memory", "peer"), "shares of the other node, kept here or there"
    (bad,) = here.events("bad_copy")
    assert (bad["step"], bad["rank"], bad["tier"]) == (at, 0, "memory")
    assert "copies beside its share" in bad["reason"]
    losses = {event["step"]: event["loss"] for event in here.events("step")}
    net = once_worker.network()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, foreach=False)
    # Equal gradients average to themselves, so one process gives the same.
    assert losses == {step: once_worker.train(net, optimizer, step) for step in range(1, at + 6)}


def test_nodes_that_hold_other_things_than_they_think_store_all_of_them(here: Place) -> None:
    options = ("--nodes", "2", "--fault", "kill-worker@step=22,rank=1,after=bucket")

    assert here.end(here.launch(*options, args=("odd", "30", "0.2"))) == contract.EXIT_OK, here.output()

    notices = [event["message"] for event in here.events("notice") if "every node stores all" in event["message"]]
    assert notices, "it is said"
    (restored,) = here.events("restored")
    assert restored["step"] in (10, 15, 20)
    assert_restored_exactly(here, 1)
    assert sum(in_bucket(here)) >= 2 * STATE_NBYTES


def without_launcher(here: Place, world_size: int, steps: int) -> None:
    """As torchrun starts a rank on each of some nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"KTRAIN_RUN": str(here.run), "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(world_size)}
    common |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(here.script), "ddp", str(steps), "0"]
    ranks = [
        subprocess.Popen(command, env=here.environment(**common, RANK=str(rank)), stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0] * world_size, errors


def test_job_without_a_launcher_is_stored_once_too(here: Place) -> None:
    without_launcher(here, 3, 10)
    sizes = in_bucket(here)
    assert len(sizes) == 3
    assert STATE_NBYTES <= sum(sizes) <= STATE_NBYTES + BESIDE_NBYTES
    assert max(sizes) <= 1.05 * sum(sizes) / 3
    without_launcher(here, 2, 15)
    assert_restored_exactly(here, 1)
