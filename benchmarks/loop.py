"""One training loop in which several ways to save take turns, block by block, on the same model and optimizer.

A block is a save and the steps until the next one is due. What a way takes from the loop is measured from outside: the
calls that it gets after an optimizer step, and the time between two hooks in front of the next one, ktrain's hook or a
peer's wait between them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.bench import Bench
from benchmarks.harness import Kind, Measured, memcpy
from benchmarks.snapshots import ALONE
from ktrain import device as devices
from ktrain.state.plan import plan_save
from ktrain.state.train_state import TrainState

WIDTH = 512
_LEARNING_RATE = 1e-6  # every step changes every tensor, and the loss does not vanish
_BYTES_PER_WEIGHT = 3 * 4  # a parameter and two moments


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Way:
    """One way to save from the loop.

    Attributes:
        commit: called after each optimizer step with the step's number, and whether a save is due.
        wait: called in front of each optimizer step.
        finish: called after a block, not timed: until nothing of the save runs any more.
    """

    name: str
    kind: Kind
    commit: Callable[[int, bool], object]
    wait: Callable[[], object] = _nothing
    finish: Callable[[], object] = _nothing


NO_SAVE = Way("no saves", Kind.BASELINE, lambda step, due: None)


@dataclass(slots=True)
class Block:
    """Seconds of one block, and of what the save took in it."""

    whole_s: float
    in_commit_s: float
    in_wait_s: float

    @property
    def taken_s(self) -> float:
        return self.in_commit_s + self.in_wait_s


@dataclass(slots=True)
class Loop(AbstractContextManager["Loop"]):
    """Linear layers under AdamW, whose parameters and moments have about `nbytes`.

    Make it before a Checkpointer, and call `arm` after the Checkpointer's `restore()`: then ktrain's hook stands
    between the loop's two.
    """

    nbytes: int
    device: torch.device
    batch: int = 4
    step: int = 0
    model: torch.nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    _way: Way = NO_SAVE
    _began: float = 0.0
    _waited_s: float = 0.0
    _handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        layers = max(1, self.nbytes // (_BYTES_PER_WEIGHT * WIDTH * WIDTH))
        linear = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))
        self.model = torch.nn.Sequential(*linear).to(self.device)
        for parameter in self.model.parameters():  # keeps the size of values: denormal ones would cost 30 times as much
            torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), _LEARNING_RATE)
        self._handles.append(register_optimizer_step_pre_hook(self._before))
        self.train()  # gives the optimizer its state

    def arm(self) -> None:
        """Takes the time in front of optimizer steps from now on."""
        self._handles.append(register_optimizer_step_pre_hook(self._after))

    @property
    def snapshot_nbytes(self) -> int:
        """Of a payload that holds model and optimizer."""
        return plan_save(TrainState({"model": self.model, "optimizer": self.optimizer}), ALONE).layout.nbytes

    def state(self) -> dict[str, torch.Tensor]:
        """The live tensors, flat; AdamW changes them in place, so they stay the same objects."""
        found = {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}
        names = {id(value): name for name, value in self.model.named_parameters()}
        for parameter, entry in self.optimizer.state.items():
            found |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in entry.items()}
        return found

    def train(self) -> None:
        """One step: forward, backward, optimizer."""
        batch = torch.randn(self.batch, WIDTH, device=self.device)
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        devices.synchronize(self.device)

    def stretch(self, least_s: float) -> float:
        """Enlarges the batch until a step takes as long; returns what it takes."""
        while True:
            taken = median_s(self.train, 5)
            if taken >= least_s:
                return taken
            self.batch = max(self.batch + 4, int(self.batch * min(4.0, 1.05 * least_s / taken)))

    def block(self, way: Way, num_steps: int) -> Block:
        """A save by the way, and `num_steps` steps after it."""
        self._way, self._waited_s, in_commit_s = way, 0.0, 0.0
        self.step += num_steps - self.step % num_steps  # a multiple of the cadence is due
        begin = time.perf_counter()
        for index in range(num_steps):
            before = time.perf_counter()
            way.commit(self.step + index, index == 0)
            in_commit_s += time.perf_counter() - before
            self.train()
        whole_s = time.perf_counter() - begin
        self.step += num_steps - 1
        way.finish()
        self._way = NO_SAVE
        return Block(whole_s, in_commit_s, self._waited_s)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self._began = time.perf_counter()

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self._way.wait()
        self._waited_s += time.perf_counter() - self._began

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()


def plain_copy(bench: Bench, nbytes: int, device: torch.device) -> Callable[[], object]:
    """The least that a snapshot must do before the next step may change the state."""
    if device.type == "cpu":
        source, target = bench.buffers(nbytes)
        return partial(memcpy, target, source, bench.threads)
    whole = torch.empty(nbytes, dtype=torch.uint8, device=device)
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy() -> None:
        pinned.copy_(whole, non_blocking=True)
        devices.synchronize(device)

    return copy


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Of `repeats` calls after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def take_turns(loop: Loop, ways: Sequence[Way], *, num_steps: int, repeats: int) -> dict[str, list[Block]]:
    """A block of each way per round, every second round backwards; the first round is not counted."""
    blocks: dict[str, list[Block]] = {way.name: [] for way in ways}
    for turn in range(repeats + 1):
        for way in ways if turn % 2 else reversed(ways):
            block = loop.block(way, num_steps)
            if turn:
                blocks[way.name].append(block)
    return blocks


def rows_of(ways: Sequence[Way], blocks: dict[str, list[Block]], beside: str, nbytes: int) -> list[Measured]:
    """What each way took from the loop, the larger of its two parts, and the whole block."""
    rows = []
    for way in ways:
        taken = tuple(block.taken_s for block in blocks[way.name])
        if way.name != NO_SAVE.name:
            name = f"{way.name}: taken from the loop"
            rows.append(Measured(name, way.kind, nbytes, taken, beside if name != beside else None))
            waits = tuple(block.in_wait_s for block in blocks[way.name])
            rows.append(Measured(f"- of it in front of the optimizer step, {way.name}", way.kind, 0, waits))
        whole = tuple(block.whole_s for block in blocks[way.name])
        rows.append(Measured(f"- the whole block, {way.name}", way.kind, 0, whole))
    return rows
