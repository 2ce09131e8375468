"""Modules that torch wraps, in a process of their own: their shards wait for the background too, and none is torn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = range(2, 5)


@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
def test_capture_of_a_wrapped_module_is_hidden_and_holds_its_step(wrap: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KTRAIN_")}
    command = [sys.executable, "-W", "ignore", "-m", "tests.integration.test_capture_wrapped", wrap, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=ROOT, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["same"] == [True] * len(STEPS)
    assert report["capture"] == "hidden" and report["notices"] == []
    assert report["num_waiting"] == 6  # two weights, each with two moments


def main(wrap: str, folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from ktrain.snapshot.staging import LATER_NBYTES
    from ktrain.state.plan import plan_save
    from ktrain.state.topology import Topology
    from ktrain.state.train_state import TrainState
    from tests.unit.checkpoint.saving import COPYING, Rig, same

    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    if wrap == "fsdp":
        mesh = init_device_mesh("cpu", (1,))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = {"model": model, "optimizer": optimizer}

    def backward() -> None:
        model(torch.randn(8, 64)).sum().backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def values() -> dict[str, torch.Tensor]:
        found = {f"model/{name.removeprefix('module.')}": value for name, value in model.state_dict().items()}
        return {name: getattr(value, "_local_tensor", value).detach().clone() for name, value in found.items()}

    backward()
    update()
    found: list[bool] = []
    with Rig(folder, parts) as rig:
        backward()
        update()
        for step in STEPS:
            expected = values()
            rig.gate.hold(COPYING)
            assert rig.saver.save(step)
            backward()
            backward()
            rig.gate.open(COPYING)
            update()
            found.append(rig.saver.finish() and same(rig.snapshot(step), expected))
        plan = plan_save(TrainState(parts), Topology(0, 1))
        waits = [
            entry.key
            for entry, guard in zip(plan.layout.entries, plan.places.guards, strict=True)
            if guard and entry.end - entry.begin >= LATER_NBYTES
        ]
        report = {
            "same": found,
            "capture": rig.saver.capture.value,
            "notices": rig.events("notice"),
            "num_waiting": len(waits),
        }
    dist.destroy_process_group()
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
