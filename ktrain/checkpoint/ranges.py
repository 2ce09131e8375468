"""Which bytes of a saved payload a restore reads: whole chunks around what is wanted, in few calls. Pure.

Invariant: what is read is whole chunks, because only a whole chunk can be proven (ADR 0011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import numpy.typing as npt

from ktrain.format.manifest import Manifest
from ktrain.native import NO_RUNS, Runs

Ranges = Sequence[tuple[int, int]]
Table = npt.NDArray[Any]

MAX_OVER_READ = 0.1
"""Of what is wanted of a payload, as much may be read in vain: whole chunks first, then gaps between them."""
FREE_OVER_READ_NBYTES = 1 << 20
"""A payload of which little is wanted may be over-read by this much: another request to a bucket costs more."""
MAX_GAP_NBYTES = 4 << 20
"""A wider gap is never read over: what lies in it takes longer than a request."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one restoring rank wants of one saved rank: ranges to view later, and runs that land in memory now."""

    views: Ranges = ()
    runs: Runs = NO_RUNS

    @property
    def is_empty(self) -> bool:
        return not any(end > begin for begin, end in self.views) and not len(memoryview(self.runs.offset))


@dataclass(frozen=True, slots=True)
class Span:
    """A range of whole chunks, and the runs that begin in it. No run leaves its span."""

    begin: int
    end: int
    runs: Runs


def wanted_nbytes(share: Share) -> int:
    """Bytes that the share wants, each as often as it is wanted."""
    table = table_of(share.runs)
    return int((table[1] * table[3]).sum()) + sum(end - begin for begin, end in share.views)


def plan_spans(manifest: Manifest, share: Share, *, closes_gaps: bool) -> list[Span]:
    """What must be read of a payload to prove all that is wanted, sorted and merged.

    Args:
        closes_gaps: whether a little more is read where that makes fewer spans. Memory needs none of it.
    """
    table = table_of(share.runs)
    table = table[:, (table[1] > 0) & (table[3] > 0)]
    views = numpy.array([view for view in share.views if view[1] > view[0]], dtype=numpy.int64).reshape(-1, 2)
    last = table[2] + (table[3] - 1) * table[4] + table[1]
    begin, end = _covers(
        numpy.concatenate((table[2], views[:, 0])), numpy.concatenate((last, views[:, 1])), manifest.chunk_nbytes
    )
    end = numpy.minimum(end, manifest.nbytes)
    if closes_gaps and len(begin) > 1:
        keep = ~_closed_gaps(begin, end, wanted_nbytes(share))
        begin = begin[numpy.concatenate(([True], keep))]
        end = end[numpy.concatenate((keep, [True]))]
    first = numpy.searchsorted(table[2], begin)
    after = numpy.searchsorted(table[2], end)
    rows = zip(begin.tolist(), end.tolist(), first.tolist(), after.tolist(), strict=True)
    return [Span(low, high, runs_of(table[:, a:b])) for low, high, a, b in rows]


def split_span(span: Span, nbytes: int, chunk_nbytes: int) -> list[tuple[int, int]]:
    """The span in reads of at most `nbytes`, each whole chunks and all about as large."""
    num_chunks = -(-(span.end - span.begin) // chunk_nbytes)
    num_reads = -(-num_chunks // max(1, nbytes // chunk_nbytes))
    bounds = [span.begin + at * num_chunks // num_reads * chunk_nbytes for at in range(num_reads)]
    return list(zip(bounds, [*bounds[1:], span.end], strict=True))


def batches(spans: Sequence[Span], nbytes: int, chunk_nbytes: int) -> list[list[Span]]:
    """The spans in groups of at most `nbytes` (or one chunk) together; a larger span in pieces with the same runs."""
    found: list[list[Span]] = []
    room = 0
    for span in spans:
        for begin, end in split_span(span, nbytes, chunk_nbytes):
            if end - begin > room or not found:
                found.append([])
                room = nbytes
            found[-1].append(Span(begin, end, span.runs))
            room -= end - begin
    return found


def table_of(runs: Runs) -> Table:
    """The columns as one array of 64-bit integers, a row of it for each."""
    columns = (runs.address, runs.nbytes, runs.offset, runs.count, runs.source_step, runs.target_step)
    return numpy.array([numpy.asarray(column).astype(numpy.int64) for column in columns])


def runs_of(table: Table) -> Runs:
    """The opposite of `table_of`; rows are sorted by offset already."""
    return Runs(*(numpy.ascontiguousarray(column).data for column in table))


def _covers(begin: Table, end: Table, chunk_nbytes: int) -> tuple[Table, Table]:
    """Ranges widened to whole chunks, sorted, and merged where they touch."""
    order = numpy.argsort(begin, kind="stable")
    begin = begin[order] // chunk_nbytes * chunk_nbytes
    reach = numpy.maximum.accumulate(-(-end[order] // chunk_nbytes) * chunk_nbytes)
    starts = numpy.concatenate(([True], begin[1:] > reach[:-1]))[: len(begin)]
    ends = numpy.concatenate((starts[1:], [True]))[: len(begin)]
    return begin[starts], reach[ends]


def _closed_gaps(begin: Table, end: Table, wanted: int) -> npt.NDArray[numpy.bool_]:
    """Which gaps between ranges are read over: the smallest first, until the over-read is spent."""
    gaps = begin[1:] - end[:-1]
    chunks = int((end - begin).sum()) - wanted  # read in vain already
    allowed = max(FREE_OVER_READ_NBYTES, int(MAX_OVER_READ * wanted)) - chunks
    order = numpy.argsort(gaps, kind="stable")
    fits = (numpy.cumsum(gaps[order]) <= allowed) & (gaps[order] <= MAX_GAP_NBYTES)
    closed = numpy.zeros(len(gaps), dtype=bool)
    closed[order] = fits
    return closed
