"""Whether a restore reads each byte of the bucket once and passes it on between the nodes (ADR 0020). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from ktrain.base import contract
from ktrain.base.events import Event
from ktrain.base.settings import Spread

WORTH = 0.8
"""Once is chosen below this part of what reading everywhere takes: estimates are rough, and more of it can fail."""
_ENOUGH = 64  # samples of a rate

Wants = Mapping[str, Sequence[Mapping[int, int]]]
"""Node -> for each of its ranks: saved rank -> bytes that it wants of it."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one node was measured to do while all of them did; None where nothing was measured."""

    bucket_bytes_per_s: float | None = None
    wire_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which node fills a slot with which saved rank's payload; none where every rank reads for itself."""

    reason: str
    fills: Mapping[int, str] = field(default_factory=dict)
    once_s: float | None = None  # estimated; None where it is not known


def measured(blocks: Iterable[Sequence[Event]]) -> Rates:
    """The rates in a run's events, the newest blocks first; read only as far as needed.

    A replica that was made from the peer's own memory moved little: its rate is the wire's or, with the time that it
    takes to ask, less. So the best of these tells where no replica crossed the wire whole.
    """
    drains: dict[tuple[str, int], tuple[int, float]] = {}  # (node, step) -> bytes, seconds of the slowest rank
    wires: list[float] = []
    least: list[float] = []  # rates that the wire has at least
    for block in blocks:
        for event in reversed(block):
            fields = event.fields
            if event.kind == "drained" and fields["tier"] == contract.TIER_BUCKET and "node" in fields:
                nbytes, seconds = drains.get((fields["node"], fields["step"]), (0, 0.0))
                drains[fields["node"], fields["step"]] = (nbytes + fields["nbytes"], max(seconds, fields["seconds"]))
            elif event.kind == "replicated" and fields["nbytes"] > 0:
                is_least = bool(fields.get("own_bytes"))
                seconds = fields["wire_seconds" if is_least else "seconds"]
                if seconds > 0:
                    (least if is_least else wires).append(fields["nbytes"] / seconds)
        if len(drains) >= _ENOUGH and len(wires) + len(least) >= _ENOUGH:
            break
    buckets = [nbytes / seconds for nbytes, seconds in drains.values() if seconds > 0]
    wire = median(wires) if wires else max(least, default=None)
    return Rates(median(buckets) if buckets else None, wire)


def choose(wants: Wants, sizes: Mapping[int, int], rates: Rates, mode: Spread) -> Choice:
    """Weighs one restore.

    Args:
        wants: what the ranks will read.
        sizes: bytes of the payloads whose nearest copy is in the bucket, by saved rank.
        rates: of one node.
        mode: whether there is a choice.
    """
    readers: dict[int, dict[str, int]] = {}  # saved rank -> node -> bytes that its ranks want, each for itself
    num_readers: dict[int, int] = {}
    for node, ranks in wants.items():
        for rank in ranks:
            for saved, nbytes in rank.items():
                if saved in sizes and nbytes > 0:
                    readers.setdefault(saved, {}).setdefault(node, 0)
                    readers[saved][node] += nbytes
                    num_readers[saved] = num_readers.get(saved, 0) + 1
    shared = {saved: nodes for saved, nodes in readers.items() if num_readers[saved] > 1}
    if mode is Spread.NEVER:
        return Choice("every rank reads for itself: it is set so")
    if not shared:
        return Choice("every rank reads for itself: no two of them want the same payload")
    alone = {node: sum(nodes.get(node, 0) for saved, nodes in readers.items() if saved not in shared) for node in wants}
    fills, loads = _assign(shared, sizes, alone)
    return _weigh(_Plan(shared, fills, loads, alone), sizes, rates, is_forced=mode is Spread.ALWAYS)


@dataclass(frozen=True, slots=True)
class _Plan:
    shared: Mapping[int, Mapping[str, int]]
    fills: Mapping[int, str]
    loads: Mapping[str, int]  # node -> bytes that it reads from the bucket
    alone: Mapping[str, int]  # those of them that only one rank wants

    def everywhere_nbytes(self) -> int:
        """That the busiest node reads when every rank reads for itself."""
        return max(
            nbytes + sum(nodes.get(node, 0) for nodes in self.shared.values()) for node, nbytes in self.alone.items()
        )

    def wire_nbytes(self, sizes: Mapping[int, int]) -> int:
        """That the busiest node takes from others; a payload of which all is wanted crosses once."""
        return max(
            sum(
                min(sizes[saved], nodes.get(node, 0))
                for saved, nodes in self.shared.items()
                if self.fills[saved] != node
            )
            for node in self.alone
        )


def _assign(
    shared: Mapping[int, Mapping[str, int]], sizes: Mapping[int, int], alone: Mapping[str, int]
) -> tuple[dict[int, str], dict[str, int]]:
    """Each payload to the node that wants it and has the least to read so far, the largest first."""
    loads, fills = dict(alone), {}
    for saved in sorted(shared, key=lambda saved: (-sizes[saved], saved)):
        node = min(shared[saved], key=lambda node: (loads[node], node))
        fills[saved] = node
        loads[node] += sizes[saved]
    return fills, loads


def _weigh(plan: _Plan, sizes: Mapping[int, int], rates: Rates, *, is_forced: bool) -> Choice:
    everywhere, load, crossing = plan.everywhere_nbytes(), max(plan.loads.values()), plan.wire_nbytes(sizes)
    bucket, wire = rates.bucket_bytes_per_s, rates.wire_bytes_per_s
    missing = None if bucket else "drain"
    if crossing and not wire:
        missing = missing or "replication"
    if missing is not None or bucket is None:
        if is_forced:
            return Choice(
                f"each byte is read from the bucket once: it is set so (no {missing} was measured)", plan.fills
            )
        return Choice(f"every rank reads for itself: no {missing} was measured")
    once_s = load / bucket + (crossing / wire if crossing and wire else 0.0)
    everywhere_s = everywhere / bucket
    told = (
        f"estimated {once_s:.3g} s, against {everywhere_s:.3g} s when every rank reads for itself; of the busiest "
        f"node: {load} bytes from the bucket and {crossing} from other nodes, against {everywhere} from the bucket; "
        f"measured for a node: {_rate(bucket)} from the bucket, {_rate(wire)} from another node"
    )
    if is_forced:
        return Choice(f"each byte is read from the bucket once: it is set so; {told}", plan.fills, once_s)
    if once_s < WORTH * everywhere_s:
        return Choice(f"each byte is read from the bucket once: {told}", plan.fills, once_s)
    return Choice(f"every rank reads for itself: once for all is {told}", {}, once_s)


def _rate(bytes_per_s: float | None) -> str:
    return "nothing" if bytes_per_s is None else f"{bytes_per_s / 1e6:.0f} MB/s"
