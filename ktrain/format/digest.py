"""Digests: CRC-64/NVME, written as 16 lower-case hexadecimal digits.

Invariant: a digest finds accidents, not forgers; whoever may write a checkpoint may write any checkpoint.
"""

from __future__ import annotations

import array
import re
import sys
from collections.abc import Sequence

from ktrain import native
from ktrain.errors import CorruptionError

_HEX = re.compile(r"[0-9a-f]{16}")


def to_text(digest: int) -> str:
    """`0` gives `0000000000000000`."""
    return f"{digest:016x}"


def digest_text(data: bytes | bytearray | memoryview) -> str:
    """The digest of a whole object (a manifest, a record), as text."""
    return to_text(native.crc64(data))


def is_digest(text: object) -> bool:
    """Whether the text is 16 lower-case hexadecimal digits."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def join_digests(digests: Sequence[str]) -> str:
    """The digest over the ranks' digests, in order of rank; says whether two checkpoints have one plan."""
    return digest_text("".join(digests).encode("ascii"))


def chunks_to_text(chunks: Sequence[int]) -> str:
    """All chunk digests as one string without separators."""
    words = array.array("Q", chunks)
    _to_big_endian(words)
    return words.tobytes().hex()


def chunks_from_text(text: str) -> tuple[int, ...]:
    """The opposite of `chunks_to_text`.

    Raises:
        CorruptionError: the text is no row of digests.
    """
    if len(text) % 16 or re.fullmatch(r"[0-9a-f]*", text) is None:
        raise CorruptionError(
            f"chunk digests: expected 16 hexadecimal digits a chunk, found {len(text)} characters, "
            f"{text[:20]!r}; take another copy"
        )
    words = array.array("Q", bytes.fromhex(text))
    _to_big_endian(words)
    return tuple(words)


def _to_big_endian(words: array.array[int]) -> None:
    """From the processor's order of bytes, or back."""
    if sys.byteorder == "little":
        words.byteswap()
