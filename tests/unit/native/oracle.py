"""CRC-64/NVME in the plainest Python, written from the definition and not from our C++."""

from __future__ import annotations

POLYNOMIAL = 0x9A6C9329AC4BC9B5
ONES = (1 << 64) - 1


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


TABLE = _table()


def crc64(data: bytes, value: int = 0) -> int:
    state = value ^ ONES
    for byte in data:
        state = state >> 8 ^ TABLE[(state ^ byte) & 0xFF]
    return state ^ ONES


def digests(data: bytes, chunk_nbytes: int) -> list[int]:
    return [crc64(data[begin : begin + chunk_nbytes]) for begin in range(0, len(data), chunk_nbytes)]
