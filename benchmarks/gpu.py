"""The cases that need a CUDA device: how fast device tensors get into a slot, and what that takes from a loop."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.bench import FULL, Bench
from benchmarks.cases import stall
from benchmarks.harness import Bytes, Case, Figure, Found, Kind, Measured, Outcome, Proofs, Step, Unit, measure, run
from benchmarks.snapshots import RUN, Snapshotter, Tensors
from ktrain import device
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.pinned import PinnedSlots

# A device copies some five times as fast as a processor: more bytes, so that fixed costs weigh as they do in training.
SIZES = replace(FULL, name="gpu", nbytes=2 << 30, num_tensors=1_000, loop_nbytes=512 << 20, num_saves=5)
_CADENCES = (1, 10, 100)


def main(record: Path | None) -> int:
    """Prints the tables, and keeps them where asked; returns 2 in one line where there is no CUDA device."""
    if device.name() != "cuda":
        print(f"bench-gpu: needs a CUDA device, found {device.name()}; nothing was measured", file=sys.stderr)
        return 2
    about = {"date": report.today(), "facts": report.facts(), "load_before": report.load()}
    about["note"] = f"Device: {torch.cuda.get_device_name()}."
    found: list[Found] = []
    with Bench(SIZES) as bench:
        for case in (CAPTURE, STALL, CADENCE):
            found.append(run(case, bench))
            print(report.section(found[-1]), flush=True)
    about["load_after"] = report.load()
    print(report.describe(about, SIZES))
    if record is not None:
        report.write_record(record, SIZES, found, about)
    return 1 if any(one.outcome is None for one in found) else 0


def _capture(bench: Bench) -> Outcome:
    """Into slots that are registered, as a rank registers them, and into slots that are not."""
    proofs, sizes = Proofs(), bench.sizes
    module = Tensors(sizes.num_tensors, sizes.nbytes // sizes.num_tensors, seed=1).to("cuda")
    with (
        NodeVolume(bench.volume_root, node="node-0", run=RUN) as volume,
        NodeVolume(bench.volume_root, node="node-1", run=RUN) as other,
    ):
        pinned = PinnedSlots()
        snapshots = Snapshotter(module, volume, num_threads=bench.threads)
        pageable = Snapshotter(module, other, num_threads=bench.threads)
        pageable.prepare()
        try:
            figures = _prepare(snapshots, pinned)
            rows = _measure_captures(bench, snapshots, pageable, proofs)
        finally:
            pinned.close()
    return Outcome(proofs, rows, figures)


def _prepare(snapshots: Snapshotter, pinned: PinnedSlots) -> list[Figure]:
    """Makes and registers the slots; what that takes."""
    free_nbytes = torch.cuda.mem_get_info()[0]
    registered: list[tuple[int, float]] = []

    def pin(slot: str, memory: memoryview) -> None:
        begin = time.perf_counter()
        pinned.pin(slot, memory)
        registered.append((memory.nbytes, time.perf_counter() - begin))

    snapshots.prepare(pin)
    nbytes = sum(count for count, _ in registered)
    seconds_per_gib = sum(taken for _, taken in registered) / (nbytes / 2**30)
    return [
        Figure("host memory pinned, all slots of a rank", nbytes, Unit.BYTES),
        Figure("device memory taken by pinning", free_nbytes - torch.cuda.mem_get_info()[0], Unit.BYTES),
        Figure("pinning, per GiB", seconds_per_gib, Unit.SECONDS),
    ]


def _measure_captures(bench: Bench, snapshots: Snapshotter, pageable: Snapshotter, proofs: Proofs) -> list[Measured]:
    nbytes = snapshots.nbytes
    for one in (snapshots, pageable):
        one.capture()
        plan = one.plan()
        with one.volume.open(0, one.identity) as slot:
            for tensor, entry in zip(plan.tensors, plan.layout.entries, strict=True):
                proofs.same("the slot holds every device tensor", slot.memory[entry.begin : entry.end], tensor.cpu())
    whole = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    plain: Bytes = target.numpy()
    _copy(target, whole)
    proofs.same("the pinned copy is one", plain, whole.cpu())
    name = "pinned copy, one DMA"
    steps = [
        Step(name, Kind.BASELINE, nbytes, partial(_copy, target, whole)),
        Step("capture into a pinned slot, sealed", Kind.KTRAIN, nbytes, snapshots.capture, name),
        Step("capture into a slot that is not pinned, sealed", Kind.KTRAIN, nbytes, pageable.capture, name),
    ]
    snapshots.parts.clear()
    rows = measure(steps, bench.sizes.repeats)
    staged = tuple(snapshots.parts.stage_s[1:])
    return [*rows, Measured("- stage and digest, pinned slot", Kind.KTRAIN, nbytes, staged, name)]


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def _stall(bench: Bench) -> Outcome:
    """With overlap (hidden), and without (at_once)."""
    proofs = Proofs()
    rows: list[Measured] = []
    figures: list[Figure] = []
    for capture in ("hidden", "at_once"):
        found = stall.run_on(bench, torch.device("cuda"), proofs, capture=capture)
        rows += [stall.renamed(row, f", {capture}") for row in found.rows]
        figures += [Figure(f"{figure.name}, {capture}", figure.value, figure.unit) for figure in found.figures]
    return Outcome(proofs, rows, figures)


def _cadence(bench: Bench) -> Outcome:
    proofs = Proofs()
    rows: list[Measured] = []
    figures: list[Figure] = []
    for cadence in _CADENCES:
        label = f"every {cadence}"
        found = stall.run_loop(bench, torch.device("cuda"), label, times=0, cadence=cadence, proofs=proofs)
        rows += [stall.renamed(row, f", {label}") for row in found.rows]
        figures += [Figure(f"{figure.name}, {label}", figure.value, figure.unit) for figure in found.figures]
    return Outcome(proofs, rows, figures)


CAPTURE = Case(
    "gpu_capture",
    "How long does a snapshot of device tensors take into a warm slot, and what does pinning take?",
    "bytes / rate of one pinned copy from the device; the digest reads the slot once more",
    _capture,
)
STALL = Case(
    "gpu_stall",
    "What do memory snapshots every 10 steps take from a training loop on a device, with overlap and without?",
    "what forward and backward do not hide of bytes / rate of a pinned copy",
    _stall,
)
CADENCE = Case(
    "gpu_cadence",
    "By how much do memory snapshots every 1, 10 and 100 steps slow a training loop on a device down?",
    "bytes / rate of a pinned copy for each save, where a step is shorter than the copy",
    _cadence,
)
