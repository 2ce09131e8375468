"""The body of a large request: a range of the caller's memory, copied, proven and sent piece by piece.

Invariant: a piece is digested in the private memory that it is sent from, after the last copy, and the last piece
leaves only while the caller still keeps its bytes unchanged. A body that ends early breaks its connection, so that the
store sees no whole request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ktrain.tier.parts import Copy

_PIECE_NBYTES = 1 << 20  # copied, digested and handed to the kernel while it is in the processor's cache


class ProvenBody:
    """[begin, end) of an object, as a file of which clients learn size and hash, and as pieces that are sent.

    For one request at a time: `rewind` before each.

    Args:
        copy: fills private memory with bytes of the object from a place on, proven.
        check: ends the body, by raising, where nobody waits any more; called before a piece is copied and after.
    """

    def __init__(
        self, view: memoryview, bounds: tuple[int, int], *, copy: Copy, unit_nbytes: int, check: Callable[[], None]
    ) -> None:
        self._begin, self._end = bounds
        self._source = view[self._begin : self._end]
        self._copy = copy
        self._check = check
        self._at = 0
        piece_nbytes = -(-_PIECE_NBYTES // unit_nbytes) * unit_nbytes
        self._memory = memoryview(bytearray(min(piece_nbytes, len(self))))
        self._failure: Exception | None = None

    def __len__(self) -> int:
        return self._end - self._begin

    def rewind(self) -> None:
        """Begins again: another request is to carry this body."""
        self._at, self._failure = 0, None

    def close(self) -> None:
        """Lets go of the caller's memory: whoever still knows this object, an error's frames say, does not hold it."""
        self._source.release()

    def take_failure(self) -> Exception | None:
        """Why the body ended early, which a client shows as a broken connection; None where it did not."""
        failure, self._failure = self._failure, None
        return failure

    # As a file: for a signature that covers the body

    def read(self, nbytes: int = -1) -> bytes:
        end = len(self) if nbytes < 0 else min(len(self), self._at + nbytes)
        data = bytes(self._source[self._at : end])
        self._at = end
        return data

    def tell(self) -> int:
        return self._at

    def seek(self, at: int, whence: int = 0) -> int:
        self._at = at + (0, self._at, len(self))[whence]
        return self._at

    # As pieces: what is sent

    def pieces(self) -> Pieces:
        """The body for a client that sends what it iterates over."""
        return Pieces(self)

    def piece_at(self, at: int) -> memoryview:
        """The piece that begins `at` bytes into the body, proven; valid until the next one. Empty at the end.

        Raises:
            ConnectionAbortedError: the body ends early; `take_failure` says why.
        """
        nbytes = min(self._memory.nbytes, len(self) - at)
        failure = self._try_fill(at, nbytes)
        if failure is not None:
            self._failure = failure
            raise ConnectionAbortedError("the body ended early")
        return self._memory[:nbytes]

    def _try_fill(self, at: int, nbytes: int) -> Exception | None:
        try:
            self._check()
            self._copy(self._memory[:nbytes], self._source[at : at + nbytes], self._begin + at)
            self._check()  # what was read after the caller had gone is not sent
        except Exception as error:  # noqa: BLE001 -- a client would wrap it; the caller gets it from `take_failure`
            return error.with_traceback(None)  # whose frames know the caller's memory
        return None


class Pieces:
    """One sending of a body. A client that is sent elsewhere begins it again by `seek(0)`."""

    def __init__(self, body: ProvenBody) -> None:
        self._body = body

    def seek(self, at: int) -> None:
        self._body.seek(at)

    def __iter__(self) -> Iterator[memoryview]:
        at = 0
        while at < len(self._body):
            piece = self._body.piece_at(at)
            at += piece.nbytes
            yield piece
