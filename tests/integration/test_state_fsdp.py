"""Two gloo ranks: exact resume under DDP and fully_shard, and from each into the other and into one process.

Run as a program, this file is one of the ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 100


def run_ranks(mode: str, folder: Path) -> list[dict[str, Any]]:
    """What both ranks found, by rank."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, mode, str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By mode; the second mode restores the first one's snapshots too."""
    return {mode: run_ranks(mode, folder) for mode in ("ddp", "fsdp")}


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_training_with_snapshots_keeps_its_losses(mode: str, found: Any) -> None:
    for rank in found[mode]:
        assert rank["watched"] == rank["plain"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_restore_on_the_same_layout_continues_bit_for_bit(mode: str, found: Any) -> None:
    for rank in found[mode]:
        assert rank["resumed"] == rank["plain"][3:]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_plan_gives_a_fresh_optimizer_no_state(mode: str, found: Any) -> None:
    assert [rank["fresh_states"] for rank in found[mode]] == [0, 0]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_restore_on_the_same_layout_reads_little_of_the_other_rank(mode: str, found: Any) -> None:
    # Under fully_shard everything is a rank's own; under DDP the ranks share what both hold.
    for index, rank in enumerate(found[mode]):
        assert rank["read_from"] == ([index] if mode == "fsdp" else [0, 1])


def test_ddp_stores_each_parameter_on_one_of_the_nodes_ranks(found: Any) -> None:
    first, second = (set(rank["parameters"]) for rank in found["ddp"])
    assert first and second
    assert not first & second


def test_ddp_snapshots_restore_under_fully_shard(found: Any) -> None:
    assert [rank["from_ddp"] for rank in found["fsdp"]] == [True, True]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_snapshots_of_two_ranks_restore_in_one_process(mode: str, folder: Path, found: Any) -> None:
    import torch

    from ktrain.state.topology import Topology

    loop = Loop("plain", seed=9)
    loop.restore(folder, mode, Topology(0, 1))
    expected = found[mode][0]
    assert {name: tensor.double().sum().item() for name, tensor in loop.values().items()} == expected["sums"]
    assert all(torch.isfinite(torch.tensor(loop.step())) for _ in range(2))


class Loop:
    """One rank's training loop with dropout, batch norm, uneven shards, and one that is empty on a rank."""

    def __init__(self, mode: str, seed: int) -> None:
        import torch
        from torch import nn

        from ktrain.state.rng import rng_part
        from ktrain.state.topology import Topology
        from ktrain.state.train_state import TrainState

        self.topology = Topology.current()
        torch.manual_seed(seed)
        self.module = nn.Sequential(
            nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.2), nn.ReLU(), nn.Linear(7, 1), nn.Linear(1, 3)
        )
        self.model: Any = self.module
        if mode == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.module)
        elif mode == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for layer in self.module:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer)
            fully_shard(self.module)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=mode == "ddp")
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        torch.manual_seed(100 + self.topology.rank)  # every rank its own noise and data
        self.state = TrainState(
            {
                "model": self.model,
                "optimizer": self.optimizer,
                "schedule": self.schedule,
                "rng": rng_part(self.topology),
            }
        )

    def step(self) -> float:
        import torch

        loss = self.model(torch.randn(4, 5)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def values(self) -> dict[str, Any]:
        """The model's and the optimizer's tensors that all ranks share, whole."""
        names = {id(value): name for name, value in self.module.named_parameters()}
        found = dict(self.module.named_parameters())
        for param, entry in self.optimizer.state.items():
            found |= {f"{names[id(param)]}/{key}": entry[key] for key in ("exp_avg", "exp_avg_sq")}
        return {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()
            for name, value in found.items()
        }

    def save(self, folder: Path, mode: str) -> list[str]:
        """Writes this rank's snapshot; returns the names of what it holds."""
        from tests.unit.state.worlds import snapshot

        manifest, payload = snapshot(self.state, self.topology)
        (folder / f"{mode}-{manifest.rank}.manifest").write_bytes(manifest.to_bytes())
        (folder / f"{mode}-{manifest.rank}.payload").write_bytes(payload)
        return [entry.shard.name for entry in manifest.entries]

    def restore(self, folder: Path, mode: str, topology: Any) -> list[int]:
        """Restores a mode's snapshots; returns the saved ranks that were read."""
        from ktrain.format.manifest import Manifest
        from tests.unit.state.worlds import restore

        saved = {
            rank: (
                Manifest.from_bytes((folder / f"{mode}-{rank}.manifest").read_bytes()),
                (folder / f"{mode}-{rank}.payload").read_bytes(),
            )
            for rank in range(2)
        }
        return list(restore(self.state, saved, topology).ranges)


def main(mode: str, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from ktrain.state.plan import plan_save

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{mode}", rank=rank, world_size=2)
    report: dict[str, Any] = {}
    plain = Loop(mode, seed=1)
    report["plain"] = [plain.step() for _ in range(6)]

    watched = Loop(mode, seed=1)
    plan_save(watched.state, watched.topology)
    report["fresh_states"] = len(watched.optimizer.state)
    report["watched"] = []
    for step in range(6):
        if step == 3:
            names = watched.save(folder, mode)
            report["sums"] = {name: value.double().sum().item() for name, value in watched.values().items()}
        else:
            plan_save(watched.state, watched.topology)
        report["watched"].append(watched.step())
    report["parameters"] = [name for name in names if name.startswith("model/") and name.endswith("weight")]
    dist.barrier()

    fresh = Loop(mode, seed=2)
    report["read_from"] = fresh.restore(folder, mode, fresh.topology)
    report["resumed"] = [fresh.step() for _ in range(3)]

    if mode == "fsdp":
        crossed, alone = Loop(mode, seed=3), Loop("plain", seed=4)
        crossed.restore(folder, "ddp", crossed.topology)
        alone.restore(folder, "ddp", alone.topology)
        expected = alone.values()
        report["from_ddp"] = all(
            torch.equal(value, expected[name]) for name, value in crossed.values().items()
        ) and len(expected) == len(crossed.values())
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
