from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain import native
from ktrain.errors import ConfigError
from tests.unit.native import oracle

UINT64 = st.integers(min_value=0, max_value=oracle.ONES)


def test_crc64_of_check_string_is_the_published_value() -> None:
    assert native.crc64(b"123456789") == 0xAE8B14860A799888


def test_crc64_of_nothing_is_the_value_it_continues() -> None:
    assert (native.crc64(b""), native.crc64(b"", 77)) == (0, 77)


@pytest.mark.parametrize("variant", native.variants())
@given(data=st.binary(max_size=3000), value=UINT64)
def test_crc64_of_any_bytes_equals_the_oracle(variant: str, data: bytes, value: int) -> None:
    assert native.crc64_with(variant, data, value) == oracle.crc64(data, value)


@pytest.mark.parametrize("variant", native.variants())
def test_crc64_at_every_length_and_alignment_equals_the_oracle(variant: str) -> None:
    # Lengths around every border of the folding loops: 16, 64, 128, 256, 512, 1024.
    data = memoryview(random.randbytes(1700))
    for nbytes in (
        *range(0, 66),
        *range(126, 130),
        *range(254, 274),
        *range(510, 516),
        *range(1022, 1106),
        1600,
    ):
        for shift in (0, 1, 7, 16, 33):
            piece = data[shift : shift + nbytes]
            assert native.crc64_with(variant, piece) == oracle.crc64(bytes(piece)), (nbytes, shift)


def test_variants_begin_with_portable_and_end_with_the_one_in_use() -> None:
    assert native.variants()[0] == "portable"
    assert native.variants()[-1] == native.isa()


@given(first=st.binary(max_size=500), second=st.binary(max_size=500))
def test_crc64_combine_of_parts_equals_the_whole(first: bytes, second: bytes) -> None:
    combined = native.crc64_combine(native.crc64(first), native.crc64(second), len(second))
    assert combined == oracle.crc64(first + second)


def test_crc64_combine_of_many_gibibytes_equals_combining_twice() -> None:
    # x^(8n) has order 2^64 - 1 at most, so lengths must add up; nobody can hold the bytes themselves.
    half, whole = 3 << 40, 6 << 40
    zeros = native.crc64_combine(0x1234, 0, half)
    assert native.crc64_combine(zeros, 0, half) == native.crc64_combine(0x1234, 0, whole)


@given(data=st.binary(max_size=2000), chunk_nbytes=st.integers(1, 700), num_threads=st.integers(1, 4))
def test_digest_chunks_of_any_bytes_equals_the_oracle(data: bytes, chunk_nbytes: int, num_threads: int) -> None:
    digests = native.digest_chunks(data, chunk_nbytes=chunk_nbytes, num_threads=num_threads)
    assert digests == oracle.digests(data, chunk_nbytes)


def test_digest_chunks_joined_equal_the_whole() -> None:
    data = random.randbytes(100_000)
    whole = 0
    for index, digest in enumerate(native.digest_chunks(data, chunk_nbytes=30_000, num_threads=2)):
        whole = native.crc64_combine(whole, digest, min(30_000, len(data) - index * 30_000))
    assert whole == native.crc64(data)


def test_digest_chunks_of_nothing_is_empty() -> None:
    assert native.digest_chunks(b"", chunk_nbytes=10, num_threads=3) == []


def test_crc64_with_one_bit_flipped_differs() -> None:
    data = bytearray(random.randbytes(5000))
    before = native.crc64(data)
    data[random.randrange(5000)] ^= 1 << random.randrange(8)
    assert native.crc64(data) != before


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: native.crc64(memoryview(b"abcdef")[::2]),
        lambda: native.crc64("text"),  # type: ignore[arg-type]
        lambda: native.crc64(b"", -1),
        lambda: native.crc64(b"", 1 << 64),
        lambda: native.crc64_with("no-such-variant", b""),
        lambda: native.crc64_combine(0, 0, -1),
        lambda: native.digest_chunks(b"abc", chunk_nbytes=0),
        lambda: native.digest_chunks(b"abc", chunk_nbytes=1, num_threads=0),
    ],
)
def test_digest_with_misuse_raises_config_error(misuse: object) -> None:
    with pytest.raises(ConfigError):
        misuse()  # type: ignore[operator]
