"""What does planning cost one rank of a world of 1,024, and what the first plan of a restore from such a world?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench import Bench
from benchmarks.harness import Case, Figure, Kind, Measured, Outcome, Proofs, Step, Unit, measure
from benchmarks.snapshots import ALONE
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, Entry
from ktrain.format.shard import Box
from ktrain.state.apply import plan_restore
from ktrain.state.plan import SavePlan, plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState

_WORLD = 1024
_PER_NODE = 8
_RANK = 517
_ROWS, _COLUMNS = 2 * _WORLD, 8  # of each parameter, on all ranks together


@dataclass(frozen=True, slots=True)
class _Layout:
    name: str
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]  # none: DDP


_LAYOUTS = (
    _Layout("DDP", (_WORLD,), ()),
    _Layout("FSDP", (_WORLD,), (Shard(0),)),
    _Layout("HSDP, 128 copies", (_WORLD // _PER_NODE, _PER_NODE), (Replicate(), Shard(0))),
    _Layout("HSDP 16 copies, TP 8", (16, 8, 8), (Replicate(), Shard(0), Shard(1))),
)


def _run(bench: Bench) -> Outcome:
    proofs = Proofs()
    num_parameters = bench.sizes.num_small // 4
    rows: list[Measured] = []
    figures: list[Figure] = []
    topology = Topology(_RANK, _WORLD, _RANK % _PER_NODE, _PER_NODE).with_nodes([_PER_NODE] * (_WORLD // _PER_NODE))
    for layout in _LAYOUTS:
        with _rank(_RANK):
            state = _state(layout, num_parameters)
            first = partial(_first, state, topology)
            plan = first()
            proofs.true(f"{layout.name}: every byte has its tensor", _is_whole(plan))
            proofs.true(f"{layout.name}: the plan of an unchanged state is the first one", _is_again(state, topology))
            what = f"{layout.name}, {len(plan.tensors)} tensors"
            steps = [Step(f"first plan, {what}", Kind.KTRAIN, 0, first)]
            rows += measure(steps, bench.sizes.repeats)
            again = Step(f"unchanged plan, {what}", Kind.KTRAIN, 0, partial(plan_save, state, topology))
            rows += measure([again], bench.sizes.repeats)
            with _Collectives() as collectives:
                plan_save(state, topology)
            figures.append(Figure(f"collectives of an unchanged plan, {layout.name}", collectives.num, Unit.COUNT))
    return Outcome(proofs, [*rows, *_restores(bench, proofs)], figures)


class _Collectives(TorchDispatchMode):
    """Counts what goes to other ranks while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += "c10d" in function.namespace
        return function(*args, **(kwargs or {}))


def _restores(bench: Bench, proofs: Proofs) -> list[Measured]:
    """From as many saved ranks, of FSDP, to one: every tensor has a piece of each."""
    num_parameters = max(1, bench.sizes.num_small // 1000)
    manifests = _saved(_LAYOUTS[1], num_parameters)
    texts = [manifest.to_bytes() for manifest in manifests.values()]
    with _rank(0, world_size=1):
        state = _state(replace(_LAYOUTS[1], mesh=(1,)), num_parameters)
        needs = plan_restore(state, manifests, ALONE)
        num_pieces = sum(len(target.pieces) for target in needs.targets.values())
        proofs.true(
            "restore: every rank has a piece of every sharded tensor", num_pieces >= 3 * num_parameters * _WORLD
        )
        steps = [
            Step(f"parse {_WORLD} manifests", Kind.KTRAIN, 0, lambda: list(map(Manifest.from_bytes, texts))),
            Step(
                f"plan a restore from {_WORLD} ranks to one, {num_pieces} pieces",
                Kind.KTRAIN,
                0,
                partial(plan_restore, state, manifests, ALONE),
            ),
        ]
        return measure(steps, bench.sizes.repeats)


def _saved(layout: _Layout, num_parameters: int) -> dict[int, Manifest]:
    """What all ranks of FSDP stored: each the next rows of every parameter."""
    with _rank(0):
        plan = plan_save(_state(layout, num_parameters), Topology(0, _WORLD, 0, _PER_NODE))
    first = Manifest(
        identity=Identity(run="bench", step=1, epoch=1, world_size=_WORLD),
        rank=0,
        plan_digest=plan.digest,
        nbytes=plan.layout.nbytes,
        chunk_nbytes=CHUNK_NBYTES,
        chunks=(0,) * -(-plan.layout.nbytes // CHUNK_NBYTES),
        entries=plan.layout.entries,
        objects=plan.objects,
        origin={"local_world_size": _PER_NODE},
    )
    return {
        rank: replace(first, rank=rank, entries=tuple(_of_rank(entry, rank) for entry in first.entries))
        for rank in range(_WORLD)
    }


def _of_rank(entry: Entry, rank: int) -> Entry:
    box = entry.shard.box
    if box.is_whole(entry.shard.global_shape):
        return entry
    offsets = (rank * box.lengths[0], *box.offsets[1:])
    return entry._replace(shard=entry.shard._replace(box=Box(offsets, box.lengths)))


@contextmanager
def _rank(rank: int, *, world_size: int = _WORLD) -> Iterator[None]:
    """A process group of which this process is one rank, and that talks to nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _state(layout: _Layout, num_parameters: int) -> TrainState:
    mesh = init_device_mesh("cpu", layout.mesh)
    module = torch.nn.Module()
    for index in range(num_parameters):
        module.register_parameter(f"layers_{index}_weight", torch.nn.Parameter(_part(layout, mesh)))
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    for parameter in module.parameters():
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    model = module if layout.placements else DistributedDataParallel(module)
    return TrainState({"model": model, "optimizer": optimizer})


def _part(layout: _Layout, mesh: DeviceMesh) -> torch.Tensor:
    if not layout.placements:
        return torch.zeros(16, _COLUMNS)
    lengths = [_ROWS, _COLUMNS]
    for axis, placement in enumerate(layout.placements):
        if isinstance(placement, Shard):
            lengths[placement.dim] //= layout.mesh[axis]
    shape = torch.Size((_ROWS, _COLUMNS))
    return DTensor.from_local(
        torch.zeros(lengths), mesh, layout.placements, run_check=False, shape=shape, stride=(_COLUMNS, 1)
    )


def _first(state: TrainState, topology: Topology) -> SavePlan:
    state.memo = None
    return plan_save(state, topology)


def _is_again(state: TrainState, topology: Topology) -> bool:
    first, again = _first(state, topology), plan_save(state, topology)
    return again.layout is first.layout and [t.data_ptr() for t in again.tensors] == [
        t.data_ptr() for t in first.tensors
    ]


def _is_whole(plan: SavePlan) -> bool:
    places = zip(plan.layout.entries, plan.tensors, strict=True)
    return bool(plan.tensors) and all(entry.end - entry.begin == tensor.nbytes for entry, tensor in places)


CASE = Case(
    "plan_world",
    f"What does planning cost one rank of {_WORLD:,}, and a restore from so many saved ranks to one?",
    "one look at each tensor; of a restore, one range for each piece",
    _run,
)
