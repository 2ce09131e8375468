"""A Trainer on one rank with the real Checkpointer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ktrain
from tests.unit.train.fakes import Net, Regression, squared_error


def fit(run: Path, steps: int, stop_at: int | None = None, **changed: object) -> ktrain.Report:
    def interrupt(notice: object) -> None:
        if getattr(notice, "step", None) == stop_at and getattr(notice, "moment", None) == "step":
            raise RuntimeError("pulled the plug")

    return ktrain.Trainer(
        lambda: Net(0.2),
        squared_error,
        lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        Regression(),
        eval_data=Regression(10),
        global_batch=16,
        steps=steps,
        every=2,
        run=str(run),
        callbacks=[interrupt],
        **changed,
    ).fit()


@pytest.fixture(autouse=True)
def _own_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRAIN_VOLUME", str(tmp_path / "volume"))


def test_trainer_interrupted_run_ends_with_the_loss_of_one_that_was_not(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 9)
    assert (whole.outcome, whole.step, len(whole.attempts), whole.num_failures) == ("succeeded", 9, 1, 0)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        fit(tmp_path / "broken", 9, stop_at=6)
    resumed = fit(tmp_path / "broken", 9)
    assert resumed.loss == whole.loss
    second = resumed.attempts[1]
    assert (second.restored_step, second.steps_lost, second.ended) == (4, 1, "succeeded")
    assert second.restored_tier in ("memory", "bucket")
    assert resumed.num_failures == 1


def test_trainer_complete_run_asked_for_more_steps_goes_on_from_the_bucket(tmp_path: Path) -> None:
    fit(tmp_path / "run", 3)
    report = fit(tmp_path / "run", 5)
    assert (report.step, report.steps_lost) == (5, 0)
    assert (report.attempts[1].restored_tier, report.attempts[1].restored_step) == ("bucket", 3)


def test_trainer_run_with_another_seed_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    fit(tmp_path / "run", 3)
    with pytest.raises(ktrain.errors.ConfigError, match="seed: 0 -> 1"):
        fit(tmp_path / "run", 5, seed=1)
    assert fit(tmp_path / "run", 5).step == 5
