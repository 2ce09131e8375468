"""Is the first snapshot as fast as the later ones, once the slots are prepared?"""

from __future__ import annotations

from functools import partial

from benchmarks.bench import Bench
from benchmarks.harness import Case, Kind, Outcome, Proofs, Step, measure, memcpy
from benchmarks.snapshots import Snapshotter, large
from ktrain.snapshot.arena import NodeVolume


class _Fresh:
    """A volume that is new for every repetition."""

    def __init__(self, bench: Bench, like: Snapshotter, name: str) -> None:
        self._bench = bench
        self._like = like
        self._name = name
        self.snapshots: Snapshotter | None = None

    def open(self, *, prepare: bool) -> None:
        volume = NodeVolume(self._bench.volume_root, node=self._name, run="first")
        self.snapshots = Snapshotter(self._like.module, volume, num_threads=self._bench.threads)
        self.snapshots.plan()  # the first plan is no question of pages
        if prepare:
            volume.prepare(0, self.snapshots.nbytes, 1)

    def capture(self) -> None:
        assert self.snapshots is not None
        self.snapshots.capture()

    def remove(self) -> None:
        assert self.snapshots is not None
        self.snapshots.volume.remove()
        self.snapshots = None


def _run(bench: Bench) -> Outcome:
    warm = large(bench)
    proofs = Proofs()
    prepared, cold = _Fresh(bench, warm, "prepared"), _Fresh(bench, warm, "cold")
    for fresh, prepare in ((prepared, True), (cold, False)):
        fresh.open(prepare=prepare)
        fresh.capture()
        assert fresh.snapshots is not None
        fresh.snapshots.prove(proofs)
        fresh.remove()
    warm.num_threads = bench.threads
    nbytes = warm.nbytes
    source, target = bench.buffers(nbytes)
    plain = "memcpy"
    open_prepared, open_cold = partial(prepared.open, prepare=True), partial(cold.open, prepare=False)
    steps = [
        Step(plain, Kind.BASELINE, nbytes, lambda: memcpy(target, source, bench.threads)),
        Step("capture, warm slot", Kind.KTRAIN, nbytes, warm.capture, plain),
        Step(
            "first capture, prepared slot", Kind.KTRAIN, nbytes, prepared.capture, plain, open_prepared, prepared.remove
        ),
        Step("first capture, no slot yet", Kind.KTRAIN, nbytes, cold.capture, plain, open_cold, cold.remove),
    ]
    return Outcome(proofs, measure(steps, bench.sizes.repeats))


CASE = Case(
    "first_capture",
    "Is the first snapshot as fast as the later ones, once the slots are prepared?",
    "bytes / memcpy into pages that exist",
    _run,
)
