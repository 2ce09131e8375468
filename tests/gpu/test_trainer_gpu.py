"""A Trainer of one rank on the device, with a process group of the device's own backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import ktrain
from ktrain import device
from tests.unit.train.fakes import Net, Regression, squared_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device.name() != "cuda", reason="needs NCCL"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch's on groups of one
]


@pytest.fixture(autouse=True)
def _own_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRAIN_VOLUME", str(tmp_path / "volume"))


@pytest.fixture
def group() -> Iterator[None]:
    place = device.for_rank(0)
    device.use(place)
    backend = device.process_group_backend(place)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=place)
    try:
        assert dist.get_backend() == "nccl"
        yield
    finally:
        dist.destroy_process_group()


def whole() -> nn.Module:
    return Net(0.2)


def sharded() -> nn.Module:
    torch.manual_seed(5)
    model = Net(0.2).to(device.for_rank(0))
    fully_shard(model)
    return model


def fit(run: Path, make: Callable[[], nn.Module], steps: int, stop_at: int | None = None) -> ktrain.Report:
    def interrupt(notice: object) -> None:
        if getattr(notice, "step", None) == stop_at and getattr(notice, "moment", None) == "step":
            raise RuntimeError("pulled the plug")

    return ktrain.Trainer(
        make if make is whole else make(),
        squared_error,
        lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        Regression(),
        eval_data=Regression(10),
        global_batch=16,
        steps=steps,
        every=2,
        run=str(run),
        callbacks=[interrupt],
    ).fit()


@pytest.mark.parametrize("make", [whole, sharded])
def test_trainer_with_a_group_of_one_resumes_with_the_losses_of_one_that_was_not_interrupted(
    group: None, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    uninterrupted = fit(tmp_path / "whole", make, 9)
    assert (uninterrupted.outcome, uninterrupted.step) == ("succeeded", 9)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(tmp_path / "broken", make, 9, stop_at=6)
    resumed = fit(tmp_path / "broken", make, 9)
    assert resumed.loss == uninterrupted.loss
    second = resumed.attempts[1]
    assert (second.restored_step, second.steps_lost, second.ended) == (4, 1, "succeeded")
    assert dist.is_initialized()  # the group is the program's
