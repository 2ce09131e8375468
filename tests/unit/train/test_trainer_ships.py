"""A Trainer goes as the arguments that it was made with, and is made anew where it runs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ktrain.errors import ConfigError
from ktrain.jobs.start import Trains
from ktrain.launcher.code.function import open_function, pack_function
from ktrain.train.loss import Loss
from ktrain.train.trainer import Trainer


def made(run: Path, **changed: Any) -> Trainer:
    given: dict[str, Any] = {
        "model": lambda: nn.Linear(4, 4),
        "loss": lambda model, batch, step: Loss((model(batch) - batch).pow(2).sum(), batch.numel()),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
        "data": torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),
        "global_batch": 4,
        "steps": 3,
        "run": str(run),
    }
    return Trainer(**{**given, **changed})


def test_trainer_that_was_shipped_trains_as_the_one_that_was_made(tmp_path: Path) -> None:
    packed = pack_function(made(tmp_path / "there").fit)
    report: Any = open_function(packed.data, packed.sha256)()

    here = made(tmp_path / "here").fit()

    assert isinstance(made(tmp_path), Trains)
    assert (report.outcome, report.step, report.loss) == (here.outcome, 3, here.loss)
    assert (tmp_path / "there" / "events.jsonl").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": torch.zeros(5 << 20)}, "Trainer.fit -> its object['data']: 20 MiB of 20 MiB of data"),
        ({"callbacks": (threading.Lock().acquire,)}, "Trainer.fit -> its object['callbacks'][0]"),
    ],
)
def test_piece_of_a_trainer_that_cannot_be_shipped_is_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pack_function(made(tmp_path, **changed).fit)

    assert said in str(caught.value)


def test_trainer_that_was_run_here_is_not_shipped(tmp_path: Path) -> None:
    trainer = made(tmp_path / "run")
    trainer.fit()

    with pytest.raises(ConfigError, match="it was run in this process already; make a new one"):
        pack_function(trainer.fit)
