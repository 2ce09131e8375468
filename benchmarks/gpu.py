"""The cases that need a CUDA device: how fast device tensors get into a slot, and how long a loop stands for it."""

from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks import report
from benchmarks.bench import FULL, Bench
from benchmarks.cases import stall
from benchmarks.harness import Bytes, Case, Kind, Outcome, Proofs, Step, measure
from benchmarks.snapshots import ALONE, RUN, Snapshotter, Tensors
from ktrain import device
from ktrain.snapshot.arena import NodeVolume
from ktrain.state.plan import plan_save


def main() -> int:
    """Prints the tables; returns 2 in one line where there is no CUDA device."""
    if device.name() != "cuda":
        print(f"bench-gpu: needs a CUDA device, found {device.name()}; nothing was measured", file=sys.stderr)
        return 2
    about = {"date": report.today(), "facts": report.facts(), "load_before": report.load()}
    with Bench(FULL) as bench:
        for case in (CAPTURE, STALL):
            print(report.section(case, case.run(bench)), flush=True)
    print(report.describe({**about, "load_after": report.load()}, FULL))
    print(f"Device: {torch.cuda.get_device_name()}.")
    return 0


def _capture(bench: Bench) -> Outcome:
    proofs = Proofs()
    sizes = bench.sizes
    module = Tensors(sizes.num_tensors, sizes.nbytes // sizes.num_tensors, seed=1).to("cuda")
    with NodeVolume(bench.volume_root, node="node-0", run=RUN) as volume:
        snapshots = Snapshotter(module, volume, num_threads=bench.threads)
        snapshots.prepare()
        snapshots.capture()
        with volume.open(0, snapshots.identity) as slot:
            for item, entry in zip(snapshots.plan().items, snapshots.plan().layout.entries, strict=True):
                proofs.same(
                    "the slot holds every device tensor", slot.memory[entry.begin : entry.end], item.tensor.cpu()
                )
        nbytes = plan_save(snapshots.state, ALONE).layout.nbytes
        whole = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        plain: Bytes = pinned.numpy()
        _copy(pinned, whole)
        proofs.same("the pinned copy is one", plain, whole.cpu())
        name = "pinned copy, one DMA"
        steps = [
            Step(name, Kind.BASELINE, nbytes, partial(_copy, pinned, whole)),
            Step("capture of device tensors", Kind.KTRAIN, nbytes, snapshots.capture, name),
        ]
        return Outcome(proofs, measure(steps, sizes.repeats))


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def _stall(bench: Bench) -> Outcome:
    return stall.run_on(bench, torch.device("cuda"))


CAPTURE = Case(
    "gpu_capture",
    "How long does a snapshot of device tensors take into a warm slot?",
    "bytes / rate of one pinned copy from the device; the digest reads the slot once more",
    _capture,
)
STALL = Case(
    "gpu_stall",
    "How long does a training loop on a device stand in Checkpointer.step(), every=10?",
    "today all bytes are copied before step() returns: bytes / rate of a pinned copy",
    _stall,
)
