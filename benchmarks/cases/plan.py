"""What does planning a save cost per tensor, when nothing but values changed?"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Measured, Outcome, Proofs, Step, measure
from benchmarks.snapshots import ALONE, Tensors
from ktrain.state.plan import plan_save
from ktrain.state.train_state import TrainState

_TENSOR_NBYTES = 256  # planning never looks at values


def _run(bench: Bench) -> Outcome:
    proofs = Proofs()
    steps = []
    small = bench.sizes.num_small
    for parts, num_tensors, state in (
        ("module", bench.sizes.num_tensors, _module(bench.sizes.num_tensors)),
        ("module", small, _module(small)),
        ("module and AdamW", small, _with_optimizer(small // 4)),
    ):
        name = f"{parts}, {num_tensors} tensors"
        plan = plan_save(state, ALONE)
        planned = [entry.shard.name for entry in plan.layout.entries]
        in_order = planned == [item.shard.name for item in plan.items]
        proofs.true(f"{name}: every tensor is planned, in its place", len(planned) == num_tensors and in_order)
        steps.append(Step(f"plan_save, {name}", Kind.KTRAIN, 0, partial(plan_save, state, ALONE)))
    rows = measure(steps, bench.sizes.repeats)
    by_name = {row.name: row for row in rows}
    per = by_name[f"plan_save, module, {small} tensors"]
    rows.append(Measured("- per tensor of the module", Kind.KTRAIN, 0, tuple(s / small for s in per.seconds)))
    return Outcome(proofs, rows)


def _module(num_tensors: int) -> TrainState:
    return TrainState({"model": Tensors(num_tensors, _TENSOR_NBYTES, seed=2)})


def _with_optimizer(num_parameters: int) -> TrainState:
    """A parameter gives four tensors: itself, two moments and a step count."""
    module = Tensors(num_parameters, _TENSOR_NBYTES, seed=2)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return TrainState({"model": module, "optimizer": optimizer})


CASE = Case(
    "plan",
    "What does planning a save cost per tensor, when nothing but values changed?",
    "one look at each tensor: its state_dict entry, about 1 us each",
    _run,
)
