"""What a restore reads of a payload: whole chunks around all that is wanted, few reads, a bounded over-read."""

from __future__ import annotations

import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.checkpoint.ranges import (
    FREE_OVER_READ_NBYTES,
    MAX_GAP_NBYTES,
    MAX_OVER_READ,
    Share,
    plan_spans,
    split_span,
    table_of,
    wanted_nbytes,
)
from ktrain.format.manifest import Identity, Manifest
from ktrain.native import Runs

MIB = 1 << 20


def manifest_of(nbytes: int, chunk_nbytes: int) -> Manifest:
    num_chunks = -(-nbytes // chunk_nbytes)
    return Manifest(Identity("ab", 1, 1, 1), 0, "0" * 16, nbytes, chunk_nbytes, (0,) * num_chunks, (), {}, {})


def share_of(rows: list[tuple[int, int, int, int]], views: list[tuple[int, int]] = ()) -> Share:  # type: ignore[assignment]
    """From rows of (offset, nbytes, count, source_step)."""
    rows = sorted(rows)
    columns = [[0] * len(rows), *([row[k] for row in rows] for k in (1, 0, 2, 3)), [0] * len(rows)]
    return Share(views, Runs(*(array.array("Q", column) for column in columns)))


@st.composite
def shares(draw: st.DrawFn) -> tuple[Manifest, Share, set[int]]:
    """A payload, a share of it, and every byte that is wanted."""
    manifest = manifest_of(draw(st.integers(1, 3000)), draw(st.integers(1, 200)))
    rows, wanted = [], set()
    for _ in range(draw(st.integers(0, 6))):
        nbytes, count, gap = draw(st.integers(0, 40)), draw(st.integers(0, 5)), draw(st.integers(0, 60))
        room = manifest.nbytes - (count * (nbytes + gap))
        if room < 0:
            continue
        offset = draw(st.integers(0, room))
        rows.append((offset, nbytes, count, nbytes + gap))
        for run in range(count):
            wanted |= set(range(offset + run * (nbytes + gap), offset + run * (nbytes + gap) + nbytes))
    views = []
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, manifest.nbytes))
        views.append((begin, draw(st.integers(begin, manifest.nbytes))))
        wanted |= set(range(*views[-1]))
    return manifest, share_of(rows, views), wanted


@given(case=shares(), closes_gaps=st.booleans())
def test_plan_spans_of_any_share_has_every_byte_in_sorted_disjoint_whole_chunks(
    case: tuple[Manifest, Share, set[int]], closes_gaps: bool
) -> None:
    manifest, share, wanted = case
    spans = plan_spans(manifest, share, closes_gaps=closes_gaps)
    assert wanted <= {at for span in spans for at in range(span.begin, span.end)}
    for span in spans:
        assert span.begin % manifest.chunk_nbytes == 0
        assert span.end % manifest.chunk_nbytes == 0 or span.end == manifest.nbytes
    assert all(a.end < b.begin for a, b in zip(spans, spans[1:], strict=False))


@given(case=shares())
def test_plan_spans_without_closed_gaps_has_no_chunk_in_vain(case: tuple[Manifest, Share, set[int]]) -> None:
    manifest, share, wanted = case
    # The bytes between the rows of a box count: a box is read from its first row to its last.
    table = table_of(share.runs)
    for _, nbytes, offset, count, step, _ in table.T.tolist():
        if nbytes and count:
            wanted |= set(range(offset, offset + (count - 1) * step + nbytes))
    total = sum(span.end - span.begin for span in plan_spans(manifest, share, closes_gaps=False))
    assert total <= len({at // manifest.chunk_nbytes for at in wanted}) * manifest.chunk_nbytes


@given(case=shares(), closes_gaps=st.booleans())
def test_plan_spans_gives_every_row_to_one_span_that_holds_it(
    case: tuple[Manifest, Share, set[int]], closes_gaps: bool
) -> None:
    manifest, share, _ = case
    rows = [row for row in table_of(share.runs).T.tolist() if row[1] and row[3]]
    given_out = []
    for span in plan_spans(manifest, share, closes_gaps=closes_gaps):
        for row in table_of(span.runs).T.tolist():
            _, nbytes, offset, count, step, _ = row
            assert span.begin <= offset and offset + (count - 1) * step + nbytes <= span.end
            given_out.append(row)
    assert given_out == rows


def test_plan_spans_of_many_small_pieces_reads_over_the_gaps_in_one_span() -> None:
    manifest = manifest_of(64 * MIB, 4096)
    rows = [(at, 8000, 1, 0) for at in range(0, 40 * MIB, 8600)]
    assert len(plan_spans(manifest, share_of(rows), closes_gaps=True)) == 1


def test_plan_spans_reads_over_the_smallest_gaps_first_within_the_bound() -> None:
    manifest = manifest_of(400 * MIB, 4096)
    gaps = [1, 3, 2, 3, 1, 3, 2, 5, 1]  # MiB, between pieces of 8 MiB
    rows, at = [], 0
    for gap in [*gaps, 0]:
        rows.append((at, 8 * MIB, 1, 0))
        at += (8 + gap) * MIB
    share = share_of(rows)
    spans = plan_spans(manifest, share, closes_gaps=True)
    over = sum(span.end - span.begin for span in spans) - wanted_nbytes(share)
    assert over == 7 * MIB <= MAX_OVER_READ * wanted_nbytes(share)  # 1 + 1 + 1 + 2 + 2; another 3 is too much
    assert len(spans) == 10 - 5


@pytest.mark.parametrize(("gap", "expected"), [(MAX_GAP_NBYTES, 1), (MAX_GAP_NBYTES + 4096, 2)])
def test_plan_spans_never_reads_over_a_wide_gap(gap: int, expected: int) -> None:
    manifest = manifest_of(400 * MIB, 4096)
    rows = [(0, 100 * MIB, 1, 0), (100 * MIB + gap, 100 * MIB, 1, 0)]
    assert len(plan_spans(manifest, share_of(rows), closes_gaps=True)) == expected


def test_plan_spans_of_little_may_read_over_a_little_more() -> None:
    manifest = manifest_of(8 * MIB, 4096)
    far = FREE_OVER_READ_NBYTES - 2 * 4096
    assert len(plan_spans(manifest, share_of([(0, 10, 1, 0), (far, 10, 1, 0)]), closes_gaps=True)) == 1
    assert len(plan_spans(manifest, share_of([(0, 10, 1, 0), (2 * far, 10, 1, 0)]), closes_gaps=True)) == 2


@given(first=st.integers(0, 50), num_bytes=st.integers(1, 5000), chunk=st.integers(1, 300), limit=st.integers(1, 2000))
def test_split_span_gives_even_reads_of_whole_chunks_that_join(
    first: int, num_bytes: int, chunk: int, limit: int
) -> None:
    manifest = manifest_of(first * chunk + num_bytes, chunk)
    (span,) = plan_spans(manifest, share_of([(first * chunk, num_bytes, 1, 0)]), closes_gaps=True)
    reads = split_span(span, limit, chunk)
    assert reads[0][0] == span.begin and reads[-1][1] == span.end
    assert all(a[1] == b[0] and b[0] % chunk == 0 for a, b in zip(reads, reads[1:], strict=False))
    sizes = [-(-(end - begin) // chunk) for begin, end in reads]
    assert max(sizes) <= max(1, limit // chunk)
    assert max(sizes) - min(sizes) <= 1
