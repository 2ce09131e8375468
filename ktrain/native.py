"""Digests and copies in C++, off the GIL. The only importer of `ktrain._native`.

All digests are CRC-64/NVME, which buckets compute as well. Every function may be called from any thread;
who writes to a buffer while it is read gets a digest of neither state.
"""

from __future__ import annotations

import array
import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ktrain import _native
from ktrain.errors import CapacityError, ConfigError, UnavailableError

if TYPE_CHECKING:
    from typing_extensions import Buffer
else:
    Buffer = Any

MappedFile: TypeAlias = _native.MappedFile
"""Memory that `map_file` made. Weak references to it tell when it is gone."""

_WORD_FORMATS = frozenset("qQlL")


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes in this process's memory and where they belong in a target.

    Whoever makes one keeps the memory at `address` (a tensor's `data_ptr()`) alive and unchanged while it is
    used.
    """

    address: int
    nbytes: int
    offset: int


Columns: TypeAlias = "tuple[Buffer, Buffer, Buffer]"
"""Segments as three arrays of 64-bit integers: addresses, sizes in bytes, offsets."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Where bytes of a payload belong in this process's memory: six arrays of 64-bit integers, one row for each box.

    Row i is `count` runs of `nbytes` bytes: the first one from byte `offset` of the payload to `address`, every next
    one `source_step` and `target_step` bytes further. Rows are sorted by offset; they may overlap in the payload, not
    in memory. Whoever makes them keeps the memory alive, and leaves it alone while they are used.
    """

    address: Buffer
    nbytes: Buffer
    offset: Buffer
    count: Buffer
    source_step: Buffer
    target_step: Buffer


NO_RUNS = Runs(*[array.array("Q")] * 6)


def crc64(data: Buffer, value: int = 0) -> int:
    """Returns the digest of contiguous bytes, continuing from `value` as `zlib.crc32` does.

    Raises:
        ConfigError: `data` is not contiguous, or `value` is no unsigned 64-bit integer.
    """
    try:
        return _native.crc64(data, value)
    except (ValueError, TypeError, BufferError) as error:
        raise _refused("digest", error) from error


def crc64_with(variant: str, data: Buffer, value: int = 0) -> int:
    """Returns what `crc64` does, by a named one of `variants()`."""
    try:
        return _native.crc64_with(variant, data, value)
    except (ValueError, TypeError, BufferError) as error:
        raise _refused("digest", error) from error


def crc64_combine(first: int, second: int, second_nbytes: int) -> int:
    """Returns the digest of two byte strings joined, without reading either.

    Raises:
        ConfigError: an argument is no unsigned 64-bit integer.
    """
    try:
        return _native.crc64_combine(first, second, second_nbytes)
    except TypeError as error:
        raise _refused("join digests", error) from error


def digest_chunks(data: Buffer, *, chunk_nbytes: int, num_threads: int = 1) -> list[int]:
    """Returns one digest per chunk; the last chunk may be short, no bytes have no chunk.

    Raises:
        ConfigError: `data` is not contiguous, or a number is below 1.
    """
    _require_positive(chunk_nbytes=chunk_nbytes, num_threads=num_threads)
    try:
        return _native.digest_chunks(data, chunk_nbytes, num_threads)
    except (ValueError, TypeError, BufferError) as error:
        raise _refused("digest chunks", error) from error


def copy_digest(target: Buffer, source: Buffer, *, chunk_nbytes: int, num_threads: int = 1) -> list[int]:
    """Copies all of `source` and returns its digests per chunk, reading memory once.

    Raises:
        ConfigError: the lengths differ, the target is read-only, or a number is below 1. Nothing was copied.
    """
    _require_positive(chunk_nbytes=chunk_nbytes, num_threads=num_threads)
    try:
        return _native.copy_digest(target, source, chunk_nbytes, num_threads)
    except (ValueError, TypeError, BufferError) as error:
        raise _refused("copy", error) from error


def gather_digest(
    target: Buffer, segments: Iterable[Segment] | Columns, *, chunk_nbytes: int, num_threads: int = 1
) -> list[int]:
    """Copies every segment to its offset and returns the digests of every chunk of the target.

    Bytes that no segment covers stay as they are and are digested too. Segments are disjoint and sorted by
    offset. Columns (see `Columns`) are for tables that are used many times.

    Raises:
        ConfigError: the target is read-only, or a segment leaves it or overlaps another. Nothing was copied.
    """
    _require_positive(chunk_nbytes=chunk_nbytes, num_threads=num_threads)
    try:
        return _native.gather_digest(target, _columns(segments), chunk_nbytes, num_threads)
    except (ValueError, TypeError, BufferError, OverflowError) as error:
        raise _refused("gather", error) from error


def prove_scatter(
    source: Buffer, runs: Runs, *, begin: int, chunk_nbytes: int, expected: Buffer, num_threads: int = 1
) -> list[int]:
    """Digests every chunk of `source` and copies what `runs` want of the chunks that match; memory is read once.

    Args:
        source: the payload's bytes from `begin` on, where a chunk begins.
        runs: what lies outside of the source is left to other calls.
        expected: a digest for each chunk of the source, as an array of 64-bit integers.

    Returns:
        The indices of the chunks of `source` that do not match. Nothing of them was written anywhere.

    Raises:
        ConfigError: the arguments do not fit one another, or a row is not sorted or overlaps itself. Nothing was
            copied.
    """
    _require_positive(chunk_nbytes=chunk_nbytes, num_threads=num_threads)
    columns = (runs.address, runs.nbytes, runs.offset, runs.count, runs.source_step, runs.target_step)
    try:
        _require_words(runs.__slots__, columns)
        return _native.prove_scatter(source, begin, chunk_nbytes, expected, columns, num_threads)
    except (ValueError, TypeError, BufferError, OverflowError) as error:
        raise _refused("scatter", error) from error


def gather(target: Buffer, segments: Iterable[Segment] | Columns, *, num_threads: int = 1) -> None:
    """Copies every segment to its offset, as `gather_digest` does, and digests nothing.

    Raises:
        ConfigError: the target is read-only, or a segment leaves it or overlaps another. Nothing was copied.
    """
    _require_positive(num_threads=num_threads)
    try:
        _native.gather(target, _columns(segments), num_threads)
    except (ValueError, TypeError, BufferError, OverflowError) as error:
        raise _refused("gather", error) from error


def digest_pieces(addresses: Buffer, sizes: Buffer, *, num_threads: int = 1) -> bytes:
    """Returns the digests of pieces of this process's memory, 8 bytes each in the machine's order.

    Both are arrays of 64-bit integers; whoever calls keeps the memory alive.

    Raises:
        ConfigError: the arrays differ in length, or are none.
    """
    _require_positive(num_threads=num_threads)
    try:
        return _native.digest_pieces(addresses, sizes, num_threads)
    except (ValueError, TypeError, BufferError) as error:
        raise _refused("digest pieces", error) from error


def describe_tensors(exchange: object, tensors: Sequence[object]) -> bytes | None:
    """Returns a record of what tensors are besides their values: equal records, equal tensors. See ADR 0024.

    It has each one's identity, class, address, device, dtype, shape and strides, and holds none of them. Call it with
    objects of the very framework that the table is of.

    Args:
        exchange: DLPack's table of C functions, as a framework's tensor class names it.

    Returns:
        None where the table is none that is known here, or where DLPack has no words for one of the tensors.
    """
    return _native.describe_tensors(exchange, tuple(tensors))


@dataclass(frozen=True, slots=True)
class Around:
    """How tensors of one class have others inside.

    Attributes:
        kind: the class; its subclasses count too.
        specification: name of the attribute whose identity counts. Whoever compares records keeps these objects alive.
        inside: name of the attribute with the tensor whose bytes count.
        plain: the very classes that this one may be of, and tensors that are not `kind`.
    """

    kind: type
    specification: str
    inside: str
    plain: tuple[type, ...]


def describe_parts(exchange: object, tensors: Sequence[object], around: Around) -> tuple[bytes, list[Any]] | None:
    """As `describe_tensors`, where tensors with others inside are described by these.

    Returns:
        The record, and the tensors with inner ones in the place of those around them. None as `describe_tensors`, and
        where one is of another class than may be.
    """
    return _native.describe_parts(
        exchange, tuple(tensors), around.kind, around.specification, around.inside, around.plain
    )


def isa() -> str:
    """Returns the name of the digest variant in use: "portable", "pclmul" or "vpclmul"."""
    return _native.isa()


def variants() -> list[str]:
    """Returns the names of the digest variants that this processor can run, slowest first."""
    return _native.variants()


def prefault(target: Buffer, *, num_threads: int = 1) -> None:
    """Makes every page of the target present and writable without changing a byte.

    Raises:
        CapacityError: the memory or its volume has no room for the pages.
        UnavailableError: the system refused for another reason.
        ConfigError: the target is read-only.
    """
    _require_positive(num_threads=num_threads)
    try:
        code = _native.prefault(target, num_threads)
    except (ValueError, TypeError, BufferError) as error:
        raise _refused("prefault", error) from error
    if code == 0:
        return
    nbytes = memoryview(target).nbytes
    message = f"cannot prefault {nbytes} bytes: {os.strerror(code)}"
    # EFAULT is what a full memory-backed volume answers: the write would have ended in SIGBUS.
    if code in (errno.ENOMEM, errno.EFAULT):
        raise CapacityError(f"{message}; free space in the volume or the memory limit, or keep fewer slots")
    raise UnavailableError(f"{message} ({errno.errorcode.get(code, code)})")


def map_file(fd: int, nbytes: int, *, writable: bool) -> MappedFile:
    """Returns the first `nbytes` of a file as shared memory, placed so that huge pages of the file can serve it.

    It is a buffer; the memory goes with the last view of it. `fd` may be closed.

    Raises:
        OSError: the system refused.
        ConfigError: `nbytes` is below 1.
    """
    _require_positive(nbytes=nbytes)
    found = _native.map_file(fd, nbytes, writable)
    if isinstance(found, int):
        raise OSError(found, os.strerror(found))
    return found


def back_huge(fd: int, begin: int, end: int, *, num_threads: int = 1) -> int:
    """Backs the bytes from `begin` to `end` of a file on tmpfs by huge pages, where the system has them (ADR 0021).

    The file is that long already; what it lacks of pages is made, but none behind `end`. No byte changes, and nothing
    raises: where the system refuses, ordinary pages stay.

    Returns:
        Bytes that huge pages back now.
    """
    _require_positive(num_threads=num_threads)
    return _native.back_huge(fd, begin, end, num_threads)


def set_parent_death_signal(signum: int) -> None:
    """Asks the system to send this process `signum` when the thread that started it dies; 0 takes that back.

    Only Linux can; elsewhere nothing happens. A parent that is gone already sends nothing: look afterwards.

    Raises:
        ConfigError: there is no such signal.
    """
    code = _native.set_parent_death_signal(signum)
    if code != 0:
        raise ConfigError(f"cannot set signal {signum} as parent death signal: {os.strerror(code)}")


def _columns(segments: Iterable[Segment] | Columns) -> tuple[Any, Any, Any]:
    """Returns three buffers of 64-bit integers, lent or made."""
    if isinstance(segments, tuple) and len(segments) == 3 and not isinstance(segments[0], Segment):
        _require_words(("addresses", "sizes", "offsets"), segments)
        return segments
    table: Sequence[Segment] = list(segments)
    return (
        array.array("Q", [segment.address for segment in table]),
        array.array("Q", [segment.nbytes for segment in table]),
        array.array("Q", [segment.offset for segment in table]),
    )


def _require_words(names: Iterable[str], columns: tuple[Any, ...]) -> None:
    for name, column in zip(names, columns, strict=True):
        view = memoryview(column)
        if view.format not in _WORD_FORMATS or view.itemsize != 8:
            raise TypeError(f"the column of {name} has items of format {view.format!r}, expected 64-bit integers")


def _require_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} is {number}, expected at least 1")


def _refused(action: str, error: Exception) -> ConfigError:
    # The binding's own message repeats the signature over several lines; the first says what matters.
    lines = str(error).splitlines() or [type(error).__name__]
    return ConfigError(f"cannot {action}: {lines[0]}")
