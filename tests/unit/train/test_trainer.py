from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from ktrain.checkpoint.checkpointer import Checkpointer
from ktrain.checkpoint.gate import Gate
from ktrain.checkpoint.policy import Capture, Keep
from ktrain.errors import ConfigError
from ktrain.train.session import Session, session
from ktrain.train.trainer import Moment, Notice, Trainer
from tests.unit.train.fakes import Net, Regression, Shelf, open_session, squared_error


def trainer(run: Path, **changed: Any) -> Trainer:
    arguments = {
        "model": Net,
        "loss": squared_error,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        "data": Regression(),
        "global_batch": 16,
        "steps": 6,
        "run": str(run),
    }
    return Trainer(**{**arguments, **changed})


def test_trainer_has_at_most_twenty_parameters() -> None:
    assert len(inspect.signature(Trainer).parameters) <= 20


@pytest.mark.parametrize("made", [session, trainer, Checkpointer])
@pytest.mark.parametrize("wrong", [{"every": "often"}, {"keep": "all"}, {"gate": "go"}, {"capture": "later"}])
def test_front_doors_refuse_a_wrong_policy_with_the_same_words(
    tmp_path: Path, made: Any, wrong: dict[str, str]
) -> None:
    state: dict[str, Any] = {"state": {}} if made is Checkpointer else {}
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"^{name}: .*{value}"):
        made(tmp_path / "run", **state, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_trainer_policies_reach_the_checkpointer(tmp_path: Path) -> None:
    config = trainer(tmp_path, keep="best:1:loss", gate="step-back", capture="at_once")._session.config
    shelf = Shelf()
    trainer(tmp_path).fit_within(Session(config, open_checkpointer=shelf.open))
    assert shelf.policies == (Keep(bucket="best:1:loss"), Gate(then="step-back"), Capture.AT_ONCE)


def test_moments_are_the_nine_that_were_promised() -> None:
    assert [str(moment) for moment in Moment] == [
        "start", "restored", "step", "update", "evaluated", "saved", "rewound", "failed", "end",
    ]  # fmt: skip


def test_trainer_tells_of_each_moment_in_order(tmp_path: Path) -> None:
    notices: list[Notice] = []
    fit = trainer(tmp_path, steps=2, eval_data=Regression(10), callbacks=[notices.append])
    fit.fit_within(open_session(Shelf(), every=2))
    assert [(notice.moment.value, notice.step) for notice in notices] == [
        ("start", 0),
        ("step", 1),
        ("update", 1),
        ("step", 2),
        ("evaluated", 2),
        ("update", 2),
        ("saved", 2),
        ("end", 2),
    ]
    assert notices[4].values["eval_loss"] > 0
    assert notices[6].values == {"memory": 2}


def test_trainer_notice_cannot_be_changed(tmp_path: Path) -> None:
    def meddle(notice: Notice) -> None:
        notice.values["loss"] = 0.0  # type: ignore[index]

    with pytest.raises(TypeError, match="does not support item assignment"):
        trainer(tmp_path, callbacks=[meddle]).fit_within(open_session(Shelf()))


def test_trainer_that_fails_tells_so_and_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    shelf = Shelf()
    told: list[tuple[str, int]] = []

    def fail_at_four(notice: Notice) -> None:
        told.append((notice.moment.value, notice.step))
        if notice.moment is Moment.STEP and notice.step == 4:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        trainer(tmp_path, callbacks=[fail_at_four]).fit_within(open_session(shelf))
    assert told[-1] == ("failed", 3)
    assert shelf.closed == [False]
    notices: list[Notice] = []
    trainer(tmp_path, callbacks=[notices.append]).fit_within(open_session(shelf))
    assert [(notice.moment.value, notice.step) for notice in notices][:3] == [
        ("start", 0),
        ("restored", 3),
        ("step", 4),
    ]
    whole = Shelf()
    trainer(tmp_path).fit_within(open_session(whole))
    assert shelf.losses == whole.losses


def test_trainer_scheduler_is_stepped_once_per_step(tmp_path: Path) -> None:
    rates: list[float] = []

    def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
        trained.append(scheduler)
        return scheduler

    trained: list[torch.optim.lr_scheduler.LRScheduler] = []

    def note(notice: Notice) -> None:
        if notice.moment is Moment.UPDATE:
            rates.append(trained[0].get_last_lr()[0])

    trainer(tmp_path, steps=4, micro_batch=4, scheduler=decay, callbacks=[note]).fit_within(open_session(Shelf()))
    assert rates == pytest.approx([0.05, 0.005, 0.005, 0.0005])


def test_trainer_eval_every_without_eval_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_every=5 needs eval_data"):
        trainer(tmp_path, eval_every=5)
