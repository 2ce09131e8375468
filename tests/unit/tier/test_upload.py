"""Large writes to S3 through a network that refuses, cuts, stalls, loses and spoils."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

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
from ktrain.tier.s3 import PART_NBYTES, checksum_text
from ktrain.tier.shapes import Shape

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
    assert tier.s3.checks is True
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
    tier.s3.checks = False
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
    assert tier.s3.checks is True
    assert stored() == data[: 2 * _MIB]


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


# As one request, where the store takes that faster


@pytest.fixture
def one(start: Start, data: bytes, chunks: Chunks) -> tuple[BucketTier, FaultyS3]:
    """A tier that has sent a payload in parts and now tries one request."""
    tier, proxy = start(checks=True)
    write(tier, data, chunks)
    assert proxy.count("upload_part") == 3
    return tier, proxy


def test_upload_as_one_request_is_checked_by_the_store_and_the_faster_way_stays(
    one: tuple[BucketTier, FaultyS3], data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = one
    before, sent = proxy.count("put_object", 200), list[int]()
    write(tier, data, chunks, sent=sent.append)
    assert stored() == data and sent == [len(data)]
    assert proxy.count("put_object", 200) == before + 1 and proxy.count("upload_part") == 3
    tier.s3.shapes.took(Shape.ONE, 1 << 60, 1.0)
    write(tier, data, chunks)
    assert proxy.count("upload_part") == 3, "one request again"


@pytest.mark.parametrize("trouble", [S3Trouble.CUT, S3Trouble.LOST_REPLY, S3Trouble.UNAVAILABLE, S3Trouble.STALL])
def test_upload_as_one_request_that_fails_is_sent_again(
    one: tuple[BucketTier, FaultyS3],
    data: bytes,
    chunks: Chunks,
    stored: Callable[[], bytes | None],
    trouble: S3Trouble,
) -> None:
    tier, proxy = one
    if trouble is S3Trouble.STALL:
        tier.s3.close()  # its next client waits for answers as its options say
        tier._new = _with_read_timeout(tier._new, 1.0)
        tier._idle.clear()
    proxy.add(S3Fault("put_object", trouble))
    write(tier, data, chunks)
    assert stored() == data
    assert proxy.count("upload_part") == 3


def _with_read_timeout(new: Callable[..., Any], read_timeout_s: float) -> Callable[..., Any]:
    def make(loop: Any) -> Any:
        filesystem = new(loop)
        filesystem.config_kwargs["read_timeout"] = read_timeout_s
        return filesystem

    return make


def test_upload_as_one_request_that_a_gateway_refuses_goes_in_parts_from_then_on(
    one: tuple[BucketTier, FaultyS3], data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = one
    proxy.add(S3Fault("put_object", S3Trouble.TOO_LARGE))
    for num in (2, 3):
        write(tier, data, chunks)
        assert stored() == data and proxy.count("upload_part") == 3 * num
    assert proxy.count("put_object", 413) == 1


def test_upload_as_one_request_of_bytes_that_changed_shows_no_object(
    one: tuple[BucketTier, FaultyS3], data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = one
    tier.delete(_NAME, deadline=soon())
    spoilt = bytearray(data)
    spoilt[20 * _MIB + 5] ^= 1
    with pytest.raises(BadBytes) as caught:
        write(tier, bytes(spoilt), chunks)
    assert (caught.value.begin, caught.value.end) == (20 * _MIB, 21 * _MIB)
    assert stored() is None


def test_upload_damaged_on_its_way_as_one_request_is_refused_and_sent_again(
    one: tuple[BucketTier, FaultyS3], data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    _, checking = one
    with FaultyS3(_Behind(checking), S3Fault("put_object", S3Trouble.FLIP_BIT, nth=3)) as spoiling:  # type: ignore[arg-type]
        os.environ.update(spoiling.environment())  # the fixture's monkeypatch puts it back
        tier = open_tier("s3://bucket/run")
        assert isinstance(tier, BucketTier)
        tier.s3.shapes.took(Shape.PARTS, 1, 1.0)
        write(tier, data, chunks)
        tier.close()
    assert stored() == data
    assert checking.count("put_object", 400) == 3, "of the probes of both tiers, and of the payload"
    assert checking.count("upload_part") == 3


def test_upload_taken_over_or_under_a_rate_never_goes_as_one_request(
    one: tuple[BucketTier, FaultyS3], data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = one
    write(tier, data, chunks, is_taken_over=True)
    assert proxy.count("upload_part") == 6
    tier.write_proven(_NAME, memoryview(data), Terms(chunks, Pace(1e9)), deadline=soon())
    assert proxy.count("upload_part") == 9 and stored() == data


# What a process that died left of an upload


Leave = Callable[..., str]


@pytest.fixture
def leave(data: bytes, chunks: Chunks) -> Leave:
    """Begins an upload of the payload through the environment's proxy, sends the named parts and goes away."""
    import boto3  # it comes with moto

    def make(parts: dict[int, bytes], *, key: str = f"run/{_NAME}") -> str:
        client = boto3.client("s3")
        about = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        upload_id = str(client.create_multipart_upload(Bucket="bucket", Key=key, **about)["UploadId"])
        for number, body in parts.items():
            said = {"Bucket": "bucket", "Key": key, "UploadId": upload_id, "PartNumber": number}
            client.upload_part(**said, Body=body, ChecksumCRC64NVME=checksum_text(native.crc64(body)))
        return upload_id

    return make


def part(data: bytes, number: int) -> bytes:
    return data[(number - 1) * PART_NBYTES : number * PART_NBYTES]


def unfinished(moto: MotoServer) -> set[str]:
    """Ids of the uploads that the server has and no listing of objects shows."""
    _, body = moto._ask("GET", "/bucket?uploads", b"", expected=(200,))
    return set(re.findall(r"<UploadId>([^<]+)</UploadId>", body.decode()))


def test_upload_taken_over_sends_only_the_parts_that_the_store_does_not_prove(
    start: Start, moto: MotoServer, leave: Leave, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start(checks=True)
    leave({2: part(data, 2)})
    best = leave({1: part(data, 1), 2: part(data, 1), 3: part(data, 3)})  # the second one is not the snapshot's
    sent_before = proxy.count("upload_part", 200)
    sent: list[int] = []
    write(tier, data, chunks, sent=sent.append, is_taken_over=True)
    assert stored() == data
    assert proxy.count("upload_part", 200) - sent_before == 1
    assert proxy.count("create_multipart_upload") == 2, "both of the dead"
    assert sum(sent) == len(data)
    assert best not in unfinished(moto) and not unfinished(moto), "the other one was ended"


@pytest.mark.parametrize("body", [b"", b"short"])
def test_upload_taken_over_of_which_nothing_is_proven_is_sent_whole(
    start: Start, leave: Leave, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None], body: bytes
) -> None:
    tier, proxy = start(checks=True)
    leave({3: body} if body else {})
    sent_before = proxy.count("upload_part", 200)
    write(tier, data, chunks, is_taken_over=True)
    assert stored() == data
    assert proxy.count("upload_part", 200) - sent_before == 3


def test_upload_of_another_name_and_one_that_is_not_taken_over_leave_others_alone(
    start: Start, moto: MotoServer, leave: Leave, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start(checks=True)
    other = leave({1: part(data, 1)}, key=f"run/{_NAME}-of-another-write")
    own = leave({1: part(data, 1)})
    write(tier, data, chunks)
    assert proxy.count("list_multipart_uploads") == 0
    write(tier, data, chunks, is_taken_over=True)
    assert unfinished(moto) == {other}
    assert own != other and stored() == data
    moto._ask("DELETE", f"/bucket/run/{_NAME}-of-another-write?uploadId={other}", b"", expected=(204,))


def test_upload_taken_over_from_a_store_that_compares_nothing_is_sent_whole(
    start: Start, moto: MotoServer, leave: Leave, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, proxy = start()
    tier.s3.checks = False
    left = leave({1: part(data, 1)})
    write(tier, data, chunks, is_taken_over=True)
    assert stored() == data
    assert proxy.count("list_parts") == proxy.count("list_multipart_uploads") == 0
    moto._ask("DELETE", f"/bucket/run/{_NAME}?uploadId={left}", b"", expected=(204,))


@pytest.mark.parametrize("operation", ["list_multipart_uploads", "list_parts"])
def test_upload_taken_over_whose_listing_fails_is_sent_whole(
    start: Start,
    moto: MotoServer,
    leave: Leave,
    data: bytes,
    chunks: Chunks,
    stored: Callable[[], bytes | None],
    operation: str,
) -> None:
    tier, _ = start(S3Fault(operation, S3Trouble.ERROR), checks=True)
    left = leave({1: part(data, 1)})
    write(tier, data, chunks, is_taken_over=True, retries=RetryBudget(initial=0))
    assert stored() == data
    assert unfinished(moto) == {left}
    moto._ask("DELETE", f"/bucket/run/{_NAME}?uploadId={left}", b"", expected=(204,))


@pytest.mark.parametrize("operation", ["upload_part", "complete_multipart_upload"])
def test_upload_taken_over_that_its_writer_ends_meanwhile_is_sent_anew(
    start: Start,
    moto: MotoServer,
    leave: Leave,
    data: bytes,
    chunks: Chunks,
    stored: Callable[[], bytes | None],
    operation: str,
) -> None:
    tier, proxy = start(checks=True)
    left = leave({1: part(data, 1), 2: part(data, 2)})
    proxy.add(S3Fault(operation, S3Trouble.NO_SUCH_UPLOAD))
    write(tier, data, chunks, is_taken_over=True)
    assert stored() == data
    assert proxy.count("create_multipart_upload") == 2
    assert unfinished(moto) == {left}, "another writer's, for all that is known"
    moto._ask("DELETE", f"/bucket/run/{_NAME}?uploadId={left}", b"", expected=(204,))


def test_upload_taken_over_in_which_its_writer_changes_a_part_meanwhile_is_sent_anew(
    start: Start, moto: MotoServer, leave: Leave, data: bytes, chunks: Chunks, stored: Callable[[], bytes | None]
) -> None:
    tier, _ = start(checks=True)
    left = leave({1: part(data, 1), 2: part(data, 2)})
    about = f"/bucket/run/{_NAME}?uploadId={left}"
    sent: list[int] = []

    def change(nbytes: int) -> None:
        sent.append(nbytes)
        if sum(sent) == len(data):
            moto._ask("PUT", f"{about}&partNumber=1", part(data, 2), expected=(200,))

    write(tier, data, chunks, is_taken_over=True, sent=change)
    assert stored() == data
    assert unfinished(moto) == {left}
    moto._ask("DELETE", about, b"", expected=(204,))
