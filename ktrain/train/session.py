"""Your loop, our steps: a session yields steps and never touches the mathematics between them.

    with ktrain.session("runs/net-a", mesh="fsdp", seed=17) as s:
        model = s.shard(Net)
        opt = torch.optim.AdamW(model.parameters(), 3e-4)
        data = s.samples(train_set, global_batch=512, micro_batch=8)
        s.track(model=model, opt=opt)
        for step in s.steps(20_000, data):
            for micro in step:
                step.backward(loss(model, micro, step))
            step.update(opt, clip=1.0)

`Step.update` is the commit point: when it returns, data position, generators, model and optimizer all
belong to the same step. All methods are for the thread that trains, and all ranks call them in the same
order.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ktrain.base import settings
from ktrain.checkpoint.gate import Gate, as_gate
from ktrain.checkpoint.log import LogReader
from ktrain.checkpoint.policy import Capture, Every, Keep, as_capture, as_every, as_keep
from ktrain.checkpoint.retention import Retention
from ktrain.data.batch import lay_out_batch
from ktrain.data.order import SampleOrder
from ktrain.data.samples import Dataset, Samples, evaluation_batches
from ktrain.errors import ConfigError, KtrainError
from ktrain.state.train_state import module_of
from ktrain.train import gradients, sharding, world
from ktrain.train.loss import Loss, as_loss, mean_over_ranks
from ktrain.train.report import Report
from ktrain.train.sharding import Mesh, Precision

_LOG = logging.getLogger(__name__)
_RESERVED = ("data", "rng")
_POSITION = "data"
_Choice = TypeVar("_Choice", Mesh, Precision)


class Checkpointing(Protocol):
    """What a session needs of a Checkpointer."""

    def restore(self) -> int: ...

    def step(self, step: int, *, loss: float | None = None, samples: int | None = None) -> None: ...

    def log(self, **values: Any) -> None: ...

    def close(self, *, success: bool = True) -> None: ...

    @property
    def committed(self) -> Mapping[str, int]:
        """Tier -> its newest committed step, as far as this rank has heard."""


class OpenCheckpointer(Protocol):
    """Makes the Checkpointer of a session, once the tracked parts are known."""

    def __call__(
        self, run: str, *, state: Mapping[str, Any], every: Every, keep: Keep, gate: Gate, capture: Capture
    ) -> Checkpointing: ...


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What a session was asked for."""

    run: str
    mesh: Mesh
    precision: Precision
    seed: int
    every: Every = Every()
    keep: Keep = Keep()
    gate: Gate = Gate()
    capture: Capture = Capture.HIDDEN


def session(  # noqa: PLR0913 -- a front door
    run: str | os.PathLike[str] | None = None,
    *,
    mesh: str = "fsdp",
    seed: int = 0,
    every: int | str | Every = 10,
    keep: int | str | Retention | Keep = 3,
    gate: str | Gate = "report",
    capture: str | Capture = "hidden",
    precision: str = "fp32",
) -> Session:
    """A session on a run; the same run again means: continue.

    Args:
        run: path or URL of the run, where checkpoints and events lie; None takes the one of `ktrain launch`.
        mesh: "fsdp" or "ddp" over all ranks, or "none" for one rank.
        seed: of initial values, sample order and generators.
        every: steps between two snapshots, or "auto": as often as measurements say.
        keep: how many checkpoints stay in the bucket, or a policy of `ktrain.checkpoint.retention`.
        gate, capture: as in `Checkpointer`.
        precision: "fp32" or "bf16" in forward and backward; parameters stay float32.

    Raises:
        ConfigError: no run is named, or an argument is not one of these.
    """
    name = settings.worker_settings().run if run is None else os.fspath(run)
    if name is None:
        raise ConfigError("session: no run is named; pass run='runs/NAME', or start the script by `ktrain launch`")
    config = SessionConfig(
        run=name,
        mesh=_one_of(Mesh, "mesh", mesh),
        precision=_one_of(Precision, "precision", precision),
        seed=seed,
        every=as_every(every),
        keep=as_keep(keep),
        gate=as_gate(gate),
        capture=as_capture(capture),
    )
    return Session(config, open_checkpointer=_open_checkpointer)


class Session:
    """A context within which a run is trained; made by `session`."""

    def __init__(self, config: SessionConfig, *, open_checkpointer: OpenCheckpointer) -> None:
        self.config = config
        self.restored_step: int | None = None  # the step continued from; None before the first step
        self.evaluations: dict[str, float] = {}  # the newest results of `evaluate`
        self._open_checkpointer = open_checkpointer
        self._world: world.World | None = None
        self._checkpointer: Checkpointing | None = None
        self._parts: dict[str, Any] = {}
        self._evaluate: tuple[Callable[[], Any], int | None] | None = None
        self._num_models = 0
        self._done = 0  # steps that are committed
        self._target = 0
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        self._world = world.join()
        world.seed_generators(self.config.seed, self._world.topology)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close(success=kind is None)
        if kind is None:  # after an error other ranks may be gone or stuck: the process's end says it to all of them
            world.leave(self._place())

    # What the ranks are

    @property
    def rank(self) -> int:
        return self._place().topology.rank

    @property
    def world_size(self) -> int:
        return self._place().topology.world_size

    @property
    def device(self) -> torch.device:
        """Where this rank's model and batches lie."""
        return self._place().device

    # How far the run is

    @property
    def num_steps(self) -> int:
        """Steps that the run has made and committed."""
        return self._done

    @property
    def committed(self) -> dict[str, int]:
        """Tier -> the newest step that is committed in it, as far as this rank has heard."""
        return {} if self._checkpointer is None else dict(self._checkpointer.committed)

    def report(self) -> Report:
        """What has happened to the run so far, over all its attempts, from its event log."""
        return Report.from_events(LogReader(self.config.run, timeouts=settings.timeouts()).read_new())

    # What is trained

    def shard(self, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
        """The model spread over the ranks by the session's mesh; pass its class (or a function), or a module.

        A factory gives the same initial values on any mesh and world size: every rank builds the whole
        model on the CPU under a seeded generator, then keeps its part. Building on the meta device, for
        models that do not fit into a host, is still to come; a module that was already given to
        `fully_shard` or DDP is taken as it is.
        """
        place = self._place()
        if isinstance(model, nn.Module) and sharding.is_distributed(model):
            return model
        seed = world.derive_seed(self.config.seed, "model", self._num_models)
        self._num_models += 1
        whole = sharding.build(model, seed=seed, world=place)
        return sharding.distribute(whole, mesh=self.config.mesh, precision=self.config.precision, world=place)

    def samples(self, dataset: Dataset, *, global_batch: int, micro_batch: int | None = None) -> Samples:
        """The data set in the run's order, `global_batch` samples per step over all ranks together.

        The order depends on the seed, the data's length and the global batch alone, never on the ranks.
        Without `micro_batch` a rank takes its share in one pass; with it, in as many passes as it needs.

        Raises:
            ConfigError: the batch does not divide; the message names sizes that do.
        """
        place = self._place()
        layout = lay_out_batch(global_batch, world_size=place.topology.world_size, micro_batch=micro_batch)
        order = SampleOrder(self.config.seed, len(dataset), global_batch)
        return Samples(dataset, order=order, layout=layout, rank=place.topology.rank, device=place.device)

    def track(self, **parts: Any) -> None:
        """Adds parts to what is checkpointed: anything with `state_dict` and `load_state_dict`.

        Learning-rate schedulers among them are stepped by `Step.update`. The data position and the
        generators are tracked without being named.
        """
        if self._checkpointer is not None:
            raise ConfigError(
                f"track: {', '.join(parts)} come too late, the run has been restored; track before steps()"
            )
        for name in parts:
            if name in _RESERVED or name in self._parts:
                raise ConfigError(f"track: the name {name!r} is taken; choose another")
        self._parts.update(parts)

    def evaluate(self, fn: Callable[[], Any], *, every: int | None = None) -> None:
        """Has `fn` called every so many steps and after the last one, on all ranks, before the step's commit.

        `fn` returns a Loss, a number, or a dict of these; the results become log values ("eval_loss", or
        the dict's names). It runs without gradients, with the tracked modules in evaluation mode, and draws
        from the generators leave no trace. A step that is done again after a failure is evaluated again.
        """
        if every is not None and every < 1:
            raise ConfigError(f"evaluate: expected every >= 1 steps, found {every}")
        self._evaluate = (fn, every)

    def mean_loss(self, fn: Callable[[Any], Loss | torch.Tensor], dataset: Dataset, *, micro_batch: int) -> float:
        """The mean of `fn(batch)` over a data set, each sample counted once, on any number of ranks."""
        place = self._place().topology
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        batches = evaluation_batches(
            dataset, world_size=place.world_size, rank=place.rank, micro_batch=micro_batch, device=self.device
        )
        with torch.no_grad():
            for batch, counts in batches:
                found = self._counted(fn(batch), batch).totals()
                totals += found if counts else torch.zeros_like(found)
        return mean_over_ranks(totals, "mean_loss")[0]

    # The loop

    def steps(self, total: int, data: Samples) -> Iterator[Step]:
        """The steps that are still to be done until the run has made `total`; restores on first use.

        Raises:
            ConfigError: a tracked module would not share its gradients, or a step was left without `update`.
        """
        if total < 1:
            raise ConfigError(f"steps: expected at least 1 step, found {total}")
        self._target = total
        if self._checkpointer is None:
            self._restore(data)
        elif self._parts[_POSITION] is not data:
            raise ConfigError("steps: the run goes on with other samples than it began with; pass the same ones")
        if self._done > total:
            _LOG.warning("run %s: %d steps were asked for, %d are done already", self.config.run, total, self._done)
        while self._done < total:
            step = Step(self, self._done + 1, data)
            yield step
            if self._done < step.number:
                raise ConfigError(
                    f"step {step.number}: it ended without update(); call step.update(optimizer) once a step"
                )

    def log(self, **values: Any) -> None:
        """Adds values to the run's events."""
        assert self._checkpointer is not None
        self._checkpointer.log(**values)

    def _notify_once(self, message: str) -> None:
        """Says something to the user, once per session and only from rank 0."""
        if self.rank == 0 and message not in self._told:
            self._told.add(message)
            _LOG.warning("%s", message)

    def _restore(self, data: Samples) -> None:
        for name, part in self._parts.items():
            module = module_of(part)
            unshared = self.world_size > 1 and module is not None and not sharding.is_distributed(module)
            if unshared and module is not None and any(value.requires_grad for value in module.parameters()):
                raise ConfigError(
                    f"part {name!r}: each of {self.world_size} ranks has the module for itself, gradients "
                    "would not be shared; make it with session.shard(...), or wrap it with fully_shard or DDP"
                )
        self._parts[_POSITION] = data
        config = self.config
        self._checkpointer = self._open_checkpointer(
            config.run,
            state=self._parts,
            every=config.every,
            keep=config.keep,
            gate=config.gate,
            capture=config.capture,
        )
        self._done = self.restored_step = self._checkpointer.restore()
        if data.position != self._done:
            raise ConfigError(
                f"run {config.run}: the checkpoint of step {self._done} has data position {data.position}; "
                "it was not made by a session with one update per step, start another run"
            )

    def _commit(self, step: Step, loss: float) -> None:
        """Makes a finished step count: evaluation, position, checkpoint."""
        assert self._checkpointer is not None
        if self._evaluate is not None:
            fn, every = self._evaluate
            if step.number == self._target or (every is not None and step.number % every == 0):
                self._run_evaluation(fn)
        data = self._parts[_POSITION]
        data.position = step.number
        self._checkpointer.step(step.number, loss=loss, samples=data.layout.global_batch)
        self._done = step.number

    def _run_evaluation(self, fn: Callable[[], Any]) -> None:
        modules = [module for module in self._modules() if module.training]
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type), torch.no_grad():
            for module in modules:
                module.eval()
            try:
                found = fn()
            finally:
                for module in modules:
                    module.train()
        values = found if isinstance(found, dict) else {"eval_loss": found}
        self.evaluations = {
            name: mean_over_ranks(value.totals(), name)[0] if isinstance(value, Loss) else float(value)
            for name, value in values.items()
        }
        self.log(**self.evaluations)

    def _counted(self, found: Loss | torch.Tensor, batch: Any) -> Loss:
        if isinstance(found, Loss):
            return found
        self._notify_once(
            "the loss is a bare tensor: it counts as the mean over the leading dimension of a micro-batch, "
            "return ktrain.Loss(sum, count) to weigh it otherwise"
        )
        return as_loss(found, batch)

    def _modules(self) -> list[nn.Module]:
        return [module for module in map(module_of, self._parts.values()) if module is not None]

    def _schedulers(self) -> list[LRScheduler]:
        return [part for part in self._parts.values() if isinstance(part, LRScheduler)]

    def _place(self) -> world.World:
        if self._world is None:
            raise ConfigError("session: use it within `with ktrain.session(...) as s:`")
        return self._world


class Step:
    """One optimizer step: iterate its micro-batches, call `backward` for each, then `update` once."""

    def __init__(self, session: Session, number: int, data: Samples) -> None:
        self.number = number  # counted from 1: after update() the run has made this many steps
        self.loss: float | None = None  # mean over the global batch; None before update()
        self.grad_norm: float | None = None  # before the clip; None before update()
        self.num_micro_batches = data.layout.accumulation
        self._session = session
        self._data = data
        self._micro_batch: Any = None
        self._num_backward = 0
        self._totals = torch.zeros(2, dtype=torch.float64, device=session.device)

    def __iter__(self) -> Iterator[Any]:
        """This rank's micro-batches; gradients cross the ranks only in the backward pass of the last."""
        modules = self._session._modules()
        for index, micro_batch in enumerate(self._data.micro_batches(), start=1):
            self._micro_batch = micro_batch
            with sharding.gradient_sync(modules, enabled=index == self.num_micro_batches):
                yield micro_batch

    def backward(self, loss: Loss | torch.Tensor) -> None:
        """Adds the gradients of one micro-batch's loss.

        A bare tensor is taken as a mean over the leading dimension of the micro-batch.
        """
        loss = self._session._counted(loss, self._micro_batch)
        self._totals += loss.totals()
        loss.sum.backward()  # type: ignore[no-untyped-call]
        self._num_backward += 1

    def update(self, *optimizers: torch.optim.Optimizer, clip: float | None = None) -> None:
        """Divides the gradients by the global count, clips them, steps optimizers and schedulers, and
        commits.

        The loss and the norm of the gradients are the same numbers on every rank and are read from the
        device here. Where one is not finite, every rank raises before anything is changed; going back by
        itself is still to come.

        Raises:
            KtrainError: the loss or the norm of the gradients is not finite.
            ConfigError: `update` or `backward` was not called once where it has to be.
        """
        self._check_ready(optimizers)
        loss, count = mean_over_ranks(self._totals, f"step {self.number}")
        parameters = gradients.parameters_of(optimizers)
        # FSDP2 and DDP have divided the sum by the number of ranks; division by the count is wanted.
        gradients.scale(parameters, self._session.world_size / count)
        grad_norm = gradients.norm(parameters)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise KtrainError(
                f"step {self.number}: expected finite numbers, found loss {loss:g} and gradient norm "
                f"{grad_norm:g}; nothing was updated: look at the samples of this step, lower the learning "
                "rate, or clip the gradients"
            )
        if clip is not None:
            gradients.clip(parameters, clip, grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for scheduler in self._session._schedulers():
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()
        self.loss, self.grad_norm = loss, grad_norm
        self._session._commit(self, loss)

    def log(self, **values: Any) -> None:
        """Adds values to the run's events."""
        self._session.log(**values)

    def _check_ready(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        if self.loss is not None:
            raise ConfigError(f"step {self.number}: update() was called twice; pass all optimizers in one call")
        if not optimizers:
            raise ConfigError(f"step {self.number}: update() needs the optimizer; call step.update(optimizer)")
        if self._num_backward != self.num_micro_batches:
            raise ConfigError(
                f"step {self.number}: expected {self.num_micro_batches} calls of backward(), one a micro-"
                f"batch, found {self._num_backward}; iterate the step to its end and call backward() for each"
            )


def _open_checkpointer(
    run: str, *, state: Mapping[str, Any], every: Every, keep: Keep, gate: Gate, capture: Capture
) -> Checkpointing:
    from ktrain.checkpoint.checkpointer import Checkpointer

    return Checkpointer(run, state=state, every=every, keep=keep, gate=gate, capture=capture)


def _one_of(kind: type[_Choice], name: str, value: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(repr(str(member)) for member in kind)
        raise ConfigError(f"session: expected {name} to be one of {known}, found {value!r}") from None
