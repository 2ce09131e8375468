"""`Trainer(...).fit()`: the usual loop, written with the public calls of a session and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ktrain.checkpoint.gate import Gate
from ktrain.checkpoint.policy import Capture, Every, Keep
from ktrain.checkpoint.retention import Retention
from ktrain.data.samples import Dataset
from ktrain.errors import ConfigError
from ktrain.train.loss import Loss
from ktrain.train.report import Report
from ktrain.train.session import Session, Step, session

LossFunction = Callable[[nn.Module, Any, Any], Loss | torch.Tensor]


class Moment(StrEnum):
    """What callbacks are told of."""

    START = "start"  # the session is open, nothing is built
    RESTORED = "restored"  # the run goes on from `step`; values: nothing
    STEP = "step"  # a step begins
    UPDATE = "update"  # a step is committed; values: loss, grad_norm
    EVALUATED = "evaluated"  # values: the results
    SAVED = "saved"  # the newest committed step of a tier has changed; values: tier -> step
    REWOUND = "rewound"  # not told yet: a run that diverges stops with an error
    FAILED = "failed"  # an error ends fit(); values: error
    END = "end"  # fit() is about to return


@dataclass(frozen=True, slots=True)
class Notice:
    """What a callback gets: read only; `step` is the newest committed step, or the one that begins."""

    moment: Moment
    run: str
    step: int
    values: Mapping[str, Any]


Callback = Callable[[Notice], None]


class Trainer:
    """A model, its loss, its optimizer and its data, trained to a number of steps whatever fails on the way.

    Args:
        model: a class or function that makes the model (on any mesh), or a module.
        loss: `loss(model, batch, step)` returns `Loss(sum, count)`; called once per micro-batch.
        optimizer: makes the optimizer from the parameters.
        data: samples to train on: a length, and samples by number.
        global_batch: samples per step over all ranks together.
        steps: steps of the whole run; the same run again continues.
        run: where checkpoints and events lie; the same name means the same run.
        eval_data: evaluated every `eval_every` steps (only at the end without it) and after the last step.
        micro_batch: samples per pass of one rank; without it the rank's share in one pass.
        scheduler: makes the learning-rate scheduler from the optimizer.
        clip: limit of the gradients' norm.
        callbacks: called at nine moments with a read-only `Notice`, on every rank.
        mesh, precision, seed, every, keep, gate, capture: as in `session`.
    """

    def __init__(  # noqa: PLR0913 -- a front door; a test keeps it at 20
        self,
        model: nn.Module | Callable[[], nn.Module],
        loss: LossFunction,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        data: Dataset,
        *,
        global_batch: int,
        steps: int,
        run: str,
        eval_data: Dataset | None = None,
        eval_every: int | None = None,
        micro_batch: int | None = None,
        scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        clip: float | None = None,
        mesh: str = "fsdp",
        precision: str = "fp32",
        seed: int = 0,
        every: int | str | Every = 10,
        keep: int | str | Retention | Keep = 3,
        gate: str | Gate = "report",
        capture: str | Capture = "hidden",
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._given = {name: value for name, value in locals().items() if name != "self"}
        if eval_every is not None and eval_data is None:
            raise ConfigError(f"Trainer: eval_every={eval_every} needs eval_data")
        self._model, self._loss, self._optimizer, self._scheduler = model, loss, optimizer, scheduler
        self._data, self._eval_data, self._eval_every = data, eval_data, eval_every
        self._global_batch, self._micro_batch, self._steps, self._clip = (
            global_batch,
            micro_batch,
            steps,
            clip,
        )
        self._session = session(
            run, mesh=mesh, seed=seed, every=every, keep=keep, gate=gate, capture=capture, precision=precision
        )
        self._run = run
        self._callbacks = tuple(callbacks)
        self._has_run = False
        self._saved: dict[str, int] = {}

    @property
    def run(self) -> str:
        """Where checkpoints and events lie."""
        return self._run

    def __reduce__(self) -> tuple[Any, ...]:
        """By its arguments: where it is launched it is made anew, with a session of that place.

        Raises:
            ConfigError: it was run here, which may have changed them: a module's weights are those of its training.
        """
        if self._has_run:
            raise ConfigError("Trainer: it was run in this process already; make a new one to launch it")
        return _made_of, (self._given,)

    def fit(self) -> Report:
        """Trains until the run has made its steps; the report covers all attempts that its events know of."""
        return self.fit_within(self._session)

    def fit_within(self, opened: Session) -> Report:
        """As `fit`, within a session of the caller's making that was not entered yet."""
        self._has_run = True
        step = 0
        try:
            with opened:
                self._tell(Moment.START, 0)
                for number in self._train(opened):
                    step = number
        except BaseException as error:  # told, never swallowed: also where a person or a signal ends it
            self._tell(Moment.FAILED, step, error=error)
            raise
        self._tell(Moment.END, step)
        return opened.report()

    def _train(self, s: Session) -> Any:
        model = s.shard(self._model)
        optimizer = self._optimizer(model.parameters())
        scheduler = None if self._scheduler is None else self._scheduler(optimizer)
        data = s.samples(self._data, global_batch=self._global_batch, micro_batch=self._micro_batch)
        s.track(model=model, optimizer=optimizer)
        if scheduler is not None:
            s.track(scheduler=scheduler)
        if self._eval_data is not None:
            self._declare_evaluation(s, model, data.layout.micro_batch)
        counter = itertools.count()
        for step in s.steps(self._steps, data):
            if next(counter) == 0 and s.restored_step:
                self._tell(Moment.RESTORED, s.restored_step)
            self._tell(Moment.STEP, step.number)
            self._one_step(step, model, optimizer)
            self._tell_saved(s, step.number)
            yield step.number

    def _one_step(self, step: Step, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for batch in step:
            step.backward(self._loss(model, batch, step))
        step.update(optimizer, clip=self._clip)
        self._tell(Moment.UPDATE, step.number, loss=step.loss, grad_norm=step.grad_norm)

    def _declare_evaluation(self, s: Session, model: nn.Module, micro_batch: int) -> None:
        eval_data = self._eval_data
        assert eval_data is not None

        def evaluate() -> float:
            found = s.mean_loss(lambda batch: self._loss(model, batch, None), eval_data, micro_batch=micro_batch)
            self._tell(Moment.EVALUATED, s.num_steps + 1, eval_loss=found)
            return found

        s.evaluate(evaluate, every=self._eval_every)

    def _tell_saved(self, s: Session, step: int) -> None:
        committed = s.committed
        if committed != self._saved:
            self._saved = committed
            self._tell(Moment.SAVED, step, **committed)

    def _tell(self, moment: Moment, step: int, **values: Any) -> None:
        for callback in self._callbacks:
            callback(Notice(moment, self._run, step, MappingProxyType(values)))


def _made_of(given: Mapping[str, Any]) -> Trainer:
    return Trainer(**given)
