"""`ktrain ckpt` on what a real launch left: listed, proven, and a flipped bit is found in every tier."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract
from tests.integration import launch_worker
from tests.integration.launching import Place, place

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        shutil.copy(Path(launch_worker.__file__), made.script)
        yield made


def flip_bit(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
def test_ckpt_of_a_stopped_run_is_listed_and_a_flipped_bit_is_found_in_every_tier(here: Place) -> None:
    launch = here.launch(args=("1000", "0.05"))
    here.await_that("step 12", lambda: any(event["step"] >= 12 for event in here.events("step")))
    launch.send_signal(signal.SIGTERM)
    assert here.end(launch) == contract.EXIT_STOPPED
    run, step = str(here.run), here.events("run_ended")[0]["step"]

    rows = json.loads(here.ktrain("ckpt", "ls", run, "--output", "json").stdout)
    assert {(row["tier"], row["committed"]) for row in rows if row["step"] == step} == {
        ("memory", True),
        ("bucket", True),
    }
    assert here.ktrain("ckpt", "verify", run).returncode == contract.EXIT_OK

    (payload,) = here.run.glob(f"checkpoints/{contract.step_dirname(step)}/data-*/*.safetensors")
    flip_bit(payload, 5000)
    bad = here.ktrain("ckpt", "verify", run, "--step", str(step), "--tier", "bucket", "--output", "json")
    assert bad.returncode == contract.EXIT_CORRUPT
    (finding,) = json.loads(bad.stdout)["bad"][0]["findings"]
    assert finding["rank"] == 0 and finding["begin"] <= 5000 < finding["end"]
    assert here.ktrain("ckpt", "verify", run, "--step", str(step), "--tier", "memory").returncode == contract.EXIT_OK

    repaired = json.loads(here.ktrain("ckpt", "repair", run, "--output", "json").stdout)["damaged"]
    assert [(row["step"], row["failure"], row["from"]) for row in repaired] == [(step, None, {"0": "memory node-0"})]
    shown = json.loads(here.ktrain("ckpt", "show", run, "--step", str(step), "--output", "json").stdout)
    losses = {event["step"]: event["loss"] for event in here.events("step")}
    assert shown["metrics"]["loss"] == losses[step] and "rng" in {part["name"] for part in shown["parts"]}
    assert here.ktrain("ckpt", "repair", run).returncode == contract.EXIT_OK

    for slot in here.volume.rglob("slot-*.safetensors"):
        flip_bit(slot, 5000)
    bad = here.ktrain("ckpt", "verify", run, "--tier", "memory")
    assert bad.returncode == contract.EXIT_CORRUPT and "rank 0" in bad.stderr and "bytes" in bad.stderr

    (volume,) = json.loads(here.ktrain("ckpt", "ls", "--volume", "--output", "json").stdout)
    assert volume["uri"] == run and volume["state"] == "left over"
    assert here.ktrain("ckpt", "rm", "--volume", run).returncode == contract.EXIT_OK
    assert here.leftovers() == []
