"""Bodies of large requests: every piece proven where it is sent from, and no hold on the caller's memory after."""

from __future__ import annotations

from functools import partial

import pytest

from ktrain import native
from ktrain.abc.proven import BadBytes, Chunks
from ktrain.errors import DeadlineError
from ktrain.tier.body import ProvenBody
from ktrain.tier.parts import copy_proven

_UNIT = 300 << 10
_DATA = b"".join(index.to_bytes(4, "big") for index in range((3 << 20) // 4)) + b"tail"
_CHUNKS = Chunks(_UNIT, native.digest_chunks(_DATA, chunk_nbytes=_UNIT))


def body_of(data: bytearray, begin: int, *, check: object = lambda: None) -> ProvenBody:
    copy = partial(copy_proven, chunks=_CHUNKS, of=(len(data), "write x"))
    return ProvenBody(memoryview(data), (begin, len(data)), copy=copy, unit_nbytes=_UNIT, check=check)  # type: ignore[arg-type]


@pytest.mark.parametrize("begin", [0, 2 * _UNIT])
def test_body_sent_in_pieces_is_the_range_as_often_as_it_is_sent(begin: int) -> None:
    body = body_of(bytearray(_DATA), begin)
    for _ in range(2):
        pieces = [bytes(piece) for piece in body.pieces()]
        assert b"".join(pieces) == _DATA[begin:] and len(pieces) > 1
        body.rewind()


def test_body_read_as_a_file_is_what_a_signature_covers() -> None:
    body = body_of(bytearray(_DATA), _UNIT)
    assert len(body) == len(_DATA) - _UNIT
    assert body.read(10) + body.read(20) + body.read() == _DATA[_UNIT:]
    assert body.tell() == len(body) and body.seek(-4, 2) == len(body) - 4 and body.read() == b"tail"


def test_body_with_a_byte_that_changed_ends_before_its_piece_and_says_which() -> None:
    data = bytearray(_DATA)
    body = body_of(data, 0)
    data[-1] ^= 1
    sent = bytearray()
    with pytest.raises(ConnectionAbortedError):
        for piece in body.pieces():
            sent += piece
    failure = body.take_failure()
    assert isinstance(failure, BadBytes) and failure.end == len(_DATA)
    assert failure.__traceback__ is None, "its frames know the caller's memory"
    assert len(sent) < len(_DATA) and _DATA.startswith(bytes(sent))
    assert body.take_failure() is None


def test_body_that_nobody_waits_for_ends_without_the_piece_just_read() -> None:
    left = [True, True, True, False]  # before and after the first piece, before the second

    def check() -> None:
        if not left.pop(0):
            raise DeadlineError("given up")

    body = body_of(bytearray(_DATA), 0, check=check)
    pieces = iter(body.pieces())
    next(pieces)
    with pytest.raises(ConnectionAbortedError):
        next(pieces)
    assert isinstance(body.take_failure(), DeadlineError)


def test_body_closed_lets_go_of_the_callers_memory() -> None:
    data = bytearray(_DATA)
    body = body_of(data, 0)
    next(iter(body.pieces()))
    body.close()
    data.append(0)  # refused while a view of it is alive
