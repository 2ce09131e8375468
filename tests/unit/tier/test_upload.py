"""Large writes to S3 through a network that refuses, cuts, stalls, loses and spoils."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from ktrain import native
from ktrain.abc.proven import BadBytes, Chunks, ProvesWrites, Terms
from ktrain.base.clock import Deadline
from ktrain.base.pace import Pace
from ktrain.base.retry import RetryBudget
from ktrain.base.settings import Timeouts
from ktrain.errors import CorruptionError, UnavailableError
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_s3 import FaultyS3, S3Fault, S3Trouble
from ktrain.testing.s3_servers import MotoServer, find_program
from ktrain.testing.tier_conformance import soon
from ktrain.tier.bucket import BucketTier
from ktrain.tier.location import open_tier
from ktrain.tier.parts import sample_chunks

_MIB = 1 << 20
_NBYTES = 33 * _MIB + 12_345  # three parts, the last one short and not whole chunks
_NAME = "checkpoints/payload"

pytestmark = pytest.mark.skipif(find_program("moto_server") is None, reason="moto_server is not installed")


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    with MotoServer() as server:
        server.make_bucket("bucket")
        yield server


@pytest.fixture(scope="module")
def data() -> bytes:
    return b"".join(index.to_bytes(2, "big") * (_MIB // 2) for index in range(34))[:_NBYTES]


@pytest.fixture(scope="module")
def chunks(data: bytes) -> Chunks:
    return Chunks(_MIB, native.digest_chunks(data, chunk_nbytes=_MIB))


Start = Callable[..., tuple[BucketTier, FaultyS3]]


@pytest.fixture
def start(moto: MotoServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Makes a tier behind a proxy with faults."""
    made: list[tuple[BucketTier, FaultyS3]] = []

    def make(*faults: S3Fault, checks: bool = False, patience_s: float = 60.0) -> tuple[BucketTier, FaultyS3]:
        proxy = FaultyS3(moto, *faults, checks=checks)
        proxy.__enter__()
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in proxy.environment().items():
            monkeypatch.setenv(name, value)
        tier = open_tier("s3://bucket/run", timeouts=Timeouts(patience_s=patience_s))
        assert isinstance(tier, BucketTier) and isinstance(tier, ProvesWrites)
        made.append((tier, proxy))
        return tier, proxy

    yield make
    for tier, proxy in made:
        tier.close()
        proxy.__exit__(None, None, None)


@pytest.fixture
def stored(moto: MotoServer) -> Iterator[Callable[[], bytes | None]]:
    """What the server itself has; the object is removed at the end."""
    yield lambda: moto.get("bucket", f"run/{_NAME}")
    moto._ask("DELETE", f"/bucket/run/{_NAME}", b"", expected=(204,))


def terms(chunks: Chunks, **more: object) -> Terms:
    return Terms(chunks, Pace(None), **more)  # type: ignore[arg-type]


def write(tier: BucketTier, data: bytes, chunks: Chunks, **more: object) -> None:
    tier.write_proven(_NAME, memoryview(data), terms(chunks, **more), deadline=soon())


def test_upload_in_parts_stores_every_byte_and_tells_how_many(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start()
    sent: list[int] = []
    write(tier, data, chunks, sent=sent.append)
    assert stored() == data
    assert sum(sent) == len(data) and proxy.count("upload_part") == len(sent) == 3


@pytest.mark.parametrize(
    ("operation", "trouble"),
    [
        ("create_multipart_upload", S3Trouble.THROTTLED),
        ("upload_part", S3Trouble.THROTTLED),
        ("upload_part", S3Trouble.UNAVAILABLE),
        ("upload_part", S3Trouble.ERROR),
        ("upload_part", S3Trouble.CUT),
        ("upload_part", S3Trouble.LOST_REPLY),
        ("complete_multipart_upload", S3Trouble.UNAVAILABLE),
        ("complete_multipart_upload", S3Trouble.LOST_REPLY),
    ],
)
def test_upload_request_that_fails_twice_is_sent_again_and_the_object_is_whole(
    start: Start,
    data: bytes,
    chunks: Chunks,
    stored: Callable[[], bytes | None],
    operation: str,
    trouble: S3Trouble,
) -> None:
    tier, proxy = start(S3Fault(operation, trouble, count=2))
    write(tier, data, chunks)
    assert stored() == data
    expected = {"upload_part": 3}.get(operation, 1)
    again = proxy.count(operation) - expected
    # After a completion whose reply was lost the next one is told that there is no such upload: it was this one.
    assert again == 2
    assert proxy.count("abort_multipart_upload") == 0


def test_upload_part_that_stalls_is_given_up_and_sent_again(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start(S3Fault("upload_part", S3Trouble.STALL, nth=2), patience_s=1.0)
    tier._patience_s = 0.2  # of a request, on top of what its bytes need
    write(tier, data, chunks)
    assert stored() == data
    assert proxy.count("upload_part", 200) == 3


def test_upload_to_a_store_that_stays_busy_ends_within_the_budget_and_leaves_nothing(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start(S3Fault("upload_part", S3Trouble.UNAVAILABLE, count=1000))
    with pytest.raises(UnavailableError, match="SlowDown 503"):
        write(tier, data, chunks, retries=RetryBudget(initial=3))
    assert proxy.count("upload_part") <= 3 + 3, "retries of all parts together"
    assert stored() is None
    assert proxy.count("abort_multipart_upload", 204) == 1


def test_upload_of_bytes_that_changed_since_the_snapshot_shows_no_object(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start()
    spoilt = bytearray(data)
    spoilt[20 * _MIB + 5] ^= 1
    with pytest.raises(BadBytes) as caught:
        write(tier, bytes(spoilt), chunks)
    assert (caught.value.begin, caught.value.end) == (20 * _MIB, 21 * _MIB)
    assert stored() is None and proxy.count("complete_multipart_upload") == 0


def test_upload_to_a_store_that_compares_digests_sends_them_and_reads_nothing_back(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start(S3Fault("upload_part", S3Trouble.FLIP_BIT, nth=2), checks=True)
    # The flip happens behind the proxy's own comparison, as on a disk of the store: this one passes.
    write(tier, data, chunks)
    assert tier._checks is True
    assert proxy.count("put_object", 400) == 1, "the probe with a wrong digest"
    assert proxy.count("get_object") == 0


def test_upload_damaged_on_its_way_to_a_store_that_compares_digests_is_refused_and_sent_again(
    start: Start, moto: MotoServer, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    _, checking = start(checks=True)
    behind = _Behind(checking)
    with FaultyS3(behind, S3Fault("upload_part", S3Trouble.FLIP_BIT, nth=3)) as spoiling:  # type: ignore[arg-type]
        os.environ.update(spoiling.environment())  # the fixture's monkeypatch puts it back
        tier = open_tier("s3://bucket/run")
        assert isinstance(tier, BucketTier)
        write(tier, data, chunks)
        tier.close()
    assert checking.count("upload_part", 400) == 1
    assert checking.count("upload_part", 200) == 3
    assert stored() == data


class _Behind:
    """A proxy as the server of another one."""

    def __init__(self, proxy: FaultyS3) -> None:
        self._proxy = proxy
        self.port = proxy._http.server_address[1]

    def environment(self) -> dict[str, str]:
        return self._proxy.environment()


def test_upload_spoilt_by_a_store_that_compares_nothing_is_found_by_reading_samples_back(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start()
    tier._checks = False
    small = data[:_MIB]  # one chunk, which is the first and the last
    proxy.add(S3Fault("put_object", S3Trouble.FLIP_BIT))
    with pytest.raises(CorruptionError, match="as read back") as caught:
        write(tier, small, Chunks(_MIB, chunks.digests[:1]))
    assert not isinstance(caught.value, BadBytes), "the copy in memory is good"
    assert proxy.count("get_object") == 1
    for _ in range(8):
        write(tier, small, Chunks(_MIB, chunks.digests[:1]))
    assert proxy.count("get_object") == 2, "of the first payload, then of each eighth"


def test_upload_probe_of_a_busy_store_is_made_again_and_not_taken_for_a_no(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start(S3Fault("put_object", S3Trouble.UNAVAILABLE, count=2), checks=True)
    write(tier, data[: 2 * _MIB], Chunks(_MIB, chunks.digests[:2]))
    assert tier._checks is True
    assert stored() == data[: 2 * _MIB]


def test_upload_copies_no_more_than_the_budget(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, _ = start()
    tier._buffers._budget_nbytes = 32 * _MIB
    write(tier, data, chunks)
    assert stored() == data
    assert tier._buffers.peak_nbytes <= 32 * _MIB


def test_upload_under_a_rate_limit_takes_its_bytes_from_it(
    start: Start, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, _ = start()
    clock = FakeClock()
    begin = clock.monotonic()
    limited = Terms(chunks, Pace(10 * _MIB, clock))
    tier.write_proven(_NAME, memoryview(data), limited, deadline=Deadline.after(600.0))
    # 33 MiB and the sample that is read back; the last part of it may still be in flight by the limiter's account
    assert 2.5 < clock.monotonic() - begin < 10.0


@pytest.mark.parametrize(
    ("nbytes", "num"), [(0, 0), (1, 1), (_MIB, 1), (2 * _MIB, 2), (100 * _MIB, 2), (300 * _MIB, 4), (10_000 * _MIB, 8)]
)
def test_sample_is_first_and_last_and_some_between(nbytes: int, num: int) -> None:
    chosen = sample_chunks(nbytes, _MIB)
    assert len(set(chosen)) == num
    if num:
        assert chosen[0] == 0 and chosen[-1] == -(-nbytes // _MIB) - 1
