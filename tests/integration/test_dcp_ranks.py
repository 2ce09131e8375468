"""DCP through our storage on several gloo ranks: four fully_shard ranks save, two and one load; a rank is killed.

Run as a program, this file is one of the ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog, verify_commit

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 100


def run_ranks(mode: str, world_size: int, folder: Path, faults: str = "") -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and errors of all ranks."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size),
        "KTRAIN_FAULTS": faults,
        "MASTER_ADDR": "127.0.0.1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, mode, str(folder)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [rank.returncode for rank in ranks], [out for out, _ in outputs], [err for _, err in outputs]


def found_by(mode: str, world_size: int, folder: Path) -> list[Any]:
    codes, outputs, errors = run_ranks(mode, world_size, folder)
    assert codes == [0] * world_size, "\n".join(errors)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of four ranks' saves, and by step what rank 0 had then."""
    folder = tmp_path_factory.mktemp("dcp")
    return folder, found_by("save", 4, folder)[0]


def catalog_of(folder: Path) -> RunCatalog:
    return RunCatalog.open(str(folder / "run"), timeouts=Timeouts(), create=False)


def test_saves_of_four_ranks_are_committed_and_proven(saved: Any) -> None:
    catalog = catalog_of(saved[0])
    commits = catalog.listing().commits

    assert [(commit.identity.step, commit.identity.world_size) for commit in commits] == [(1, 4), (2, 4)]
    assert [finding for commit in commits for finding in verify_commit(catalog, commit)] == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_load_on_fewer_ranks_gives_the_values_of_the_save(world_size: int, saved: Any) -> None:
    folder, values = saved

    for rank in found_by("load", world_size, folder):
        assert rank == {"1": values["1"], "newest": values["2"]}


def test_export_of_four_ranks_saves_is_the_whole_model(saved: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from ktrain.exchange.export import export_run

    folder, values = saved
    export_run(folder / "run", tmp_path / "x", form="safetensors", step=1)

    found = {f"model.{name}": tensor.double().flatten().tolist() for name, tensor in load_file(tmp_path / "x").items()}
    assert found == {name: value for name, value in values["1"].items() if name.startswith("model.")}


def test_async_save_by_process_is_committed_with_the_values_of_its_call(tmp_path: Path) -> None:
    (found,) = found_by("process", 1, tmp_path)

    assert found == [2.0, 2.0]
    assert [commit.identity.step for commit in catalog_of(tmp_path).listing().commits] == [1, 2]


def test_killed_rank_leaves_no_checkpoint(tmp_path: Path) -> None:
    codes, _, _ = run_ranks("save", 2, tmp_path, "kill@drain.manifest,step=1,rank=1")

    assert codes[1] == -9 and codes[0] != 0
    assert list((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert catalog_of(tmp_path).listing().commits == ()


def test_killed_coordinator_leaves_what_was_committed(tmp_path: Path) -> None:
    codes, _, _ = run_ranks("save", 1, tmp_path, "kill@commit.begin,step=2")

    assert codes == [-9]
    assert [commit.identity.step for commit in catalog_of(tmp_path).listing().commits] == [1]


class Program:
    """One rank: a model and its optimizer under fully_shard, as DCP users name them."""

    def __init__(self, seed: int) -> None:
        import torch
        from torch import nn
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1), nn.Linear(1, 3))
        for layer in self.model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step()

    def step(self) -> None:
        import torch

        self.model(torch.ones(4, 5).cumsum(0)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer, "step": 7}

    def values(self) -> dict[str, list[Any]]:
        """Everything, whole, in a form that JSON keeps exactly."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        tensors = {f"model.{name}": tensor for name, tensor in model.items()}
        for name, state in optimizer["state"].items():
            tensors |= {f"optim.{name}.{key}": tensor for key, tensor in state.items()}
        return {name: tensor.double().flatten().tolist() for name, tensor in sorted(tensors.items())}

    def load(self, run: str, **options: Any) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        from ktrain.checkpoint.dcp import RunStorageReader

        state = self.state()
        dcp.load(state, storage_reader=RunStorageReader(run, **options))
        assert state["step"] == 7
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def save(run: str) -> dict[str, Any]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from ktrain.checkpoint.dcp import RunStorageWriter

    program, writer = Program(seed=1), RunStorageWriter(run)
    values = {"1": program.values()}
    dcp.save(program.state(), storage_writer=writer, checkpoint_id="step-1")
    program.step()
    values["2"] = program.values()
    # A group of its own: the background thread's collectives must not meet those of the next step.
    own = dist.new_group(backend="gloo")
    future = dcp.async_save(program.state(), storage_writer=writer, checkpoint_id="step-2", process_group=own)
    program.step()
    future.result(timeout=60)  # type: ignore[union-attr]
    writer.close()
    return values


def load(run: str) -> dict[str, Any]:
    program = Program(seed=5)
    program.load(run, step=1)
    first = program.values()
    program.load(run)
    return {"1": first, "newest": program.values()}


def save_by_process(run: str) -> list[float]:
    """Two saves by torch's background process; what a load gives after them."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    from ktrain.checkpoint.dcp import RunStorageReader, RunStorageWriter

    for step in (1, 2):
        state = {"w": torch.full((2,), float(step))}
        writer, by = RunStorageWriter(run), AsyncCheckpointerType.PROCESS
        future = dcp.async_save(state, storage_writer=writer, checkpoint_id=f"step-{step}", async_checkpointer_type=by)
        state["w"].zero_()
        future.result(timeout=60)  # type: ignore[union-attr]
    found = {"w": torch.zeros(2)}
    dcp.load(found, storage_reader=RunStorageReader(run))
    values: list[float] = found["w"].tolist()
    return values


def main(mode: str, folder: Path) -> None:
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / f"store-{mode}-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    run = str(folder / "run")
    print(json.dumps({"save": save, "load": load, "process": save_by_process}[mode](run)))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # fully_shard keeps gloo's threads, which can abort the interpreter's end (see ktrain.run.worker.leave)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
